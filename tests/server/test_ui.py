"""The web UI's files, logins and sessions, and everything that must not get in."""

from __future__ import annotations

import gzip
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from websockets.sync.client import connect

from hypeman.actor import Actor, current_actor
from hypeman.instances.model.types import InstanceState, StopInstanceRequest
from hypeman.server.app import ApiApp, build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.serve import Server, bind_unix
from hypeman.server.sessions import (
    LINK,
    MAX_OF_ONE,
    MAX_SESSIONS,
    SESSION,
    SESSIONS,
    LoginRequest,
    Sessions,
    cookie_name,
    is_local_name,
    same_host,
)
from hypeman.server.ui import POLICY
from hypeman.store import Store
from hypeman.tokens import LOCAL, Caller, mint
from tests.fakes.services import FakeWorld
from tests.server.conftest import SECRET, Answer, SocketClient, read_answer

HOST = "hypeman.test:8080"
PAGE = {"Host": HOST, "Origin": f"http://{HOST}"}
"""Headers of a request by our own page."""


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store.open(tmp_path / "store")
    async with store.serving():
        yield store
    store.close()


@pytest.fixture
def sessions(store: Store, clock: Clock) -> Sessions:
    return Sessions(store, SECRET, now=clock)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A UI as the build leaves it, and next to it a file that must not be served."""
    folder = tmp_path / "ui"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>the page</title>")
    (folder / "assets" / "app-1234.js").write_text("'use strict';" * 100)
    (tmp_path / "secret.txt").write_text("secret")
    return folder


@pytest.fixture
def app(world: FakeWorld, sessions: Sessions, folder: Path) -> ApiApp:
    return build_app(world.services, ServerSettings(SECRET, url="http://localhost:8080"), sessions=sessions, ui=folder)


@pytest.fixture
async def address(app: ApiApp, nursery: trio.Nursery) -> tuple[str, int]:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    await nursery.start(Server(app, plain=app.plain).run, [listening], trio.Event())
    return listening.getsockname()  # type: ignore[no-any-return]


Ask = Callable[..., Any]


@pytest.fixture
def ask(address: tuple[str, int]) -> Ask:
    return SocketClient(address).ask


async def log_in(ask: Ask, *, scopes: list[str] | None = None, headers: dict[str, str] = PAGE) -> str:
    """The header Cookie of a new session."""
    token = mint(SECRET, subject="ann", scopes=scopes)
    answer = await ask("POST", "/ui/session", json={"token": token}, headers=headers)
    assert answer.status_code == 200, await answer.get_data()
    return str(answer.headers["Set-Cookie"].partition(";")[0])


async def code_of(answer: Answer) -> tuple[int, str]:
    return answer.status_code, (await answer.get_json())["code"]


# ── Files ────────────────────────────────────────────────────────────────────────────────────────


async def test_the_page_has_a_strict_policy_and_is_checked_each_time(ask: Ask) -> None:
    answer = await ask("GET", "/ui/")
    assert answer.status_code == 200
    assert "the page" in await answer.get_data(as_text=True)
    assert answer.headers["Content-Security-Policy"] == POLICY
    assert "unsafe" not in POLICY
    assert "frame-ancestors 'none'" in POLICY
    assert "default-src 'none'" in POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-cache"
    again = await ask("GET", "/ui/", headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, await again.get_data()) == (304, b"")


async def test_assets_are_compressed_and_kept_for_good(ask: Ask, folder: Path) -> None:
    plain = await ask("GET", "/ui/assets/app-1234.js")
    packed = await ask("GET", "/ui/assets/app-1234.js", headers={"Accept-Encoding": "br, gzip"})
    wanted = (folder / "assets" / "app-1234.js").read_bytes()
    assert await plain.get_data() == wanted
    assert "Content-Encoding" not in plain.headers
    assert gzip.decompress(await packed.get_data()) == wanted
    assert packed.headers["Content-Encoding"] == "gzip"
    assert "immutable" in packed.headers["Cache-Control"]
    assert plain.content_type.startswith("text/javascript")


async def test_every_path_of_the_page_is_the_page(ask: Ask) -> None:
    answer = await ask("GET", "/ui/instances/web")
    assert (answer.status_code, answer.content_type) == (200, "text/html; charset=utf-8")
    assert (await ask("GET", "/ui/assets/none")).status_code == 404
    assert (await ask("GET", "/ui/none.js")).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/ui/../secret.txt", "/ui/%2e%2e/secret.txt", "/ui/..%2fsecret.txt", "/ui/assets/..%2f..%2fsecret.txt",
     "/ui//etc/passwd.txt", "/ui/%00.txt", "/ui/assets/%2e%2e/%2e%2e/secret.txt", "/ui/..\\secret.txt"],
)  # fmt: skip
async def test_no_path_leads_out_of_the_folder(ask: Ask, path: str) -> None:
    answer = await ask("GET", path)
    assert answer.status_code == 404
    assert b"secret\n" not in await answer.get_data()
    assert await answer.get_data() != b"secret"


async def test_a_ui_that_was_not_built_says_so(world: FakeWorld, sessions: Sessions) -> None:
    app = build_app(world.services, ServerSettings(SECRET), sessions=sessions, ui=None)
    answer: Any = await app.test_client().get("/ui/")
    assert answer.status_code == 404
    assert "make ui" in (await answer.get_json())["message"]


async def test_only_a_browser_is_redirected_to_the_ui(ask: Ask) -> None:
    answer = await ask("GET", "/", headers={"Accept": "text/html,*/*"})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/ui/")
    for accept in ("application/json", "*/*"):
        assert await code_of(await ask("GET", "/", headers={"Accept": accept})) == (404, "Not Found")


# ── Logging in and out ───────────────────────────────────────────────────────────────────────────


async def test_a_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(ask: Ask, world: FakeWorld) -> None:
    world.instances.add("web")
    token = mint(SECRET, subject="ann", scopes=["instance:read"])
    answer = await ask("POST", "/ui/session", json={"token": token}, headers=PAGE)
    flags = {part.strip().split("=")[0] for part in answer.headers["Set-Cookie"].split(";")[1:]}
    assert {"HttpOnly", "SameSite", "Path", "Max-Age"} <= flags
    assert "SameSite=Strict" in answer.headers["Set-Cookie"]
    assert answer.headers["Cache-Control"] == "no-store"
    found = await answer.get_json()
    assert (found["subject"], found["scopes"]) == ("ann", ["instance:read"])
    cookie = answer.headers["Set-Cookie"].partition(";")[0]
    assert token not in cookie
    listed = await ask("GET", "/instances", headers={"Host": HOST, "Cookie": cookie})
    assert [one["name"] for one in await listed.get_json()] == ["web"]
    refused = await ask("POST", "/instances/web/stop", headers={**PAGE, "Cookie": cookie})
    assert await code_of(refused) == (403, "Forbidden")


async def test_over_tls_the_cookie_is_secure(ask: Ask) -> None:
    token = mint(SECRET, subject="ann")
    headers = {"Host": "ops.example.com", "Origin": "https://ops.example.com"}
    answer = await ask("POST", "/ui/session", json={"token": token}, headers=headers)
    assert "Secure" in answer.headers["Set-Cookie"]


@pytest.mark.parametrize("body", [{}, {"token": "x", "link": "y"}, {"token": "nonsense"}, {"link": "nonsense"}, []])
async def test_what_is_no_login(ask: Ask, body: Any) -> None:
    answer = await ask("POST", "/ui/session", json=body, headers=PAGE)
    assert answer.status_code in (400, 401)
    assert "Set-Cookie" not in answer.headers


async def test_after_a_logout_the_cookie_is_worthless(ask: Ask) -> None:
    cookie = await log_in(ask)
    assert (await ask("GET", "/ui/session", headers={"Host": HOST, "Cookie": cookie})).status_code == 200
    out = await ask("DELETE", "/ui/session", headers={**PAGE, "Cookie": cookie})
    assert (out.status_code, "Max-Age=0" in out.headers["Set-Cookie"]) == (204, True)
    for path in ("/ui/session", "/instances"):
        assert (await ask("GET", path, headers={"Host": HOST, "Cookie": cookie})).status_code == 401


async def test_a_session_ends_with_its_time_its_token_and_the_secret(
    store: Store, sessions: Sessions, clock: Clock
) -> None:
    long, ends = await sessions.begin(LOCAL, HOST)
    assert ends == clock.now + SESSION
    short, _ = await sessions.begin(Caller("ann", frozenset(["image:read"]), clock.now + 60), HOST)
    assert sessions.caller(short, HOST) == Caller("ann", frozenset(["image:read"]), clock.now + 60)
    with pytest.raises(Exception, match="has ended"):
        Sessions(store, "another secret", now=clock).caller(long, HOST)
    assert sessions.caller(long, HOST).permissions is None
    clock.now += 61
    with pytest.raises(Exception, match="has ended"):
        sessions.caller(short, HOST)
    clock.now += SESSION
    with pytest.raises(Exception, match="has ended"):
        sessions.caller(long, HOST)


async def test_the_store_holds_no_cookie_and_not_more_than_so_many(
    store: Store, sessions: Sessions, clock: Clock
) -> None:
    first, _ = await sessions.begin(LOCAL, HOST)
    stored = store.read(lambda txn: [f"{key} {row}" for key, row in txn.scan(SESSIONS)])
    assert first not in str(stored)

    def fill(txn: Any) -> None:
        row = txn.get(SESSIONS, next(txn.keys(SESSIONS)))
        for number in range(MAX_SESSIONS + 5):
            txn.put(SESSIONS, f"{number}", msgspec.structs.replace(row, subject=f"{number % 30}"))

    await store.write(fill)
    clock.now += 1
    newest, _ = await sessions.begin(LOCAL, HOST)
    assert store.read(lambda txn: len(list(txn.keys(SESSIONS)))) == MAX_SESSIONS
    assert sessions.caller(newest, HOST).subject == "local"
    for _ in range(MAX_OF_ONE + 5):
        last, _ = await sessions.begin(Caller("bob", None), HOST)
    assert sessions.caller(newest, HOST).subject == "local"
    assert sessions.caller(last, HOST).subject == "bob"
    of_bob = store.read(lambda txn: sum(row.subject == "bob" for _, row in txn.scan(SESSIONS)))
    assert of_bob <= MAX_OF_ONE


async def test_a_link_logs_in_once_and_not_for_long(ask: Ask, clock: Clock) -> None:
    token = {"Authorization": f"Bearer {mint(SECRET, subject='ops', scopes=['volume:read'])}"}
    made = await (await ask("POST", "/ui/links", headers=token)).get_json()
    assert made["url"] == "http://localhost:8080" + made["path"]
    code = made["path"].partition("#link=")[2]
    used = await ask("POST", "/ui/session", json={"link": code}, headers=PAGE)
    found = await used.get_json()
    assert (found["subject"], found["scopes"]) == ("ops", ["volume:read"])
    assert (await ask("POST", "/ui/session", json={"link": code}, headers=PAGE)).status_code == 401
    late = (await (await ask("POST", "/ui/links", headers=token)).get_json())["path"].partition("#link=")[2]
    clock.now += LINK + 1
    assert (await ask("POST", "/ui/session", json={"link": late}, headers=PAGE)).status_code == 401


async def test_a_link_needs_a_caller(ask: Ask) -> None:
    assert (await ask("POST", "/ui/links", headers=PAGE)).status_code == 401


async def test_a_link_made_in_a_session_does_not_prolong_it(ask: Ask, clock: Clock) -> None:
    cookie = await log_in(ask)
    clock.now += SESSION - 100
    made = await (await ask("POST", "/ui/links", headers={**PAGE, "Cookie": cookie})).get_json()
    code = made["path"].partition("#link=")[2]
    used = await ask("POST", "/ui/session", json={"link": code}, headers=PAGE)
    newer = used.headers["Set-Cookie"].partition(";")[0]
    clock.now += 101
    assert (await ask("GET", "/ui/session", headers={"Host": HOST, "Cookie": newer})).status_code == 401


# ── Other sites ──────────────────────────────────────────────────────────────────────────────────

FOREIGN: list[dict[str, str]] = [
    {},
    {"Origin": "null"},
    {"Origin": "http://evil.test"},
    {"Origin": "http://hypeman.test:3000"},
    {"Origin": f"http://{HOST}.evil.test"},
    {"Origin": f"ftp://{HOST}"},
    {"Origin": f"http://evil.test@{HOST}"},
    {"Origin": f"http://{HOST}", "Sec-Fetch-Site": "cross-site"},
    {"Origin": f"http://{HOST}", "Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/instances/web/stop"), ("DELETE", "/instances/web"), ("PATCH", "/instances/web"),
     ("POST", "/ui/links"), ("DELETE", "/ui/session"), ("POST", "/ui/session")],
)  # fmt: skip
async def test_another_site_changes_nothing(
    ask: Ask, world: FakeWorld, headers: dict[str, str], method: str, path: str
) -> None:
    world.instances.add("web")
    cookie = await log_in(ask)
    answer = await ask(method, path, json={}, headers={"Host": HOST, "Cookie": cookie, **headers})
    assert await code_of(answer) == (403, "wrong_origin")
    assert not world.instances.asked
    assert (await ask("GET", "/ui/session", headers={"Host": HOST, "Cookie": cookie})).status_code == 200


@pytest.mark.parametrize("headers", [one for one in FOREIGN if one], ids=str)
async def test_another_site_reads_nothing(ask: Ask, headers: dict[str, str]) -> None:
    cookie = await log_in(ask)
    for path in ("/instances", "/events", "/ui/session"):
        answer = await ask("GET", path, headers={"Host": HOST, "Cookie": cookie, **headers})
        assert await code_of(answer) == (403, "wrong_origin")


@pytest.mark.parametrize("origin", [None, "http://evil.test", "null", f"http://{HOST}"])
async def test_a_websocket_opens_for_our_own_page_only(
    ask: Ask, address: tuple[str, int], world: FakeWorld, origin: str | None
) -> None:
    world.instances.add("web", InstanceState.RUNNING)
    cookie = await log_in(ask)

    def open_it() -> int:
        try:
            with connect(
                f"ws://{HOST}/instances/web/exec",
                sock=socket.create_connection(address),
                origin=origin,  # type: ignore[arg-type]
                additional_headers={"Cookie": cookie},
                open_timeout=10,
            ):
                return 101
        except Exception as error:
            return int(getattr(error, "response").status_code)  # noqa: B009

    status = await trio.to_thread.run_sync(open_it)
    assert status == (101 if origin == f"http://{HOST}" else 403)


async def test_a_name_that_resolves_to_us_has_no_session(ask: Ask) -> None:
    """DNS rebinding: origin and host agree, but it is not the host of the login; the cookie is given for the test."""
    cookie = await log_in(ask)
    rebound = {"Host": "evil.test:8080", "Origin": "http://evil.test:8080", "Cookie": cookie}
    for method, path in (("GET", "/instances"), ("POST", "/instances/web/stop"), ("GET", "/ui/session")):
        assert await code_of(await ask(method, path, headers=rebound)) == (403, "wrong_origin")


async def test_a_token_needs_no_origin_and_ignores_the_cookie(ask: Ask, world: FakeWorld) -> None:
    world.instances.add("web")
    token = {"Authorization": f"Bearer {mint(SECRET, subject='script')}"}
    answer = await ask("POST", "/instances/web/stop", headers={**token, "Cookie": f"{cookie_name('x')}=nonsense"})
    assert answer.status_code == 200


async def test_the_registry_takes_no_cookie(ask: Ask) -> None:
    cookie = await log_in(ask)
    answer = await ask("GET", "/v2/", headers={"Host": HOST, "Cookie": cookie})
    assert answer.status_code == 401
    assert "sandbox" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "docker.example.com"}, 200),  # a program may write what it likes
        ({"Host": "localhost:8080", "Origin": "http://localhost:8080"}, 200),
        ({"Host": "localhost:8080", "User-Agent": "Mozilla/5.0"}, 200),
        ({"Host": "localhost:8080", "Origin": "http://evil.test"}, 403),
        ({"Host": "localhost:8080", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "evil.test:8080", "Origin": "http://evil.test:8080"}, 403),
        ({"Host": "evil.test:8080", "User-Agent": "Mozilla/5.0"}, 403),
        ({"Host": "127.0.0.1.evil.test", "User-Agent": "Mozilla/5.0"}, 403),
    ],
    ids=str,
)
async def test_the_trusted_socket_admits_no_other_site(
    app: ApiApp, tmp_path: Path, nursery: trio.Nursery, world: FakeWorld, headers: dict[str, str], status: int
) -> None:
    """A browser gets there through ``ssh -L``, where the socket itself admits every client."""
    world.instances.add("web")
    path = str(tmp_path / "s")
    await nursery.start(lambda task_status: Server(app, plain=app.plain).run(
        [], trio.Event(), trusted=[bind_unix(path, mode=0o600)], task_status=task_status
    ))  # fmt: skip
    for method, target in (("GET", "/instances"), ("POST", "/instances/web/stop")):
        async with await trio.open_unix_socket(path) as stream:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            await stream.send_all(f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode())
            assert (await read_answer(stream)).status_code == status
    assert bool(world.instances.asked) == (status == 200)


def test_host_names() -> None:
    assert same_host("https://a.example", "A.example")
    assert not same_host("https://a.example", "a.example:8080")
    assert not same_host("http://[::1", "[::1")
    for local in ("localhost:80", "x", "[::1]:8080", "10.0.0.1", "a.localhost", ""):
        assert is_local_name(local)
    for public in ("a.example", "a.example:80", "10.0.0.1.evil.test", "[::1", "@evil.test", "a@evil.test:1"):
        assert not is_local_name(public)
    assert cookie_name("localhost:8080") != cookie_name("localhost:8081")
    assert cookie_name("[::1]") == cookie_name("localhost") == cookie_name("localhost:x=1;")


async def test_the_actor_of_a_session_is_its_caller(ask: Ask, world: FakeWorld) -> None:
    world.instances.add("web")
    seen: list[Actor | None] = []
    stop = world.instances.stop

    async def spied(ref: str, request: StopInstanceRequest) -> Any:
        seen.append(current_actor())
        return await stop(ref, request)

    world.instances.stop = spied  # type: ignore[method-assign]
    cookie = await log_in(ask)
    await ask("POST", "/instances/web/stop", headers={**PAGE, "Cookie": cookie})
    assert seen[0] is not None
    assert seen[0].subject == "ann"


def test_a_login_shows_no_secret() -> None:
    assert "s3cret" not in repr(LoginRequest(token="s3cret", link="s3cret"))
