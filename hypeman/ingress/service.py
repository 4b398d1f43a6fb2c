"""Ingresses: stores them, holds their ports, and has the engine carry their requests.

Changes are made one after another. A new ingress has its ports before it is stored, and when ``create`` returns, the
engine knows it. An engine that ends is replaced (``egress/service.py``): the next one gets the same sockets and all
routes, and connections that come meanwhile wait in the sockets. An engine that outlives the server holds the sockets
for the next server.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

import trio
from msgspec import UNSET

from hypeman.egress.front import Front, Place
from hypeman.egress.records import Served
from hypeman.errors import HypemanError
from hypeman.ids import tags_match
from hypeman.ingress import records
from hypeman.ingress.certificates.service import Certificates
from hypeman.ingress.certificates.types import Answer, Pair
from hypeman.ingress.listeners import listen_on
from hypeman.ingress.routing import Route, compile_routes
from hypeman.ingress.types import (
    HTTP_PORT,
    CreateIngressRequest,
    Ingress,
    IngressRecord,
    RequestHeaderAuth,
    ports_of,
)
from hypeman.ingress.validate import FindInstance, check_request
from hypeman.network.leases import check_ports_free
from hypeman.network.types import PortMapping
from hypeman.store import Store, Txn

log = logging.getLogger(__name__)
access_log = logging.getLogger("hypeman.ingress.access")

_KINDS = ("1xx", "2xx", "3xx", "4xx", "5xx", "passed", "none")
_DIRECTIONS = ("received", "sent")
_RETRY = 5.0
"""Seconds between attempts to bind a port that another program has."""


async def _allow_all(_: Iterable[int]) -> None:
    """Where no firewall holds the engine back."""


class Ingresses:
    """Implements ``IngressService``. ``run`` in a nursery."""

    def __init__(
        self,
        store: Store,
        front: Front,
        *,
        find: FindInstance,
        place_of: Callable[[str], Place],
        certificates: Certificates,
        name_of: Callable[[str], str] = "instance {}".format,
        open_to_engine: Callable[[Iterable[int]], Awaitable[None]] = _allow_all,
        listen: Callable[[int], Sequence[socket.socket]] = listen_on,
    ) -> None:
        """``front``: the engine; ``find``: a reference → the instance's name; ``place_of``: a name or id → where it is;
        ``certificates``: not running yet; ``name_of``: an instance's id → how an error calls it; ``open_to_engine``:
        lets the engine connect to these ports of guests, and to no others."""
        self._store = store
        self.front = front
        self._find = find
        self._place_of = place_of
        self._name_of = name_of
        self._listeners: dict[int, Sequence[socket.socket]] = {}
        self.certificates = certificates
        certificates.carry(self._certify, self._challenge, self._listeners.keys)
        self._open_to_engine = open_to_engine
        self._bind = listen
        self._records: dict[str, IngressRecord] = {}
        self._ports: Counter[int] = Counter()
        """How many ingresses name a port of the host."""
        self._guest_ports: Counter[int] = Counter()
        """How many name a port of guests."""
        self._changing = trio.Lock()
        self.requests: Counter[tuple[str, ...]] = Counter()
        """By name of the ingress and class of the status, as in 2xx; TLS that was passed through: ``passed``."""
        self.bytes: Counter[tuple[str, ...]] = Counter()
        """By name of the ingress and direction."""

    # ── The API ──────────────────────────────────────────────────────────────────────────────────

    async def list(self, *, tags: Mapping[str, str]) -> Sequence[Ingress]:
        found = self._store.read(records.all_records)
        return [self._shown(record) for record in found if tags_match(record.tags, tags)]

    async def get(self, ref: str) -> Ingress:
        return self._shown(self._store.read(lambda txn: records.find(txn, ref)))

    async def create(self, request: CreateIngressRequest) -> Ingress:
        record = check_request(request, self._find, self.certificates.check, datetime.now(UTC))
        async with self._changing:
            with trio.CancelScope(shield=True):  # bounded; a client that leaves changes nothing
                self._store.read(lambda txn: records.check_free(txn, record))
                fresh = await self._hold(self._ports_of(record))
                try:
                    await self._open_to_engine(self._guest_ports.keys() | _guest_ports(record))
                    await self._store.write(lambda txn: records.insert(txn, record))
                except BaseException:
                    await self._release(fresh)
                    raise  # a port of guests that nothing leads to is closed with the next change
                self._add(record)
                await self.certificates.use(record.tls_hosts)
                await self.front.put(record.id, _routes(record))
                for port in fresh:
                    await self.front.listen(port, self._listeners[port])
        return self._shown(record)

    async def delete(self, ref: str) -> None:
        async with self._changing:
            with trio.CancelScope(shield=True):
                record = await self._store.write(lambda txn: records.remove(txn, ref))
                self._remove(record)
                await self.front.drop(record.id)
                await self._open_to_engine(self._guest_ports.keys())
                await self._release([port for port in self._ports_of(record) if not self._is_used(port)])
                await self.certificates.leave(record.tls_hosts)
                for kind in _KINDS:
                    self.requests.pop((record.name, kind), None)
                for direction in _DIRECTIONS:
                    self.bytes.pop((record.name, direction), None)

    async def internal_root(self) -> str:
        """The internal CA's certificate, PEM. Raises InternalError."""
        return await self.certificates.root()

    def _shown(self, record: IngressRecord) -> Ingress:
        states = tuple(self.certificates.state_of(host) for host in sorted(record.tls_hosts))
        return Ingress(
            id=record.id,
            name=record.name,
            rules=record.rules,
            created_at=record.created_at,
            tags=record.tags or UNSET,
            certificates=states or UNSET,
        )

    def _add(self, record: IngressRecord) -> None:
        self._records[record.id] = record
        self._ports.update(record.ports)
        self._guest_ports.update(_guest_ports(record))

    def _remove(self, record: IngressRecord) -> None:
        if self._records.pop(record.id, None) is not None:
            _subtract(self._ports, record.ports)
            _subtract(self._guest_ports, _guest_ports(record))

    # ── Ports ────────────────────────────────────────────────────────────────────────────────────

    def _ports_of(self, record: IngressRecord) -> frozenset[int]:
        return record.ports.union(*(self.certificates.ports_for(rule) for rule in record.rules))

    def _is_used(self, port: int) -> bool:
        if port != HTTP_PORT or self._ports[port]:
            return self._ports[port] > 0
        return port in self._used_ports()  # by public CAs, which depends on where certificates come from

    def _used_ports(self) -> frozenset[int]:
        return frozenset(port for record in self._records.values() for port in self._ports_of(record))

    async def _hold(self, ports: Iterable[int]) -> Sequence[int]:
        """Bind those that are not bound; which these were. Raises PortInUse or HostError, and has bound none then."""
        fresh = deque[int]()
        try:
            for port in sorted({port for port in ports if port not in self._listeners}):
                self._store.read(partial(_check_port_free, port, self._name_of))
                inherited = await self.front.inherited(port)
                self._listeners[port] = inherited or await trio.to_thread.run_sync(self._bind, port)
                fresh.append(port)
        except BaseException:
            await self._release(fresh)
            raise
        return fresh

    async def _release(self, ports: Iterable[int]) -> None:
        for port in ports:
            sockets = self._listeners.pop(port, None)
            if sockets is not None:
                await self.front.unlisten(port)
                for each in sockets:
                    with contextlib.suppress(OSError):  # the engine closes its copy a moment later: end the port now
                        each.shutdown(socket.SHUT_RDWR)
                    each.close()

    async def _hold_stored(self, complained: set[int]) -> None:
        """Ports of stored ingresses that are not bound yet. ``complained``: those that another program has."""
        for port in sorted(self._used_ports() - self._listeners.keys()):
            try:
                await self._hold([port])
            except HypemanError as error:
                if port not in complained:
                    complained.add(port)
                    log.error("ingresses on port %d wait: %s", port, error.message)
            else:
                complained.discard(port)
                await self.front.listen(port, self._listeners[port])

    async def _hold_again(self, complained: set[int]) -> None:
        while True:
            await trio.sleep(_RETRY)
            async with self._changing:
                await self._hold_stored(complained)

    # ── The engine ───────────────────────────────────────────────────────────────────────────────

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Have requests carried until cancelled; started once the engine knows the stored ingresses."""
        self.front.use(self._place_of, self._count)
        try:
            await self.certificates.load()
            async with self._changing:
                for record in self._store.read(records.all_records):
                    self._add(record)
                await self._open_to_engine(self._guest_ports.keys())
                await self.certificates.use([host for record in self._records.values() for host in record.tls_hosts])
                for record in self._records.values():
                    await self.front.put(record.id, _routes(record))
                complained = set[int]()
                await self._hold_stored(complained)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.certificates.run)
                nursery.start_soon(self._hold_again, complained)
                task_status.started()
        finally:
            self.front.let_go()
            for sockets in self._listeners.values():
                for each in sockets:
                    each.close()
            self._listeners.clear()

    async def _certify(self, name: str, pair: Pair | None) -> None:
        if pair is None:
            await self.front.uncertify(name)
        else:
            await self.front.certify(name, pair.chain, pair.key)

    async def _challenge(self, name: str, answer: Answer | None) -> None:
        if answer is None:
            await self.front.unchallenge(name)
        else:
            await self.front.challenge(name, answer.token, answer.authorization, answer.chain, answer.key)

    def _count(self, served: Served) -> None:
        record = self._records.get(served.ingress)
        name = record.name if record is not None else ""
        kind = f"{served.status // 100}xx" if served.status else "passed" if served.passed else "none"
        if record is not None or not served.ingress:
            self.requests[name, kind] += 1
            for direction, count in zip(_DIRECTIONS, (served.received, served.sent), strict=True):
                self.bytes[name, direction] += count
        access_log.info(
            "ingress connection" if served.passed else "ingress request",
            extra={
                "ingress": name,
                "host": served.host,
                "client": served.client,
                "method": served.method,
                "path": served.path,
                "instance": served.instance,
                "status": served.status,
                "received": served.received,
                "sent": served.sent,
                "seconds": round(served.seconds, 4),
                "http": served.http,
            },
        )


def _guest_ports(record: IngressRecord) -> set[int]:
    return {rule.target.port for rule in record.rules}


def _subtract(counted: Counter[int], ports: Iterable[int]) -> None:
    """One of each; keys are what is used."""
    for port in ports:
        counted[port] -= 1
        if not counted[port]:
            del counted[port]


def _check_port_free(port: int, name_of: Callable[[str], str], txn: Txn) -> None:
    check_ports_free(txn, [PortMapping(host_port=port, guest_port=port)], name_of)


def _routes(record: IngressRecord) -> bytes:
    routes = [
        Route(
            hostname=rule.match.hostname,
            port=port,
            instance=rule.target.instance,
            target_port=rule.target.port,
            auth_header=auth.header if isinstance(auth := rule.request_header_auth, RequestHeaderAuth) else "",
            auth_value=auth.value if isinstance(auth, RequestHeaderAuth) else "",
            tls=rule.tls and port == rule.match.port,
            tls_passthrough=rule.tls_passthrough and port == rule.match.port,
            redirect=rule.match.port if rule.redirect_http else 0,
        )
        for rule in record.rules
        for port in ports_of(rule)
    ]
    return compile_routes(routes)
