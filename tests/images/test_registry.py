"""Registries that fail, throttle, redirect and ask for logins; and Debian's with login and TLS."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trustme

from hypeman.config import ImagesConfig
from hypeman.errors import Conflict, InternalError, NotFound, RateLimited
from hypeman.images.reference import parse_reference
from hypeman.images.registry import Patience, RegistryClient, RegistryError
from hypeman.images.types import CreateImageRequest, Image, ImageStatus, PushCredentials
from hypeman.paths import Paths
from tests.images.conftest import Start, free_port, push, running_registry
from tests.images.faults import FaultyRegistry, Request, Response, Rule, serve_bytes
from tests.images.layout import ImageFiles, directory, entry, tar

DATA = bytes(range(256)) * 4000
HTPASSWD = b"ann:$2y$04$CovU8JoQCpdHbJaokMRdOOlOIt3iz/jYz5WH1LJS2TrqbpST1xrqS\n"
"""Login ann, password secret."""


def image_files() -> ImageFiles:
    return ImageFiles([tar(directory("d")), tar(entry("d/data", data=DATA))], compression="none")


async def pull(registry: FaultyRegistry, make_images: Start, **settings: object) -> Image:
    images = await make_images(insecure_registries=(registry.host,), **settings)
    name = f"{registry.host}/some/image"
    await images.create(CreateImageRequest(name))
    with trio.fail_after(30):
        return await images.wait_final(name)


def big_blob(request: Request) -> bool:
    return "/blobs/" in request.path and request.path.endswith(BIG)


FILES = image_files()
BIG = str(FILES.layer_descriptors[1]["digest"])
BYTES = FILES.blobs[BIG]


def faults(*answers: Response | None) -> Rule:
    """A rule that gives these answers to the first requests for the big layer."""
    left = list(answers)

    def rule(request: Request) -> Response | None:
        return left.pop(0) if left and big_blob(request) else None

    return rule


@pytest.mark.parametrize(
    "answers",
    [
        [Response(500), Response(503), Response(502)],
        [Response(200, {}, BYTES, cut=70_000, then="close")],
        [Response(200, {}, BYTES, cut=70_000, then="reset"), Response(500)],
        [Response(200, {}, BYTES, cut=300_000, then="stall")],
        [Response(200, {}, BYTES, cut=0, then="stall")],
    ],
    ids=["500", "short", "reset", "stall", "silence"],
)
async def test_trouble_that_passes(answers: list[Response], registry: FaultyRegistry, make_images: Start) -> None:
    """The pull goes on and ends well; what had arrived is not asked for again."""
    registry.serve("some/image", FILES)
    registry.rules.append(faults(*answers))
    image = await pull(registry, make_images)
    assert image.status is ImageStatus.READY, image.error
    asked = [request.headers.get("range") for request in registry.requests if big_blob(request)]
    cut = next((answer.cut for answer in answers if answer.cut), 0)
    assert asked[0] is None
    assert asked[-1] == (f"bytes={cut}-" if cut else None)


async def test_many_short_answers(registry: FaultyRegistry, make_images: Start) -> None:
    """As long as every answer brings something, there is no end to the patience."""
    registry.serve("some/image", FILES)

    def rule(request: Request) -> Response | None:
        if not big_blob(request):
            return None
        whole = serve_bytes(request, BYTES)
        whole.cut, whole.then = 100_000, "reset"
        return whole

    registry.rules.append(rule)
    image = await pull(registry, make_images)
    assert image.status is ImageStatus.READY, image.error
    assert len([request for request in registry.requests if big_blob(request)]) == -(-len(BYTES) // 100_000)


@pytest.mark.parametrize("left", ["a part", "a damaged part", "all", "too much"])
async def test_a_download_resumes_after_a_restart(
    left: str, registry: FaultyRegistry, make_images: Start, paths: Paths
) -> None:
    """A server that stops in a download leaves what it has; the next one asks for the rest, and checks all of it."""
    data = os.urandom(3 << 20)
    files = ImageFiles([tar(entry("data", data=data))], compression="none")
    (digest,) = (str(layer["digest"]) for layer in files.layer_descriptors)
    whole = files.blobs[digest]
    registry.serve("some/image", files)

    def rule(request: Request) -> Response | None:
        stalls = Response(200, {}, whole, cut=len(whole) * 6 // 10, then="stall")
        return stalls if request.path.endswith(digest) else None

    registry.rules.append(rule)
    name = f"{registry.host}/some/image"
    partial = paths.blobs / "partial" / digest.removeprefix("sha256:")
    async with trio.open_nursery() as first:
        images = await make_images(
            insecure_registries=(registry.host,), nursery=first, patience=Patience(silence=600, grace=600)
        )
        await images.create(CreateImageRequest(name))
        with trio.fail_after(30):
            while not sum(layer.done for layer in (await images.progress(name)).layers):
                await trio.sleep(0.01)
        first.cancel_scope.cancel()
    have = partial.read_bytes()
    assert 0 < len(have) < len(whole) and whole.startswith(have)
    match left:
        case "a damaged part":
            partial.write_bytes(b"x" + have[1:])
        case "all":
            partial.write_bytes(whole)
        case "too much":
            partial.write_bytes(whole + b"x")
    for name_of_nobody in ("0" * 64, "import-0123"):
        (partial.parent / name_of_nobody).write_bytes(b"x")
    registry.rules.clear()
    registry.requests.clear()
    images = await make_images(insecure_registries=(registry.host,))
    with trio.fail_after(30):
        image = await images.wait_final(name)
    assert image.status is ImageStatus.READY, image.error
    asked = [request.headers.get("range") for request in registry.requests if request.path.endswith(digest)]
    rest = f"bytes={len(have)}-"
    assert asked == {"a part": [rest], "a damaged part": [rest, None], "all": [], "too much": [None]}[left]
    with trio.fail_after(30):
        while os.listdir(partial.parent):  # the collection after the last job
            await trio.sleep(0.01)


@pytest.mark.parametrize(
    "second",
    [
        Response(206, {"Content-Range": f"bytes 0-99/{len(BYTES)}"}, BYTES[:100]),
        Response(206, {"Content-Range": f"bytes 70001-{len(BYTES) - 1}/{len(BYTES)}"}, BYTES[70_001:]),
        Response(206, {}, BYTES[70_000:]),
        Response(416),
        Response(200, {}, BYTES),
    ],
    ids=["other range", "shifted range", "no range", "416", "ranges unknown"],
)
async def test_wrong_range(second: Response, registry: FaultyRegistry, make_images: Start) -> None:
    """An answer that does not continue where we stopped is not mixed with what we have."""
    registry.serve("some/image", FILES)
    registry.rules.append(faults(Response(200, {}, BYTES, cut=70_000, then="reset"), second))
    image = await pull(registry, make_images)
    assert image.status is ImageStatus.READY, image.error


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Response(500), "answers with status 500"),
        (Response(200, {}, BYTES, cut=0, then="stall"), "has gone silent"),
        (Response(200, {}, BYTES, cut=0, then="reset"), "connection broke"),
        (Response(404), "has no blob"),
        (Response(200, {"Content-Length": str(len(BYTES) + 4)}, BYTES + b"more"), "bytes long at the registry"),
        (Response(200, {"Transfer-Encoding": "chunked", "Content-Length": ""}, b""), "connection broke"),
    ],
    ids=["500", "stall", "reset", "404", "too long", "nonsense"],
)
async def test_trouble_that_stays(answer: Response, reason: str, registry: FaultyRegistry, make_images: Start) -> None:
    registry.serve("some/image", FILES)
    registry.rules.append(lambda request: answer if big_blob(request) else None)
    image = await pull(registry, make_images)
    assert image.status is ImageStatus.FAILED
    assert reason in (image.error or "")


async def test_throttled_at_once(registry: FaultyRegistry, make_images: Start) -> None:
    """While the client waits for the digest, 429 is its answer too, with the time to wait."""
    registry.rules.append(lambda request: Response(429, {"Retry-After": "17"}))
    images = await make_images(insecure_registries=(registry.host,))
    with pytest.raises(RateLimited) as caught:
        await images.create(CreateImageRequest(f"{registry.host}/some/image"))
    assert caught.value.retry_after == 17 and caught.value.status == 429


async def test_throttled_in_the_background(registry: FaultyRegistry, make_images: Start) -> None:
    """Later we wait as long as Retry-After says."""
    registry.serve("some/image", FILES)
    registry.rules.append(faults(Response(429, {"Retry-After": "0"}), Response(429, {"Retry-After": "0"})))
    assert (await pull(registry, make_images)).status is ImageStatus.READY


async def test_redirects_carry_no_login(registry: FaultyRegistry, make_images: Start) -> None:
    """Blobs come from another host, which must not see the credentials of the registry."""
    async with trio.open_nursery() as nursery:
        store = FaultyRegistry()
        await nursery.start(store.run)
        store.rules.append(lambda request: serve_bytes(request, registry.blobs.get(request.path[1:])))
        registry.serve("some/image", FILES)
        registry.rules.append(ask_for_basic("user", "secret"))
        registry.rules.append(
            lambda request: (
                Response(307, {"Location": f"http://{store.host}/{request.path.rpartition('/')[2]}"})
                if "/blobs/" in request.path
                else None
            )
        )
        images = await make_images(insecure_registries=(registry.host,))
        name = f"{registry.host}/some/image"
        await images.create(CreateImageRequest(name, credentials=PushCredentials("user", "secret")))
        assert (await images.wait_final(name)).status is ImageStatus.READY
        assert store.requests and not [request for request in store.requests if "authorization" in request.headers]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("location", ["http://127.0.0.1:1/x", "file:///etc/passwd", "/v2/loop"])
async def test_bad_redirects(location: str, registry: FaultyRegistry, make_images: Start) -> None:
    registry.rules.append(lambda request: Response(302, {"Location": location}))
    images = await make_images(insecure_registries=(registry.host,))
    with pytest.raises(InternalError, match=r"redirects|broke|answer"):
        await images.create(CreateImageRequest(f"{registry.host}/some/image"))


class Names(trio.abc.HostnameResolver):
    """Names that need no server; every other host is an address."""

    known = {"registry.test": "198.51.100.7", "blobs.test": "198.51.100.8", "inward.test": "127.0.0.1"}

    async def getaddrinfo(self, host: Any, port: Any, *_: Any, **__: Any) -> Any:
        address = self.known.get(host.decode() if isinstance(host, bytes) else host, host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0))]

    async def getnameinfo(self, *_: Any) -> Any:
        raise AssertionError("not asked for")


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("blobs.test", True),
        ("10.0.0.1", True),
        ("inward.test", False),
        ("127.0.0.1:6443", False),
        ("127.8.8.8", False),
        ("[::1]", False),
        ("[::ffff:127.0.0.1]", False),
        ("0.0.0.0", False),
        ("169.254.169.254", False),
        ("[fe80::1]", False),
    ],
)
async def test_a_registry_sends_us_to_no_service_of_this_host(target: str, allowed: bool) -> None:
    trio.socket.set_custom_hostname_resolver(Names())
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host != "registry.test":
            return httpx.Response(404)
        return httpx.Response(307, headers={"Location": f"http://{target}/latest/meta-data"})

    client = RegistryClient(ImagesConfig(insecure_registries=("registry.test",)))
    client._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    with pytest.raises(NotFound if allowed else RegistryError):
        await client.manifest(parse_reference("registry.test/some/image"), wait=False)
    assert (len(asked) > 1) == allowed, asked
    await client.aclose()


async def pull_through(answer: Callable[[httpx.Request], httpx.Response], error: type[Exception], words: str) -> None:
    client = RegistryClient(ImagesConfig(insecure_registries=("registry.test",)))
    client._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    with pytest.raises(error, match=words):
        await client.manifest(parse_reference("registry.test/some/image"), wait=False)
    await client.aclose()


async def test_the_address_that_was_checked_is_dialled() -> None:
    """A name that is public when it is looked at, and leads here when it is dialled."""
    names = Names()
    trio.socket.set_custom_hostname_resolver(names)
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        names.known = {**names.known, "blobs.test": "127.0.0.1"}
        if request.headers["host"] != "registry.test":
            return httpx.Response(404)
        names.known = {**names.known, "blobs.test": "198.51.100.8"}
        return httpx.Response(307, headers={"Location": "http://blobs.test:81/x"})

    await pull_through(answer, NotFound, "has no")
    last = asked[-1]
    assert (last.url.host, last.url.port, last.headers["host"]) == ("198.51.100.8", 81, "blobs.test:81")
    assert last.extensions["sni_hostname"] == "blobs.test", "whose certificate is wanted"


async def test_a_registry_that_moves_here_gains_nothing() -> None:
    """Its own name leads to this host after its first answer, which names another port."""
    names = Names()
    trio.socket.set_custom_hostname_resolver(names)
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        names.known = {**names.known, "registry.test": "127.0.0.1"}
        return httpx.Response(307, headers={"Location": "http://registry.test:6443/secrets"})

    await pull_through(answer, RegistryError, "an address of this host")
    assert len(asked) == 1


async def test_a_token_service_is_not_on_this_host() -> None:
    trio.socket.set_custom_hostname_resolver(Names())

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.host == "registry.test", "no other host is asked"
        challenge = 'Bearer realm="http://169.254.169.254/latest/meta-data",service="x"'
        return httpx.Response(401, headers={"WWW-Authenticate": challenge})

    await pull_through(answer, RegistryError, "an address of this host")


async def test_plain_http_only_by_configuration(registry: FaultyRegistry, make_images: Start) -> None:
    images = await make_images()
    with pytest.raises(InternalError):
        await images.create(CreateImageRequest(f"{registry.host}/some/image"))
    assert not registry.requests


async def test_mirror_first(registry: FaultyRegistry, make_images: Start) -> None:
    """A mirror is asked first, without the login of the registry; where it fails, the registry is."""
    registry.serve("library/thing", FILES)
    registry.rules.append(lambda request: Response(500) if big_blob(request) and len(registry.requests) < 99 else None)
    async with trio.open_nursery() as nursery:
        own = FaultyRegistry()
        await nursery.start(own.run)
        own.serve("library/thing", FILES)
        images = await make_images(
            insecure_registries=(registry.host, own.host), mirrors={own.host: ("127.0.0.1:1", registry.host)}
        )
        name = f"{own.host}/library/thing"
        await images.create(CreateImageRequest(name))
        assert (await images.wait_final(name)).status is ImageStatus.READY
        assert [request.path.rpartition("/")[2] for request in own.requests] == [BIG]
        nursery.cancel_scope.cancel()


# ── Logins ───────────────────────────────────────────────────────────────────────────────────────


def ask_for_basic(username: str, password: str) -> Rule:
    wanted = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()

    def rule(request: Request) -> Response | None:
        if request.headers.get("authorization") == wanted:
            return None
        return Response(401, {"WWW-Authenticate": 'Basic realm="here"'})

    return rule


def ask_for_token(registry: FaultyRegistry, given: list[str]) -> Rule:
    """A token service beside the registry; ``given`` collects the logins it saw."""

    def rule(request: Request) -> Response | None:
        if request.path.startswith("/token"):
            given.append(request.headers.get("authorization", request.body.decode()))
            assert "scope=repository%3Asome%2Fimage%3Apull" in request.path + request.body.decode()
            return Response(200, {}, json.dumps({"token": "abc", "expires_in": 300}).encode())
        if request.headers.get("authorization") == "Bearer abc":
            return None
        challenge = f'Bearer realm="http://{registry.host}/token",service="a, b",scope="repository:x:pull"'
        return Response(401, {"WWW-Authenticate": challenge})

    return rule


async def test_token(registry: FaultyRegistry, make_images: Start) -> None:
    """Nobody in particular gets a token, once for all requests."""
    registry.serve("some/image", FILES)
    given: list[str] = []
    registry.rules.append(ask_for_token(registry, given))
    assert (await pull(registry, make_images)).status is ImageStatus.READY
    assert given == [""]


@pytest.mark.parametrize(
    ("stored", "seen"),
    [
        ({"auth": base64.b64encode(b"ann:pass:word").decode()}, "Basic " + base64.b64encode(b"ann:pass:word").decode()),
        ({"username": "ann", "password": "x"}, "Basic " + base64.b64encode(b"ann:x").decode()),
        ({"identitytoken": "refresh"}, "refresh_token=refresh"),
    ],
)
async def test_login_from_docker_config(
    stored: dict[str, str], seen: str, registry: FaultyRegistry, make_images: Start, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.host: stored}}))
    registry.serve("some/image", FILES)
    given: list[str] = []
    registry.rules.append(ask_for_token(registry, given))
    image = await pull(registry, make_images, docker_config=str(tmp_path / "config.json"))
    assert image.status is ImageStatus.READY, image.error
    assert len(given) == 1 and seen in given[0]


async def test_registry_token_is_sent_as_it_is(registry: FaultyRegistry, make_images: Start) -> None:
    registry.serve("some/image", FILES)
    given: list[str] = []
    registry.rules.append(ask_for_token(registry, given))
    images = await make_images(insecure_registries=(registry.host,))
    name = f"{registry.host}/some/image"
    await images.create(CreateImageRequest(name, credentials=PushCredentials(registry_token="abc")))
    assert (await images.wait_final(name)).status is ImageStatus.READY
    assert not given


async def test_wrong_login(registry: FaultyRegistry, make_images: Start) -> None:
    registry.serve("some/image", FILES)
    registry.rules.append(ask_for_basic("user", "secret"))
    images = await make_images(insecure_registries=(registry.host,))
    with pytest.raises(NotFound, match="needs a login") as caught:
        await images.create(
            CreateImageRequest(f"{registry.host}/some/image", credentials=PushCredentials("user", "guessed"))
        )
    assert "guessed" not in str(caught.value)


async def test_token_service_that_is_not_safe(registry: FaultyRegistry, make_images: Start) -> None:
    registry.rules.append(lambda request: Response(401, {"WWW-Authenticate": 'Bearer realm="file:///etc/passwd"'}))
    images = await make_images(insecure_registries=(registry.host,))
    with pytest.raises(InternalError, match="no safe token service"):
        await images.create(CreateImageRequest(f"{registry.host}/some/image"))


async def test_another_login_while_pulling(registry: FaultyRegistry, make_images: Start) -> None:
    """One pull, one login: a request with another one is refused, a request with the same one joins."""
    registry.serve("some/image", FILES)
    registry.rules.append(lambda request: Response(200, {}, BYTES, cut=10, then="stall") if big_blob(request) else None)
    images = await make_images(insecure_registries=(registry.host,))
    name = f"{registry.host}/some/image"
    first = PushCredentials("one", "1")
    await images.create(CreateImageRequest(name, credentials=first))
    await images.create(CreateImageRequest(name, credentials=first))
    with pytest.raises(Conflict) as caught:
        await images.create(CreateImageRequest(name, credentials=PushCredentials("two", "2")))
    assert caught.value.code == "credential_conflict"


@pytest.mark.real
async def test_debian_registry_with_login_and_tls(make_images: Start, tmp_path: Path) -> None:
    """TLS by a CA of our own, a login by htpasswd; without either the pull is refused and says why."""
    authority = trustme.CA()
    server = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    server.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    (tmp_path / "htpasswd").write_bytes(HTPASSWD)
    extra = (
        f"  tls: {{certificate: {tmp_path}/cert.pem, key: {tmp_path}/key.pem}}\n"
        f"auth: {{htpasswd: {{realm: test, path: {tmp_path}/htpasswd}}}}\n"
    )
    layout = FILES.write_layout(tmp_path / "oci")
    with running_registry(tmp_path / "registry", extra) as host:
        name = f"{host}/some/image:1"
        await trio.to_thread.run_sync(
            lambda: push(layout, name, "--dest-creds", "ann:secret", "--dest-tls-verify=false")
        )
        images = await make_images(ca_file=str(tmp_path / "ca.pem"))
        login = PushCredentials("ann", "secret")
        with pytest.raises(NotFound, match="needs a login"):
            await images.create(CreateImageRequest(name))
        await images.create(CreateImageRequest(name, credentials=login))
        with trio.fail_after(30):
            assert (await images.wait_final(name)).status is ImageStatus.READY
        stranger = await make_images()
        with pytest.raises(InternalError, match="is not who it claims to be"):
            await stranger.create(CreateImageRequest(name, credentials=login))


async def test_proxy_of_the_environment(
    registry: FaultyRegistry, make_images: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY is used, NO_PROXY is kept to."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://{registry.host}")
    monkeypatch.setenv("NO_PROXY", "")
    registry.serve("x", FILES)
    strip = "http://registry.test/"

    def rule(request: Request) -> Response | None:
        if request.path.startswith(strip):
            return registry._proper(Request("GET", request.path[len(strip) - 1 :], request.headers))
        return None

    registry.rules.append(rule)
    images = await make_images(insecure_registries=("registry.test",))
    await images.create(CreateImageRequest("registry.test/x"))
    with trio.fail_after(20):
        assert (await images.wait_final("registry.test/x")).status is ImageStatus.READY


async def test_nobody_there(make_images: Start) -> None:
    host = f"127.0.0.1:{free_port()}"
    images = await make_images(insecure_registries=(host,))
    with pytest.raises(InternalError, match=host):
        await images.create(CreateImageRequest(f"{host}/x"))


@pytest.mark.parametrize("fault", [Response(503), Response(200, {}, b"x" * 100, cut=3, then="reset")])
async def test_a_manifest_is_asked_for_again(fault: Response, registry: FaultyRegistry, make_images: Start) -> None:
    """While the client waits: a registry that fails once is no failure of the pull."""
    registry.serve("some/image", FILES)
    faults = [fault]
    registry.rules.append(lambda request: faults.pop() if faults and "/manifests/" in request.path else None)
    assert (await pull(registry, make_images)).status is ImageStatus.READY
    assert not faults


@pytest.mark.parametrize("host", ["localhost:1", "registry.invalid", "[:]"])
async def test_a_registry_that_cannot_be_reached(host: str, make_images: Start) -> None:
    """A gateway's failure with the name of the host, and no fault of the server's own."""
    images = await make_images(insecure_registries=(host,))
    with pytest.raises(RegistryError, match=re.escape(host)) as caught:
        await images.create(CreateImageRequest(f"{host}/some/image"))
    assert caught.value.status in (502, 504)


async def test_null_in_a_token_reply(registry: FaultyRegistry, make_images: Start) -> None:
    registry.serve("some/image", FILES)
    header = {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/token"'}

    def answer(request: Request) -> Response | None:
        if request.path.startswith("/token"):
            return Response(body=b'{"token": null, "access_token": "abc", "expires_in": null}')
        return None if request.headers.get("authorization") == "Bearer abc" else Response(401, header)

    registry.rules.append(answer)
    assert (await pull(registry, make_images)).status is ImageStatus.READY
