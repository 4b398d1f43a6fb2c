"""Every route and every way to fail, without a port."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from hypeman.devices.types import AvailableDevice
from hypeman.errors import (
    Conflict,
    HypemanError,
    InsufficientResources,
    InternalError,
    InvalidRequest,
    NotSupported,
    RateLimited,
)
from hypeman.instances.model.types import InstanceState
from hypeman.server.routes import OPERATIONS
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld

Client = Callable[..., Awaitable[Any]]
SECRET = "a secret that is long enough for HS256"


async def failure(response: Any, status: int, code: str) -> str:
    """The message of a failure, after its form has been checked."""
    body = await response.get_json()
    assert (response.status_code, body["code"]) == (status, code), body
    assert response.content_type == "application/json"
    assert set(body) <= {"code", "message", "details", "inner_error"}
    return str(body["message"])


# ── Who may ──────────────────────────────────────────────────────────────────────────────────────


async def test_health_is_public(client: Client) -> None:
    response = await client("GET", "/health")
    assert (response.status_code, await response.get_json()) == (200, {"status": "ok"})


PUBLIC = {"/health", "/spec.json", "/spec.yaml", "/swagger"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")
async def test_every_other_route_requires_a_token_and_its_scope(client: Client, operation: Any) -> None:
    assert (not operation.scopes) == (operation.path in PUBLIC)
    if not operation.scopes:
        return
    path = operation.path.replace("{", "").replace("}", "")
    response = await client(operation.method, path, json=None)
    await failure(response, 401, "Unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    others = {scope for operation in OPERATIONS for scope in operation.scopes} - {*operation.scopes}
    token = mint(SECRET, subject="narrow", scopes=[str(scope) for scope in others])
    response = await client(operation.method, path, json=None, headers={"Authorization": f"Bearer {token}"})
    message = await failure(response, 403, "Forbidden")
    assert all(scope in message for scope in operation.scopes)


# ── The shape of failures ────────────────────────────────────────────────────────────────────────


async def test_unknown_routes_and_methods(ask: Any) -> None:
    assert "/nowhere" in await failure(await ask("GET", "/nowhere"), 404, "Not Found")
    await failure(await ask("GET", "/instances/"), 404, "Not Found")
    response = await ask("PUT", "/instances")
    await failure(response, 405, "Method Not Allowed")
    assert response.headers["Allow"] == "GET, HEAD, POST"
    await failure(await ask("OPTIONS", "/instances"), 405, "Method Not Allowed")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/instances/x", "DELETE, GET, HEAD, PATCH"),
        ("PUT", "/devices/available", "GET, HEAD"),
        ("DELETE", "/devices/available", "GET, HEAD"),
        ("GET", "/volumes/from-archive", "POST"),
        ("DELETE", "/images/import", "POST"),
        ("PUT", "/devices/x", "DELETE, GET, HEAD"),
        ("PATCH", "/events", "GET, HEAD"),
        ("OPTIONS", "/volumes/from-archive", "POST"),
        ("PUT", "/images/a/tag", "POST"),
        ("PUT", "/images/a/progress", "GET, HEAD"),
        ("POST", "/instances/x/exec", "GET, HEAD"),
        ("DELETE", "/instances/x/cp", "GET, HEAD"),
    ],
)
async def test_allow_lists_the_methods_of_that_very_path(client: Client, method: str, path: str, allowed: str) -> None:
    response = await client(method, path)
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"x":' + b"[" * 100_000, "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"{}", "name"),
        (b'{"name":"a","image":1}', "$.image"),
        (b'{"name":"a","image":"b","vcpus":"2"}', "$.vcpus"),
        (b'{"name":"a","image":"b","vcpus":0}', "$.vcpus"),
        (b'{"name":"a","image":"b","hypervisor":"xen"}', "$.hypervisor"),
        (b'{"name":"a","image":"b","env":{"A":1}}', "$.env"),
        (b'{"name":"a","image":"b","expires_at":"soon"}', "$.expires_at"),
        (b'{"name":"a","image":"b","network":{"enabled":"yes"}}', "$.network.enabled"),
    ],
)
async def test_bodies_that_do_not_fit(ask: Any, body: bytes, place: str) -> None:
    assert place in await failure(await ask("POST", "/instances", data=body), 400, "Bad Request")


async def test_unknown_keys_are_ignored(ask: Any) -> None:
    response = await ask("POST", "/instances", json={"name": "a", "image": "b", "colour": "red", "network": {"x": 1}})
    assert response.status_code == 201


async def test_body_too_large(ask: Any, world: FakeWorld) -> None:
    big = json.dumps({"name": "a", "image": "b", "env": {"A": "x" * (3 * 2**20)}}).encode()
    await failure(await ask("POST", "/instances", data=big), 413, "Request Entity Too Large")
    await failure(
        await ask("POST", "/instances", data=big, headers={"Content-Length": ""}), 413, "Request Entity Too Large"
    )
    assert world.instances.asked == []


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("state=Flying", "$.state"),
        ("tags=x", "$.tags"),
        ("state=%ff", "malformed"),
        ("&".join(f"a{n}=1" for n in range(500)), "too long"),
    ],
)
async def test_queries_that_do_not_fit(ask: Any, query: str, place: str) -> None:
    assert place in await failure(await ask("GET", f"/instances?{query}"), 400, "Bad Request")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("no", code="invalid_size"), 400, "invalid_size"),
        (Conflict("no"), 409, "conflict"),
        (InsufficientResources("no"), 409, "insufficient_resources"),
        (RateLimited("no", retry_after=7.2), 429, "rate_limited"),
        (NotSupported("no"), 501, "not_supported"),
        (HypemanError("no"), 500, "internal_error"),
        (ExceptionGroup("nursery", [ExceptionGroup("inner", [NotSupported("no")])]), 501, "not_supported"),
    ],
)
async def test_refusals_of_services(ask: Any, world: FakeWorld, error: Exception, status: int, code: str) -> None:
    world.instances.fails = error
    response = await ask("GET", "/instances/web")
    assert await failure(response, status, code) == "no"
    assert response.headers.get("Retry-After") == ("7" if status == 429 else None)


@pytest.mark.parametrize(
    "error",
    [KeyError("hunter2"), ExceptionGroup("nursery", [NotSupported("no"), KeyError("hunter2")]), trio.TooSlowError()],
)
async def test_internal_errors_are_logged_and_not_shown(
    ask: Any, world: FakeWorld, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    world.instances.fails = error
    assert "hunter2" not in await failure(await ask("GET", "/instances/web"), 500, "internal_error")
    assert any(record.exc_info and record.exc_info[1] is error for record in caplog.records)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("/var/lib/hypeman/instances/abc/overlay.raw: No space left", "overlay.raw: No space left"),
        ("nft refused: in '/run/hypeman/x y'", "nft refused: in 'x y'"),
        ("writing '1' to /sys/bus/pci/drivers/e1000e/unbind: busy", "writing '1' to unbind: busy"),
        ("image docker.io/library/nginx:1 cannot be used", "image docker.io/library/nginx:1 cannot be used"),
        ("see https://example.com/a/b", "see https://example.com/a/b"),
        ("the VMM answered 1/2 requests", "the VMM answered 1/2 requests"),
    ],
)
async def test_errors_name_no_path_of_the_host(
    ask: Any, world: FakeWorld, caplog: pytest.LogCaptureFixture, message: str, shown: str
) -> None:
    world.instances.fails = InternalError(message)
    response = await ask("GET", "/instances/web")
    assert (response.status_code, (await response.get_json())["message"]) == (500, shown)
    assert message in caplog.text, "the log has it whole"


async def test_time_limit(
    autojump_clock: trio.testing.MockClock, client: Client, world: FakeWorld, headers: dict[str, str]
) -> None:
    world.instances.hangs = True
    response = await client("GET", "/instances/web", headers=headers)
    await failure(response, 504, "Gateway Timeout")
    assert response.headers["X-Should-Retry"] == "false"
    assert trio.current_time() >= 60


# ── What is answered ─────────────────────────────────────────────────────────────────────────────


async def test_life_of_an_instance(ask: Any) -> None:
    response = await ask("POST", "/instances", json={"name": "web", "image": "nginx", "tags": {"a": "b"}})
    made = await response.get_json()
    assert response.status_code == 201
    assert made["state"] == "Running"
    assert made["expires_at"] is None
    assert "gpu" not in made
    assert (await (await ask("GET", f"/instances/{made['id']}")).get_json())["name"] == "web"
    assert (await (await ask("GET", f"/instances/{made['id'][:6]}")).get_json())["id"] == made["id"]
    for verb, state in [("stop", "Stopped"), ("start", "Running"), ("standby", "Standby"), ("restore", "Running")]:
        response = await ask("POST", f"/instances/web/{verb}")
        assert (response.status_code, (await response.get_json())["state"]) == (200, state)
    await failure(await ask("POST", "/instances/web/start", json={}), 409, "invalid_state")
    response = await ask("POST", "/instances/web/fork", json={"name": "copy", "from_running": True})
    assert response.status_code == 201
    waited = await (await ask("GET", "/instances/web/wait?state=Running&timeout=10m")).get_json()
    assert waited == {"state": "Running", "timed_out": False, "state_error": None}
    response = await ask("DELETE", "/instances/web")
    assert (response.status_code, await response.get_data()) == (204, b"")
    await failure(await ask("GET", "/instances/web"), 404, "not_found")


async def test_requests_reach_the_service(ask: Any, world: FakeWorld) -> None:
    world.instances.add("web", InstanceState.STOPPED)
    await ask("POST", "/instances/web/start", json={"entrypoint": ["/bin/sh"], "cmd": []})
    await ask("PATCH", "/instances/web", json={"env": {"KEY": "new"}})
    await ask("GET", "/instances/web/wait?state=Stopped&timeout=1m30s")
    await ask("GET", "/instances/web/wait?state=Stopped&timeout=1h")
    start, update, wait, long_wait = (request for _, request in world.instances.asked)
    assert (start.entrypoint, start.cmd) == (("/bin/sh",), ())
    assert update.env == {"KEY": "new"}
    assert wait == (InstanceState.STOPPED, 90)
    assert long_wait == (InstanceState.STOPPED, 300)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("state=Unknown", "invalid_state"),
        ("state=Running&timeout=soon", "invalid_timeout"),
        ("state=Running&timeout=0", "invalid_timeout"),
        ("state=Flying", "Bad Request"),
        ("timeout=1s", "Bad Request"),
    ],
)
async def test_waits_that_make_no_sense(ask: Any, world: FakeWorld, query: str, code: str) -> None:
    world.instances.add("web")
    await failure(await ask("GET", f"/instances/web/wait?{query}"), 400, code)


async def test_lists_are_filtered(ask: Any, world: FakeWorld) -> None:
    world.instances.add("a", tags={"team": "x", "env": "prod"})
    world.instances.add("b", InstanceState.STOPPED, tags={"team": "x"})

    async def names(query: str) -> list[str]:
        return [one["name"] for one in await (await ask("GET", f"/instances?{query}")).get_json()]

    assert await names("") == ["a", "b"]
    assert await names("state=Stopped") == ["b"]
    assert await names("tags[team]=x") == ["a", "b"]
    assert await names("tags%5Bteam%5D=x&tags%5Benv%5D=prod") == ["a"]
    assert await names("tags[team]=y") == []


async def test_an_encoded_list_is_sent_as_it_is(ask: Any, world: FakeWorld) -> None:
    world.instances.encoded = b'[{"name":"already encoded"}]'
    assert await (await ask("GET", "/instances")).get_data() == world.instances.encoded


@pytest.mark.parametrize(
    "path",
    [
        "/images/docker.io%2Flibrary%2Falpine:latest",
        "/images/docker.io%2flibrary%2falpine%3Alatest",
        "/images/docker.io/library/alpine:latest",
        "/images/alpine",
    ],
)
async def test_image_references_in_the_path(ask: Any, path: str) -> None:
    assert (await ask("POST", "/images", json={"name": "alpine"})).status_code == 202
    image = await (await ask("GET", path)).get_json()
    assert image["name"] == "docker.io/library/alpine:latest"
    assert (await (await ask("GET", path + "/progress")).get_json())["layers"][0]["size"] == 1000
    assert (await ask("DELETE", path)).status_code == 204
    await failure(await ask("GET", path), 404, "not_found")


async def test_a_path_with_nul(ask: Any, world: FakeWorld) -> None:
    await failure(await ask("GET", "/instances/a%00"), 400, "Bad Request")


async def test_archives_are_streamed(ask: Any, world: FakeWorld) -> None:
    data = bytes(range(256)) * 20_000
    response = await ask("POST", "/images/import?name=mine&tags[a]=b", data=data)
    assert (response.status_code, (await response.get_json())["tags"]) == (202, {"a": "b"})
    assert world.images.imported == data
    response = await ask("POST", "/volumes/from-archive?name=v&size_gb=1&id=v1", data=data)
    assert (response.status_code, (await response.get_json())["id"]) == (201, "v1")
    assert world.volumes.archives["v1"] == data
    await failure(await ask("POST", "/volumes/from-archive?name=v&size_gb=0", data=data), 400, "Bad Request")
    await failure(await ask("POST", "/volumes/from-archive?size_gb=1", data=data), 400, "Bad Request")


async def test_volumes_devices_snapshots(ask: Any, world: FakeWorld) -> None:
    response = await ask("POST", "/volumes", json={"name": "data", "size_gb": 2})
    volume = await response.get_json()
    assert (response.status_code, volume["size_gb"]) == (201, 2)
    world.instances.add("web")
    response = await ask("POST", f"/instances/web/volumes/{volume['id']}", json={"mount_path": "/data"})
    assert (await response.get_json())["volumes"] == [
        {"volume_id": volume["id"], "mount_path": "/data", "readonly": False, "overlay": False}
    ]
    response = await ask("DELETE", f"/instances/web/volumes/{volume['id']}")
    assert (response.status_code, (await response.get_json())["volumes"]) == (200, [])
    assert (await ask("DELETE", "/volumes/data")).status_code == 204
    world.devices.free.append(
        AvailableDevice(pci_address="0000:01:00.0", vendor_id="10de", device_id="2204", iommu_group=1)
    )
    world.devices.free.append(
        AvailableDevice(
            pci_address="0000:00:01.0", vendor_id="8086", device_id="1234", iommu_group=2, reason="is a bridge"
        )
    )
    (free,) = await (await ask("GET", "/devices/available")).get_json()
    assert free["current_driver"] is None
    assert "reason" not in free
    everything = await (await ask("GET", "/devices/available?all=true")).get_json()
    assert [device.get("reason") for device in everything] == [None, "is a bridge"]
    await failure(await ask("POST", "/devices", json={"pci_address": "0000:01:00.0"}), 404, "device_not_found")
    response = await ask("POST", "/instances/web/snapshots", json={"kind": "Standby", "name": "before"})
    assert (response.status_code, (await response.get_json())["name"]) == (201, "before")
    assert (await ask("POST", "/instances/web/snapshots/abc/restore")).status_code == 200
    await failure(await ask("GET", "/snapshots/abc"), 404, "not_found")


async def test_a_refusal_that_is_final_says_so(ask: Any) -> None:
    """SDKs retry 409 by themselves."""
    body = {"name": "web", "image": "a"}
    assert (await ask("POST", "/instances", json=body)).status_code == 201
    taken = await ask("POST", "/instances", json=body)
    assert (taken.status_code, taken.headers["X-Should-Retry"]) == (409, "false")
    assert "X-Should-Retry" not in (await ask("GET", "/instances/nobody")).headers


async def test_an_image_gets_another_name(ask: Any) -> None:
    await ask("POST", "/images", json={"name": "alpine"})
    response = await ask("POST", "/images/docker.io%2Flibrary%2Falpine%3Alatest/tag", json={"target": "mine:1"})
    assert response.status_code == 200
    assert (await response.get_json())["name"] == "docker.io/library/mine:1"
    await failure(await ask("POST", "/images/nothing/tag", json={"target": "mine:1"}), 404, "not_found")


async def test_a_delete_without_a_shutdown(ask: Any, world: FakeWorld) -> None:
    for name, query, killed in (
        ("a", "", 0),
        ("b", "?graceful_shutdown=true", 0),
        ("c", "?graceful_shutdown=false", 1),
    ):
        await ask("POST", "/instances", json={"name": name, "image": "a"})
        assert (await ask("DELETE", f"/instances/{name}{query}")).status_code == 204
        assert world.instances.killed == killed, query
    await ask("POST", "/instances", json={"name": "d", "image": "a"})
    await failure(await ask("DELETE", "/instances/d?graceful_shutdown=maybe"), 400, "Bad Request")


async def test_request_ids(ask: Any) -> None:
    assert (await ask("GET", "/health", headers={"X-Request-Id": "abc-1"})).headers["X-Request-Id"] == "abc-1"
    assert len((await ask("GET", "/health", headers={"X-Request-Id": "x" * 200})).headers["X-Request-Id"]) == 16


async def test_one_line_a_request_and_no_secret(
    ask: Any, world: FakeWorld, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await ask("POST", "/instances", json={"name": "web", "image": "a", "env": {"KEY": "hunter2"}})
    await ask("GET", "/instances/web")
    await ask("GET", "/nowhere")
    lines = [record for record in caplog.records if record.name == "hypeman.http"]
    assert [(line.method, line.route, line.status) for line in lines] == [  # type: ignore[attr-defined]
        ("POST", "/instances", 201),
        ("GET", "/instances/{id}", 200),
        ("GET", "unknown", 404),
    ]
    assert lines[1].path_id == "web"  # type: ignore[attr-defined]
    logged = repr([vars(record) for record in caplog.records])
    assert "hunter2" not in logged
    assert headers["Authorization"][7:] not in logged


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (Conflict("a name is taken"), True),
        (Conflict("it is being read", retryable=True), False),
        (InsufficientResources("full"), False),
        (NotSupported("never"), True),
        (RateLimited("later"), False),
        (InternalError("a disk"), False),
    ],
)
async def test_answers_say_what_not_to_retry(
    ask: Any, world: FakeWorld, monkeypatch: pytest.MonkeyPatch, error: HypemanError, final: bool
) -> None:
    async def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(world.instances, "stop", refuse)
    world.instances.add("web")
    response = await ask("POST", "/instances/web/stop")
    assert (response.status_code, response.headers.get("X-Should-Retry")) == (error.status, "false" if final else None)
