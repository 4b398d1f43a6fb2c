"""Certificates from a real ACME server, Let's Encrypt's pebble, with its faults on, through the confined engine."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import trio

from hypeman.errors import InvalidRequest
from hypeman.ingress.certificates.acme import Pace
from hypeman.ingress.certificates.acme_client import CA, BoundedSession
from hypeman.ingress.certificates.names import DomainList
from hypeman.ingress.certificates.rows import ACCOUNTS, CERTIFICATES, AccountRow, CertificateRow
from hypeman.ingress.certificates.service import Certificates, Settings
from hypeman.ingress.service import Ingresses
from hypeman.ingress.types import CertificateState, IngressCertificate
from hypeman.store import Store
from tests.ingress.pebble import BLOCKED, Pebble, pebble, why_not
from tests.ingress.test_service import ingresses, make_folder, request, secure_curl
from tests.network.lab import Lab, in_namespace, sh

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not())]

QUICK = Pace(interval=0.05, poll=0.05, retry=0.5, longest=5, ask=0.2)
SLOW_TO_ASK = Pace(interval=0.05, poll=0.05, retry=0.5, longest=5, ask=3600)
EXPECTED = "X-Forwarded-Proto: https 200"


async def answer(stream: trio.SocketStream) -> None:
    """A guest that says how it was asked."""
    async with stream:
        head = await stream.receive_some(65536)
        who = next(line for line in head.split(b"\r\n") if line.startswith(b"X-Forwarded-Proto:"))
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(who), who))


@asynccontextmanager
async def guest() -> AsyncIterator[int]:
    (guests,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [guests])
        yield guests.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def settled(service: Ingresses, name: str) -> IngressCertificate:
    """The state of an ingress's first certificate, once it is not pending any more."""
    with trio.fail_after(120):
        while True:
            (state,) = (await service.get(name)).certificates or ()
            if state.state is not CertificateState.PENDING:
                return state
            await trio.sleep(0.05)


def accounts(service: Ingresses) -> list[AccountRow]:
    return service._store.read(lambda txn: [row for _, row in txn.scan(ACCOUNTS)])


def row(service: Ingresses, name: str) -> CertificateRow:
    found = service._store.read(lambda txn: txn.get(CERTIFICATES, name))
    assert found is not None
    return found


@in_namespace
async def test_orders_refusals_and_replacement_under_load(lab: Lab) -> None:
    folder = make_folder()
    with pebble(folder, eab=True, WFE_NONCEREJECT="40", VA_SLEEPTIME="1", AUTHZREUSE="0") as ca:
        settings = Settings(ca=ca.settings(email="a@example.com"), allowed=DomainList.parse("*.example.com"))
        async with guest() as port, ingresses(folder, "127.0.0.1", settings, QUICK) as service:
            root = folder / "root.pem"
            root.write_text(await trio.to_thread.run_sync(ca.root))

            async def ask(url: str) -> str:
                return await trio.to_thread.run_sync(secure_curl, url, str(root))

            make = partial(request, target_port=port, tls=True)
            await service.create(make("http", "http.example.com", port=8443))
            assert (await settled(service, "http")).state is CertificateState.VALID, "HTTP-01: nothing listens on 443"
            assert await ask("https://http.example.com:8443/") == EXPECTED
            assert "validate w/ HTTP: http://http.example.com" in ca.log.read_text()
            await service.create(make("alpn", "alpn.example.com", port=443))
            state = await settled(service, "alpn")
            assert (state.state, state.source) == (CertificateState.VALID, "acme"), "TLS-ALPN-01 comes first"
            assert await ask("https://alpn.example.com:443/") == EXPECTED
            assert "validate w/ HTTP: http://alpn.example.com" not in ca.log.read_text()
            (account,) = accounts(service)

            for hostname, code in [("a.b.com", "domain_not_allowed"), ("{x}.example.com", "config_validation_failed")]:
                try:
                    service.certificates.check(hostname)
                except InvalidRequest as error:
                    assert error.code == code
                else:
                    raise AssertionError(f"{hostname} was taken")
            await service.create(make("blocked", BLOCKED, port=443))
            blocked = await settled(service, "blocked")
            assert blocked.state is CertificateState.FAILED
            assert "rejectedIdentifier" in str(blocked.error)
            await service.delete("blocked")
            ca.unknown.add("away.example.com")
            await service.create(make("away", "away.example.com", port=443))
            away = await settled(service, "away")
            assert away.state is CertificateState.FAILED
            assert "Could not resolve" in str(away.error), away
            ca.unknown.clear()
            with trio.fail_after(60):
                while (await settled(service, "away")).state is not CertificateState.VALID:
                    await trio.sleep(0.1)
            assert row(service, "away.example.com").failures == 0

            asked: list[str] = []
            is_over = False

            async def ask_often() -> None:
                while not is_over:
                    asked.append(await ask("https://alpn.example.com:443/"))

            before = row(service, "alpn.example.com")
            async with trio.open_nursery() as clients:
                clients.start_soon(ask_often)
                clients.start_soon(ask_often)
                await trio.to_thread.run_sync(revoke, settings, account, before.chain)
                with trio.fail_after(120):
                    while row(service, "alpn.example.com").chain == before.chain:
                        await trio.sleep(0.05)
                count = len(asked)
                with trio.fail_after(60):
                    while len(asked) < count + 6:
                        await trio.sleep(0.05)
                is_over = True
            assert set(asked) == {EXPECTED}, "no request is lost while a revoked certificate is replaced"
            assert row(service, "http.example.com").error == ""
            assert accounts(service) == [account]


def revoke(settings: Settings, account: AccountRow, chain: str) -> None:
    assert settings.ca is not None
    ca = CA(settings.ca, account.key, account.url)
    ca.revoke(chain)
    ca.close()


# ── Kills ────────────────────────────────────────────────────────────────────────────────────────


def obtain(folder: Path, ca: Pebble, kill_at: int, *, after: bool) -> None:
    """In a process of its own: a server's part that requires a certificate, killed at its n-th request to the CA."""
    count = 0
    send = BoundedSession.send

    def counted(self: BoundedSession, *arguments: object, **more: object) -> object:
        nonlocal count
        count += 1
        if count == kill_at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        response = send(self, *arguments, **more)  # type: ignore[arg-type]
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return response

    BoundedSession.send = counted  # type: ignore[assignment,method-assign]

    async def run() -> None:
        store = Store.open(folder / "store")
        async with store.serving(), trio.open_nursery() as nursery:
            settings = Settings(ca=ca.settings(), allowed=DomainList.parse("*"))
            service = Certificates(settings, folder / "ca", store, interval=0.05, pace=SLOW_TO_ASK)
            service.carry(nothing, nothing, lambda: (80, 443))
            await service.use(["a.example.com"])
            nursery.start_soon(service.run)
            with trio.fail_after(60):
                while service.state_of("a.example.com").state is not CertificateState.VALID:
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        store.close()

    trio.run(run)


async def nothing(name: str, what: object) -> None:
    pass


def outcome(folder: Path, ca: Pebble, kill_at: int, *, after: bool) -> int:
    """0 if the certificate is there, else the signal."""
    child = os.fork()
    if not child:
        code = 1
        try:
            obtain(folder, ca, kill_at, after=after)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def stored(folder: Path) -> tuple[AccountRow | None, CertificateRow | None]:
    store = Store.open(folder / "store")
    try:
        found = store.read(lambda txn: ([row for _, row in txn.scan(ACCOUNTS)], txn.get(CERTIFICATES, "a.example.com")))
    finally:
        store.close()
    assert len(found[0]) <= 1
    return (found[0][0] if found[0] else None), found[1]


@in_namespace
def test_a_server_killed_at_any_request_to_the_ca() -> None:
    """The account stays the same, an order that is known is continued, and at most one is made anew."""
    sh("ip link set lo up")
    folder = make_folder()
    with pebble(folder, VA_NOSLEEP="1", VA_ALWAYS_VALID="1", WFE_NONCEREJECT="0", AUTHZREUSE="0") as ca:
        killed = 0
        for after in (False, True):
            for kill_at in range(1, 100):
                place = folder / f"{kill_at}-{after}"
                place.mkdir()
                orders = ca.requests("order-plz")
                first = outcome(place, ca, kill_at, after=after)
                if first == 0:
                    break  # it needs fewer requests than that
                assert first == -signal.SIGKILL
                killed += 1
                account, begun = stored(place)
                known = begun is not None and bool(begun.order)
                assert outcome(place, ca, 0, after=after) == 0, (kill_at, after)
                made = ca.requests("order-plz") - orders
                assert made <= (1 if known else 2), (kill_at, after, made)
                now, finished = stored(place)
                assert account is None or (now is not None and now.key == account.key)
                assert account is None or not account.url or (now is not None and now.url == account.url)
                assert finished is not None
                assert (finished.order, finished.order_key, finished.failures) == ("", "", 0)
                assert finished.not_after is not None
                assert finished.not_after > datetime.now(UTC)
        assert killed > 15, killed
