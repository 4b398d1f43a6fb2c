"""Ingresses: stores them, holds their ports, and keeps a worker running that carries their requests.

Changes are made one after another. A new ingress has its ports before it is stored, and when ``create`` returns, the
worker knows it. A worker that ends is replaced: it gets the same sockets and all routes, and connections that come
meanwhile wait in the sockets.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

import trio
from msgspec import UNSET

from hypeman.errors import HypemanError
from hypeman.ids import tags_match
from hypeman.ingress import protocol, records
from hypeman.ingress.certificates.service import Certificates
from hypeman.ingress.certificates.types import Answer, Pair
from hypeman.ingress.link import Command, WorkerLink, WorkerLost, start_worker, worker_command
from hypeman.ingress.listeners import listen_on
from hypeman.ingress.proxy import Place
from hypeman.ingress.routing import Route
from hypeman.ingress.types import CreateIngressRequest, Ingress, IngressRecord, RequestHeaderAuth, ports_of
from hypeman.ingress.validate import FindInstance, check_request
from hypeman.network.leases import check_ports_free
from hypeman.network.types import PortMapping
from hypeman.store import Store, Txn

log = logging.getLogger(__name__)
access_log = logging.getLogger("hypeman.ingress.access")

_RETRY = 5.0
"""Seconds between attempts to bind a port that another program has, and the longest pause before another worker."""
_FIRST_PAUSE = 0.1


class Ingresses:
    """Implements ``IngressService``. ``run`` in a nursery."""

    def __init__(
        self,
        store: Store,
        *,
        find: FindInstance,
        place_of: Callable[[str], Place],
        certificates: Certificates,
        name_of: Callable[[str], str] = "instance {}".format,
        uid: int = 0,
        command: Command = worker_command,
        listen: Callable[[int], Sequence[socket.socket]] = listen_on,
    ) -> None:
        """``find``: a reference → the instance's name; ``place_of``: a name or id → where it is;
        ``certificates``: not running yet;
        ``name_of``: an instance's id → how an error calls it; ``uid``: of the worker."""
        self._store = store
        self._find = find
        self._place_of = place_of
        self._name_of = name_of
        self._listeners: dict[int, Sequence[socket.socket]] = {}
        self.certificates = certificates
        certificates.carry(self._certify, self._challenge, self._listeners.keys)
        self._uid = uid
        self._command = command
        self._bind = listen
        self._records: dict[str, IngressRecord] = {}
        self._changing = trio.Lock()
        self._wanted = trio.Event()
        """There is, or was, an ingress: without any there is no worker, and the server starts sooner."""
        self._link: WorkerLink | None = None
        self.connections = 0
        self.refused = 0
        self.requests: Counter[tuple[str, ...]] = Counter()
        """By name of the ingress and class of the status, as in 2xx."""
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
                    await self._store.write(lambda txn: records.insert(txn, record))
                except BaseException:
                    await self._release(fresh)
                    raise
                self._records[record.id] = record
                self._wanted.set()
                await self._use_certificates()
                await self._tell(partial(_put, record))
                for port in fresh:
                    await self._open(port)
        return self._shown(record)

    async def delete(self, ref: str) -> None:
        async with self._changing:
            with trio.CancelScope(shield=True):
                record = await self._store.write(lambda txn: records.remove(txn, ref))
                self._records.pop(record.id, None)
                await self._tell(lambda number: protocol.Drop(number, record.id))
                await self._release(self._ports_of(record) - self._used_ports())
                await self._use_certificates()
                for counter in (self.requests, self.bytes):
                    for key in [key for key in counter if key[0] == record.name]:
                        del counter[key]

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

    async def _use_certificates(self) -> None:
        await self.certificates.use({host for record in self._records.values() for host in record.tls_hosts})

    # ── Ports ────────────────────────────────────────────────────────────────────────────────────

    def _ports_of(self, record: IngressRecord) -> frozenset[int]:
        return record.ports.union(*(self.certificates.ports_for(rule) for rule in record.rules))

    def _used_ports(self) -> frozenset[int]:
        return frozenset(port for record in self._records.values() for port in self._ports_of(record))

    async def _hold(self, ports: Iterable[int]) -> Sequence[int]:
        """Bind those that are not bound; which these were. Raises PortInUse or HostError, and has bound none then."""
        fresh = deque[int]()
        try:
            for port in sorted(set(ports) - self._listeners.keys()):
                self._store.read(partial(_check_port_free, port, self._name_of))
                self._listeners[port] = await trio.to_thread.run_sync(self._bind, port)
                fresh.append(port)
        except BaseException:
            await self._release(fresh)
            raise
        return fresh

    async def _open(self, port: int) -> None:
        await self._tell(lambda number: protocol.Listen(number, port), self._listeners[port])

    async def _release(self, ports: Iterable[int]) -> None:
        for port in ports:
            sockets = self._listeners.pop(port, None)
            if sockets is not None:
                await self._tell(partial(_unlisten, port))
                for each in sockets:
                    each.close()

    async def _hold_again(self) -> None:
        """Ports of stored ingresses that another program had."""
        complained: set[int] = set()
        while True:
            async with self._changing:
                for port in sorted(self._used_ports() - self._listeners.keys()):
                    try:
                        await self._hold([port])
                    except HypemanError as error:
                        if port not in complained:
                            complained.add(port)
                            log.error("ingresses on port %d wait: %s", port, error.message)
                    else:
                        complained.discard(port)
                        await self._open(port)
            await trio.sleep(_RETRY)

    # ── The worker ───────────────────────────────────────────────────────────────────────────────

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry requests until cancelled; started once the stored ingresses are served."""
        try:
            await self.certificates.load()
            async with self._changing:
                self._records = {record.id: record for record in self._store.read(records.all_records)}
                for port in sorted(self._used_ports()):
                    try:
                        await self._hold([port])
                    except HypemanError as error:
                        log.warning("ingresses on port %d: %s", port, error.message)
                await self._use_certificates()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.certificates.run)
                if self._records:
                    self._wanted.set()
                    await nursery.start(self._keep_worker)
                else:
                    nursery.start_soon(self._keep_worker)
                nursery.start_soon(self._hold_again)
                task_status.started()
        finally:
            for sockets in self._listeners.values():
                for each in sockets:
                    each.close()
            self._listeners.clear()

    async def _keep_worker(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._wanted.wait()
        pause = _FIRST_PAUSE
        is_first = True
        while True:
            began = trio.current_time()
            try:
                link = await start_worker(self._uid, self._command)
            except (WorkerLost, OSError) as error:
                log.error("the ingress worker cannot be started: %s", error)
            else:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(link.run, self._answer, self._count)
                    async with self._changing:
                        self._link = link
                        await self._tell_everything()
                    if is_first:
                        task_status.started()
                        is_first = False
                    try:
                        await link.lost.wait()
                    finally:
                        self._link = None
                        self.connections = 0
                log.warning("the ingress worker has ended; another one is started")
            if is_first:
                task_status.started()  # the server starts without; attempts go on
                is_first = False
            if trio.current_time() - began > 60:
                pause = _FIRST_PAUSE
            await trio.sleep(pause)
            pause = min(_RETRY, 2 * pause)

    async def _tell_everything(self) -> None:
        for name, pair in self.certificates.pairs():
            await self._certify(name, pair)
        for name, answer in self.certificates.answers():
            await self._challenge(name, answer)
        for record in self._records.values():
            await self._tell(partial(_put, record))
        for port in self._listeners:
            await self._open(port)

    async def _certify(self, name: str, pair: Pair | None) -> None:
        if pair is None:
            await self._tell(lambda number: protocol.Uncertify(number, name))
        else:
            await self._tell(lambda number: protocol.Certify(number, name, pair.chain, pair.key))

    async def _challenge(self, name: str, answer: Answer | None) -> None:
        if answer is None:
            await self._tell(lambda number: protocol.Unchallenge(number, name))
        else:
            await self._tell(
                lambda number: protocol.Challenge(
                    number, name, answer.token, answer.authorization, answer.chain, answer.key
                )
            )

    async def _tell(self, make: Callable[[int], protocol.Request], sockets: Sequence[socket.socket] = ()) -> None:
        """If it is lost, the next worker gets everything anyway."""
        if self._link is not None:
            try:
                await self._link.call(make, sockets)
            except WorkerLost:
                self._link = None

    def _answer(self, asked: protocol.Ask) -> protocol.Target:
        place = self._place_of(asked.instance)
        return protocol.Target(asked.token, place.address, place.exists)

    def _count(self, batch: protocol.Log) -> None:
        self.connections = batch.connections
        self.refused += batch.refused
        if batch.lost:
            log.warning("%d ingress requests are not in the log", batch.lost)
        for served in batch.served:
            record = self._records.get(served.ingress)
            name = record.name if record is not None else ""
            if record is not None or not served.ingress:
                self.requests[name, f"{served.status // 100}xx" if served.status else "none"] += 1
                self.bytes[name, "received"] += served.received
                self.bytes[name, "sent"] += served.sent
            access_log.info(
                "ingress request",
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
                },
            )


def _check_port_free(port: int, name_of: Callable[[str], str], txn: Txn) -> None:
    check_ports_free(txn, [PortMapping(host_port=port, guest_port=port)], name_of)


def _put(record: IngressRecord, number: int) -> protocol.Request:
    return protocol.Put(number, record.id, _routes(record))


def _unlisten(port: int, number: int) -> protocol.Request:
    return protocol.Unlisten(number, port)


def _routes(record: IngressRecord) -> tuple[Route, ...]:
    return tuple(
        Route(
            ingress=record.id,
            hostname=rule.match.hostname,
            port=port,
            instance=rule.target.instance,
            target_port=rule.target.port,
            auth_header=auth.header if isinstance(auth := rule.request_header_auth, RequestHeaderAuth) else "",
            auth_value=auth.value if isinstance(auth, RequestHeaderAuth) else "",
            tls=rule.tls and port == rule.match.port,
            redirect=rule.match.port if rule.redirect_http else 0,
        )
        for rule in record.rules
        for port in ports_of(rule)
    )
