"""exec, cp and logs as clients see them, with a real WebSocket over a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from hypeman.guest.types import CopyEntry, FileKind
from hypeman.instances.model.types import InstanceState
from tests.fakes.services import FakeWorld


class Client:
    """A WebSocket; ``rejected`` is (status, body) where the server refused the upgrade."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.connection = WSConnection(ConnectionType.CLIENT)
        self.rejected: tuple[int, Any] | None = None
        self._events: list[Any] = []

    async def open(self, path: str) -> None:
        await self.stream.send_all(self.connection.send(Request(host="x", target=path)))
        event = await self._event()
        if isinstance(event, RejectConnection):
            body = b""
            while True:
                data = await self._event()
                assert isinstance(data, RejectData)
                body += bytes(data.data)
                if data.body_finished:
                    break
            self.rejected = (event.status_code, json.loads(body))
        else:
            assert isinstance(event, AcceptConnection)

    async def send(self, data: str | bytes) -> None:
        message: Message[Any] = TextMessage(data=data) if isinstance(data, str) else BytesMessage(data=data)
        await self.stream.send_all(self.connection.send(message))

    async def receive(self) -> str | bytes | None:
        """A whole message; None when the server closes."""
        whole: Any = None
        while True:
            event = await self._event()
            if isinstance(event, CloseConnection):
                return None
            if isinstance(event, Ping):
                continue
            assert isinstance(event, Message)
            data = event.data if isinstance(event.data, str) else bytes(event.data)
            whole = data if whole is None else whole + data
            if event.message_finished:
                return whole  # type: ignore[no-any-return]

    async def receive_all(self) -> list[str | bytes]:
        messages = []
        while (message := await self.receive()) is not None:
            messages.append(message)
        return messages

    async def _event(self) -> Any:
        while not self._events:
            data = await self.stream.receive_some()
            self.connection.receive_data(bytes(data) if data else None)
            self._events += self.connection.events()
        return self._events.pop(0)


@pytest.fixture
async def dial(served: Any, world: FakeWorld) -> AsyncIterator[Any]:
    world.instances.add("web")

    @asynccontextmanager
    async def open_client(path: str) -> AsyncIterator[Client]:
        with trio.fail_after(10):
            async with await trio.open_unix_socket(served.socket_path) as stream:
                client = Client(stream)
                await client.open(path)
                yield client

    yield open_client


def request(**fields: Any) -> str:
    return json.dumps(fields)


async def run(dial: Any, **fields: Any) -> tuple[bytes, int]:
    """Output and exit code of a program that wants no input."""
    async with dial("/instances/web/exec") as client:
        await client.send(request(**fields))
        *output, last = await client.receive_all()
        assert all(isinstance(chunk, bytes) and len(chunk) <= 32 * 1024 for chunk in output)
        return b"".join(output), json.loads(last)["exitCode"]


async def test_exec(dial: Any, world: FakeWorld) -> None:
    assert await run(dial, command=["echo", "hello"], env={"A": "b"}, cwd="/tmp") == (b"hello\n", 0)
    assert await run(dial, command=["false"]) == (b"", 1)
    assert await run(dial, command=["big", "1000000"]) == (b"x" * 1_000_000, 0)
    assert await run(dial, command=["no-such-program"]) == (b"Error: exec: no-such-program: not found\r\n", 127)
    assert await run(dial, command=["dies"]) == (b"Error: the guest has gone\r\n", 127)
    assert await run(dial, command=["path"]) == (b"Error: overlay.raw: No space left\r\n", 127), "no path of the host"
    output, code = await run(dial, command=["bug"])
    assert (b"secret" in output, code) == (False, 127)
    assert all(session.closed for session in world.instances.sessions)
    assert world.instances.sessions[0].request.env == {"A": "b"}


async def test_exec_keeps_streams_apart(dial: Any) -> None:
    """With ``separate`` the first byte of a message says which of the two it is."""
    for command, messages in (
        (["both", "out", "err"], [b"\x01out", b"\x02err", '{"exitCode":0}']),
        (["no-such-program"], [b"\x02Error: exec: no-such-program: not found\r\n", '{"exitCode":127}']),
    ):
        async with dial("/instances/web/exec") as client:
            await client.send(request(command=command, separate=True))
            assert await client.receive_all() == messages
    assert await run(dial, command=["both", "out", "err"]) == (b"outerr", 0)
    async with dial("/instances/web/exec") as client:
        await client.send(request(command=["echo"], separate=True, keep=True))
        [answer] = await client.receive_all()
        assert "separate and keep" in json.loads(answer)["error"]


async def test_exec_with_a_terminal(dial: Any) -> None:
    async with dial("/instances/web/exec") as client:
        await client.send(request(command=["sh"], tty=True))
        await client.send(b"type")
        assert await client.receive() == b"TYPE"
        await client.send('{"resize":{"rows":50,"cols":120}}')
        assert await client.receive() == b"50x120\r\n"
        await client.send('{"resize":{"rows":0,"cols":120}}')  # no size at all is no resize
        assert await client.receive() == b'{"RESIZE":{"ROWS":0,"COLS":120}}'
        await client.send("text is input too\n")
        assert await client.receive() == b"TEXT IS INPUT TOO\n"
        await client.send(b"exit 3")
        assert await client.receive_all() == [b"EXIT 3", '{"exitCode":3}']


async def test_exec_without_a_terminal(dial: Any) -> None:
    """What would be a resize is input; an empty message is the end of it."""
    async with dial("/instances/web/exec") as client:
        await client.send(request(command=["cat"]))
        await client.send('{"resize":{"rows":5,"cols":5}}')
        assert await client.receive() == b'{"RESIZE":{"ROWS":5,"COLS":5}}'
        await client.send("")
        await client.send(b"")
        assert await client.receive_all() == ['{"exitCode":0}']


@pytest.mark.parametrize("first", [b"bytes", "no json", "[]", '{"command":"ls"}', '{"rows":-1}'])
async def test_exec_that_begins_wrong(dial: Any, first: str | bytes) -> None:
    async with dial("/instances/web/exec") as client:
        await client.send(first)
        [answer] = await client.receive_all()
        assert "bad request" in json.loads(answer)["error"]


async def test_hanging_up_ends_the_program(dial: Any, world: FakeWorld) -> None:
    async with dial("/instances/web/exec") as client:
        await client.send(request(command=["cat"]))
        await client.send(b"x")
        await client.receive()
    with trio.fail_after(5):
        while not world.instances.sessions[0].closed:
            await trio.sleep(0.01)


@pytest.mark.parametrize("what", ["exec", "cp"])
async def test_refusals_before_the_upgrade(served: Any, dial: Any, world: FakeWorld, what: str) -> None:
    world.instances.add("asleep", InstanceState.STANDBY)
    world.instances.add("twin", id="aaa1")
    world.instances.add("other", id="aaa2")
    for name, status, code in [
        ("missing", 404, "not_found"),
        ("asleep", 409, "invalid_state"),
        ("aaa", 409, "ambiguous"),
    ]:
        async with dial(f"/instances/{name}/{what}") as client:
            assert (client.rejected[0], client.rejected[1]["code"]) == (status, code)
    with trio.fail_after(5):
        async with await trio.open_tcp_stream("127.0.0.1", served.port) as stream:
            client = Client(stream)
            await client.open(f"/instances/web/{what}")
            assert client.rejected is not None
            assert (client.rejected[0], client.rejected[1]["code"]) == (401, "Unauthorized")


async def test_plain_requests_to_a_stream_are_told_so(served: Any) -> None:
    async with await trio.open_unix_socket(served.socket_path) as stream:
        await stream.send_all(b"GET /instances/web/exec HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join([chunk async for chunk in stream])
        assert answer.startswith(b"HTTP/1.1 426"), answer
        assert b"WebSocket" in answer


# ── cp ───────────────────────────────────────────────────────────────────────────────────────────


async def test_copy_in(dial: Any, world: FakeWorld) -> None:
    async with dial("/instances/web/cp") as client:
        await client.send(request(direction="to", guest_path="/tmp/a", mode=0o600, uid=1, gid=2))
        await client.send(b"one ")
        await client.send(b"two")
        await client.send('{"type":"end"}')
        [result] = await client.receive_all()
        assert json.loads(result) == {"type": "result", "success": True, "bytes_written": 7}
    asked, data = world.instances.files["/tmp/a"]
    assert (asked.mode, asked.uid, data) == (0o600, 1, b"one two")
    async with dial("/instances/web/cp") as client:
        await client.send(request(direction="to", guest_path="/tmp/d", is_dir=True))
        await client.send('{"type":"end"}')
        assert json.loads(await client.receive())["success"]
    assert all(copy.closed for copy in world.instances.copies)


async def test_copy_in_that_fails_is_reported_immediately(dial: Any) -> None:
    async with dial("/instances/web/cp") as client:
        await client.send(request(direction="to", guest_path="/full"))
        await client.send(b"x")
        assert json.loads(await client.receive()) == {
            "type": "result",
            "success": False,
            "error": "no space left in the guest",
        }
        await client.send(b"still sending")
        await client.send('{"type":"end"}')
        assert await client.receive() is None


async def test_an_unfinished_copy_leaves_nothing(dial: Any, world: FakeWorld) -> None:
    async with dial("/instances/web/cp") as client:
        await client.send(request(direction="to", guest_path="/tmp/a"))
        await client.send(b"half")
        await trio.sleep(0.05)
    with trio.fail_after(5):
        while not (world.instances.copies and world.instances.copies[0].closed):
            await trio.sleep(0.01)
    assert world.instances.files == {}


def entry(path: str, **fields: Any) -> CopyEntry:
    defaults: dict[str, Any] = {"kind": FileKind.FILE, "mode": 0o644, "size": 0}
    return CopyEntry(path=path, mtime=5, uid=0, gid=0, **{**defaults, **fields})


async def test_copy_out(dial: Any, world: FakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypeman.server.messages.CHUNK", 4)
    world.instances.tree = [
        entry("d", kind=FileKind.DIR, mode=0o755),
        entry("d/f", size=10),
        b"0123456789",
        entry("d/l", kind=FileKind.SYMLINK, link_target="f"),
    ]
    async with dial("/instances/web/cp") as client:
        await client.send(request(direction="from", guest_path="/d"))
        messages = await client.receive_all()
    assert [json.loads(message) if isinstance(message, str) else message for message in messages] == [
        header("d", is_dir=True, mode=0o755),
        {"type": "end", "final": False},
        header("d/f", size=10),
        b"0123",
        b"4567",
        b"89",
        {"type": "end", "final": False},
        header("d/l", is_symlink=True, link_target="f"),
        {"type": "end", "final": True},
    ]


def header(path: str, **fields: Any) -> dict[str, Any]:
    plain = {"mode": 0o644, "is_dir": False, "is_symlink": False, "link_target": "", "size": 0}
    return {"type": "header", "path": path, **plain, "mtime": 5, "uid": 0, "gid": 0, **fields}


async def test_impossible_copies_are_refused(dial: Any) -> None:
    async with dial("/instances/web/cp") as client:
        await client.send(request(direction="from", guest_path="/missing"))
        [answer] = await client.receive_all()
        assert json.loads(answer) == {
            "type": "error",
            "message": "/missing: no such file or directory",
            "path": "/missing",
        }
    async with dial("/instances/web/cp") as client:
        await client.send(request(direction="sideways", guest_path="/x"))
        [answer] = await client.receive_all()
        assert json.loads(answer)["type"] == "error"


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────


async def test_logs(ask: Any, world: FakeWorld) -> None:
    world.instances.add("web")
    response = await ask("GET", "/instances/web/logs?source=vmm")
    assert (response.status_code, (await response.get_json())["code"]) == (404, "log_not_found")
    (world.log_directory / "web-vmm.log").write_text("one\ntwo\nthree\n")
    response = await ask("GET", "/instances/web/logs?source=vmm&tail=2")
    assert await response.get_data() == b'data: "two"\n\ndata: "three"\n\n'
    assert response.content_type == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    for query in ("tail=-1", "tail=x", "source=kernel", "follow=maybe"):
        assert (await ask("GET", f"/instances/web/logs?{query}")).status_code == 400


async def test_followed_logs_come_at_once(served: Any, world: FakeWorld) -> None:
    world.instances.add("web")
    path = world.log_directory / "web-app.log"
    path.write_text("")
    async with await trio.open_unix_socket(served.socket_path) as stream:
        await stream.send_all(b"GET /instances/web/logs?follow=true HTTP/1.1\r\nHost: x\r\n\r\n")
        with trio.fail_after(10):
            received = await stream.receive_some()
            assert b"text/event-stream" in received
            for number in range(3):
                with path.open("a") as log:
                    log.write(f"line {number}\n")
                while f'data: "line {number}"\n\n'.encode() not in received:
                    received += await stream.receive_some()
