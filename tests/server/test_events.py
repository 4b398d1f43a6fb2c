"""GET /events: as a list and as a stream, with cursors, filters and scopes; who called, in log and events."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import pytest
import trio

from hypeman.actor import current_actor
from hypeman.events.types import CursorGone, Kind
from hypeman.server.app import ApiApp
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld

SECRET = "a secret that is long enough for HS256"


@pytest.fixture
def logged(world: FakeWorld) -> FakeWorld:
    world.events.add(Kind.INSTANCE, "created", "web", tags={"team": "a"})
    world.events.add(Kind.IMAGE, "ready", "alpine")
    world.events.add(Kind.VOLUME, "attached", "data", instance_id="web")
    world.events.add(Kind.INSTANCE, "deleted", "web")
    return world


async def cursors(ask: Any, query: str, **options: Any) -> list[int]:
    response = await ask("GET", f"/events?follow=false&{query}", **options)
    body = await response.get_json()
    assert response.status_code == 200, body
    return [event["cursor"] for event in body]


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("", [1, 2, 3, 4]),
        ("since=0", [1, 2, 3, 4]),
        ("since=2", [3, 4]),
        ("since=4", []),
        ("since=1h", [1, 2, 3, 4]),
        ("since=2000-01-01T00:00:00Z", [1, 2, 3, 4]),
        ("since=2999-01-01T00:00:00Z", []),
        ("limit=2", [1, 2]),
        ("type=instance", [1, 4]),
        ("type=image,instance.deleted", [2, 4]),
        ("instance=web", [1, 3, 4]),
        ("tags[team]=a", [1]),
        ("tags[team]=b", []),
    ],
)
async def test_lists(ask: Any, logged: FakeWorld, query: str, wanted: list[int]) -> None:
    assert await cursors(ask, query) == wanted


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("since=yesterday", "invalid_since"),
        ("since=-5", "invalid_since"),
        ("since=2026-01-01T00:00:00", "invalid_since"),
        ("since=9999999999h", "invalid_since"),
        ("type=instance.", "invalid_request"),
        ("type=bird", "invalid_request"),
        ("type=Instance", "invalid_request"),
        ("limit=0", "Bad Request"),
        ("limit=10001", "Bad Request"),
        ("follow=maybe", "Bad Request"),
    ],
)
async def test_bad_queries(ask: Any, query: str, code: str) -> None:
    response = await ask("GET", f"/events?{query}")
    assert (response.status_code, (await response.get_json())["code"]) == (400, code)


async def test_only_the_kinds_that_the_token_may_read(app: ApiApp, ask: Any, logged: FakeWorld) -> None:
    def headers(*scopes: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {mint(SECRET, subject='narrow', scopes=scopes)}"}

    assert await cursors(ask, "", headers=headers("image:read")) == [2]
    assert await cursors(ask, "instance=web", headers=headers("volume:read", "image:read")) == [3]
    for scopes, query in ((("instance:write",), ""), (("image:read",), "&type=instance")):
        response = await ask("GET", f"/events?follow=false{query}", headers=headers(*scopes))
        assert response.status_code == 403


async def test_a_lost_cursor_is_410_and_final(ask: Any, world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CursorGone("too old")

    monkeypatch.setattr(world.events, "follow", refuse)
    response = await ask("GET", "/events?since=7")
    assert (response.status_code, (await response.get_json())["code"]) == (410, "cursor_gone")
    assert response.headers["X-Should-Retry"] == "false"


async def stream(served: Any, headers: dict[str, str], path: str, size: int) -> list[str]:
    """The first ``size`` blocks of an event stream."""
    lines = [f"GET {path} HTTP/1.0", "Host: x", *(f"{name}: {value}" for name, value in headers.items())]
    head, text = b"", b""
    with trio.fail_after(10):
        async with await trio.open_tcp_stream("127.0.0.1", served.port) as client:
            await client.send_all("\r\n".join([*lines, "", ""]).encode())
            while text.count(b"\n\n") < size:
                head += await client.receive_some()
                text = head.partition(b"\r\n\r\n")[2]
    return text.decode().split("\n\n")[:size]


async def test_streams(served: Any, headers: dict[str, str], logged: FakeWorld) -> None:
    blocks = await stream(served, headers, "/events?since=0&type=instance", 3)
    assert [block.split("\n")[0] for block in blocks] == ["id: 1", "id: 4", ": alive"]
    event = json.loads(blocks[0].split("\n")[1].removeprefix("data: "))
    assert event["object"] == {"kind": "instance", "id": "web", "name": "web"}
    assert blocks[2] == ": alive\nid: 4"


async def test_a_stream_begins_with_what_is_new(served: Any, headers: dict[str, str], logged: FakeWorld) -> None:
    [block] = await stream(served, headers, "/events", 1)
    assert block == ": alive\nid: 4"


async def test_a_client_that_reconnects_continues(served: Any, headers: dict[str, str], logged: FakeWorld) -> None:
    blocks = await stream(served, {**headers, "Last-Event-ID": "3"}, "/events?since=0", 1)
    assert blocks[0].startswith("id: 4\n")


async def test_a_stream_that_fell_behind_ends_with_the_reason(ask: Any, logged: FakeWorld) -> None:
    logged.events.failure = CursorGone("events were dropped")
    response = await ask("GET", "/events?since=0")
    with trio.fail_after(10):
        text = await response.get_data(as_text=True)
    assert text.startswith("event: error\ndata: ")
    assert json.loads(text.split("data: ")[1])["code"] == "cursor_gone"


async def test_who_called_is_in_the_log_and_is_the_actor(
    served: Any, world: FakeWorld, headers: dict[str, str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    actors = []
    real = world.volumes.delete

    async def delete(ref: str) -> None:
        actors.append(current_actor())
        await real(ref)

    monkeypatch.setattr(world.volumes, "delete", delete)
    caplog.set_level(logging.INFO, "hypeman.http")
    token = headers["Authorization"]
    tcp = await trio.open_tcp_stream("127.0.0.1", served.port)
    unix = await trio.open_unix_socket(served.socket_path)
    for client, head in ((tcp, f"Authorization: {token}\r\nX-Request-Id: r1\r\n"), (unix, ""), (tcp, "")):
        await client.send_all(f"DELETE /volumes/none HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
        with trio.fail_after(10):
            await client.receive_some()
    await tcp.aclose()
    await unix.aclose()
    lines: list[logging.LogRecord] = []
    with trio.fail_after(10):  # a response is there before its line
        while len(lines) < 3:
            await trio.sleep(0.01)
            lines = [record for record in caplog.records if record.message == "request"]
    logged = [{key: getattr(line, key, None) for key in ("subject", "address", "uid", "status")} for line in lines]
    assert logged == [
        {"subject": "tester", "address": "127.0.0.1", "uid": None, "status": 404},
        {"subject": "local", "address": None, "uid": os.getuid(), "status": 404},
        {"subject": None, "address": "127.0.0.1", "uid": None, "status": 401},
    ]
    assert [actor.subject for actor in actors if actor] == ["tester", "local"]
    assert actors[0] is not None and actors[0].request_id == "r1"
