"""When certificates are ordered by ACME, and when not: with a CA that the test controls, and a faulty one."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.lowlevel
import trustme
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hypeman.events.log import EVENTS
from hypeman.ingress.certificates.acme import Acme, Pace, renewal_time
from hypeman.ingress.certificates.acme_client import CA, make_key
from hypeman.ingress.certificates.acme_types import (
    AcmeError,
    AuthorizationView,
    CASettings,
    ChallengeView,
    OrderView,
    Problem,
)
from hypeman.ingress.certificates.rows import ACCOUNTS, CERTIFICATES, AccountRow, CertificateRow
from hypeman.ingress.certificates.types import Answer, Pair
from hypeman.store import Store
from tests.ingress.certs import make_chain
from tests.ingress.test_certificates import Clock

SETTINGS = CASettings(directory="https://ca.example.com/dir", email="a@b.c")
PACE = Pace(interval=0.01, poll=0.01, validation=0.5, ask=3600)


class FakeCA:
    """Orders are ready at once and issue what is asked for."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.fails: dict[str, AcmeError] = {}
        """By method."""
        self.status = "valid"
        """Of authorizations, once they are answered."""
        self.issued_for = ""
        """Another name than the one that was asked for."""
        self.days = 90.0
        self.replace_at: datetime | None = None
        self._keys: dict[str, tuple[str, str]] = {}
        self._answered: set[str] = set()
        self.shown: list[tuple[str, str]] = []
        """Name and kind of challenge."""

    def _count(self, method: str) -> None:
        self.calls[method] += 1
        if method in self.fails:
            raise self.fails[method]

    def new_order(self, name: str) -> tuple[str, OrderView]:
        self._count("new_order")
        url = f"https://ca/order/{name}/{self.calls['new_order']}"
        return url, self._order(url)

    def order(self, url: str) -> OrderView:
        self._count("order")
        return self._order(url)

    def _order(self, url: str) -> OrderView:
        status = "valid" if url in self._keys else "ready" if url in self._answered else "pending"
        return OrderView(status, (url + "/authz",), url, url + "/cert" if url in self._keys else "")

    def authorization(self, url: str) -> AuthorizationView:
        self._count("authorization")
        order = url.removesuffix("/authz")
        challenges = tuple(ChallengeView(kind, f"{url}/{kind}", token="tok") for kind in ("http-01", "tls-alpn-01"))
        if order not in self._answered:
            return AuthorizationView("pending", challenges)
        if self.status != "valid":
            failed = ChallengeView(
                "http-01", url, "invalid", "tok", Problem("urn:ietf:params:acme:error:dns", "no\nname")
            )
            return AuthorizationView(self.status, (failed,))
        return AuthorizationView("valid")

    def key_authorization(self, token: str) -> str:
        return token + ".thumb"

    def answer(self, url: str) -> None:
        self._count("answer")
        self._answered.add(url.rpartition("/authz")[0])

    def finalize(self, url: str, name: str, key: str) -> OrderView:
        self._count("finalize")
        self._keys[url] = (self.issued_for or name, key)
        return self._order(url)

    def download(self, url: str) -> str:
        self._count("download")
        name, key = self._keys[url.removesuffix("/cert")]
        private = load_pem_private_key(key.encode(), None)
        return make_chain(cast(Any, private), name, days=self.days).decode()

    def renewal_time(self, chain: str) -> datetime | None:
        self._count("renewal_time")
        return self.replace_at

    def close(self) -> None:
        pass


class Tried(Acme):
    """Talks to a FakeCA."""

    fake: FakeCA

    async def _connect(self) -> CA:
        return cast(CA, self.fake)


class World:
    def __init__(self, folder: Path) -> None:
        self.store = Store.open(folder / "store")
        self.ca = FakeCA()
        self.clock = Clock()
        self.ports: tuple[int, ...] = (80, 443)
        self.acme = self._make()

    def _make(self) -> Tried:
        acme = Tried(
            SETTINGS, self.store, answer=self._show, changed=self._changed, ports=lambda: self.ports, now=self.clock,
            pace=PACE,
        )  # fmt: skip
        acme.fake = self.ca
        return acme

    async def _show(self, name: str, answer: Answer | None) -> None:
        if answer is not None:
            self.ca.shown.append((name, "http-01" if answer.token else "tls-alpn-01"))

    async def _changed(self, name: str) -> None:
        pass

    def row(self, name: str) -> CertificateRow:
        return self.store.read(lambda txn: txn.get(CERTIFICATES, name)) or CertificateRow()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.005)

    async def rest(self) -> None:
        """Long enough for many looks at what is due."""
        await trio.sleep(20 * PACE.interval)

    async def has(self, name: str) -> Pair:
        await self.until(lambda: self.acme.pair(name) is not None)
        found = self.acme.pair(name)
        assert found is not None
        return found


@asynccontextmanager
async def running(folder: Path, prepare: Callable[[World], None] = lambda _: None) -> AsyncIterator[World]:
    world = World(folder)
    async with world.store.serving():
        prepare(world)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.acme.run)
            with trio.fail_after(60):
                yield world
            nursery.cancel_scope.cancel()
    world.store.close()


async def test_one_order_for_a_name_however_often_it_is_wanted(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        for _ in range(20):
            await here.acme.use(["a.com", "b.com"])
            await trio.lowlevel.checkpoint()
        await here.has("a.com")
        await here.has("b.com")
        await here.acme.use([])
        await here.acme.use(["a.com"])
        assert here.acme.pair("a.com") is not None, "stored, and there at once"
        await here.rest()
        assert here.ca.calls["new_order"] == 2
        assert here.row("a.com").failures == 0


async def test_renewal_when_two_thirds_are_over_and_only_once(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        await here.acme.use(["a.com"])
        first = await here.has("a.com")
        lifetime = first.not_after - first.not_before
        due = renewal_time("a.com", first)
        assert lifetime * 2 / 3 - lifetime / 20 <= due - first.not_before <= lifetime * 2 / 3
        assert len({renewal_time(f"{number}.com", first) for number in range(50)}) > 40, "names differ"
        here.clock.now = due - timedelta(seconds=1)
        await here.rest()
        assert here.ca.calls["new_order"] == 1
        here.ca.days = 150  # the CA's clock goes with ours
        here.clock.now = due
        await here.until(lambda: here.acme.pair("a.com") != first)
        await here.rest()
        assert here.ca.calls["new_order"] == 2


async def test_pauses_after_failures_grow_and_the_old_certificate_stays(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        await here.acme.use(["a.com"])
        first = await here.has("a.com")
        here.clock.now = renewal_time("a.com", first)
        here.ca.fails["new_order"] = AcmeError("no", "serverInternal")
        for number, seconds in enumerate((60, 180, 540), 1):
            while here.ca.calls["new_order"] <= number:
                await trio.sleep(0.005)
            await here.until(lambda: not here.acme._running)
            assert here.row("a.com").failures == number
            pause = here.row("a.com").next_attempt - here.clock.now  # type: ignore[operator]
            assert timedelta(seconds=seconds) <= pause <= timedelta(seconds=seconds * 1.2)
            await here.rest()
            assert here.ca.calls["new_order"] == 1 + number
            here.clock.now += pause
        assert here.acme.pair("a.com") == first
        assert here.acme.error("a.com") == "no"
        here.ca.fails["new_order"] = AcmeError("slower", "rateLimited")
        await here.until(lambda: here.acme.error("a.com") == "slower")
        assert here.row("a.com").next_attempt >= here.clock.now + timedelta(hours=1)  # type: ignore[operator]
        here.ca.fails.clear()
        here.clock.now += timedelta(days=2)
        await here.until(lambda: here.acme.pair("a.com") != first)
        assert here.acme.error("a.com") == ""


async def test_a_rejected_validation_tries_the_other_challenge_next(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        here.ca.status = "invalid"
        await here.acme.use(["a.com"])
        await here.until(lambda: here.acme.error("a.com") == "dns: no\\nname")
        assert here.row("a.com").order == "", "it is of no more use"
        await here.until(lambda: not here.acme._running)
        here.ca.status = "valid"
        here.clock.now += timedelta(minutes=2)
        await here.has("a.com")
        assert here.ca.shown == [("a.com", "tls-alpn-01"), ("a.com", "http-01")]
        failed, issued = here.store.read(lambda txn: [event for _, event in txn.scan(EVENTS)])
        assert (failed.type, failed.object.id) == ("ingress.certificate_failed", "a.com")
        assert failed.data
        assert failed.data["error"] == "dns: no\\nname"
        assert issued.type == "ingress.certificate_issued"
        here.ports = (8443,)
        await here.acme.use(["b.com"])
        await here.until(lambda: "can be answered on our ports" in here.acme.error("b.com"))


async def test_an_interrupted_run_continues_with_the_same_order(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        here.ca.fails["finalize"] = AcmeError("later", "serverInternal")
        await here.acme.use(["a.com"])
        await here.until(lambda: here.acme.error("a.com") == "later")
        before = here.row("a.com")
        assert before.order.startswith("https://ca/order/a.com/")
        await here.until(lambda: not here.acme._running)
        here.ca.fails.clear()
        here.acme = here._make()  # as a new server, which does not wait for the next attempt
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.acme.run)
            await here.acme.use(["a.com"])
            await here.has("a.com")
            nursery.cancel_scope.cancel()
        assert here.ca.calls["new_order"] == 1
        assert here.row("a.com").key == before.order_key


async def test_an_attempt_counts_before_it_begins(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        seen: list[int] = []
        original = here.ca.new_order

        def look(name: str) -> tuple[str, OrderView]:
            seen.append(here.row(name).failures)
            return original(name)

        here.ca.new_order = look  # type: ignore[method-assign]
        await here.acme.use(["a.com"])
        await here.has("a.com")
        assert seen == [1]


async def test_an_account_that_the_ca_has_forgotten_is_asked_for_again_with_its_key(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        account = AccountRow(make_key(), "https://ca/account/1")
        await here.store.write(lambda txn: txn.put(ACCOUNTS, SETTINGS.account, account))
        here.ca.fails["new_order"] = AcmeError("who?", "accountDoesNotExist")
        await here.acme.use(["a.com"])
        await here.until(lambda: here.acme.error("a.com") == "who?")
        assert here.store.read(lambda txn: txn.get(ACCOUNTS, SETTINGS.account)) == AccountRow(account.key, "")


async def test_an_internal_error_causes_no_loop_of_orders_and_no_end(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        here.ca.fails["finalize"] = cast(AcmeError, RuntimeError("a fault"))
        await here.acme.use(["a.com"])
        await here.until(lambda: here.ca.calls["finalize"] == 1)
        await here.rest()
        assert here.ca.calls["new_order"] == 1
        here.ca.fails.clear()
        await here.acme.use(["a.com", "b.com"])
        await here.has("b.com")


async def test_a_certificate_for_another_name_is_not_used(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        here.ca.issued_for = "other.com"
        await here.acme.use(["a.com"])
        await here.until(lambda: "for other.com" in here.acme.error("a.com"))
        assert here.acme.pair("a.com") is None


async def test_the_ca_can_ask_for_a_replacement(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        here.ca.replace_at = here.clock.now + timedelta(days=1)
        await here.acme.use(["a.com"])
        first = await here.has("a.com")
        await here.until(lambda: here.ca.calls["renewal_time"] == 1)
        await here.rest()
        assert here.acme.pair("a.com") == first
        here.ca.replace_at = here.clock.now
        here.acme._asked.clear()
        await here.until(lambda: here.acme.pair("a.com") != first)
        await here.rest()
        assert here.ca.calls["new_order"] == 2


async def test_another_ca_and_a_clock_that_was_wrong(tmp_path: Path) -> None:
    def prepare(here: World) -> None:
        far = here.clock.now + timedelta(days=1000)
        key = make_key()
        chain = make_chain(cast(Any, load_pem_private_key(key.encode(), None)), "a.com").decode()
        stored = CertificateRow(chain=chain, key=key, account="another", failures=3, next_attempt=far)
        old = CertificateRow(chain=chain, key=key, not_after=here.clock.now - timedelta(days=1))
        here.store.write_soon(lambda txn: txn.put(CERTIFICATES, "a.com", stored))
        here.store.write_soon(lambda txn: txn.put(CERTIFICATES, "old.com", old))

    async with running(tmp_path, prepare) as here:
        await here.acme.use(["a.com"])
        await here.until(lambda: here.row("a.com").account == SETTINGS.account)
        assert here.ca.calls["new_order"] == 1
        await here.until(lambda: here.row("old.com") == CertificateRow())


# ── A CA that sends malformed answers ─────────────────────────────────────────────────────────────────────


@contextmanager
def serving(folder: Path, status: int, body: bytes, headers: dict[str, str]) -> Iterator[CASettings]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield CASettings(directory=f"https://localhost:{server.server_address[1]}/", ca_file=str(folder / "ca.pem"))
        finally:
            server.shutdown()
            thread.join()


PLAIN_HTTP = b'{"newNonce":"http://localhost/n","newAccount":"http://localhost/a","newOrder":"http://localhost/o"}'


@pytest.mark.parametrize(
    ("status", "body", "headers", "said"),
    [
        (200, b"hello", {}, "cannot be parsed"),
        (200, b"[]", {}, "cannot be parsed"),
        (200, b"{}", {}, "cannot be parsed"),
        (200, b'{"meta": 7}', {}, "cannot be parsed"),
        (200, PLAIN_HTTP, {}, "not https"),
        (200, b"x" * (3 << 20), {}, "too long"),
        (302, b"", {"Location": "https://example.com/"}, "cannot be parsed"),
        (500, b"oh\x1b[31m", {}, "responded with 500"),
        (503, b'{"type":"urn:ietf:params:acme:error:rateLimited","detail":"a\\u001b[31m\\nb"}', {}, r"a\x1b[31m\nb"),
        (200, b"short", {"Content-Length": "10"}, "cannot be reached"),
    ],
)
def test_every_answer_of_a_ca_is_an_error_at_most(
    tmp_path: Path, status: int, body: bytes, headers: dict[str, str], said: str
) -> None:
    with serving(tmp_path, status, body, headers) as settings:
        ca = CA(settings, make_key())
        for call in (ca.register, lambda: ca.new_order("a.com")):
            with pytest.raises(AcmeError) as caught:
                call()
            text = str(caught.value)
            assert said in text
            assert text.isprintable()
            assert len(text) <= 300
        ca.close()


def test_a_ca_with_an_unverified_certificate_is_not_used(tmp_path: Path) -> None:
    with serving(tmp_path, 200, b"{}", {}) as settings:
        other = trustme.CA()
        other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
        ca = CA(CASettings(directory=settings.directory, ca_file=str(tmp_path / "other.pem")), make_key())
        with pytest.raises(AcmeError, match="certificate verify failed"):
            ca.register()
        ca.close()


def test_tokens_are_no_paths(tmp_path: Path) -> None:
    ca = CA(CASettings(directory="https://ca.example.com/"), make_key())
    assert ca.key_authorization("abc-_9").startswith("abc-_9.")
    for token in ("", "../x", "a b", "a\n", "a" * 201):
        with pytest.raises(AcmeError):
            ca.key_authorization(token)
    ca.close()
    assert "PRIVATE" not in repr(AccountRow(make_key())) + repr(CASettings("https://x", eab_hmac_key="PRIVATE"))
