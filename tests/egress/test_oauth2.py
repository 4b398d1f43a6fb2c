"""Access tokens: what a server of tokens gets, for each grant; what can go wrong; renewal through the engine."""

from __future__ import annotations

import base64
import json
import ssl
import time
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import jwt
import pytest
import trio
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hypeman.egress import oauth2, transforms
from hypeman.egress.broker import Broker
from hypeman.egress.oauth2 import TokenClient, check_secret
from hypeman.egress.sealing import load_sealer
from hypeman.egress.sources import Sources
from hypeman.egress.transforms import Unavailable, Value
from hypeman.egress.types import CredentialPolicy, CredentialSource, InjectAs, InjectRule, OAuth2Form
from hypeman.errors import InvalidRequest
from hypeman.host.checked_backend import is_public_or_in
from hypeman.host.processes import Processes
from hypeman.instances.adapters import SECRETS, RotatedSecrets, SealedSecrets
from hypeman.store import Store
from tests.egress import conftest
from tests.egress.conftest import GUEST, HOST, Wire, World

SECRET = "client-secret-1"


def pem(key: Any) -> str:
    return str(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
    )


RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


class TokenServer:
    """Answers with what a test says; keeps what it got."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.answers: list[tuple[int, bytes]] = []
        self.url = ""
        self.wait = trio.Event()
        self.wait.set()

    def answer(self, status: int = 200, **fields: Any) -> None:
        self.answers.append((status, json.dumps(fields).encode()))

    async def serve(self, stream: trio.SSLStream[Any]) -> None:
        wire = Wire(stream)
        try:
            head = (await wire.until(b"\r\n\r\n")).decode().split("\r\n")
            fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
            body = await wire.exactly(int(fields["content-length"]))
            self.got.append((head[0], fields, dict(parse_qsl(body.decode()))))
            await self.wait.wait()
            status, said = self.answers.pop(0)
            more = b"Location: /elsewhere\r\n" if status == 302 else b""
            await wire.send(b"HTTP/1.1 %d X\r\n%bContent-Length: %d\r\n\r\n%b" % (status, more, len(said), said))
            await stream.aclose()
        except (trio.BrokenResourceError, EOFError):
            pass


@pytest.fixture
async def server(nursery: trio.Nursery) -> TokenServer:
    made = TokenServer()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert("localhost").configure_cert(context)
    listeners = await nursery.start(
        partial(trio.serve_ssl_over_tcp, made.serve, 0, context, host="127.0.0.1", https_compatible=True)
    )
    made.url = f"https://localhost:{listeners[0].transport_listener.socket.getsockname()[1]}/token"
    return made


CA = trustme.CA()


def token_client(*networks: str) -> TokenClient:
    trust = ssl.create_default_context()
    CA.configure_trust(trust)
    return TokenClient(lambda: trust, partial(is_public_or_in, networks or ("127.0.0.0/8", "::1/128")))


async def test_client_credentials(server: TokenServer) -> None:
    """The secret in Authorization, escaped as RFC 6749 says, or in the body."""
    server.answer(access_token="t1", expires_in=60)
    form = OAuth2Form(grant="client_credentials", token_url=server.url, client_id="a:b", scope="x y", audience="api")
    token = await token_client().obtain(form, "s/1")
    assert (token.value.text, token.secret) == ("t1", None)
    assert 0 < token.value.expires_at - time.time() <= 60
    line, fields, body = server.got[0]
    assert line == "POST /token HTTP/1.1"
    assert fields["authorization"] == "Basic " + base64.b64encode(b"a%3Ab:s%2F1").decode()
    assert body == {"grant_type": "client_credentials", "scope": "x y", "audience": "api"}
    server.answer(access_token="t2", expires_in="60")
    form = OAuth2Form(grant="client_credentials", token_url=server.url, client_id="c", client_auth="post")
    assert (await token_client().obtain(form, "s/1")).value.text == "t2"
    assert server.got[1][2] == {"grant_type": "client_credentials", "client_id": "c", "client_secret": "s/1"}
    assert "authorization" not in server.got[1][1]


@pytest.mark.parametrize("given", ["r1", '{"refresh_token": "r1", "client_secret": "s"}'])
async def test_refresh_token(server: TokenServer, given: str) -> None:
    """Another refresh token takes the place of the one used, in the form in which that was given."""
    form = OAuth2Form(grant="refresh_token", token_url=server.url, client_id="c")
    more: tuple[dict[str, Any], ...] = ({}, {"refresh_token": "r1"})
    for brought in more:
        server.answer(access_token="t", **brought)
        assert (await token_client().obtain(form, given)).secret is None
    server.answer(access_token="t", refresh_token="r2")
    after = (await token_client().obtain(form, given)).secret
    assert after is not None
    server.answer(access_token="t")
    await token_client().obtain(form, after)
    sent = [body["refresh_token"] for _, _, body in server.got]
    assert sent == ["r1", "r1", "r1", "r2"]
    secret = [fields.get("authorization") for _, fields, _ in server.got]
    assert len(set(secret)) == 1 and (secret[0] is None) == (given == "r1")


@pytest.mark.parametrize(("algorithm", "key"), [("RS256", RSA_KEY), ("ES256", EC_KEY)])
async def test_jwt_bearer(server: TokenServer, algorithm: Any, key: Any) -> None:
    server.answer(access_token="t", expires_in=60)
    form = OAuth2Form(
        grant="jwt_bearer",
        token_url=server.url,
        issuer="me",
        subject="you",
        key_id="k1",
        algorithm=algorithm,
        scope="s",
    )
    await token_client().obtain(form, pem(key))
    body = server.got[0][2]
    assert (body["grant_type"], body["scope"]) == ("urn:ietf:params:oauth:grant-type:jwt-bearer", "s")
    claims = jwt.decode(body["assertion"], key.public_key(), algorithms=[algorithm], audience=server.url)
    assert (claims["iss"], claims["sub"]) == ("me", "you") and claims["exp"] - claims["iat"] == 300 and claims["jti"]
    assert jwt.get_unverified_header(body["assertion"])["kid"] == "k1"


async def test_google(server: TokenServer) -> None:
    server.answer(access_token="t", expires_in=60)
    file = json.dumps({"type": "service_account", "client_email": "a@b", "private_key": pem(RSA_KEY),
                       "private_key_id": "7", "token_uri": "https://evil.test/"})  # fmt: skip
    form = OAuth2Form(grant="google", token_url=server.url, scope="s1 s2")
    await token_client().obtain(form, file)
    claims = jwt.decode(server.got[0][2]["assertion"], RSA_KEY.public_key(), algorithms=["RS256"], audience=server.url)
    assert (claims["iss"], claims["scope"]) == ("a@b", "s1 s2")


async def test_github_app(server: TokenServer) -> None:
    server.answer(201, token="ghs_1", expires_at="2030-01-01T00:00:00Z")
    base = server.url.removesuffix("/token")
    form = OAuth2Form(grant="github_app", token_url=base, client_id="Iv1", installation_id="42")
    token = await token_client().obtain(form, pem(RSA_KEY))
    assert (token.value.text, token.value.expires_at) == ("ghs_1", 1893456000.0)
    line, fields, body = server.got[0]
    assert (line, body) == ("POST /app/installations/42/access_tokens HTTP/1.1", {})
    claims = jwt.decode(fields["authorization"].removeprefix("Bearer "), RSA_KEY.public_key(), algorithms=["RS256"])
    assert claims["iss"] == "Iv1" and claims["exp"] - claims["iat"] <= 600


@pytest.mark.parametrize(
    ("status", "said", "shown"),
    [
        (400, b'{"error": "invalid_grant", "error_description": "client-secret-1"}', "status 400 invalid_grant"),
        (400, b'{"error": "client-secret-1"}', "status 400"),
        (500, b"client-secret-1", "status 500"),
        (302, b"", "status 302"),
        (200, b"client-secret-1", "cannot be parsed"),
        (200, b"{}", "has no token"),
        (200, b'{"access_token": "t", "expires_in": "soon"}', "cannot be parsed"),
        (200, b" " * 70_000, "more than"),
    ],
)
async def test_no_token(server: TokenServer, status: int, said: bytes, shown: str) -> None:
    server.answers.append((status, said))
    form = OAuth2Form(grant="client_credentials", token_url=server.url, client_id="c")
    with pytest.raises(Unavailable, match=shown) as caught:
        await token_client().obtain(form, SECRET)
    assert SECRET not in str(caught.value) and len(server.got) == 1


@pytest.mark.parametrize(
    "said",
    [{"expires_in": "nan"}, {"expires_in": "inf"}, {"expires_in": 1e300}, {"expires_in": -5}, {"expires_in": 0},
     {"expires_at": "0001-01-01T00:00:00"}, {"expires_at": "1950-01-01T00:00:00Z"}],
)  # fmt: skip
async def test_times_that_cannot_be_meant(server: TokenServer, said: dict[str, Any]) -> None:
    """The engine could not take such a time; and one that is over would have the server ask every second."""
    server.answer(access_token="t", refresh_token="r2", **said)
    form = OAuth2Form(grant="refresh_token", token_url=server.url, client_id="c")
    token = await token_client().obtain(form, "r1")
    assert 50 < token.value.expires_at - time.time() <= 60 and token.secret == "r2"


async def test_private_addresses_are_not_asked(server: TokenServer) -> None:
    """Otherwise anyone who may create instances could have the server send requests to its own network."""
    form = OAuth2Form(grant="client_credentials", token_url=server.url, client_id="c")
    with pytest.raises(Unavailable, match="no address that is allowed"):
        await token_client("10.0.0.0/8").obtain(form, SECRET)
    assert server.got == []


@pytest.mark.parametrize(
    ("form", "secret"),
    [
        (OAuth2Form(grant="client_credentials", client_id="c"), SECRET),
        (OAuth2Form(grant="client_credentials", token_url="https://a.b/"), SECRET),
        (OAuth2Form(grant="client_credentials", token_url="https://a.b/", client_id="c"), ""),
        (OAuth2Form(grant="client_credentials", token_url="https://a.b:x/", client_id="c"), SECRET),
        (OAuth2Form(grant="client_credentials", token_url="https://a.b:99999/", client_id="c"), SECRET),
        (OAuth2Form(grant="client_credentials", token_url="https://[::1/", client_id="c"), SECRET),
        (OAuth2Form(grant="client_credentials", token_url="https://ä.b/", client_id="c"), SECRET),
        (OAuth2Form(grant="client_credentials", token_url="https://a.b/\n", client_id="c"), SECRET),
        (OAuth2Form(grant="jwt_bearer", token_url="https://a.b/", issuer="i"), SECRET),
        (OAuth2Form(grant="jwt_bearer", token_url="https://a.b/", issuer="i"), pem(EC_KEY)),
        (OAuth2Form(grant="jwt_bearer", token_url="https://a.b/", issuer="i", algorithm="ES256"), pem(RSA_KEY)),
        (OAuth2Form(grant="jwt_bearer", token_url="https://a.b/"), pem(RSA_KEY)),
        (OAuth2Form(grant="google", scope="s"), SECRET),
        (OAuth2Form(grant="google"), "{}"),
        (OAuth2Form(grant="github_app", client_id="1"), pem(RSA_KEY)),
        (OAuth2Form(grant="refresh_token", token_url="https://a.b/"), '{"client_secret": "client-secret-1"}'),
    ],
)
def test_refused_when_configured(form: OAuth2Form, secret: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_secret(form, secret)
    assert SECRET not in str(caught.value) and "PRIVATE" not in str(caught.value)


# ── Through the engine ───────────────────────────────────────────────────────────────────────────


def rules_with(form: OAuth2Form) -> dict[str, CredentialPolicy]:
    rule = InjectRule(hosts=(HOST,), ports=tuple(conftest.PORTS), as_=InjectAs(oauth2=form))
    return {"KEY": CredentialPolicy(source=CredentialSource(env="R"), inject=(rule,))}


class Kept:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str, str]] = []

    async def __call__(self, instance_id: str, env: str, used: str, new: str) -> None:
        self.calls.append((instance_id, env, used, new))


@pytest.fixture
async def brokered(world: World) -> AsyncGenerator[tuple[Broker, Kept]]:
    kept = Kept()
    broker = Broker(world.egress, Sources({}, Processes()), token_client(), kept)
    await world.nursery.start(broker.run)
    yield broker, kept


async def test_waiting_requests_cause_one_renewal(
    world: World, server: TokenServer, brokered: tuple[Broker, Kept]
) -> None:
    """They get the token when it comes; the guest sees neither it nor the refresh token, which is stored first."""
    broker, kept = brokered
    server.wait = trio.Event()
    server.answer(access_token="t-one", expires_in=60, refresh_token="r-two")
    form = OAuth2Form(grant="refresh_token", token_url=server.url, client_id="c")
    await broker.set_policy("inst-a", GUEST, rules_with(form), {"R": "r-one"})
    seen: list[bytes] = []

    async def ask() -> None:
        status, fields, body = await world.get(fields="Authorization: Bearer mock-KEY\r\n")
        seen.append(repr((status, fields, body)).encode())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        while (await world.egress.statistics()).counters["requests"] < 5:
            await trio.sleep(0.01)
        server.wait.set()
    assert [request.all("authorization") for request in world.origin.requests] == [["Bearer t-one"]] * 5
    assert len(server.got) == 1
    assert kept.calls == [("inst-a", "R", "r-one", "r-two")]
    assert not any(secret in each for each in seen for secret in (b"t-one", b"r-one", b"r-two"))
    await broker.remove("inst-a")
    assert broker._supplies == {}


async def test_instances_share_no_token(world: World, server: TokenServer, brokered: tuple[Broker, Kept]) -> None:
    """Also if all else is the same; what ends with one instance is its own token."""
    broker, _ = brokered
    server.answer(access_token="t-first", expires_in=600)
    server.answer(access_token="t-second", expires_in=600)
    form = OAuth2Form(grant="client_credentials", token_url=server.url, client_id="c")
    await broker.set_policy("inst-a", GUEST, rules_with(form), {"R": SECRET})
    assert (await world.get())[0] == 200
    await broker.set_policy("inst-b", "127.0.1.2", rules_with(form), {"R": SECRET})
    for source in ("127.0.1.2", GUEST):
        assert (await world.get(source=source))[0] == 200
    await broker.remove("inst-a")
    assert (await world.get(source="127.0.1.2"))[0] == 200
    used = [request.all("authorization")[0].removeprefix("Bearer t-") for request in world.origin.requests]
    assert used == ["first", "second", "first", "second"]


async def test_renewal_under_load(world: World, server: TokenServer, brokered: tuple[Broker, Kept]) -> None:
    """A token of one second is replaced again and again; no request fails or leaves with an expired one."""
    broker, kept = brokered
    for number in range(20):
        server.answer(access_token=f"t-{number}", expires_in=2, refresh_token=f"r-{number + 1}")
    form = OAuth2Form(grant="refresh_token", token_url=server.url)
    await broker.set_policy("inst-a", GUEST, rules_with(form), {"R": "r-0"})
    statuses: set[int] = set()
    while len(server.got) < 4:
        wire = await world.tls()
        for _ in range(20):
            status, _, _ = await world.ask(wire, f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            statuses.add(status)
            await trio.sleep(0.01)
        await trio.aclose_forcefully(wire.stream)
    assert statuses == {200}
    assert [body["refresh_token"] for _, _, body in server.got][:4] == ["r-0", "r-1", "r-2", "r-3"]
    assert [call[2:] for call in kept.calls][:3] == [("r-0", "r-1"), ("r-1", "r-2"), ("r-2", "r-3")]
    used = [request.all("authorization")[0] for request in world.origin.requests]
    assert len(set(used)) >= 3 and used == sorted(used, key=lambda value: int(value.rpartition("-")[2]))


async def test_rotated_value_is_stored(store: Store, tmp_path: Path) -> None:
    """Unless a client of the API has set another one meanwhile, or the instance is gone."""
    sealer = load_sealer(tmp_path)
    egress: Any = type("E", (), {"sealer": sealer})
    keep = RotatedSecrets(egress, store).keep
    await store.write(lambda txn: txn.put(SECRETS, "i", SealedSecrets(sealer.seal("i", {"R": "1", "S": "x"}))))

    def stored() -> dict[str, str]:
        row = store.read(lambda txn: txn.get(SECRETS, "i"))
        assert row is not None
        return sealer.open("i", row.sealed)

    await keep("i", "R", "1", "2")
    assert stored() == {"R": "2", "S": "x"}
    await keep("i", "R", "1", "3")
    assert stored() == {"R": "2", "S": "x"}
    await keep("gone", "R", "1", "3")


@pytest.mark.parametrize(
    "made",
    [
        oauth2._Refresh(SECRET, SECRET),
        oauth2._ServiceAccount("a", SECRET),
        oauth2.Token(Value(SECRET), SECRET),
        oauth2.Request("https://a.b/", {"authorization": SECRET}, SECRET.encode()),
        transforms._AwsKeys("A", SECRET, SECRET),
        transforms.Compiled(transforms.Kind.HEADER, "a", SECRET, (SECRET,)),
    ],
)
def test_no_repr_has_a_secret(made: object) -> None:
    """Tracebacks and logs show them."""
    assert SECRET not in repr(made)
