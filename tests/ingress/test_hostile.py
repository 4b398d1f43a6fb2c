"""What two programs could read differently, in both directions: from clients, before a guest sees it, and from guests.

The tables are those of the egress path, since the parsers are the same; here it matters that ingresses use them.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from hypeman.egress.service import Timeouts
from tests.egress.conftest import HOST
from tests.egress.test_hostile import BAD_CHUNKS, REFUSED
from tests.egress.test_http1 import BAD_RESPONSES
from tests.ingress.test_proxy import World, response_of, world

ALLOWED = {"absolute-form, other scheme"}
"""Of what is refused there: a client may name the scheme that a proxy before us ended."""
GRACE = Timeouts(linger=1)


async def end_of(here: World, data: bytes) -> bytes:
    """All that a client gets, however its connection ends; it stays open on the client's side."""
    received = bytearray()
    async with await here.connect() as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(data)
        with trio.fail_after(60), suppress(trio.BrokenResourceError):
            while piece := await stream.receive_some(65536):
                received += piece
    return bytes(received)


async def test_no_guest_sees_what_clients_should_not_send() -> None:
    seen: list[bytes] = []

    async def guest(stream: trio.SocketStream) -> None:
        seen.append(bytes(await stream.receive_some(65536)))

    async with world(guest, GRACE) as here:
        for name, text in REFUSED.items():
            if name in ALLOWED:
                continue
            data = text.encode("latin-1").replace(HOST.encode(), b"a.test")
            async with await here.connect() as stream:
                await stream.send_all(data)
                status = int((await stream.receive_some(65536)).split()[1])
            assert 400 <= status < 500, name
        assert seen == []


async def test_no_guest_takes_a_broken_body_for_a_whole_one() -> None:
    """The client gets an error; the guest's connection ends before its last chunk, and carries nothing else."""
    ends: list[bytes] = []

    async def guest(stream: trio.SocketStream) -> None:
        data = bytearray()
        with suppress(trio.BrokenResourceError):
            async for piece in stream:
                data += piece
        ends.append(bytes(data))

    async with world(guest, GRACE) as here:
        for count, (name, text) in enumerate(BAD_CHUNKS.items(), 1):
            head = b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
            answer = await end_of(here, head + text.encode())
            assert answer.startswith(b"HTTP/1.1 400 "), (name, answer[:80])
            assert answer.count(b"HTTP/1.1 ") == 1, name
            with trio.fail_after(60):
                while len(ends) < count:
                    await trio.sleep(0.01)
        assert not any(end.endswith(b"\r\n0\r\n\r\n") for end in ends)


SMUGGLED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstole"
EXTRA_RESPONSES = {
    "nothing and a length": b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
    "length list": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
    "length with plus": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
    "space before colon": b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello",
    "NUL in value": b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 5\r\n\r\nhello",
    "gzip, chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another response behind it": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + SMUGGLED,
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "nothing": b"",
}


async def test_no_client_gets_what_was_not_for_it() -> None:
    """After each hostile response the same client asks again, and another one does: both get their own."""
    responses: dict[str, bytes] = BAD_RESPONSES | EXTRA_RESPONSES

    async def guest(stream: trio.SocketStream) -> None:
        data = bytearray()
        with suppress(trio.BrokenResourceError):
            async for piece in stream:
                data += piece
                if data.endswith(b"\r\n\r\n"):
                    name = data.split()[1][1:].decode().replace("_", " ")
                    good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nme"
                    await stream.send_all(responses.get(name, good))
                    data.clear()
                    if not responses.get(name, good):
                        return

    async with world(guest, GRACE) as here:
        for name, said in responses.items():
            async with await here.connect() as client:
                ask = "GET /{} HTTP/1.1\r\nHost: a.test\r\n\r\n"
                await client.send_all(ask.format(name.replace(" ", "_")).encode())
                response, body = await response_of(client)
                if response.status_code < 400:
                    assert body == (b"" if b" 204 " in said else b"ok"), name
                else:
                    assert response.status_code == 502, name
                await client.send_all(ask.format("good").encode())
                assert (await response_of(client))[1] == b"me", name
            assert (await here.get("a.test", path="/good"))[1] == b"me", name
