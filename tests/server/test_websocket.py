"""WebSockets that the connection carries: frames as wsproto reads them, and the connection's own duties.

What the streams themselves do is in test_streams.py, which runs both ways.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong, TextMessage

from hypeman.guest.types import CopyEntry, FileKind
from hypeman.server import websocket
from hypeman.server.app import ApiApp
from hypeman.server.frames import BINARY, CLOSE, PING, PONG, TEXT, Control, Decoder, Violation, close_answer, head_of
from hypeman.server.heads import upgrade_headers
from hypeman.server.websocket import MAX_MESSAGE, WebSocket
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld
from tests.server.test_plain import SECRET, logged, serving, unvaried

_CONTROL: dict[type, int] = {Ping: PING, Pong: PONG, CloseConnection: CLOSE}


def frame(kind: int, payload: bytes, *, final: bool = True, key: bytes = b"abcd", first: int | None = None) -> bytes:
    """As a client sends it."""
    head = bytearray(head_of(kind, len(payload)))
    head[0] = first if first is not None else head[0] if final else kind
    head[1] |= 0x80
    return bytes(head) + key + bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))


def decode(data: bytes, cuts: list[int], limit: int = MAX_MESSAGE) -> tuple[list[Any], int | None]:
    """What ``data`` holds if it arrives in parts, and the code of the violation that ends it."""
    decoder, found = Decoder(limit), []
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        try:
            for received in decoder.feed(data[begin:end]):
                found.append(received)
        except Violation as violation:
            return found, violation.code
    return found, None


# ── Frames ───────────────────────────────────────────────────────────────────────────────────────


def by_wsproto(data: bytes) -> tuple[list[Any], bool]:
    """What wsproto finds in ``data``, and whether it refuses the rest."""
    connection = Connection(ConnectionType.SERVER)
    found: list[Any] = []
    parts: list[Any] = []
    connection.receive_data(data)
    for event in connection.events():
        if isinstance(event, Message):
            parts.append(event.data if isinstance(event.data, str) else bytes(event.data))
            if event.message_finished:
                found.append(parts[0][:0].join(parts))
                parts = []
        elif isinstance(event, CloseConnection):
            return found, connection.state.name == "OPEN"
        else:
            found.append(Control(_CONTROL[type(event)], bytes(event.payload)))  # type: ignore[attr-defined]
    return found, False


def test_a_message_in_pieces_of_a_byte_takes_little_more_memory() -> None:
    decoder, payload = Decoder(MAX_MESSAGE), bytes(range(256)) * 20
    for at, byte in enumerate(payload[:-1]):
        assert not list(decoder.feed(bytes((BINARY if at == 0 else 0, 0x81, 0, 0, 0, 0, byte))))
    assert len(decoder._parts) <= 1024
    assert list(decoder.feed(bytes((0x80, 0x81, 0, 0, 0, 0, payload[-1])))) == [payload]


def test_messages_of_wsproto_cut_anywhere() -> None:
    rng = random.Random(3)
    for _ in range(200):
        client, data, wanted = Connection(ConnectionType.CLIENT), b"", []
        for _ in range(rng.randrange(1, 8)):
            size = rng.choice([0, 1, 7, 125, 126, 127, 4000, 65535, 65536, 70000])
            event: Any = rng.choice(
                [TextMessage("ü" * size), BytesMessage(rng.randbytes(size)), Ping(rng.randbytes(size % 126))]
            )
            if isinstance(event, Message):
                wanted.append(event.data)
                middle = rng.randrange(len(event.data) + 1)
                for part, last in ((event.data[:middle], False), (event.data[middle:], True)):
                    data += client.send(type(event)(part, message_finished=last))
                    if not last and rng.random() < 0.3:  # a control frame inside a message
                        data += client.send(Pong(b"x"))
                        wanted.insert(len(wanted) - 1, Control(PONG, b"x"))
            else:
                data += client.send(event)
                wanted.append(Control(PING, event.payload))
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(12)))
        assert decode(data, cuts) == (wanted, None)


def test_any_bytes_are_judged_as_wsproto_judges_them() -> None:
    """Also frames that break a rule: what precedes one is the same, and it ends the connection in both."""
    rng = random.Random(4)
    opcodes = [0, TEXT, BINARY, CLOSE, PING, PONG, 3, 11, 0x41, 0x12]
    refused = 0
    for _ in range(4000):
        data = b"".join(
            frame(
                0, rng.choice([b"", b"a", b"\xff", "ü".encode(), b"x" * 130]), first=rng.choice([0, 0x80, 0x80]) | kind
            )
            for kind in rng.choices(opcodes, [4, 6, 6, 1, 4, 4, 1, 1, 1, 1], k=rng.randrange(1, 6))
        )
        found, code = decode(data, sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(3))))
        closed = [at for at, one in enumerate(found) if isinstance(one, Control) and one.kind == CLOSE]
        if closed:
            bad = close_answer(found[closed[0]].payload) != found[closed[0]].payload
            found, code = found[: closed[0]], 1002 if bad else None
        theirs, theirs_refuse = by_wsproto(data)
        if theirs_refuse:  # in places earlier, since wsproto looks at text before its message is complete
            assert found[: len(theirs)] == theirs, data
            assert code is not None or b"\x9e" in data, data
        else:
            assert (found, code) == (theirs, None), data
        refused += theirs_refuse
    assert 500 < refused < 3500


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x82\x01x", 1002),  # not masked
        (frame(BINARY, b"", first=0xC2), 1002),  # a reserved bit
        (frame(0, b"x"), 1002),  # goes on with nothing
        (frame(TEXT, b"x", final=False) + frame(TEXT, b"x"), 1002),  # another message inside of one
        (frame(PING, b"x", final=False), 1002),
        (frame(PING, b"x" * 126), 1002),
        (b"\x82\xfe\x00\x05abcd12345", 1002),  # a length that is not in its shortest form
        (b"\x82\xff" + b"\xff" * 8 + b"abcd", 1002),
        (frame(TEXT, b"\xff"), 1007),
        (frame(BINARY, bytes(60), final=False) + frame(0, bytes(41)), 1009),
        (b"\x82\xff" + (2**40).to_bytes(8) + b"abcd", 1009),  # before its bytes have come
    ],
)
def test_what_breaks_a_rule(data: bytes, code: int) -> None:
    for cuts in ([], list(range(1, len(data)))):
        assert decode(data, cuts, limit=100)[1] == code


@pytest.mark.parametrize(
    ("payload", "answer"),
    [
        (b"", b""),
        (b"\x03\xe8", b"\x03\xe8"),
        (b"\x0f\xa0bye", b"\x0f\xa0bye"),
        (b"\x03", b"\x03\xea"),
        (b"\x03\xed", b"\x03\xea"),  # 1005 is never sent
        (b"\x03\xe8\xff", b"\x03\xef"),
    ],
)
def test_answers_to_a_close(payload: bytes, answer: bytes) -> None:
    assert close_answer(payload) == answer


# ── Heads ────────────────────────────────────────────────────────────────────────────────────────

UPGRADE = (
    "Host: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def test_an_upgrade_is_read() -> None:
    block = f"Authorization: Bearer a\r\nX-Request-Id: 1\r\n{UPGRADE}".encode()
    assert upgrade_headers(block) == ("Bearer a", "1", b"dGhlIHNhbXBsZSBub25jZQ==")
    assert websocket.accept_key(b"dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # of RFC 6455 §1.3


@pytest.mark.parametrize(
    "header",
    ["Cookie: a=b", "Origin: http://x", "User-Agent: Mozilla/5.0", "Content-Length: 1", "Transfer-Encoding: chunked",
     "Sec-WebSocket-Extensions: permessage-deflate", "Host: y", "Upgrade: h2c", "Sec-WebSocket-Key: b", "A: \x01"],
)  # fmt: skip
def test_upgrades_that_are_hypercorns(header: str) -> None:
    assert upgrade_headers(f"{UPGRADE}{header}\r\n".encode()) is None


@pytest.mark.parametrize("line", UPGRADE.splitlines(keepends=True))
def test_upgrades_that_are_incomplete(line: str) -> None:
    assert upgrade_headers(UPGRADE.replace(line, "").encode()) is None


# ── The connection's duties ──────────────────────────────────────────────────────────────────────


def head(path: str) -> bytes:
    token = mint(SECRET, subject="x")
    return f"GET {path} HTTP/1.1\r\n{UPGRADE}Authorization: Bearer {token}\r\n\r\n".encode()


Dial = Callable[..., Any]


@pytest.fixture
async def dial(app: ApiApp, world: FakeWorld) -> AsyncIterator[Dial]:
    """A stream on which ``path`` was accepted; without Quart."""
    world.instances.add("web")

    async def quart(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("Quart was asked")

    async with serving(quart, app.plain) as (_, connect, _):

        @asynccontextmanager
        async def accepted(path: str, first: bytes) -> AsyncIterator[trio.SocketStream]:
            with trio.fail_after(20):
                async with await connect() as stream:
                    await stream.send_all(head(path) + first)
                    response = b""
                    while not response.endswith(b"\r\n\r\n"):
                        response += await stream.receive_some(1)
                    assert response.startswith(b"HTTP/1.1 101 ")
                    yield stream

        yield accepted


async def answers(stream: trio.SocketStream) -> list[tuple[int, bytes]]:
    """All frames until the server closes, as opcode and payload."""
    data, at, found = b"".join([bytes(chunk) async for chunk in stream]), 0, []
    while at < len(data):
        first, length, at = data[at], data[at + 1], at + 2
        if length > 125:
            size = 2 if length == 126 else 8
            length, at = int.from_bytes(data[at : at + size]), at + size
        found.append((first & 0x0F, data[at : at + length]))
        at += length
    assert at == len(data)
    return found


def request(**fields: Any) -> bytes:
    return frame(TEXT, json.dumps(fields).encode())


async def test_what_comes_with_the_head_is_not_lost(dial: Dial) -> None:
    async with dial(
        "/instances/web/exec", request(command=["cat"]) + frame(BINARY, b"ab") + frame(BINARY, b"")
    ) as stream:
        found = await answers(stream)
    assert found == [(BINARY, b"AB"), (TEXT, b'{"exitCode":0}'), (CLOSE, b"\x03\xe8")]


async def test_refusals_and_acceptance_both_ways(
    app: ApiApp, world: FakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """The same bytes and the same log line, but for date, id and duration."""
    caplog.set_level("INFO")
    world.instances.add("web")
    asked = [
        head("/instances/web/exec"),
        head("/instances/web/cp?x=y"),
        head("/instances/nobody/exec"),
        head("/instances/%zz/exec"),
        head("/instances//exec"),
        head("/instances/web/attach"),
        head("/instances/web/exec").replace(b"Authorization: Bearer ", b"Authorization: Bearer x"),
        head("/instances/web/exec").replace(b"GET", b"PUT"),
        head("/instances/web"),
    ]
    async with serving(app, app.plain) as (_, connect, _), serving(app, None) as (_, connect_quart, _):
        for each in asked:
            seen = []
            for way in (connect, connect_quart):
                caplog.clear()
                with trio.fail_after(10):
                    async with await way() as stream:
                        await stream.send_all(each)
                        data = bytes(await stream.receive_some())
                        if data.startswith(b"HTTP/1.1 101 "):
                            await stream.send_all(request(command=["echo", "hello"]))
                        else:
                            await stream.send_eof()
                        data += b"".join([bytes(chunk) async for chunk in stream])
                        await trio.testing.wait_all_tasks_blocked()
                first, _, rest = data.partition(b"\r\n\r\n")
                seen.append((unvaried(first), rest, logged(caplog)))
            assert seen[0] == seen[1], each


@pytest.mark.parametrize(
    ("sent", "code"),
    [(b"\x82\x01x", 1002), (frame(TEXT, b"\xff"), 1007), (frame(BINARY, bytes(MAX_MESSAGE + 1)), 1009)],
)
async def test_a_client_that_breaks_a_rule_is_told_and_its_program_ends(
    dial: Dial, world: FakeWorld, sent: bytes, code: int
) -> None:
    async with dial("/instances/web/exec", request(command=["cat"])) as stream:
        await stream.send_all(sent)
        assert await answers(stream) == [(CLOSE, code.to_bytes(2))]
    assert world.instances.sessions[0].closed


@pytest.mark.parametrize("waits", [False, True], ids=["before", "meanwhile"])
@pytest.mark.parametrize("sends", [False, True], ids=["receive", "send"])
async def test_a_socket_that_another_task_closes(waits: bool, sends: bool) -> None:
    """As a client that has gone."""
    ours, theirs = trio.socket.socketpair()
    carried = WebSocket(ours, b"", b"", lambda: None)

    async def use() -> None:
        with carried.scope:
            while sends:
                await carried.send(bytes(1 << 20))
            await carried.receive()

    with trio.fail_after(10), theirs:
        await carried.send(b"")
        async with trio.open_nursery() as nursery:
            if not waits:
                ours.close()
            nursery.start_soon(use)
            await trio.testing.wait_all_tasks_blocked()
            ours.close()
    assert carried.scope.cancelled_caught


async def test_control_frames_while_only_we_send(dial: Dial, world: FakeWorld) -> None:
    """A copy out has nothing to receive; its pings are answered, and a close ends it."""
    async with dial("/instances/web/cp", b"") as stream:

        async def endless(ref: str, asked: Any) -> Any:
            return Endless()

        world.instances.copy_from = endless  # type: ignore[method-assign, assignment]
        await stream.send_all(request(direction="from", guest_path="/x") + frame(PING, b"there?"))
        await trio.sleep(0.05)
        await stream.send_all(frame(CLOSE, b"\x03\xe8enough"))
        found = [answer for answer in await answers(stream) if answer[0] not in (TEXT, BINARY)]
    assert found == [(PONG, b"there?"), (CLOSE, b"\x03\xe8enough")]


class Endless:
    """A copy out without an end."""

    def __init__(self) -> None:
        self._begun = False

    def __aiter__(self) -> Endless:
        return self

    async def __anext__(self) -> CopyEntry | bytes:
        await trio.sleep(0.001)
        if self._begun:
            return b"x" * 10
        self._begun = True
        return CopyEntry(path="x", kind=FileKind.FILE, mode=0o644, size=2**40, mtime=0, uid=0, gid=0)

    async def aclose(self) -> None:
        pass


async def test_much_output_for_a_slow_reader(dial: Dial) -> None:
    async with dial("/instances/web/exec", request(command=["big", "9000000"])) as stream:
        await trio.testing.wait_all_tasks_blocked(0.05)
        found = await answers(stream)
    assert b"".join(payload for kind, payload in found if kind == BINARY) == b"x" * 9_000_000
    assert found[-2:] == [(TEXT, b'{"exitCode":0}'), (CLOSE, b"\x03\xe8")]


@pytest.fixture
async def pair() -> AsyncIterator[tuple[WebSocket, trio.SocketStream]]:
    ours, theirs = trio.socket.socketpair()
    with ours:
        async with trio.SocketStream(theirs) as stream:
            yield WebSocket(ours, b"", b"", lambda: None), stream
            if ours.fileno() >= 0:
                ours.shutdown(socket.SHUT_RDWR)


async def test_a_closed_one_does_not_use_a_newer_connection_of_the_same_number(
    pair: tuple[WebSocket, trio.SocketStream],
) -> None:
    ours, _ = pair
    newer, its_client = socket.socketpair()
    with newer, its_client:
        newer.setblocking(False)
        its_client.setblocking(False)
        its_client.send(b"its client's secret")
        number = ours._socket.fileno()
        ours._socket.close()
        os.dup2(newer.fileno(), number)
        try:
            with trio.move_on_after(0), ours.scope:
                await ours.send("for another client")
            assert newer.recv(100) == b"its client's secret"
            with pytest.raises(BlockingIOError):
                its_client.recv(100)
        finally:
            os.close(number)


async def test_the_rest_of_a_cancelled_send_goes_before_the_next(pair: tuple[WebSocket, trio.SocketStream]) -> None:
    ours, stream = pair
    big = os.urandom(3_000_000)
    with trio.move_on_after(0.05) as scope:
        await ours.send(big)
    assert scope.cancelled_caught
    found: list[tuple[int, bytes]] = []

    async def read() -> None:
        found.extend(await answers(stream))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await ours.send("after it")
            await ours.close()
            os.close(os.dup(ours._socket.fileno()))
            with socket.socket(fileno=os.dup(ours._socket.fileno())) as same:
                same.shutdown(socket.SHUT_WR)
    assert found == [(BINARY, big), (TEXT, b"after it"), (CLOSE, b"\x03\xe8")]


async def test_pings_of_a_client_that_does_not_read_take_no_memory(pair: tuple[WebSocket, trio.SocketStream]) -> None:
    ours, stream = pair

    async def flood() -> None:
        for _ in range(3000):
            await stream.send_all(frame(PING, b"x" * 125) * 20)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.receive)
        with trio.fail_after(20):
            await flood()
        assert len(ours._unsent) <= 8
        nursery.cancel_scope.cancel()


async def test_a_message_that_nobody_wants_holds_back_its_client(dial: Dial) -> None:
    """The program reads nothing: what its client sends stays in the kernel, and is not collected."""
    async with dial("/instances/web/exec", request(command=["sleep"])) as stream:
        sent = 0
        with trio.move_on_after(1):
            while True:
                await stream.send_all(frame(BINARY, bytes(32768)))
                sent += 32768
        assert sent < 32 * 2**20
