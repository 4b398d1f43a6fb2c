"""Which certificate each host name has, and that it is a current one.

    name of a rule with tls ──► a file that has the name
                            ──► the internal CA, for private names and ``ingress.internal_domains``
                            ──► a public CA by ACME, for ``acme.allowed_domains``
                            ──► otherwise refused, with the reason

Does not know who carries the traffic: every change is reported through ``carry``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio
from msgspec import UNSET, Struct

from hypeman.errors import InternalError, InvalidRequest
from hypeman.ingress.certificates.acme import HTTPS_PORT, Acme, Pace
from hypeman.ingress.certificates.acme_types import CASettings
from hypeman.ingress.certificates.files import CertificateFile
from hypeman.ingress.certificates.internal import RENEW_BEFORE, InternalCA
from hypeman.ingress.certificates.names import (
    DomainList,
    best_match,
    certificate_name,
    is_private,
    public_problem,
)
from hypeman.ingress.certificates.pem import is_expired
from hypeman.ingress.certificates.types import Answer, Pair, Source
from hypeman.ingress.types import HTTP_PORT, CertificateState, IngressCertificate, IngressRule
from hypeman.store import Store
from hypeman.text import without_host_paths

log = logging.getLogger(__name__)

_INTERVAL = 5.0
"""Seconds between looks at files and dates."""
_READING = 10.0
"""Seconds for a pair of files."""
_NO_SOURCE = "config_validation_failed"
_NOT_ALLOWED = "domain_not_allowed"

Certify = Callable[[str, Pair | None], Awaitable[None]]
"""The carrier has this certificate for the name from now on, or none."""
Challenge = Callable[[str, Answer | None], Awaitable[None]]
"""The carrier shows this for the name to a public CA from now on, or nothing."""


async def _carry_nothing(name: str, what: object) -> None:
    pass


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Settings(Struct, frozen=True):
    """What the configuration says about certificates."""

    files: Mapping[str, tuple[Path, Path]] = {}
    """Name in the configuration → certificate and key."""
    internal: DomainList = DomainList(())
    domain: str = ""
    """``network.domain``."""
    ca: CASettings | None = None
    """A public CA."""
    allowed: DomainList = DomainList(())
    """What may be asked of it."""


@dataclass
class _Held:
    """A name in use."""

    source: Source | None = None
    pair: Pair | None = None
    error: str = ""


def _names(hostnames: Iterable[str]) -> list[str]:
    """Of the certificates for them."""
    return [name for hostname in hostnames if (name := certificate_name(hostname)) is not None]


class Certificates:
    """``run`` in a nursery; names can be used before."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        store: Store,
        *,
        now: Callable[[], datetime] = _utc_now,
        interval: float = _INTERVAL,
        pace: Pace | None = None,
    ) -> None:
        """``directory``: of the internal CA."""
        self._settings = settings
        self._files = {name: CertificateFile(*paths) for name, paths in settings.files.items()}
        self._readers = {name: trio.CapacityLimiter(1) for name in self._files}
        self._ca = InternalCA(directory)
        self._now = now
        self._interval = interval
        self._held: dict[str, _Held] = {}
        self._uses: Counter[str] = Counter()
        """How often each of these is used."""
        self._carry: Certify = _carry_nothing
        self._show: Challenge = _carry_nothing
        self._answering: set[str] = set()
        """Names for which the carrier shows an answer."""
        self._ports: Callable[[], Collection[int]] = tuple
        self._acme: Acme | None = None
        if settings.ca is not None:
            self._acme = Acme(
                settings.ca, store, answer=self._answer, changed=self._changed, ports=lambda: self._ports(), now=now,
                pace=pace,
            )  # fmt: skip
        self._changing = trio.Lock()

    def carry(self, certify: Certify, show: Challenge, ports: Callable[[], Collection[int]]) -> None:
        """Report changes there. ``ports``: on which the carrier listens."""
        self._carry, self._show, self._ports = certify, show, ports

    async def load(self) -> None:
        """Read the files: before the first ``check``."""
        await self._reload()

    async def run(self) -> None:
        """Keep certificates current until cancelled."""
        async with trio.open_nursery() as nursery:
            if self._acme is not None:
                nursery.start_soon(self._acme.run)
            while True:
                await trio.sleep(self._interval)
                await self._reload()
                async with self._changing:
                    await self._tell_acme()
                    for name in list(self._held):
                        await self._refresh(name)

    async def root(self) -> str:
        """The internal CA's certificate, PEM. Raises InternalError."""
        return await trio.to_thread.run_sync(self._ca.root)

    # ── Names ────────────────────────────────────────────────────────────────────────────────────

    def check(self, hostname: str) -> None:
        """Whether a rule with this host name can have TLS. Raises InvalidRequest."""
        name = certificate_name(hostname)
        if name is None:
            raise InvalidRequest(
                f"tls for {hostname}: a pattern can have a certificate only if its capture is the first label",
                code=_NO_SOURCE,
            )
        source, pair, problem = self._find(name)
        if source is None:
            raise InvalidRequest(f"tls for {hostname}: {problem}", code=self._code(name))
        if pair is not None and is_expired(pair, self._now()):
            raise InvalidRequest(
                f"tls for {hostname}: the certificate expired at {pair.not_after:%Y-%m-%d %H:%M} UTC", code=_NO_SOURCE
            )

    async def use(self, hostnames: Iterable[str]) -> None:
        """These host names of rules have certificates, once more each. Raises InternalError."""
        async with self._changing:
            fresh = sorted(set(_names(hostnames)) - self._held.keys())
            self._uses.update(_names(hostnames))
            self._held.update({name: _Held() for name in fresh})
            if fresh:
                await self._tell_acme()
            for name in fresh:
                await self._refresh(name)

    async def leave(self, hostnames: Iterable[str]) -> None:
        """Undo one ``use`` of these; unused names lose their certificates."""
        async with self._changing:
            self._uses.subtract(_names(hostnames))
            gone = [name for name in set(_names(hostnames)) if self._uses[name] <= 0]
            for name in gone:
                del self._uses[name]
                self._held.pop(name, None)
                await self._carry(name, None)
            if gone:
                await self._tell_acme()

    def pairs(self) -> Sequence[tuple[str, Pair]]:
        """All names in use that have a certificate."""
        return [(name, held.pair) for name, held in self._held.items() if held.pair is not None]

    def ports_for(self, rule: IngressRule) -> frozenset[int]:
        """Of the host, that obtaining the rule's certificate takes."""
        name = certificate_name(rule.match.hostname) if rule.tls else None
        if name is None or self._find(name)[0] is not Source.ACME or rule.match.port == HTTPS_PORT:
            return frozenset()
        return frozenset([HTTP_PORT])

    def state_of(self, hostname: str) -> IngressCertificate:
        """As the API shows it."""
        name = certificate_name(hostname)
        held = self._held.get(name) if name is not None else None
        if held is None:
            return IngressCertificate(hostname=hostname, state=CertificateState.PENDING)
        state = CertificateState.VALID
        if held.pair is None:
            state = CertificateState.FAILED if held.error else CertificateState.PENDING
        elif is_expired(held.pair, self._now()):
            state = CertificateState.EXPIRED
        return IngressCertificate(
            hostname=hostname,
            state=state,
            source=held.source.value if held.source is not None else UNSET,
            not_after=held.pair.not_after if held.pair is not None else UNSET,
            error=without_host_paths(held.error) or UNSET,
        )

    def ends(self) -> dict[tuple[str, ...], float]:
        """For metrics: when the certificate of each name ends, in seconds since 1970."""
        return {(name,): pair.not_after.timestamp() for name, pair in self.pairs()}

    # ── Sources ──────────────────────────────────────────────────────────────────────────────────

    def _find(self, name: str) -> tuple[Source | None, Pair | None, str]:
        """Source, the pair if it is a file's, and a problem to show."""
        found: list[tuple[bool, bool, datetime, CertificateFile]] = []
        for file in self._files.values():
            if file.pair is not None and (match := best_match(file.pair.names, name)) is not None:
                found.append((not is_expired(file.pair, self._now()), match == name, file.pair.not_after, file))
        if found:
            file = max(found, key=lambda row: row[:3])[3]
            return Source.FILE, file.pair, file.error
        if is_private(name, self._settings.domain) or self._settings.internal.has(name):
            return Source.INTERNAL, None, ""
        if self._acme is not None and self._settings.allowed.has(name):
            if problem := public_problem(name):
                return None, None, f"{name} {problem}"
            return Source.ACME, self._acme.pair(name), self._acme.error(name)
        broken = [file.error for file in self._files.values() if file.error]
        if broken:
            return None, None, f"no certificate file covers it, and {broken[0]}"
        if self._acme is not None:
            return None, None, "it is not in acme.allowed_domains, and no certificate file covers it"
        if self._files or self._settings.internal.entries:
            return None, None, "no certificate file and no list of domains in the configuration covers it"
        return None, None, "this server has no source of certificates for public names"

    def _code(self, name: str) -> str:
        lists = (self._settings.internal, self._settings.allowed)
        if any(each.entries for each in lists) and not any(each.has(name) for each in lists):
            return _NOT_ALLOWED
        return _NO_SOURCE

    async def _tell_acme(self) -> None:
        if self._acme is not None:
            await self._acme.use([name for name in self._held if self._find(name)[0] is Source.ACME])

    async def _answer(self, name: str, answer: Answer | None) -> None:
        if answer is not None:
            self._answering.add(name)
        elif name in self._answering:
            self._answering.remove(name)
        else:
            return
        await self._show(name, answer)

    async def _changed(self, name: str) -> None:
        async with self._changing:
            if name in self._held:
                await self._refresh(name)

    async def _reload(self) -> None:
        for label, file in self._files.items():
            changed = False
            with trio.move_on_after(_READING) as scope:
                # A thread that hangs, as with a network file system that is gone, keeps its place in the limiter.
                changed = await trio.to_thread.run_sync(
                    file.reload, abandon_on_cancel=True, limiter=self._readers[label]
                )
            if scope.cancelled_caught:
                log.error("ingress.certificates.%s: the files cannot be read within %.0f s", label, _READING)
            if changed:
                if file.error:
                    log.error("ingress.certificates.%s: %s", label, file.error)
                else:
                    log.info("ingress.certificates.%s: read, %r", label, file.pair)

    async def _refresh(self, name: str) -> None:
        """Give the name the certificate that it should have now."""
        held = self._held[name]
        before = held.pair
        source, pair, problem = self._find(name)
        if source is Source.INTERNAL:
            pair = held.pair if held.source is Source.INTERNAL else None
            if pair is None or pair.not_after - self._now() < RENEW_BEFORE:
                try:
                    pair = await trio.to_thread.run_sync(partial(self._ca.issue, name, self._now()))
                except InternalError as error:
                    problem = error.message
                    if problem != held.error:
                        log.error("no certificate for %s: %s", name, problem)
        held.source, held.pair, held.error = source, pair, problem
        if pair != before:
            await self._carry(name, pair)
