"""Every declared operation, asked once through the whole application on fakes: a new verb cannot be green and broken.

Bodies and queries are made from the declared types, so an operation that is added is asked without an entry here. If
the made request does not succeed, the operation needs a row in ``STATES`` or ``FIELDS``: that is a decision,
and the failure says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote, urlencode

import msgspec
import pytest
import trio
from jsonschema import Draft202012Validator

from hypeman.builds.types import CreateBuilderRequest
from hypeman.ingress.types import CreateIngressRequest, IngressMatch, IngressRule, IngressTarget
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    SetSnapshotScheduleRequest,
    SnapshotKind,
    SnapshotRetention,
)
from hypeman.instances.model.types import InstanceState
from hypeman.registry.push_types import CreatePushRequest
from hypeman.server.api import Operation, Page, UploadStream
from hypeman.server.openapi import render_document
from hypeman.server.routes import OPERATIONS
from hypeman.server.streams import WEBSOCKETS
from hypeman.telemetry import metrics
from hypeman.volumes.types import CreateVolumeRequest
from tests.fakes.services import FakeWorld

DOCUMENT: dict[str, Any] = render_document(OPERATIONS, WEBSOCKETS)
STATES = {"start_instance": InstanceState.STOPPED, "restore_instance": InstanceState.STANDBY}
"""In which state the instance must be; Running for all others."""

QUERIES = {"get_events": {"follow": "false"}}
"""Query fields besides the required ones, where the answer has no end without them."""

FIELDS: dict[str, Any] = {
    "instance": "web",
    "image": "alpine", "interval": "1h", "mount_path": "/data", "pci_address": "0000:03:00.0", "path": "/etc",
    "reclaim_bytes": 1 << 30, "url": "https://api.example.com/",
}  # fmt: skip
"""Required fields for which no value can be made from the type alone."""


def example(kind: Any) -> Any:
    """The smallest value of a type: a Struct's required fields only, the first member of an enum."""
    match kind:
        case msgspec.inspect.StructType():
            return {
                field.encode_name: FIELDS.get(field.encode_name, example(field.type))
                for field in kind.fields
                if field.required
            }
        case msgspec.inspect.EnumType():
            return next(iter(kind.cls)).value
        case msgspec.inspect.VarTupleType():
            return [example(kind.item_type)]
        case msgspec.inspect.LiteralType():
            return kind.values[0]
        case msgspec.inspect.Metadata():
            return example(kind.type)
        case msgspec.inspect.UnionType():
            return example(kind.types[0])
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            return 1
        case msgspec.inspect.StrType():
            return "new"
        case msgspec.inspect.BoolType():
            return True
    raise AssertionError(f"no example for {kind}: add the field to FIELDS")


async def _fields() -> AsyncIterator[tuple[str, bytes]]:
    yield "source", b"a context"


async def fill(world: FakeWorld, operation: Operation) -> dict[str, str]:
    """One object of each kind; what to put into the path for each parameter."""
    instance = world.instances.add("web", STATES.get(operation.name, InstanceState.RUNNING))
    world.egress.allow(instance)
    approval = world.egress.hold(instance)
    for source in ("app", "vmm", "hypeman"):
        (world.log_directory / f"web-{source}.log").write_text("one line\n")
    await world.images.create_named("alpine")
    schedule = SetSnapshotScheduleRequest(interval="1h", retention=SnapshotRetention(max_count=3))
    await world.policies.set_schedule("web", schedule)
    snapshot = await world.snapshots.create("web", CreateSnapshotRequest(kind=SnapshotKind.STOPPED))
    await world.volumes.create(CreateVolumeRequest(name="data", size_gb=1, id="data"))
    device = world.devices.add("gpu")
    route = IngressRule(match=IngressMatch(hostname="web.example.com"), target=IngressTarget(instance="web", port=80))
    await world.ingresses.create(CreateIngressRequest(name="site", rules=(route,)))
    push = await world.pushes.create(CreatePushRequest(image="alpine", target="quay.io/a:v1"))
    builder = await world.builds.create_builder(CreateBuilderRequest())
    build = await world.builds.create(_fields())
    owner = operation.path.split("/")[1]
    ids = {
        "instances": "web", "volumes": "data", "devices": device.id, "pushes": push.id, "ingresses": "site",
        "builders": builder.id, "builds": build.id,
    }  # fmt: skip
    return {
        "id": ids.get(owner, "x"), "name": "alpine", "snapshotId": snapshot.id, "volumeId": "data", "rest": "a/b",
        "approval": approval.id,
    }  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")
async def test_it_answers_as_documented(
    ask: Any, world: FakeWorld, operation: Operation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hypeman.http")
    values = await fill(world, operation)
    path = operation.path.format_map(values)
    if operation.query is not None:
        query = example(msgspec.inspect.type_info(operation.query)) | QUERIES.get(operation.name, {})
        path += "?" + urlencode(query) if query else ""
    options: dict[str, Any] = {}
    if operation.form is not None:
        options["headers"] = {"Content-Type": "multipart/form-data; boundary=b"}
        options["data"] = b'--b\r\nContent-Disposition: form-data; name="source"\r\n\r\ntar\r\n--b--\r\n'
    elif operation.body is UploadStream:
        options["data"] = b"an archive"
    elif operation.body is not None:
        options["json"] = example(msgspec.inspect.type_info(operation.body))
    before = observations(operation)
    with trio.fail_after(30):
        response = await ask(operation.method, path, **options)
        data = await response.get_data(as_text=False)

    wanted = operation.status
    assert response.status_code == wanted, data
    described = DOCUMENT["paths"][operation.path][operation.method.lower()]["responses"]
    assert str(wanted) in described, f"the document does not know the status {wanted}"
    content = described[str(wanted)].get("content")
    if content is None:
        assert data == b"", "an operation without content answered with some"
    else:
        media_type = response.content_type.partition(";")[0]
        assert media_type in content
        form = content[media_type]
        if media_type == "application/json" and operation.answer is not Page:
            Draft202012Validator({**form["schema"], "components": DOCUMENT["components"]}).validate(json.loads(data))
            if operation.answer is not None:
                msgspec.json.decode(data, type=operation.or_list or operation.answer)
    line = await logged(caplog)
    reported = {key: getattr(line, key, None) for key in ("method", "route", "status", "subject")}
    subject = "tester" if operation.scopes else None
    assert reported == {"method": operation.method, "route": operation.path, "status": wanted, "subject": subject}
    assert getattr(line, "address", "127.0.0.1") == "127.0.0.1", "of a test without sockets there is none"
    objects = {name: unquote(getattr(line, f"path_{name}")) for name in operation.path_parameters}
    assert objects == {name: values[name] for name in operation.path_parameters}
    body = options.get("json", {})
    wanted_name = body.get("name") or body.get("pci_address") or body.get("target")
    assert wanted_name is None or getattr(line, "names", None) == wanted_name
    after = observations(operation)
    assert {name: after[name] - before[name] for name in after} == dict.fromkeys(after, 1), "a metric is missing"


async def logged(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """The one line of the request; it may be written after the response."""
    with trio.fail_after(10):
        while not (lines := [record for record in caplog.records if record.message == "request"]):
            await trio.sleep(0.01)
    [line] = lines
    return line


@pytest.mark.parametrize("path", [route.path for route in WEBSOCKETS] + ["/v2/team/app/manifests/v1"])
@pytest.mark.parametrize("token", [True, False])
async def test_what_is_no_operation_is_logged_too(
    served: Any, headers: dict[str, str], caplog: pytest.LogCaptureFixture, path: str, token: bool
) -> None:
    """WebSockets and the registry: who called, from where, about what, and what came of it."""
    caplog.set_level(logging.INFO, "hypeman.http")
    given = f"Authorization: {headers['Authorization']}\r\n" if token else ""
    if not path.startswith("/v2"):
        given += "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        given += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    async with await trio.open_tcp_stream("127.0.0.1", served.port) as stream:
        await stream.send_all(f"GET {path.format(id='nobody')} HTTP/1.1\r\nHost: x\r\n{given}\r\n".encode())
        with trio.fail_after(10):
            status = int((await stream.receive_some()).split()[1])
    line = await logged(caplog)
    assert status == (401 if not token else 502 if path.startswith("/v2") else 404)
    reported = {key: getattr(line, key, None) for key in ("status", "subject", "address")}
    assert reported == {"status": status, "subject": "tester" if token else None, "address": "127.0.0.1"}
    assert "nobody" in vars(line).get("path_id", "") or vars(line).get("path_rest") == "team/app/manifests/v1"


def observations(operation: Operation) -> dict[str, float]:
    """How often the metrics of this operation were observed so far."""
    labels = {"method": operation.method, "path": operation.path, "status": str(operation.status)}
    found = {"requests": metrics.REGISTRY.get_sample_value("hypeman_http_requests_total", labels) or 0}
    if operation.measure is not None:
        name = f"hypeman_instances_{operation.measure}_duration_seconds_count"
        found["duration"] = metrics.REGISTRY.get_sample_value(name, {"status": "success"}) or 0
    return found


def test_every_measured_verb_is_declared_by_exactly_one_operation() -> None:
    measured = [operation.measure for operation in OPERATIONS if operation.measure is not None]
    assert sorted(measured) == sorted(metrics.instance_seconds)
