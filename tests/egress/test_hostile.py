"""Requests that two programs could read differently: strict everywhere, decided before anything leaves."""

from __future__ import annotations

import pytest
import trio

from tests.egress.conftest import HOST, SECRET, Wire, World, read_response

H = f"Host: {HOST}\r\n"

REFUSED = {
    "length and chunked": f"POST / HTTP/1.1\r\n{H}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": f"POST / HTTP/1.1\r\n{H}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two equal lengths": f"POST / HTTP/1.1\r\n{H}Content-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "two lengths": f"POST / HTTP/1.1\r\n{H}Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "length list": f"POST / HTTP/1.1\r\n{H}Content-Length: 1, 1\r\n\r\nx",
    "length with plus": f"POST / HTTP/1.1\r\n{H}Content-Length: +1\r\n\r\nx",
    "length in hex": f"POST / HTTP/1.1\r\n{H}Content-Length: 0x1\r\n\r\nx",
    "length negative": f"POST / HTTP/1.1\r\n{H}Content-Length: -1\r\n\r\n",
    "length empty": f"POST / HTTP/1.1\r\n{H}Content-Length:\r\n\r\n",
    "length over 2^62": f"POST / HTTP/1.1\r\n{H}Content-Length: 9999999999999999999\r\n\r\n",
    "xchunked": f"POST / HTTP/1.1\r\n{H}Transfer-Encoding: xchunked\r\n\r\n",
    "chunked, identity": f"POST / HTTP/1.1\r\n{H}Transfer-Encoding: chunked, identity\r\n\r\n",
    "gzip, chunked": f"POST / HTTP/1.1\r\n{H}Transfer-Encoding: gzip, chunked\r\n\r\n",
    "two chunked": f"POST / HTTP/1.1\r\n{H}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunked in 1.0": f"POST / HTTP/1.0\r\n{H}Transfer-Encoding: chunked\r\n\r\n",
    "space before colon": f"GET / HTTP/1.1\r\n{H}X : y\r\n\r\n",
    "space before name": f"GET / HTTP/1.1\r\n X: y\r\n{H}\r\n",
    "no colon": f"GET / HTTP/1.1\r\n{H}X\r\n\r\n",
    "empty name": f"GET / HTTP/1.1\r\n{H}: y\r\n\r\n",
    "NUL in value": f"GET / HTTP/1.1\r\n{H}X: a\0b\r\n\r\n",
    "NUL in name": f"GET / HTTP/1.1\r\n{H}X\0: b\r\n\r\n",
    "bare CR in value": f"GET / HTTP/1.1\r\n{H}X: a\rb\r\n\r\n",
    "DEL in value": f"GET / HTTP/1.1\r\n{H}X: a\x7fb\r\n\r\n",
    "obs-fold": f"GET / HTTP/1.1\r\n{H}X: a\r\n b\r\n\r\n",
    "bare LF after the request line": f"GET / HTTP/1.1\n{H}\r\n",
    "bare LF after a field": f"GET / HTTP/1.1\r\nHost: {HOST}\n\r\n",
    "bare LF at the end": f"GET / HTTP/1.1\r\n{H}\n",
    "no Host": "GET / HTTP/1.1\r\n\r\n",
    "two Hosts": f"GET / HTTP/1.1\r\n{H}{H}\r\n",
    "two different Hosts": f"GET / HTTP/1.1\r\n{H}Host: evil.test\r\n\r\n",
    "empty line first": f"\r\nGET / HTTP/1.1\r\n{H}\r\n",
    "HTTP/1.2": f"GET / HTTP/1.2\r\n{H}\r\n",
    "HTTP/2.0": f"GET / HTTP/2.0\r\n{H}\r\n",
    "HTTP/0.9": "GET /\r\n",
    "lower-case version": f"GET / http/1.1\r\n{H}\r\n",
    "two spaces": f"GET  / HTTP/1.1\r\n{H}\r\n",
    "tab as space": f"GET\t/ HTTP/1.1\r\n{H}\r\n",
    "space in target": f"GET /a b HTTP/1.1\r\n{H}\r\n",
    "fragment in target": f"GET /a#b HTTP/1.1\r\n{H}\r\n",
    "bytes over 127 in target": f"GET /\u00e9 HTTP/1.1\r\n{H}\r\n",
    "method with parenthesis": f"GE(T / HTTP/1.1\r\n{H}\r\n",
    "relative target": f"GET x HTTP/1.1\r\n{H}\r\n",
    "asterisk for GET": f"GET * HTTP/1.1\r\n{H}\r\n",
    "absolute-form, other scheme": f"GET http://{HOST}/ HTTP/1.1\r\n{H}\r\n",
    "absolute-form, user": f"GET https://a@{HOST}/ HTTP/1.1\r\n{H}\r\n",
    "bad option in Connection": f"GET / HTTP/1.1\r\n{H}Connection: a b\r\n\r\n",
    "not a host": "GET / HTTP/1.1\r\nHost: evil.example%23.com\r\n\r\n",
    "Host with user": f"GET / HTTP/1.1\r\nHost: a@{HOST}\r\n\r\n",
    "Host with path": f"GET / HTTP/1.1\r\nHost: {HOST}/\r\n\r\n",
    "Host list": f"GET / HTTP/1.1\r\nHost: {HOST}, evil.test\r\n\r\n",
    "Host empty": "GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "Host with a bad port": f"GET / HTTP/1.1\r\nHost: {HOST}:0x50\r\n\r\n",
}

MISDIRECTED = {
    "absolute-form, other host": f"GET https://evil.test/ HTTP/1.1\r\n{H}\r\n",
    "other host": "GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n",
    "other port": f"GET / HTTP/1.1\r\nHost: {HOST}:1\r\n\r\n",
    "sibling": "GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n",
    "parent": "GET / HTTP/1.1\r\nHost: example.com\r\n\r\n",
    "HTTP/1.0 other host": "GET / HTTP/1.0\r\nHost: evil.test\r\n\r\n",
}

BAD_CHUNKS = {
    "size ended by LF": "5\nhello\r\n0\r\n\r\n",
    "underscore": "0_0\r\n\r\n",
    "17 digits": "00000000000000005\r\nhello\r\n0\r\n\r\n",
    "0x": "0x5\r\nhello\r\n0\r\n\r\n",
    "negative": "-5\r\nhello\r\n0\r\n\r\n",
    "space before size": " 5\r\nhello\r\n0\r\n\r\n",
    "space after size": "5 \r\nhello\r\n0\r\n\r\n",
    "no size": "\r\nhello\r\n0\r\n\r\n",
    "longer than said": "5\r\nhelloX\r\n0\r\n\r\n",
    "LF after data": "5\r\nhello\n0\r\n\r\n",
    "LF in extension": "5;a\nb\r\nhello\r\n0\r\n\r\n",
    "CR alone after size": "5\rhello\r\n0\r\n\r\n",
    "length in trailers": "0\r\nContent-Length: 5\r\n\r\n",
    "host in trailers": "0\r\nHost: evil.test\r\n\r\n",
    "folded trailer": "0\r\nX: a\r\n b\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused(world: World, name: str) -> None:
    """400 with a reason, the connection ends, nothing reaches the host."""
    wire = await world.tls()
    status, fields, body = await world.ask(wire, REFUSED[name].encode("latin-1"))
    assert status == 400
    assert fields["x-hypeman-egress"] in ("bad_request", "bad_host")
    assert b'"code":' in body
    assert fields["connection"] == "close"
    assert world.origin.requests == []


@pytest.mark.parametrize("name", MISDIRECTED)
async def test_misdirected(world: World, name: str) -> None:
    """421, as RFC 9110 has it, so that a client may try again on a connection of that name."""
    wire = await world.tls()
    status, fields, _ = await world.ask(wire, MISDIRECTED[name].encode())
    assert (status, fields["x-hypeman-egress"]) == (421, "host_mismatch")
    assert world.origin.requests == []


@pytest.mark.parametrize("name", BAD_CHUNKS)
async def test_bad_chunks(world: World, name: str) -> None:
    """The request is cut off on both sides; no complete one ever reaches the host."""
    complete = False

    async def answer(request: object, wire: Wire) -> bool:
        nonlocal complete
        await wire.chunks()
        complete = True
        return False

    world.origin.answers["/chunks"] = answer
    wire = await world.tls()
    await wire.send(f"POST /chunks HTTP/1.1\r\n{H}Transfer-Encoding: chunked\r\n\r\n{BAD_CHUNKS[name]}".encode())
    status, _, _ = await read_response(wire)
    assert status == 400
    assert await wire.rest() == b""
    assert not complete


@pytest.mark.parametrize("size", [33 * 1024, 300 * 1024])
async def test_head_too_large(world: World, size: int) -> None:
    wire = await world.tls()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            try:
                await wire.send(f"GET / HTTP/1.1\r\n{H}X: {'y' * size}\r\n\r\n".encode())
            except trio.BrokenResourceError:
                return

        nursery.start_soon(send)
        status, fields, _ = await read_response(wire)
    assert (status, fields["x-hypeman-egress"]) == (431, "head_too_large")


async def test_too_many_fields(world: World) -> None:
    fields = "".join(f"X-{n}: y\r\n" for n in range(200))
    assert (await world.get(fields=fields))[0] == 431


async def test_every_split_of_a_head(world: World) -> None:
    """A head that comes in two pieces, cut anywhere, is the same head."""
    wire = await world.tls()
    data = f"GET /s HTTP/1.1\r\n{H}X: y\r\n\r\n".encode()
    for cut in range(1, len(data)):
        await wire.send(data[:cut])
        assert (await world.ask(wire, data[cut:]))[0] == 200
    assert {request.line for request in world.origin.requests} == {"GET /s HTTP/1.1"}


@pytest.mark.parametrize(
    "fields",
    [
        "Authorization: Bearer mock-API_KEY\r\nauthorization: Basic Zm9v\r\n",
        "AUTHORIZATION: one\r\nX: y\r\nAuthorization: two\r\n",
        "Connection: close, Authorization\r\nAuthorization: mine\r\n",
        "Connection: Authorization\r\n",
        "",
    ],
)
async def test_exactly_one_credential(world: World, fields: str) -> None:
    """Whatever the guest sends under the name, and whatever it nominates, the host sees our value once."""
    assert (await world.get(fields=fields))[0] == 200
    assert world.origin.requests[0].all("authorization") == [f"Bearer {SECRET}"]


async def test_hop_by_hop_fields_stay_here(world: World) -> None:
    await world.get(fields="Connection: X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\nProxy-Authorization: p\r\n"
                           "TE: gzip\r\nUpgrade: h2c\r\nProxy-Connection: keep-alive\r\nX-Other: 2\r\n")  # fmt: skip
    names = [name for name, _ in world.origin.requests[0].fields]
    assert names == ["host", "x-other", "via", "authorization"]


async def test_guest_identity_does_not_travel_beside_ours(world: World) -> None:
    """At a host that gets a credential, the guest's own Cookie is dropped."""
    await world.get(fields="Cookie: session=guest\r\n")
    assert world.origin.requests[0].all("cookie") == []


async def test_trace_would_echo_the_credential(world: World) -> None:
    wire = await world.tls()
    status, fields, _ = await world.ask(wire, f"TRACE / HTTP/1.1\r\n{H}\r\n".encode())
    assert (status, fields["x-hypeman-egress"]) == (405, "method_not_allowed")


async def test_connect_inside_tls(world: World) -> None:
    wire = await world.tls()
    status, _, _ = await world.ask(wire, f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n".encode())
    assert status == 405


async def test_h2c_upgrade_is_not_offered(world: World) -> None:
    await world.get(fields="Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n")
    assert [name for name, _ in world.origin.requests[0].fields] == ["host", "via", "authorization"]


async def test_unknown_expectation(world: World) -> None:
    assert (await world.get(fields="Expect: 200-ok\r\n"))[0] == 417


async def test_absolute_form_for_the_same_host(world: World) -> None:
    """RFC 9112 wants it accepted; the host gets origin-form."""
    wire = await world.tls()
    status, _, _ = await world.ask(wire, f"GET https://{HOST}/p?q HTTP/1.1\r\n{H}\r\n".encode())
    assert status == 200
    assert world.origin.requests[0].target == "/p?q"


async def test_denial_keeps_the_connection(world: World) -> None:
    """A refused request without a body costs no connection."""
    wire = await world.tls()
    for _ in range(3):
        assert (await world.ask(wire, MISDIRECTED["other host"].encode()))[0] == 421
    assert (await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200


AHEAD = f"GET / HTTP/1.1\r\nHost: {HOST}\r\nExpect: nothing\r\n\r\n".encode() * 1000
"""Requests sent before the first is answered; each gets 417, which costs nobody else anything."""


async def test_answers_wait_for_their_reader(world: World) -> None:
    """A client that sends on and on and reads nothing is read no more; its answers would fill the memory."""
    wire = await world.tls()
    sent = 0
    while sent < 64 << 20:
        with trio.move_on_after(3) as waited:
            await wire.send(AHEAD)
        if waited.cancelled_caught:
            break
        sent += len(AHEAD)
    assert sent < 64 << 20
    assert (await world.get())[0] == 200
