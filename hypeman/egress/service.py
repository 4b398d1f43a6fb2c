"""Runs the data plane and sets each instance's policy.

The loops are native threads (`ext/egress/`); Trio handles infrequent work: policies, name resolution, the audit
stream, shutdown. Names are resolved here because that needs the system's resolver; whether an address may be dialled is
decided in the data plane, on the addresses it then dials.

A policy is in force when ``set_policy`` returns: each request uses the rules in force when it is forwarded, so the
new rules also apply to later requests on open connections.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman._native.egress import REASONS, TIMERS, Engine
from hypeman.egress.authority import load_authority
from hypeman.egress.policy import Unmatched, compile_policy, wipe
from hypeman.egress.resolver import Resolve, Resolver, resolve_by_system
from hypeman.egress.sealing import load_sealer
from hypeman.egress.types import CredentialPolicy
from hypeman.errors import InternalError

Keep = Callable[[Sequence[socket.socket]], None]

_PR_SET_DUMPABLE = 4
_SYSTEM_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine, Arch
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",
)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one instance."""

    connections: int = 4096
    requests_per_second: int = 0
    """0: unlimited."""
    mints_per_second: int = 50
    """Leaf certificates for new names: each costs 0.3 ms of signing."""


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds."""

    head: float = 30
    handshake: float = 15
    resolve: float = 10
    connect: float = 5
    """Per address of a host."""
    idle_down: float = 75
    idle_up: float = 55
    stream: float = 2 * 3600
    """Without traffic in an open exchange: event streams and long calls can be silent for a long time."""
    half: float = 60
    """The same once one side has closed."""
    linger: float = 5


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the data plane is started with."""

    address: str
    """Listening address for redirected and proxied connections: the guests' gateway."""
    port: int
    loops: int = 0
    """Threads; 0: one per core, at most 4."""
    allow: tuple[str, ...] = ()
    """Networks beyond the public internet that guests may reach, as address/prefix."""
    deny: tuple[str, ...] = ()
    """Networks that guests may never reach; the host's own addresses are always refused."""
    trust_file: str = ""
    """CA bundle; empty: the system's."""
    extra_ca_file: str = ""
    unmatched: Unmatched = Unmatched.PASS
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    assumed_tls_port: int = 443
    """Destination port assumed for TLS that arrives on the proxy's own address."""


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request, allowed or denied; without path, query or credential values."""

    time: float
    """Seconds since 1970, when it ended."""
    instance: str
    kind: str
    """``request``; ``passed_through``: not decrypted; ``refused``: a connection without a valid request."""
    host: str
    port: int
    method: str
    status: int
    reason: str
    """``ok``, or the error code returned to a denied client."""
    injected: bool
    credentials: tuple[str, ...]
    """Names of the credentials that were applied."""
    bytes_up: int
    bytes_down: int
    seconds: float
    http: int


_KINDS = ("request", "passed_through", "refused")


def _read_record(row: tuple[int | str, ...]) -> AuditRecord:
    kind, rules, status, reason, http, port, took, at, up, down, instance, host, method, keys = row
    return AuditRecord(
        time=int(at) / 1e6,
        instance=str(instance),
        kind=_KINDS[int(kind)],
        host=str(host),
        port=int(port),
        method=str(method),
        status=int(status),
        reason=REASONS[int(reason)],
        injected=int(rules) > 0,
        credentials=tuple(str(keys).split(",")) if keys else (),
        bytes_up=int(up),
        bytes_down=int(down),
        seconds=int(took) / 1e6,
        http=int(http),
    )


class Statistics(msgspec.Struct, frozen=True):
    """Counters since the start."""

    counters: dict[str, int]
    denied: dict[str, int]
    """By reason."""
    latency: list[int]
    """Requests by duration: item i counts those below 16 µs · 2^i."""


def forbid_dumps() -> None:
    """Disable core dumps and ptrace of this process: its memory holds credentials."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _system_roots() -> str | None:
    return next((path for path in _SYSTEM_ROOTS if Path(path).exists()), None)


def _inherit_listeners(given: Sequence[socket.socket], address: str, port: int) -> list[socket.socket]:
    """The sockets that listen on ``address`` and ``port``; the others are closed."""
    mine = []
    for each in given:
        if each.getsockname()[0] == address and port in (0, each.getsockname()[1]):
            mine.append(each)
        else:
            each.close()
    return mine


def _open_listener(address: str, port: int, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET:  # the gateway's address appears with the first TAP
            listener.setsockopt(socket.SOL_IP, getattr(socket, "IP_FREEBIND", 15), 1)
        listener.bind((address, port))
        listener.listen(4096)
    except BaseException:
        listener.close()
        raise
    return listener


class Egress:
    """The egress path of all instances.

    ``run`` serves until it is cancelled and then drains; the other methods may be called once ``run`` has reported
    started. Connections wait until ``accept`` is called after the policies of all guests are set: earlier they would
    be reset as unregistered.
    """

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        *,
        resolve: Resolve = resolve_by_system,
        listeners: Sequence[socket.socket] = (),
        keep: Keep | None = None,
    ) -> None:
        """``directory`` contains the authority and the sealing key.

        ``keep`` receives the listening sockets to hold for the next process, which takes them as ``listeners``, so that
        guests connecting during a restart wait instead of being refused. There are as many loops as ``listeners``.
        """
        self.settings = settings
        self.authority = load_authority(directory)
        self.sealer = load_sealer(directory)
        self.port = settings.port
        self._resolver = Resolver(resolve)
        self._inherited = listeners
        self._keep = keep
        self._engine: Engine | None = None
        self._sources: dict[str, set[str]] = {}
        self._on_audit: list[Callable[[AuditRecord], None]] = []

    @property
    def ca_pem(self) -> bytes:
        """The CA certificate that guests must trust."""
        return self.authority.certificate

    def _make_engine(self) -> Engine:
        settings = self.settings
        loops = settings.loops or min(4, os.cpu_count() or 1)
        extra = Path(settings.extra_ca_file).read_bytes() if settings.extra_ca_file else None
        trust = settings.trust_file or _system_roots()
        sockets = _inherit_listeners(self._inherited, settings.address, self.port)
        try:
            for _ in range(0 if sockets else loops):
                sockets.append(_open_listener(settings.address, self.port, shared=loops > 1))
                self.port = sockets[-1].getsockname()[1]
            self.port = sockets[0].getsockname()[1]
            if self._keep is not None:
                self._keep(sockets)
            return Engine(
                [each.detach() for each in sockets],
                self.authority.certificate,
                self.authority.key,
                trust.encode() if trust else None,
                extra,
                512,
                settings.limits.connections,
                settings.limits.requests_per_second,
                settings.limits.mints_per_second,
                self.port,
                settings.assumed_tls_port,
                [max(1, round(getattr(settings.timeouts, name) * 1000)) for name in TIMERS],
                [network.encode() for network in settings.allow],
                [network.encode() for network in settings.deny],
            )
        except (OSError, ValueError) as error:
            raise InternalError(
                f"the egress proxy can not be started on {settings.address} port {settings.port}: {error}"
            ) from error
        finally:
            for each in sockets:
                each.close()

    async def run(self, *, grace: float = 5, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; open exchanges then get ``grace`` seconds to finish."""
        forbid_dumps()
        engine = self._engine = self._make_engine()
        engine.start()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer_questions, engine, nursery)
                nursery.start_soon(self._read_audit, engine)
                task_status.started()
        finally:
            engine.drain(round(grace * 1000))
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(engine.join)
            self._publish(engine)
            self._engine = None

    def accept(self) -> None:
        """Start accepting connections, including those queued since the sockets were opened."""
        self._running().accept()

    def _running(self) -> Engine:
        if self._engine is None:
            raise InternalError("the egress proxy is not running")
        return self._engine

    def set_policy(
        self,
        instance_id: str,
        source_ip: str,
        credentials: Mapping[str, CredentialPolicy],
        secrets: Mapping[str, str],
        unmatched: Unmatched | None = None,
        *,
        web_only: bool = False,
    ) -> None:
        """Once this returns, these rules apply to requests from ``source_ip``, also on open connections.

        ``web_only``: see compile_policy. Raises InvalidRequest if the rules are invalid; the previous ones
        then stay in force.
        """
        engine = self._running()
        snapshot = compile_policy(
            credentials,
            secrets,
            self.settings.unmatched if unmatched is None else unmatched,
            web_only=web_only,
            usual_port=self.settings.assumed_tls_port,
        )
        try:
            engine.set_policy(source_ip.encode(), instance_id.encode(), snapshot)
        except ValueError as error:
            raise InternalError(f"the egress policy of instance {instance_id} for {source_ip!r}: {error}") from None
        finally:
            wipe(snapshot)
        for instance, addresses in self._sources.items():
            if instance != instance_id:
                addresses.discard(source_ip)
        self._sources.setdefault(instance_id, set()).add(source_ip)

    def remove(self, instance_id: str) -> None:
        """Remove the instance: wipe its values, close its connections, refuse new ones. No-op if unknown."""
        for source_ip in self._sources.pop(instance_id, ()):
            if self._engine is not None:
                self._engine.remove(source_ip.encode())

    def statistics(self) -> Statistics:
        engine = self._running()
        return Statistics(engine.metrics(), engine.denied(), engine.latency())

    def on_audit(self, tell: Callable[[AuditRecord], None]) -> None:
        """Call ``tell`` with every record, in Trio's thread."""
        self._on_audit.append(tell)

    @asynccontextmanager
    async def audit(
        self, instance_id: str | None = None, *, backlog: int = 1000
    ) -> AsyncGenerator[trio.MemoryReceiveChannel[AuditRecord]]:
        """New records of one instance or of all. A reader that lags by more than ``backlog`` misses some."""
        send, receive = trio.open_memory_channel[AuditRecord](backlog)
        wanted = partial(_offer, send, instance_id)
        self._on_audit.append(wanted)
        try:
            yield receive
        finally:
            self._on_audit.remove(wanted)
            send.close()

    def _publish(self, engine: Engine) -> None:
        for row in engine.audit(bool(self._on_audit)):  # creating record objects costs more than the requests
            record = _read_record(row)
            for tell in tuple(self._on_audit):
                tell(record)

    async def _read_audit(self, engine: Engine) -> None:
        while True:
            await _wait_event(engine.audit_fd())
            self._publish(engine)

    async def _answer_questions(self, engine: Engine, nursery: trio.Nursery) -> None:
        while True:
            await _wait_event(engine.question_fd())
            for loop, token, instance, name in engine.questions():
                nursery.start_soon(self._answer, engine, loop, token, instance, name)

    async def _answer(self, engine: Engine, loop: int, token: int, instance: str, name: str) -> None:
        addresses = await self._resolver.addresses(instance, name)
        engine.answer(loop, token, [address.encode() for address in addresses])


def _offer(send: trio.MemorySendChannel[AuditRecord], instance_id: str | None, record: AuditRecord) -> None:
    if instance_id is None or record.instance == instance_id:
        try:
            send.send_nowait(record)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return


async def _wait_event(descriptor: int) -> None:
    await trio.lowlevel.wait_readable(descriptor)
    os.read(descriptor, 8)
