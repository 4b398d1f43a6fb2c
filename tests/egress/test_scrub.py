"""Credentials that a host echoes are taken out of its responses: by a model of the search, and through the engine."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from urllib.parse import quote

import h2.events
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hypeman._native.egress import scrub
from hypeman.egress.types import BasicForm, BodyForm, CredentialPolicy, CredentialSource, InjectAs, InjectRule, MtlsForm
from hypeman.errors import InvalidRequest
from tests.egress import conftest
from tests.egress.conftest import GUEST, HOST, SECRET, Request, Wire, World
from tests.egress.test_http2 import GrpcLike, Peer, grpc, through

__all__ = ["grpc"]

H = f"Host: {HOST}\r\n"
BEARER = InjectAs(header="Authorization", format="Bearer ${value}")
GET = f"GET /echo HTTP/1.1\r\n{H}\r\n".encode()


def scrubbed(shape: InjectAs = BEARER, *, env: str = "REAL_KEY", host: str = HOST) -> CredentialPolicy:
    rule = InjectRule(hosts=(host,), ports=tuple(conftest.PORTS), as_=shape, scrub=True)
    return CredentialPolicy(source=CredentialSource(env=env), inject=(rule,))


# ── The search ───────────────────────────────────────────────────────────────────────────────────


def replaced(texts: dict[bytes, bytes], data: bytes) -> bytes:
    """The longest text at each place, from left to right."""
    longest_first = sorted(texts, key=len, reverse=True)
    pattern = b"|".join(re.escape(text) for text in longest_first)
    return re.sub(pattern, lambda match: texts[match[0]], data) if texts else data


LETTERS = st.text("ab", max_size=6).map(str.encode)


@given(st.dictionaries(LETTERS.filter(len), st.sampled_from([b"X", b"mock-KEY", b"ab"]), max_size=5),
       st.lists(LETTERS | st.binary(max_size=8), max_size=12))  # fmt: skip
def test_however_it_is_cut(texts: dict[bytes, bytes], pieces: list[bytes]) -> None:
    assert b"".join(scrub(list(texts.items()), pieces)) == replaced(texts, b"".join(pieces))


@given(st.lists(LETTERS.filter(len), min_size=1, max_size=3), st.lists(LETTERS, max_size=6))
def test_only_what_may_be_a_beginning_is_kept_back(texts: list[bytes], pieces: list[bytes]) -> None:
    """So that an event that is complete leaves at once."""
    out = scrub([(text, text) for text in texts], [*pieces])
    kept = b"".join(pieces)[len(b"".join(out[:-1])) :]
    assert kept == b"" or any(text.startswith(kept) and text != kept for text in texts)


# ── Through the engine ───────────────────────────────────────────────────────────────────────────


async def test_head_and_body(world: World) -> None:
    """In whatever spelling; with a length that is true; and the host is asked for what can be searched."""
    secret = 'sk"<live>/7f3a91'
    spelled = [secret, json.dumps(secret)[1:-1], quote(secret, safe=""), html.escape(secret)]
    spelled += [base64.b64encode(secret.encode()).decode(), quote(secret, safe="").lower()]

    async def echo(request: Request, wire: Wire) -> None:
        body = " ".join(["Bearer", *spelled, "end"]).encode()
        head = f"X-Seen: {request.all('authorization')[0]}!\r\nContent-MD5: eA==\r\n"
        await wire.send(f"HTTP/1.1 200 {secret}\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    world.origin.answers["/echo"] = echo
    await world.allow(secret=secret, KEY=scrubbed())
    wire = await world.tls()
    for _ in range(2):  # the connection stays in step
        asked = f"GET /echo HTTP/1.1\r\n{H}Accept-Encoding: gzip\r\nRange: bytes=1-2\r\nIf-Range: x\r\n\r\n"
        status, fields, body = await world.ask(wire, asked.encode())
        assert (status, fields["x-seen"]) == (200, "Bearer mock-KEY!")
        assert body == b"Bearer " + b"mock-KEY " * 4 + b"mock-KEY== mock-KEY end"
        assert fields["transfer-encoding"] == "chunked"
        assert not {"content-length", "content-md5"} & set(fields)
    request = world.origin.requests[0]
    assert request.all("authorization") == [f"Bearer {secret}"], "the host has the real one"
    assert (request.all("accept-encoding"), request.all("range"), request.all("if-range")) == (["identity"], [], [])
    assert (await world.egress.statistics()).counters["scrubbed"] == 2


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_cut_at_every_byte(world: World, framing: str, version: str) -> None:
    async def echo(request: Request, wire: Wire) -> bool | None:
        text = f"{{a {SECRET}{SECRET[:5]}{SECRET} {SECRET[:-1]}".encode()
        head = {"length": f"Content-Length: {len(text)}\r\n", "chunked": "Transfer-Encoding: chunked\r\n", "close": ""}
        await wire.send(f"HTTP/1.1 200 OK\r\nX-{SECRET.upper()}: 1\r\n{head[framing]}\r\n".encode())
        for byte in text:
            await wire.send(b"1\r\n%c\r\n" % byte if framing == "chunked" else bytes([byte]))
        if framing == "chunked":
            await wire.send(b"0\r\nX-Sum: %b.\r\n\r\n" % SECRET.encode())
        if framing == "close":
            await wire.stream.aclose()
        return framing != "close"

    world.origin.answers["/echo"] = echo
    await world.allow(KEY=scrubbed())
    wire = await world.tls()
    status, fields, body = await world.ask(wire, GET.replace(b"HTTP/1.1", b"HTTP/" + version.encode()))
    assert (status, body) == (200, f"{{a mock-KEY{SECRET[:5]}mock-KEY {SECRET[:-1]}".encode())
    assert ("transfer-encoding" in fields) == (version == "1.1")
    assert f"x-{SECRET}" not in fields
    if framing == "chunked" and version == "1.1":
        assert fields["(trailers)"] == "X-Sum: mock-KEY.\r\n"


async def test_head_and_not_modified_tell_no_length(world: World) -> None:
    """It would be that of the body with the value."""

    async def answer(request: Request, wire: Wire) -> None:
        status = "200 OK" if request.method == "HEAD" else "304 Not Modified"
        await wire.send(f"HTTP/1.1 {status}\r\nContent-Length: 1234\r\nContent-Encoding: br\r\n\r\n".encode())

    world.origin.answers["/echo"] = answer
    await world.allow(KEY=scrubbed())
    wire = await world.tls()
    for method, wanted in (("HEAD", 200), ("GET", 304), ("HEAD", 200)):
        status, fields, _ = await world.ask(wire, GET.replace(b"GET", method.encode()), head_only=True)
        assert (status, "content-length" in fields, "transfer-encoding" in fields) == (wanted, False, False)


@pytest.mark.parametrize("kind", ["gzip", "part"])
async def test_what_cannot_be_searched_is_refused(world: World, kind: str) -> None:
    async def answer(request: Request, wire: Wire) -> None:
        body = gzip.compress(SECRET.encode())
        head = "200 OK\r\nContent-Encoding: gzip" if kind == "gzip" else "206 Partial\r\nContent-Range: bytes 1-2/9"
        await wire.send(f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    world.origin.answers["/echo"] = answer
    await world.allow(KEY=scrubbed())
    wire = await world.tls()
    status, fields, _ = await world.ask(wire, GET)
    assert (status, fields["x-hypeman-egress"]) == (502, "unsearchable_response")
    assert (await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200


@pytest.mark.parametrize("where", ["head", "interim", "trailers"])
async def test_a_head_that_grows_too_large(world: World, where: str) -> None:
    """Placeholders are longer than the values. A head is whole or refused, and what follows it stays in step."""
    echoes = b"X-Echo: " + b"sk-8char" * 900 + b"\r\n"
    heads = {
        "head": b"HTTP/1.1 200 OK\r\n" + echoes * 4 + b"Content-Length: 2\r\n\r\nhi",
        "interim": b"HTTP/1.1 103 Early Hints\r\n" + echoes * 4 + b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n" + echoes + b"\r\n",
    }

    async def answer(request: Request, wire: Wire) -> None:
        await wire.send(heads[where])

    world.origin.answers["/echo"] = answer
    await world.egress.set_policy("inst-a", GUEST, {"K" * 64: scrubbed()}, {"REAL_KEY": "sk-8char"})
    wire = await world.tls()
    for _ in range(2):
        status, fields, body = await world.ask(wire, GET)
        if where == "trailers":
            assert (status, body, len(fields["(trailers)"])) == (200, b"hi", len("X-Echo: \r\n") + 900 * 69)
        else:
            assert (status, fields["x-hypeman-egress"]) == (502, "upstream_response")


async def test_no_upgrade(world: World) -> None:
    """Nothing searches what follows one, so the host answers as if it had not been asked."""
    await world.allow(KEY=scrubbed())
    wire = await world.tls()
    asked = f"GET / HTTP/1.1\r\n{H}Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert (await world.ask(wire, asked.encode()))[0] == 200
    assert world.origin.requests[0].all("upgrade") == []


async def test_rotation_during_a_response(world: World) -> None:
    """What was sent is what is looked for; an event leaves when it is complete."""
    go_on = trio.Event()

    async def events(request: Request, wire: Wire) -> bool:
        await wire.send(f"HTTP/1.1 200 OK\r\n\r\ndata: {SECRET}\n\n".encode())
        await go_on.wait()
        await wire.send(f"data: {SECRET}\n\n".encode())
        await wire.stream.aclose()
        return False

    world.origin.answers["/echo"] = events
    await world.allow(KEY=scrubbed())
    wire = await world.tls()
    await wire.send(GET)
    assert await wire.until(b"data: mock-KEY\n\n")
    await world.allow(secret="sk-another-7f3a91", KEY=scrubbed())
    go_on.set()
    assert await wire.until(b"data: mock-KEY\n\n")
    await wire.until(b"0\r\n\r\n")


async def test_forms(world: World) -> None:
    """A Basic credential, of which the value is no part, and the value of a body."""

    async def echo(request: Request, wire: Wire) -> None:
        await conftest.read_body(request, wire)
        said = request.all("authorization")[0].encode() + b" " + request.body
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

    world.origin.answers["/echo"] = echo
    basic, body = (
        scrubbed(InjectAs(basic=BasicForm(username="user"))),
        scrubbed(InjectAs(body=BodyForm()), env="OTHER_KEY"),
    )
    await world.allow(GIT=basic, KEY=body)
    sent = b'{"k": "mock-KEY"}'
    head = f"POST /echo HTTP/1.1\r\n{H}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
    _, _, got = await world.ask(await world.tls(), head.encode() + sent)
    assert got == b"Basic mock-GIT " + sent
    assert world.origin.requests[0].body == f'{{"k": "other-{SECRET}"}}'.encode()


async def test_streams_of_http2(world: World, grpc: GrpcLike) -> None:
    """More than the host's window holds, with values that become longer and shorter; trailers go on."""
    for secret, times in (("sk-8char", 5), ("sk-" + "9" * 200, 80)):
        await world.allow(secret=secret, NAME_OF_A_KEY=scrubbed())
        peer: Peer = await through(world, grpc)
        fields = ("content-type", "application/grpc")
        for _ in range(times):
            text = f"{secret}{secret[:4]}".encode()
            body = (text * (16384 // len(text)))[:16384]
            stream = await peer.ask(fields, method="POST", body=body, authority=f"{HOST}:{grpc.port}")
            status, _, got = await peer.answer(stream)
            assert (status, got) == (200, replaced({secret.encode(): b"mock-NAME_OF_A_KEY"}, body))
            assert peer.of(stream, h2.events.TrailersReceived)
    assert [head["authorization"] for head in grpc.heads[-1:]] == ["Bearer sk-" + "9" * 200]


@pytest.mark.parametrize(
    ("shape", "key", "secret", "why"),
    [
        (BEARER, "KEY", "sk-1234", "8 characters"),
        (BEARER, "K" * 65, SECRET, "64"),
        (InjectAs(mtls=MtlsForm()), "K", "x", "mtls"),
    ],
)
async def test_refused(world: World, shape: InjectAs, key: str, secret: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        await world.egress.set_policy("inst-a", GUEST, {key: scrubbed(shape)}, {"REAL_KEY": secret})
    assert secret == "x" or secret not in str(caught.value)


async def test_not_too_many(world: World) -> None:
    rules = {f"K{number}": scrubbed(InjectAs(body=BodyForm()), host=f"h{number}.example.org") for number in range(33)}
    with pytest.raises(InvalidRequest, match="scrubbed"):
        await world.egress.set_policy("inst-a", GUEST, rules, {"REAL_KEY": SECRET})
