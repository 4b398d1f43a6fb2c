"""The document: the one in git, true of real answers, and complete."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from hypeman.instances.model.types import InstanceState
from hypeman.server.app import ApiApp
from hypeman.server.openapi import render_document
from hypeman.server.routes import OPERATIONS
from hypeman.server.streams import WEBSOCKETS
from tests.fakes.services import FakeWorld

DOCUMENT: dict[str, Any] = render_document(OPERATIONS, WEBSOCKETS)
GOLDEN = Path(__file__).parent / "golden" / "openapi.json"


def test_golden_copy() -> None:
    """Look at the difference, then write the file again: ``python -m tests.server.test_openapi``."""
    assert render() == GOLDEN.read_text()


def render() -> str:
    return json.dumps(render_document(OPERATIONS, WEBSOCKETS), indent=1, ensure_ascii=False) + "\n"


def test_every_schema_is_one_and_every_reference_leads_somewhere() -> None:
    document = DOCUMENT
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(schemas)
    names = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))


def examples_of(operation: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Schema and JSON of each example of an operation's body, successes, and WebSocket messages."""
    success = [answer for status, answer in operation["responses"].items() if status < "300"]
    described = [
        form
        for part in (operation.get("requestBody", {}), *success)
        for media_type, form in part.get("content", {}).items()
        if media_type in ("application/json", "multipart/form-data") and form.get("schema")
    ]
    socket = operation.get("x-websocket", {"receives": [], "sends": []})
    described += [message for message in (*socket["receives"], *socket["sends"]) if "schema" in message]
    described += [
        {"schema": parameter["schema"], "example": parameter["example"]}
        for parameter in operation["parameters"]
        if "example" in parameter
    ]
    return [(form["schema"], json.dumps(form["example"])) for form in described]


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_every_example_fits_its_schema(path: str) -> None:
    """A missing example is a KeyError here."""
    for operation in DOCUMENT["paths"][path].values():
        for schema, example in examples_of(operation):
            if schema:  # of lists that are always empty, nothing is known
                Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(json.loads(example))
        for parameter in operation["parameters"]:
            assert not parameter["required"] or "example" in parameter, parameter["name"]


def test_websockets_are_described_with_the_types_that_the_server_decodes() -> None:
    described = {
        path: methods["get"]["x-websocket"]
        for path, methods in DOCUMENT["paths"].items()
        if "get" in methods and "x-websocket" in methods["get"]
    }
    assert {path: message["receives"][0]["schema"] for path, message in described.items()} == {
        "/instances/{id}/exec": {"$ref": "#/components/schemas/ExecRequest"},
        "/instances/{id}/cp": {"$ref": "#/components/schemas/CpRequest"},
    }


@pytest.mark.parametrize("path", ["/instances/web/exec", "/instances/web/cp"])
async def test_a_plain_request_to_a_websocket_gets_426(ask: Any, path: str) -> None:
    response = await ask("GET", path)
    assert (response.status_code, response.headers["Upgrade"]) == (426, "websocket")


CONTRACT = """
GET /health|GET /capabilities|GET /resources|POST /resources/memory/reclaim
GET /images|POST /images|GET /images/{name}|DELETE /images/{name}
GET /instances|POST /instances|GET /instances/{id}|PATCH /instances/{id}|DELETE /instances/{id}
POST /instances/{id}/standby|POST /instances/{id}/restore|POST /instances/{id}/fork|POST /instances/{id}/start
POST /instances/{id}/stop|GET /instances/{id}/logs|GET /instances/{id}/stat|GET /instances/{id}/stats
GET /instances/{id}/wait|GET /instances/{id}/auto-standby/status|POST /instances/{id}/auto-standby/hold
POST /instances/{id}/volumes/{volumeId}|DELETE /instances/{id}/volumes/{volumeId}
POST /instances/{id}/snapshots|POST /instances/{id}/snapshots/{snapshotId}/restore
GET /instances/{id}/snapshot-schedule|PUT /instances/{id}/snapshot-schedule
DELETE /instances/{id}/snapshot-schedule
GET /snapshots|GET /snapshots/{snapshotId}|DELETE /snapshots/{snapshotId}|POST /snapshots/{snapshotId}/fork
GET /volumes|POST /volumes|POST /volumes/from-archive|GET /volumes/{id}|DELETE /volumes/{id}
GET /devices|POST /devices|GET /devices/available|GET /devices/{id}|DELETE /devices/{id}
GET /ingresses|POST /ingresses|GET /ingresses/{id}|DELETE /ingresses/{id}
GET /builders|POST /builders|GET /builders/{id}|DELETE /builders/{id}|POST /builders/{id}/prune
GET /builds|POST /builds|GET /builds/{id}|DELETE /builds/{id}|GET /builds/{id}/events
GET /pushes|POST /pushes|GET /pushes/{id}
"""


def test_all_62_operations_of_the_contract_are_there() -> None:
    wanted = set(CONTRACT.replace("\n", "|").strip("|").split("|"))
    assert len(wanted) == 62
    assert wanted <= {f"{operation.method} {operation.path}" for operation in OPERATIONS}


RULE = {"match": {"hostname": "a.b"}, "target": {"instance": "web", "port": 80}}
ANSWERS = [
    ("GET", "/health", None),
    ("GET", "/capabilities", None),
    ("GET", "/resources", None),
    ("POST", "/resources/memory/reclaim", {"reclaim_bytes": 1 << 30, "hold_for": "10m"}),
    ("POST", "/resources/memory/reclaim", {"reclaim_bytes": "much"}),
    ("GET", "/images", None),
    ("POST", "/images", {"name": "nginx"}),
    ("GET", "/images/alpine", None),
    ("GET", "/images/missing", None),
    ("GET", "/instances", None),
    ("GET", "/instances?state=nonsense", None),
    ("POST", "/instances", {"name": "new", "image": "a", "env": {"A": "b"}, "tags": {"c": "d"}}),
    ("POST", "/instances", {"name": "web", "image": "a"}),
    ("POST", "/instances", {"name": "web"}),
    ("GET", "/instances/web", None),
    ("GET", "/instances/missing", None),
    ("PATCH", "/instances/web", {"ttl": "1h"}),
    ("POST", "/instances/web/stop", None),
    ("POST", "/instances/web/restore", None),
    ("GET", "/instances/web/wait?state=Running", None),
    ("GET", "/instances/web/stat?path=/etc", None),
    ("GET", "/instances/web/stats", None),
    ("GET", "/instances/web/egress", None),
    ("GET", "/instances/plain/egress", None),
    ("POST", "/instances/web/volumes/v", {"mount_path": "/data"}),
    ("POST", "/instances/web/snapshots", {"kind": "Stopped"}),
    ("GET", "/snapshots", None),
    ("GET", "/volumes", None),
    ("POST", "/volumes", {"name": "data", "size_gb": 1, "tags": {"a": "b"}}),
    ("GET", "/devices", None),
    ("GET", "/ingresses", None),
    (
        "POST",
        "/ingresses",
        {"name": "site", "rules": [{"match": {"hostname": "a.b"}, "target": {"instance": "web", "port": 80}}]},
    ),
    ("GET", "/builds", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ANSWERS, ids=lambda value: str(value))
async def test_real_answers_fit_the_document(ask: Any, world: FakeWorld, method: str, path: str, body: Any) -> None:
    world.egress.allow(world.instances.add("web", InstanceState.RUNNING))
    world.instances.add("plain")
    await world.images.create_named("alpine")
    response = await ask(method, path, **({"json": body} if body is not None else {}))
    document = DOCUMENT
    operation = next(
        methods[method.lower()]
        for template, methods in document["paths"].items()
        if method.lower() in methods and re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path.partition("?")[0])
    )
    assert str(response.status_code) in operation["responses"], "a status that the document does not know"
    described = operation["responses"][str(response.status_code)]
    [(media_type, content)] = described["content"].items()
    assert response.content_type == media_type
    schema = {**content["schema"], "components": document["components"]}
    Draft202012Validator(schema).validate(await response.get_json())


async def test_documents_are_served(app: ApiApp) -> None:
    client = app.test_client()
    as_json = await client.get("/spec.json")
    as_yaml = await client.get("/spec.yaml")
    assert as_yaml.content_type == "application/vnd.oai.openapi"
    assert yaml.safe_load(await as_yaml.get_data()) == await as_json.get_json() == json.loads(render())


async def test_the_page_asks_no_other_host(app: ApiApp) -> None:
    response = await app.test_client().get("/swagger")
    page = await response.get_data(as_text=True)
    assert response.content_type == "text/html; charset=utf-8"
    assert 'fetch("spec.json")' in page
    assert not re.search(r"https?://|//cdn|innerHTML", page)
    policy = response.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    for part in re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, re.DOTALL):
        assert base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() in policy


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(render())
