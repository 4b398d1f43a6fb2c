"""Forms of credentials other than a header: as the host gets them, through the engine, in both versions of HTTP."""

from __future__ import annotations

import base64
import hmac
import time
from typing import Any

import pytest
import trio

from hypeman.egress.service import Timeouts
from hypeman.egress.transforms import Value
from hypeman.egress.types import (
    BasicForm,
    BodyForm,
    CredentialPolicy,
    CredentialSource,
    HmacForm,
    InjectAs,
    InjectRule,
)
from hypeman.errors import InvalidRequest
from tests.egress import conftest
from tests.egress.conftest import GUEST, HOST, SECRET, World

H = f"Host: {HOST}\r\n"


def used_as(shape: InjectAs, *hosts: str, named: str | None = None, scrub: bool = False) -> CredentialPolicy:
    rule = InjectRule(hosts=hosts or (HOST,), ports=tuple(conftest.PORTS) or None, as_=shape)
    source = CredentialSource(named=named) if named else CredentialSource(env="REAL_KEY")
    return CredentialPolicy(source=source, inject=(rule,))


async def test_basic(world: World) -> None:
    await world.allow(GIT=used_as(InjectAs(basic=BasicForm(username="x-access-token"))))
    assert (await world.get(fields="Authorization: Basic bW9jay1HSVQ6\r\n"))[0] == 200
    wanted = "Basic " + base64.b64encode(f"x-access-token:{SECRET}".encode()).decode()
    assert world.origin.requests[0].all("authorization") == [wanted]


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        ("/p", "/p?api_key=a%26b%20c%2Fd"),
        ("/p?", "/p?api_key=a%26b%20c%2Fd"),
        ("/p?api_key=mock-KEY&x=1", "/p?x=1&api_key=a%26b%20c%2Fd"),
        ("/p?x=1&%61pi%5Fkey=mine&api_key&y", "/p?x=1&y&api_key=a%26b%20c%2Fd"),
        ("/p?api_keys=1&API_KEY=2", "/p?api_keys=1&API_KEY=2&api_key=a%26b%20c%2Fd"),
        (f"https://{HOST}?x=1", "/?x=1&api_key=a%26b%20c%2Fd"),
    ],
)
async def test_query(world: World, sent: str, got: str) -> None:
    """Whatever the guest sent for the parameter, however it was spelled, is gone."""
    await world.allow(secret="a&b c/d", KEY=used_as(InjectAs(query="api_key")))
    assert (await world.get(sent))[0] == 200
    assert world.origin.requests[0].target == got


async def test_query_beside_a_header(world: World) -> None:
    header = InjectAs(header="X-Key", format="${value}")
    await world.allow(KEY=used_as(InjectAs(query="k")), OTHER=used_as(header))
    assert (await world.get("/?a=b"))[0] == 200
    request = world.origin.requests[0]
    assert (request.target, request.all("x-key")) == (f"/?a=b&k={SECRET}", [SECRET])


@pytest.mark.parametrize(
    "shape",
    [
        InjectAs(),
        InjectAs(header="X"),
        InjectAs(format="${value}"),
        InjectAs(header="X", format="${value}", query="k"),
        InjectAs(query="k", format="${value}"),
        InjectAs(query="k", basic=BasicForm(username="u")),
        InjectAs(query="é"),
        InjectAs(basic=BasicForm(username="a:b")),
        InjectAs(basic=BasicForm(username="a\r\nb")),
    ],
)
async def test_forms_refused(world: World, shape: InjectAs) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await world.allow(KEY=used_as(shape))
    assert SECRET not in str(caught.value)


async def test_two_parameters_of_one_name_clash(world: World) -> None:
    with pytest.raises(InvalidRequest, match="query parameter"):
        await world.allow(A=used_as(InjectAs(query="k")), B=used_as(InjectAs(query="k")))


async def obtain(world: World, **values: Value) -> None:
    rules = {"KEY": used_as(InjectAs(header="Authorization", format="Bearer ${value}"), named="x")}
    await world.egress.set_policy("inst-a", GUEST, rules, {}, obtained=values)


async def test_request_waits_for_the_value(world: World) -> None:
    """It is held until there is one, and then has it; those of others go on meanwhile."""
    await obtain(world)
    answers: list[int] = []

    async def ask() -> None:
        answers.append((await world.get(fields="X: mock-KEY\r\n"))[0])

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        while (await world.egress.statistics()).counters["requests"] < 3:
            await trio.sleep(0.01)
        await world.allow("inst-b", "127.0.1.2")
        assert (await world.get(source="127.0.1.2"))[0] == 200
        assert (len(world.origin.requests), answers) == (1, [])
        await obtain(world, KEY=Value("late"))
    assert answers == [200] * 3
    assert [request.all("authorization") for request in world.origin.requests[1:]] == [["Bearer late"]] * 3


@pytest.mark.parametrize("values", [{}, {"KEY": Value("old", 1000.0)}])
async def test_request_without_a_value_is_refused(make_world: Any, values: dict[str, Value]) -> None:
    """Also if the value that there was has expired."""
    async with make_world(timeouts=Timeouts(held=0.2)) as world:
        await obtain(world, **values)
        status, fields, body = await world.get()
        assert (status, fields["x-hypeman-egress"]) == (503, "credential_unavailable")
        assert b'"credential_unavailable"' in body and int(fields["retry-after"]) > 0
        assert world.origin.requests == []


async def test_client_leaves_while_it_is_held(world: World) -> None:
    await obtain(world)
    wire = await world.tls()
    await wire.send(f"GET / HTTP/1.1\r\n{H}\r\n".encode())
    while not (await world.egress.statistics()).counters["requests"]:
        await trio.sleep(0.01)
    await trio.aclose_forcefully(wire.stream)
    while (await world.egress.statistics()).counters["connections"]:
        await trio.sleep(0.01)
    await obtain(world, KEY=Value("late"))
    assert (await world.get())[0] == 200
    assert len(world.origin.requests) == 1


BODY = b'{"event": "push", "key": "mock-KEY"}'
JSON = "application/json; charset=utf-8"


async def post(world: World, body: bytes, content_type: str, more: str = "") -> Any:
    """The request as the origin got it."""
    wire = await world.tls()
    head = f"POST / HTTP/1.1\r\n{H}Content-Type: {content_type}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    assert (await world.ask(wire, head.encode() + body))[0] == 200
    return world.origin.requests[-1]


@pytest.mark.parametrize(
    ("content_type", "sent", "got"),
    [
        (JSON, BODY, b'{"event": "push", "key": "a\\"b\\\\ &"}'),
        ("application/vnd.api+json", b'["mock-KEY","mock-KEY!"]', b'["a\\"b\\\\ &","a\\"b\\\\ &!"]'),
        ("application/x-www-form-urlencoded", b"a=1&key=mock-KEY&b=2", b"a=1&key=a%22b%5C%20%26&b=2"),
        (JSON, b'{"key": "none"}', b'{"key": "none"}'),
        (JSON, b"", b""),
        ("text/plain", BODY, BODY),
    ],
)
async def test_body(world: World, content_type: str, sent: bytes, got: bytes) -> None:
    """Escaped as the format needs, with the length that it has then."""
    await world.allow(secret='a"b\\ &', KEY=used_as(InjectAs(body=BodyForm())))
    request = await post(world, sent, content_type)
    assert (request.body, request.all("content-length")) == (got, [str(len(got))])


async def test_a_body_does_not_become_larger_than_one_may_be(world: World) -> None:
    """Else a guest could have the engine, which serves all, make gigabytes out of a few megabytes."""
    await world.allow(secret="x" * 8000, KEY=used_as(InjectAs(body=BodyForm())))
    for count, wanted in ((500, 200), (600, 413)):
        wire = await world.tls()
        body = b"mock-KEY" * count
        head = f"POST / HTTP/1.1\r\n{H}Content-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
        status, _, said = await world.ask(wire, head.encode() + body)
        assert (status, b"body_too_large" in said) == (wanted, wanted == 413)
    assert [len(request.body) for request in world.origin.requests] == [500 * 8000]


async def test_compressed_body_is_not_read(world: World) -> None:
    await world.allow(KEY=used_as(InjectAs(body=BodyForm())))
    assert (await post(world, BODY, JSON, "Content-Encoding: gzip\r\n")).body == BODY


@pytest.mark.parametrize("scheme", ["github", "stripe", "slack"])
async def test_hmac(world: World, scheme: Any) -> None:
    """Of the body as it leaves, also if another rule changes it."""
    filled = used_as(InjectAs(body=BodyForm()))
    await world.allow(KEY=filled, SIGNING=used_as(InjectAs(hmac=HmacForm(scheme=scheme))))
    request = await post(world, BODY, JSON, "X-Hub-Signature-256: mine\r\nStripe-Signature: mine\r\n")
    assert request.body == BODY.replace(b"mock-KEY", SECRET.encode())

    def signed(before: str) -> str:
        return hmac.digest(SECRET.encode(), before.encode() + request.body, "sha256").hex()

    if scheme == "github":
        assert request.all("x-hub-signature-256") == [f"sha256={signed('')}"]
    elif scheme == "stripe":
        (value,) = request.all("stripe-signature")
        stamp = value.split(",")[0].removeprefix("t=")
        assert value == f"t={stamp},v1={signed(stamp + '.')}" and abs(int(stamp) - time.time()) < 60
    else:
        (stamp,) = request.all("x-slack-request-timestamp")
        assert request.all("x-slack-signature") == [f"v0={signed(f'v0:{stamp}:')}"]


async def test_hmac_of_nothing(world: World) -> None:
    await world.allow(KEY=used_as(InjectAs(hmac=HmacForm(scheme="github"))))
    assert (await world.get())[0] == 200
    wanted = hmac.digest(SECRET.encode(), b"", "sha256").hex()
    assert world.origin.requests[0].all("x-hub-signature-256") == [f"sha256={wanted}"]
