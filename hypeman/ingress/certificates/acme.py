"""Certificates by ACME: one order at a time for each name, continued after a crash, renewed ahead of time.

    key stored ─► order asked for ─► its URL stored ─► challenges answered ─► finalized ─► certificate stored
        └─ the attempt counts as failed from here on, until there is a certificate                └─ in use

A server that is killed in between continues with the stored order. Without one it orders again when the pause after a
failed attempt is over: 1 minute, then three times as long each time, at most a day.

The library blocks, so it runs in threads; whatever hangs there ends for us at ``_CALL_LIMIT``, and at most
``_THREADS`` can hang.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio
from msgspec import Struct

from hypeman import events
from hypeman.ingress.certificates import rows
from hypeman.ingress.certificates.acme_types import (
    HTTP_01,
    TLS_ALPN_01,
    AcmeError,
    AuthorizationView,
    CASettings,
    OrderView,
)
from hypeman.ingress.certificates.pem import BadCertificate, is_expired, read_pair
from hypeman.ingress.certificates.rows import ACCOUNTS, CERTIFICATES, AccountRow, CertificateRow
from hypeman.ingress.certificates.types import Answer, Pair
from hypeman.ingress.types import HTTP_PORT
from hypeman.store import Store, Txn

if TYPE_CHECKING:
    from hypeman.ingress.certificates.acme_client import CA

log = logging.getLogger(__name__)
R = TypeVar("R")

_THREADS = 4
_ORDERS = 4
"""At the same time, of different names."""
_CALL_LIMIT = 60.0
_GOODBYE = 10.0
HTTPS_PORT = 443
"""Where public CAs look for answers to TLS-ALPN-01."""
_RATE_LIMITED = timedelta(hours=1)
_DEAD = ("invalid", "expired", "revoked", "deactivated")


class Pace(Struct, frozen=True):
    """Seconds."""

    interval: float = 5.0
    """Between looks at what is due."""
    poll: float = 1.0
    """The first pause between questions to the CA; each is longer, up to five times as long."""
    validation: float = 180.0
    """For the CA to look at the answers, and then to issue."""
    retry: float = 60.0
    """After the first failure."""
    longest: float = 86400.0
    ask: float = 6 * 3600.0
    """Between questions whether a certificate is to be replaced early, as after a revocation."""


class Acme:
    """``run`` in a nursery."""

    def __init__(
        self,
        settings: CASettings,
        store: Store,
        *,
        answer: Callable[[str, Answer | None], Awaitable[None]],
        changed: Callable[[str], Awaitable[None]],
        ports: Callable[[], Collection[int]],
        now: Callable[[], datetime],
        pace: Pace | None = None,
    ) -> None:
        """``answer``: the carrier shows this for the name when it returns; ``changed``: of a name, certificate or
        error; ``ports``: on which we listen."""
        self._settings = settings
        self._store = store
        self._answer = answer
        self._changed = changed
        self._ports = ports
        self._now = now
        self._pace = pace or Pace()
        self._wanted: frozenset[str] = frozenset()
        self._pairs: dict[str, Pair] = {}
        self._running: set[str] = set()
        self._continued: set[str] = set()
        """Names whose stored order this server has gone on with."""
        self._asked: dict[str, float] = {}
        """When the CA was asked for the renewal time."""
        self._early: set[str] = set()
        """Names whose certificates should be replaced now, according to the CA."""
        self._wake = trio.Event()
        self._threads = trio.CapacityLimiter(_THREADS)
        self._slots = trio.CapacityLimiter(_ORDERS)
        self._account_lock = trio.Lock()

    async def use(self, names: Collection[str]) -> None:
        """From now on exactly these names are kept current. Stored certificates are there when this returns."""
        wanted = frozenset(names)
        for name in wanted - self._pairs.keys():  # before they are wanted: what is not here yet would be ordered
            row = self._row(name)
            if row.chain:
                try:
                    pair = await trio.to_thread.run_sync(read_pair, row.chain.encode(), row.key.encode())
                except BadCertificate as error:
                    log.error("the stored certificate of %s cannot be used: %s", name, error)
                else:
                    self._pairs[name] = pair
        for name in self._pairs.keys() - wanted:
            del self._pairs[name]
        self._wanted = wanted
        self._wake.set()

    def pair(self, name: str) -> Pair | None:
        return self._pairs.get(name)

    def error(self, name: str) -> str:
        """Why the last attempt failed; empty after one that succeeded and during the first."""
        return self._row(name).error

    async def run(self) -> None:
        """Order what is due until cancelled."""
        await self._store.write(partial(_forget_old, self._wanted, self._now()))
        async with trio.open_nursery() as nursery:
            while True:
                for name in sorted(self._wanted - self._running):
                    if self._is_due(name):
                        self._running.add(name)
                        nursery.start_soon(self._renew, name)
                    elif self._is_to_be_asked(name):
                        self._running.add(name)
                        nursery.start_soon(self._ask, name, self._pairs[name])
                self._wake = trio.Event()
                with trio.move_on_after(self._pace.interval):
                    await self._wake.wait()

    # ── What is due ──────────────────────────────────────────────────────────────────────────────

    def _row(self, name: str) -> CertificateRow:
        return self._store.read(lambda txn: txn.get(CERTIFICATES, name)) or CertificateRow()

    def _is_due(self, name: str) -> bool:
        row, now = self._row(name), self._now()
        pair = self._pairs.get(name)
        is_current = pair is not None and row.account == self._settings.account and name not in self._early
        if pair is not None and is_current and now < renewal_time(name, pair):
            return False
        if row.order and row.order_account == self._settings.account and name not in self._continued:
            return True
        # A time that lies further ahead than the longest pause is from a clock that was wrong.
        return row.next_attempt is None or not now < row.next_attempt <= now + timedelta(seconds=2 * self._pace.longest)

    def _is_to_be_asked(self, name: str) -> bool:
        if name not in self._pairs or name in self._early or is_expired(self._pairs[name], self._now()):
            return False
        return trio.current_time() >= self._asked.get(name, -1.0) + self._pace.ask

    async def _ask(self, name: str, pair: Pair) -> None:
        self._asked[name] = trio.current_time() - random.uniform(0, self._pace.ask / 10)  # noqa: S311 - spreads load
        try:
            async with self._slots:
                ca = await self._connect()
                try:
                    when = await self._call(ca.renewal_time, pair.chain)
                finally:
                    ca.close()
            if when is not None and when <= self._now():
                log.warning("the CA asks to replace the certificate of %s now", name)
                self._early.add(name)
        except AcmeError as error:
            log.info("the renewal time of %s is not known: %s", name, error)
        except Exception:
            log.exception("the renewal time of %s is not known", name)
        finally:
            self._running.discard(name)

    # ── One order ────────────────────────────────────────────────────────────────────────────────

    async def _renew(self, name: str) -> None:
        try:
            async with self._slots:
                await self._attempt(name)
            await self._changed(name)
        except Exception:  # a full disk, or a fault of ours: the attempt has been counted
            log.exception("no certificate for %s", name)
        finally:
            self._running.discard(name)

    async def _attempt(self, name: str) -> None:
        row = await self._begin_attempt(name)
        try:
            pair = await self._obtain(name, row)
        except (AcmeError, BadCertificate) as error:
            await self._note_failure(name, error)
        else:
            self._pairs[name] = pair
            self._early.discard(name)
            log.info("%s has a certificate until %s", name, pair.not_after.strftime("%Y-%m-%d %H:%M UTC"))
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _GOODBYE):
                await self._answer(name, None)

    async def _begin_attempt(self, name: str) -> CertificateRow:
        """Counts it as failed, so that no series of crashes becomes a series of orders."""
        self._continued.add(name)

        def begin(txn: Txn) -> CertificateRow:
            row = txn.get(CERTIFICATES, name) or CertificateRow()
            failures = row.failures + 1
            mine = row.order and row.order_account == self._settings.account
            return rows.change(
                txn, name, failures=failures, next_attempt=self._now() + self._backoff(failures),
                order=row.order if mine else "", order_key=row.order_key if mine else "",
            )  # fmt: skip

        return await self._store.write(begin)

    async def _note_failure(self, name: str, error: AcmeError | BadCertificate) -> None:
        code = error.code if isinstance(error, AcmeError) else ""
        is_dead = isinstance(error, BadCertificate) or error.is_final
        log.error("no certificate for %s: %s", name, error)

        def note(txn: Txn) -> None:
            row = txn.get(CERTIFICATES, name) or CertificateRow()
            pause = self._backoff(row.failures)
            if code == "rateLimited":
                pause = max(pause, _RATE_LIMITED)
            dead = {"order": "", "order_key": ""} if is_dead or code == "accountDoesNotExist" else {}
            when = self._now() + pause
            rows.change(txn, name, error=str(error), next_attempt=when, **dead)
            _record(txn, name, "certificate_failed", error=str(error), next_attempt=when.isoformat())
            if code == "accountDoesNotExist":
                account = txn.get(ACCOUNTS, self._settings.account)
                if account is not None:
                    txn.put(ACCOUNTS, self._settings.account, AccountRow(account.key))

        await self._store.write(note)

    def _backoff(self, failures: int) -> timedelta:
        seconds = min(self._pace.retry * 3.0 ** min(failures - 1, 20), self._pace.longest)
        return timedelta(seconds=seconds * random.uniform(1, 1.2))  # noqa: S311 - spreads load

    async def _obtain(self, name: str, row: CertificateRow) -> Pair:
        """Raises AcmeError or BadCertificate."""
        from hypeman.ingress.certificates.acme_client import make_key

        ca = await self._connect()
        try:
            url, key = row.order, row.order_key
            if url:
                order = await self._call(ca.order, url)
            else:
                key = await self._call(make_key)
                await self._store.write(lambda txn: rows.change(txn, name, order_key=key))
                url, order = await self._call(ca.new_order, name)
                await self._store.write(
                    lambda txn: rows.change(txn, name, order=url, order_account=self._settings.account)
                )
            order = await self._validate(ca, name, url, order, row.failures)
            if order.status == "ready":
                order = await self._call(ca.finalize, order.finalize, name, key)
            order = await self._wait_for_order(ca, url, order, "valid")
            chain = await self._call(ca.download, order.certificate)
            pair = await trio.to_thread.run_sync(partial(_check_issued, name, chain, key, self._now()))

            def finish(txn: Txn) -> None:
                rows.change(
                    txn, name, chain=pair.chain, key=pair.key, account=self._settings.account, order="", order_key="",
                    not_after=pair.not_after, failures=0, next_attempt=None, error="",
                )  # fmt: skip
                _record(txn, name, "certificate_issued", not_after=pair.not_after.isoformat())

            await self._store.write(finish)
            return pair
        finally:
            ca.close()

    async def _validate(self, ca: CA, name: str, url: str, order: OrderView, attempt: int) -> OrderView:
        """Answer the challenges; the order once it is ready."""
        if order.status == "pending":
            for authorization in order.authorizations:
                await self._authorize(ca, name, authorization, attempt)
        return await self._wait_for_order(ca, url, order, "ready", "processing", "valid")

    async def _authorize(self, ca: CA, name: str, url: str, attempt: int) -> None:
        authorization = await self._call(ca.authorization, url)
        if authorization.status == "pending":
            possible = [
                kind for kind, port in ((TLS_ALPN_01, HTTPS_PORT), (HTTP_01, HTTP_PORT)) if port in self._ports()
            ]
            possible = [
                kind for kind in possible if any(challenge.type == kind for challenge in authorization.challenges)
            ]
            if not possible:
                offered = ", ".join(challenge.type for challenge in authorization.challenges)
                raise AcmeError(f"none of the CA's challenges ({offered}) can be answered on our ports", is_final=True)
            kind = possible[(attempt - 1) % len(possible)]
            challenge = next(challenge for challenge in authorization.challenges if challenge.type == kind)
            text = await self._call(ca.key_authorization, challenge.token)
            if kind == HTTP_01:
                shown = Answer(token=challenge.token, authorization=text)
            else:
                from hypeman.ingress.certificates.acme_client import tls_alpn_certificate

                chain, key = await self._call(tls_alpn_certificate, name, text, self._now())
                shown = Answer(chain=chain, key=key)
            await self._answer(name, shown)
            if challenge.status == "pending":
                await self._call(ca.answer, challenge.url)
            authorization = await self._wait_for_authorization(ca, url)
        if authorization.status != "valid":
            raise AcmeError(authorization.problem, is_final=True)

    async def _wait_for_authorization(self, ca: CA, url: str) -> AuthorizationView:
        deadline, pause = trio.current_time() + self._pace.validation, self._pace.poll
        while True:
            found = await self._call(ca.authorization, url)
            if found.status not in ("pending", "processing"):
                return found
            if trio.current_time() > deadline:
                raise AcmeError("the CA has not validated the answer in time")
            await trio.sleep(pause)
            pause = min(pause * 1.5, 5 * self._pace.poll)

    async def _wait_for_order(self, ca: CA, url: str, order: OrderView, *wanted: str) -> OrderView:
        deadline, pause = trio.current_time() + self._pace.validation, self._pace.poll
        while order.status not in wanted:
            if order.status in _DEAD:
                raise AcmeError(str(order.error) if order.error else f"the order is {order.status}", is_final=True)
            if trio.current_time() > deadline:
                raise AcmeError(f"the order stays {order.status}")
            order = await self._call(ca.order, url)
            if order.status not in (*wanted, *_DEAD):
                await trio.sleep(pause)
                pause = min(pause * 1.5, 5 * self._pace.poll)
        return order

    # ── The account ──────────────────────────────────────────────────────────────────────────────

    async def _connect(self) -> CA:
        """A connection with our account, which is made if there is none. Raises AcmeError."""
        from hypeman.ingress.certificates.acme_client import CA, make_key

        name = self._settings.account
        async with self._account_lock:
            row = self._store.read(lambda txn: txn.get(ACCOUNTS, name))
            if row is None:
                row = AccountRow(await self._call(make_key))
                made = row
                await self._store.write(lambda txn: txn.put(ACCOUNTS, name, made))
            ca = await self._call(CA, self._settings, row.key, row.url)
            if not row.url:
                try:
                    row = AccountRow(row.key, await self._call(ca.register))
                except BaseException:
                    ca.close()
                    raise
                registered = row
                await self._store.write(lambda txn: txn.put(ACCOUNTS, name, registered))
        return ca

    async def _call(self, fn: Callable[..., R], *arguments: object) -> R:
        """In a thread. Raises AcmeError."""
        try:
            with trio.fail_after(_CALL_LIMIT):
                return await trio.to_thread.run_sync(
                    partial(fn, *arguments), abandon_on_cancel=True, limiter=self._threads
                )
        except trio.TooSlowError:
            raise AcmeError(f"the CA has not answered within {_CALL_LIMIT:.0f} s") from None


def _forget_old(wanted: Collection[str], now: datetime, txn: Txn) -> None:
    """Rows of names that are not in use are kept while their certificates, or the pauses after failures, last."""
    for name, row in list(txn.scan(CERTIFICATES)):
        ends = [when for when in (row.not_after, row.next_attempt) if when is not None]
        if name not in wanted and all(when < now for when in ends):
            txn.delete(CERTIFICATES, name)


def _record(txn: Txn, name: str, action: str, **data: str) -> None:
    events.record(txn, events.Kind.INGRESS, action, name, name=name, data=data)


def renewal_time(name: str, pair: Pair) -> datetime:
    """When two thirds of its time are over, and earlier by up to a twentieth that differs between names."""
    lifetime = pair.not_after - pair.not_before
    share = int.from_bytes(hashlib.sha256(f"{name} {pair.not_after}".encode()).digest()[:4], "big") / (1 << 32)
    return pair.not_after - lifetime / 3 - lifetime / 20 * share


def _check_issued(name: str, chain: str, key: str, now: datetime) -> Pair:
    pair = read_pair(chain.encode(), key.encode())
    if name not in pair.names:
        raise BadCertificate(f"the CA issued a certificate for {', '.join(pair.names)[:200]}")
    if is_expired(pair, now):
        raise BadCertificate("the CA issued a certificate that has expired")
    return pair
