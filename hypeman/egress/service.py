"""Keeps an engine process running and sets each instance's policy in it.

The engine (``engine.py``) carries the traffic; this module decides: policies, name resolution, which program carries.
Whether an address may be dialled is decided in the engine, on the addresses it then dials, by the networks given here.

A policy is in force when ``set_policy`` returns: each request uses the rules in force when it is forwarded, so the
new rules also apply to later requests on open connections.

- **Supervision.** What is in force is kept here, sealed. If the engine ends, another one gets all of it before it
  accepts connections; those that come meanwhile wait in the listening sockets, which are held here too.
- **Adoption.** With a directory, an engine outlives the server: the next one finds it there, sets all policies again
  while it carries on, and removes those that are no longer wanted with ``accept``. If the program or the settings
  have changed, a new engine takes over the listening sockets and the old one ends with its last connection, after
  ``drain_timeout`` at the latest; until then it gets every change of a policy, too.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import secrets as random
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from pathlib import Path

import msgspec
import trio

from hypeman import __version__
from hypeman.egress import protocol
from hypeman.egress.authority import load_authority
from hypeman.egress.front import Front
from hypeman.egress.link import (
    Command,
    EngineFailed,
    EngineLink,
    EngineLost,
    Handlers,
    engine_command,
    find_engines,
    start_engine,
)
from hypeman.egress.policy import Unmatched, compile_policy, wipe
from hypeman.egress.records import AuditRecord, Served, read_records
from hypeman.egress.resolver import Resolve, Resolver, resolve_by_system
from hypeman.egress.rules import compile_access
from hypeman.egress.sealing import load_sealer
from hypeman.egress.transforms import Value
from hypeman.egress.types import CredentialPolicy, EgressAccess
from hypeman.errors import InternalError

log = logging.getLogger(__name__)

Keep = Callable[[Sequence[socket.socket]], None]
Decide = Callable[[bool], Awaitable[None]]
Ask = Callable[[protocol.ApprovalNeeded, Decide], Awaitable[None]]
"""Called with a request that needs an approval, and with what is to be called with the decision."""

TIMERS = ("head", "handshake", "resolve", "connect", "idle_down", "idle_up", "stream", "half", "linger", "ask", "held",
          "place", "dial", "answer")  # fmt: skip
"""Fields of Timeouts, in the order in which an engine takes them."""
_PR_SET_DUMPABLE = 4
_LEAF_CACHE = 512
_MAX_PAUSE = 0.5
"""Seconds between starts of an engine that keeps ending at once."""
_STEADY = 10.0
"""Seconds after which an engine counts as running."""
_SYSTEM_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine, Arch
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",
)


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What may be held at once."""

    connections: int = 4096
    """From guests."""
    upstreams: int = 2048
    """Connections to hosts, idle ones too."""
    streams: int = 4096
    """Requests that are not complete."""
    handshakes: int = 256
    """TLS handshakes with guests that are not complete, and long key derivations for Postgres."""
    descriptors: int = 8192
    bytes: int = 64 << 20
    """In buffers. Above it, a connection is read only when what was read of it before has gone."""


CLIENTS = Bounds(connections=4096, upstreams=4096, streams=8192, handshakes=256, descriptors=8192, bytes=256 << 20)
"""Of clients of ingresses; they get nothing of what instances may hold."""
TOTAL = Bounds(connections=65536, upstreams=65536, streams=131072, handshakes=4096, descriptors=262144, bytes=1 << 30)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one instance, which gets no more than half of what all may hold."""

    each: Bounds = Bounds()
    total: Bounds = TOTAL
    """Of all instances together; of descriptors, no more than the process may have."""
    client: Bounds = CLIENTS
    """The same for clients of ingresses at one address (IPv6: in one network of 64 bits), and for all of them."""
    clients: Bounds = CLIENTS
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
    ask: float = 60
    """That a request is held for an approval."""
    held: float = 15
    """A request whose credential has no valid value at the moment."""
    place: float = 5
    """Ingresses: for us to say where an instance is."""
    dial: float = 20
    """For a guest to accept a connection; it may have to be woken from standby."""
    answer: float = 120
    """For a guest to begin its response, for a client to send more of its request or to take more of the response."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is started with."""

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
    uid: int = 65534
    """User of the engine process, for a server that is root."""
    drain_timeout: float = 4 * 3600
    """Seconds that an engine may keep its connections after another one has taken over."""


class Statistics(msgspec.Struct, frozen=True):
    """Counters since the start."""

    counters: dict[str, int]
    denied: dict[str, int]
    """By reason."""
    latency: list[int]
    """Requests by duration: item i counts those below 16 µs · 2^i."""
    in_use: dict[str, int]
    """What all instances hold now, by bound."""
    largest: dict[str, tuple[str, int]]
    """The instance that holds the most of it, and how much."""
    limited: dict[str, int]
    """How often something was refused because of a bound."""


def forbid_dumps() -> None:
    """Disable core dumps and ptrace of this process: credentials pass through its memory."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _trusted_roots(settings: Settings) -> bytes:
    """PEM of the roots that hosts must chain to."""
    path = settings.trust_file or next((path for path in _SYSTEM_ROOTS if Path(path).exists()), None)
    path = path or ssl.get_default_verify_paths().cafile
    if not path:
        log.warning("this host has no bundle of CA certificates: every TLS connection through the proxy will fail")
        return b""
    return Path(path).read_bytes()


@cache
def _program() -> str:
    """Differs between two versions of the engine."""
    spec = importlib.util.find_spec("hypeman._native._egress_c")
    if spec is None or spec.origin is None:
        raise InternalError("the egress data plane is missing; run make")
    with open(spec.origin, "rb") as file:
        return f"{__version__} {hashlib.file_digest(file, 'sha256').hexdigest()}"


class _Policy(msgspec.Struct, frozen=True):
    """What is to be in force for a source address."""

    instance: str
    plain: bytes | None
    """The compiled policy, if it holds no credential."""
    sealed: bytes
    """Otherwise: only engines hold values in clear text."""


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

    ``run`` serves until it is cancelled; the other methods may be called once ``run`` has reported started. Connections
    wait until ``accept`` is called after the policies of all guests are set: earlier they would be reset as
    unregistered.
    """

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        *,
        resolve: Resolve = resolve_by_system,
        listeners: Sequence[socket.socket] = (),
        keep: Keep | None = None,
        engines: Path | None = None,
        group: Callable[[], str] = str,
        command: Command = engine_command,
    ) -> None:
        """``directory`` contains the authority and the sealing key.

        ``engines`` is a directory that only the server can enter, in which the next server finds the engine, which then
        outlives this one. Without it the engine ends with ``run``.
        ``group`` makes the control group for an engine and returns its directory, "" for none.
        ``keep`` receives the listening sockets to hold for the next process, which takes them as ``listeners``, so that
        guests connecting during a restart wait instead of being refused, even if the engine ends as well. There are as
        many loops as ``listeners``.
        """
        self.settings = settings
        self.authority = load_authority(directory)
        self.sealer = load_sealer(directory)
        self.port = settings.port
        self._resolver = Resolver(resolve)
        self._inherited = listeners
        self._keep = keep
        self._directory = engines
        self._group = group
        self._command = command
        self._listeners: list[socket.socket] = []
        self._engine: EngineLink | None = None
        """The one that accepts connections."""
        self._engines: list[EngineLink] = []
        """All that are connected: that one, and those that drain."""
        self._replaced = trio.Event()
        """Set when there is another ``_engine``, and then replaced."""
        self._running = False
        self._accepting = False
        self._policies: dict[str, _Policy] = {}
        """By source address."""
        self._ended: list[protocol.Counters] = []
        """What engines had counted before they ended; at most two, sums and a new one."""
        self._on_audit: list[Callable[[AuditRecord], None]] = []
        self._nursery: trio.Nursery | None = None
        self._ask: Ask | None = None
        self.front = Front(lambda: self._engines, self._count_clients)
        """What ingresses use."""

    def _count_clients(self) -> tuple[int, int]:
        counters = self.counted().counters if self._running else {}
        return counters.get("clients", 0), counters.get("clients_refused", 0)

    @property
    def ca_pem(self) -> bytes:
        """The CA certificate that guests must trust."""
        return self.authority.certificate

    @property
    def engine_pid(self) -> int:
        """Process id of the engine that accepts connections; 0 if there is none."""
        return self._engine.pid if self._engine else 0

    # ── Engines ──────────────────────────────────────────────────────────────────────────────────

    async def run(self, *, grace: float = 5, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. An engine that does not outlive us then gets ``grace`` seconds for open exchanges."""
        forbid_dumps()
        try:
            await self._begin()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for engine in self._engines:
                    nursery.start_soon(self._watch_one, engine)
                nursery.start_soon(self.front.run)
                self._running = True
                task_status.started()
                await self._supervise()
        finally:
            self._running = False
            self._nursery = None
            with trio.CancelScope(shield=True):
                await self._leave(grace)

    async def _begin(self) -> None:
        """Take over the engine that runs, or start one."""
        if self._directory is not None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._engines = await find_engines(self._directory)
        self._listeners = self._make_listeners()
        self.port = self._listeners[0].getsockname()[1]
        if self._keep is not None:
            self._keep(self._listeners)
        texts = await self._read_texts()
        identity = self._identity(texts)
        mine = next((e for e in self._engines if e.hello and e.hello.identity == identity and not e.draining), None)
        if mine is None:
            mine = await self._start()
        else:
            log.info("the engine keeps running", extra={"pid": mine.pid})
        self._engine = mine

    def _make_listeners(self) -> list[socket.socket]:
        """Sockets that listen where they should: those of a running engine, those kept for us, or new ones."""
        settings = self.settings
        loops = settings.loops or min(4, os.cpu_count() or 1)
        theirs = {
            os.fstat(listener.fileno()).st_ino: listener for engine in self._engines for listener in engine.listeners
        }
        running = _inherit_listeners([listener.dup() for listener in theirs.values()], settings.address, self.port)
        sockets = _inherit_listeners(self._inherited, settings.address, self.port)
        if running:  # the same sockets as those kept for us
            for each in sockets:
                each.close()
            return running
        try:
            for _ in range(0 if sockets else loops):
                sockets.append(_open_listener(settings.address, self.port, shared=loops > 1))
                self.port = sockets[-1].getsockname()[1]
        except OSError as error:
            for each in sockets:
                each.close()
            raise InternalError(
                f"the egress proxy cannot listen on {settings.address} port {settings.port}: {error}"
            ) from error
        return sockets

    def _engine_settings(self) -> protocol.EngineSettings:
        settings = self.settings
        return protocol.EngineSettings(
            uid=settings.uid,
            leaf_cache=_LEAF_CACHE,
            each=tuple(getattr(settings.limits.each, name) for name in protocol.BOUNDS),
            total=tuple(getattr(settings.limits.total, name) for name in protocol.BOUNDS),
            clients_each=tuple(getattr(settings.limits.client, name) for name in protocol.BOUNDS),
            clients_total=tuple(getattr(settings.limits.clients, name) for name in protocol.BOUNDS),
            requests_per_second=settings.limits.requests_per_second,
            mints_per_second=settings.limits.mints_per_second,
            listen_port=self.port,
            assumed_tls_port=settings.assumed_tls_port,
            timers_ms=tuple(max(1, round(getattr(settings.timeouts, name) * 1000)) for name in TIMERS),
            allow=settings.allow,
            deny=settings.deny,
        )

    async def _read_texts(self) -> list[bytes]:
        """What ``Start`` brings, without the key. Raises EngineFailed."""

        def read() -> list[bytes]:
            extra = Path(self.settings.extra_ca_file).read_bytes() if self.settings.extra_ca_file else b""
            return [self.authority.certificate, _trusted_roots(self.settings), extra]

        try:
            return await trio.to_thread.run_sync(read)
        except OSError as error:
            raise EngineFailed(f"the egress proxy cannot read its trusted certificates: {error}") from error

    def _identity(self, texts: Sequence[bytes]) -> str:
        sockets = sorted(os.fstat(listener.fileno()).st_ino for listener in self._listeners)
        digest = hashlib.sha256(msgspec.json.encode((_program(), self._engine_settings(), sockets)))
        for text in texts:
            digest.update(hashlib.sha256(text).digest())
        return digest.hexdigest()

    async def _start(self) -> EngineLink:
        """A new engine, which has no policies yet. Raises EngineFailed."""
        certificate, roots, extra = texts = await self._read_texts()
        parts = [text + b"\0" for text in (certificate, self.authority.key, roots, extra)]
        first, second, third, fourth = (len(part) for part in parts)
        message = protocol.Start(
            settings=self._engine_settings(),
            identity=self._identity(texts),
            sizes=(first, second, third, fourth),
            adoptable=self._directory is not None,
        )
        engine = await start_engine(
            message,
            bytearray().join(parts),
            self._listeners,
            self._directory / f"{random.token_hex(8)}.sock" if self._directory is not None else None,
            log=self._directory / "engine.log" if self._directory is not None else None,
            group=self._group(),
            command=self._command,
        )
        assert engine.hello is not None
        if not engine.hello.locked:
            log.warning("the memory of the engine is not locked: it may be written to swap")
        self._engines.append(engine)
        if self._nursery is not None:
            self._nursery.start_soon(self._watch_one, engine)
        return engine

    async def _watch_one(self, engine: EngineLink) -> None:
        wrong = await engine.run(Handlers(self._question, self._locate, self._records, self._approval))
        self._engines.remove(engine)
        if engine.counted is not None:
            self._ended.append(engine.counted)
        if wrong:
            log.error("an engine was ended: %s", wrong, extra={"pid": engine.pid})

    async def _supervise(self) -> None:
        """Start another engine whenever the present one ends."""
        pause = 0.0
        while True:
            old, since = self._engine, trio.current_time()
            assert old is not None
            await old.lost.wait()
            self._engine = None
            pause = 0.0 if trio.current_time() - since > _STEADY else min(_MAX_PAUSE, pause + 0.1)
            while (new := await self._another()) is None:
                pause = min(_MAX_PAUSE, pause + 0.1)
                await trio.sleep(pause)
            self._engine = new
            self._replaced.set()
            self._replaced = trio.Event()
            log.error(
                "the engine ended unexpectedly, with its connections; another one runs",
                extra={"ended": old.pid, "code": old.code, "pid": new.pid},
            )
            await trio.sleep(pause)

    async def _another(self) -> EngineLink | None:
        """A new engine with all policies, accepting if we do."""
        try:
            new = await self._start()
            await self._set_all(new)
            return new
        except EngineFailed as error:
            log.error("%s", error)
        except EngineLost:
            log.error("the engine ended at once")
        return None

    async def _set_all(self, engine: EngineLink) -> None:
        """Bring a new engine up to date. Raises EngineLost."""
        for source in list(self._policies):
            try:
                await self._set_one(engine, source)
            except InternalError as error:  # its source stays unregistered, without any egress
                log.error("the egress policy for %s: %s", source, error)
        await self.front.set_all(engine)
        if self._accepting:
            await engine.accept()

    async def _set_one(self, engine: EngineLink, source: str) -> None:
        policy = self._policies.get(source)
        if policy is None:
            await engine.remove_policy(source)
        else:
            await engine.set_policy(source, policy.instance, partial(self._open, source, policy.instance))

    def _open(self, source: str, instance: str) -> bytearray | None:
        """The policy that is to be in force now; None if the address is no longer that instance's."""
        policy = self._policies.get(source)
        if policy is None or policy.instance != instance:
            return None
        if policy.plain is not None:
            return bytearray(policy.plain)
        return bytearray(self.sealer.open_bytes(instance, policy.sealed))

    async def _everywhere(self, source: str) -> None:
        """Bring all engines up to date for ``source``; waits for the next one if there is none."""
        while True:
            replaced, present, done = self._replaced, self._engine, False
            for engine in tuple(self._engines):
                with suppress(EngineLost):
                    await self._bring_up_to_date(engine, source)
                    done = done or engine is present
            if done:
                return
            self._check_running()
            await replaced.wait()

    async def _bring_up_to_date(self, engine: EngineLink, source: str) -> None:
        """A draining engine that is too old for a policy must not keep the previous one. Raises EngineLost."""
        try:
            await self._set_one(engine, source)
        except InternalError:
            if not engine.draining:
                raise
            await engine.remove_policy(source)

    async def _leave(self, grace: float) -> None:
        """End the engines, or leave them running without a server."""
        if self._directory is None:
            async with trio.open_nursery() as nursery:
                for engine in tuple(self._engines):
                    nursery.start_soon(self._watch_one, engine)
                    nursery.start_soon(self._end, engine, grace)
        for engine in tuple(self._engines):
            engine.close()
        self._engines.clear()
        self._engine = None
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    async def _end(self, engine: EngineLink, grace: float) -> None:
        with suppress(EngineLost), trio.move_on_after(grace + 5):
            await engine.drain(grace)
            await engine.lost.wait()
        if not engine.lost.is_set():
            await engine.kill()

    # ── Policies ─────────────────────────────────────────────────────────────────────────────────

    async def accept(self) -> None:
        """Start accepting connections, including those queued since the sockets were opened.

        An adopted engine accepts already: what it knows and was not set again is removed. Engines of another version
        or with other settings begin to drain.
        """
        self._check_running()
        self._accepting = True
        for engine in tuple(self._engines):
            with suppress(EngineLost):
                await engine.accept()
                if engine is not self._engine and not engine.draining:
                    log.info("another engine takes over", extra={"pid": self.engine_pid, "drains": engine.pid})
                    await engine.drain(self.settings.drain_timeout)

    def _check_running(self) -> None:
        if not self._running:
            raise InternalError("the egress proxy is not running")

    async def set_policy(
        self,
        instance_id: str,
        source_ip: str,
        credentials: Mapping[str, CredentialPolicy],
        secrets: Mapping[str, str],
        unmatched: Unmatched | None = None,
        *,
        obtained: Mapping[str, Value] | None = None,
        web_only: bool = False,
        access: EgressAccess | None = None,
    ) -> None:
        """Once this returns, these rules apply to requests from ``source_ip``, also on open connections.

        ``obtained``, ``web_only``: see compile_policy. ``access`` must be checked. Raises InvalidRequest if the rules
        are invalid; the previous ones then stay in force. If the engine ends meanwhile, this waits for the next one.
        """
        self._check_running()
        snapshot = compile_policy(
            credentials,
            secrets,
            self.settings.unmatched if unmatched is None else unmatched,
            obtained=obtained,
            web_only=web_only,
            usual_port=self.settings.assumed_tls_port,
            access=compile_access(access),
        )
        try:
            if credentials:
                policy = _Policy(instance_id, None, self.sealer.seal_bytes(instance_id, snapshot))
            else:
                policy = _Policy(instance_id, bytes(snapshot), b"")
        finally:
            wipe(snapshot)
        before = self._policies.get(source_ip)
        self._policies[source_ip] = policy
        try:
            await self._everywhere(source_ip)
        except InternalError:
            if self._policies.get(source_ip) is policy:
                del self._policies[source_ip]
                if before is not None:
                    self._policies[source_ip] = before
            raise

    async def remove(self, instance_id: str) -> None:
        """Remove the instance: wipe its values, close its connections, refuse new ones. No-op if unknown."""
        mine = [source for source, policy in self._policies.items() if policy.instance == instance_id]
        for source in mine:
            del self._policies[source]
        if self._running:
            for source in mine:
                await self._everywhere(source)

    # ── Counters and records ─────────────────────────────────────────────────────────────────────

    async def statistics(self) -> Statistics:
        """Up to date. Raises InternalError if nothing runs."""
        self._check_running()
        for engine in tuple(self._engines):
            with suppress(EngineLost):
                await engine.count()
        return self.counted()

    def counted(self) -> Statistics:
        """The same as of the last call of ``statistics``."""
        self._check_running()
        gone = [
            msgspec.structs.replace(
                each, counters={**each.counters, "connections": 0, "clients": 0}, in_use={}, largest={}
            )
            for each in self._ended
        ]
        known = [engine.counted for engine in self._engines if engine.counted is not None]
        total = _sum(gone)
        self._ended = [total]
        everything = _sum([total, *known])
        return Statistics(
            everything.counters,
            everything.denied,
            list(everything.latency),
            everything.in_use,
            everything.largest,
            everything.limited,
        )

    def on_audit(self, report: Callable[[AuditRecord], None]) -> None:
        """Call ``report`` with every record, in Trio's thread."""
        self._on_audit.append(report)

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

    def _records(self, engine: EngineLink, data: bytearray) -> None:
        assert engine.hello is not None
        if not self._on_audit and self.front.on_served is None:
            return  # creating record objects costs more than the requests
        for record in read_records(data, engine.hello.reasons):
            if isinstance(record, Served):
                if self.front.on_served is not None:
                    self.front.on_served(record)
            else:
                for report in tuple(self._on_audit):
                    report(record)

    def _locate(self, engine: EngineLink, asked: protocol.Locate) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self.front.locate, engine, asked)

    def on_approval_needed(self, ask: Ask) -> None:
        """Await ``ask`` with each request that is held for an approval; without it such requests time out."""
        self._ask = ask

    def _approval(self, engine: EngineLink, held: protocol.ApprovalNeeded) -> None:
        async def decide(allow: bool) -> None:
            await engine.decide(held, allow=allow)

        if self._nursery is not None and self._ask is not None:
            self._nursery.start_soon(self._ask, held, decide)

    def record(self, record: AuditRecord) -> None:
        """Pass on a record of something that was decided here."""
        for report in tuple(self._on_audit):
            report(record)

    # ── Names ────────────────────────────────────────────────────────────────────────────────────

    def pin(self, instance_id: str, name: str, addresses: Sequence[str], seconds: float) -> None:
        """The guest received these addresses: its connections to ``name`` go there as long as that is valid."""
        self._resolver.pin(instance_id, name, addresses, seconds)

    def _question(self, engine: EngineLink, question: protocol.Question) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._answer, engine, question)

    async def _answer(self, engine: EngineLink, question: protocol.Question) -> None:
        addresses = await self._resolver.addresses(question.instance, question.name)
        await engine.answer(question, addresses)


def _sum(counted: Sequence[protocol.Counters]) -> protocol.Counters:
    counters: dict[str, int] = {}
    denied: dict[str, int] = {}
    in_use: dict[str, int] = {}
    limited: dict[str, int] = {}
    largest: dict[str, tuple[str, int]] = {}
    latency: list[int] = []
    for each in counted:
        for bound, (instance, held) in each.largest.items():
            if held > largest.get(bound, ("", 0))[1]:
                largest[bound] = instance, held
        pairs = ((counters, each.counters), (denied, each.denied), (in_use, each.in_use), (limited, each.limited))
        for total, more in pairs:
            for name, value in more.items():
                total[name] = total.get(name, 0) + value
        latency += [0] * (len(each.latency) - len(latency))
        for bucket, value in enumerate(each.latency):
            latency[bucket] += value
    return protocol.Counters(
        id=0,
        counters=counters,
        denied=denied,
        latency=tuple(latency),
        in_use=in_use,
        largest=largest,
        limited=limited,
    )


def _offer(send: trio.MemorySendChannel[AuditRecord], instance_id: str | None, record: AuditRecord) -> None:
    if instance_id is None or record.instance == instance_id:
        try:
            send.send_nowait(record)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return
