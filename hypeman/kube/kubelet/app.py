"""The kubelet's API as an ASGI application: authenticate, authorize, parse, answer.

A failure before the first byte is a response with its status and one line of text, as a kubelet's. A pod is looked up
in memory (``PodTable``); what happens in its guest goes through this host's server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import trio
from msgspec import UNSET, Struct

from hypeman.errors import HypemanError, InternalError, InvalidRequest, InvalidState, NotFound, RateLimited
from hypeman.host import facts
from hypeman.instances.model.types import Instance, InstanceState, UsageOfAll
from hypeman.kube.kubelet import channels, portforward, spdy
from hypeman.kube.kubelet.answer import TEXT, Answer, Receive, Scope, Send, Socket
from hypeman.kube.kubelet.auth import Gate
from hypeman.kube.kubelet.logs import send_log
from hypeman.kube.kubelet.remote import Exec as Program
from hypeman.kube.kubelet.remote import open_exec
from hypeman.kube.kubelet.routes import (
    Attach,
    Container,
    Exec,
    Forward,
    Health,
    ListPods,
    Logs,
    ResourceMetrics,
    Summary,
    parse_call,
    permission_for,
)
from hypeman.kube.kubelet.usage import NodeUsage, PodUsage, Rates, Sample, render_metrics, summarize
from hypeman.kube.local import LocalError, LocalServer
from hypeman.kube.site import PodTable, Served
from hypeman.kube.status import NO_EPHEMERAL

log = logging.getLogger(__name__)

JSON = "application/json"
MAX_LOGS = 64
"""Logs that are read at a time. Each has two of the connections that the node's heartbeat also needs."""
METRICS = "text/plain; version=0.0.4; charset=utf-8"


class _Said(Struct, frozen=True, rename="camel"):
    """A text message of the server's exec."""

    exit_code: int | None = None
    error: str = ""


class Kubelet:
    """One node's API."""

    def __init__(self, node: str, gate: Gate, pods: PodTable, local: LocalServer, data_dir: Path) -> None:
        """``data_dir`` lies on the file system whose size is reported."""
        self._node = node
        self._gate = gate
        self._pods = pods
        self._local = local
        self._data_dir = data_dir
        self._rates = Rates()
        self._reading = trio.CapacityLimiter(MAX_LOGS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(scope, receive, send)
        failure: HypemanError | None = None
        try:
            await self._answer(scope, answer)
        except* HypemanError as group:
            failure = _first(group)
        except* Exception as group:
            log.error("unexpected failure", exc_info=group)
            failure = InternalError("unexpected failure; the log of the node has it")
        if failure is not None:
            await answer.refuse(failure)

    async def _answer(self, scope: Scope, answer: Answer) -> None:
        path = scope["raw_path"].decode("latin-1").partition("?")[0]
        method = scope.get("method", "GET")
        connection = answer.connection
        secure = connection.secure if connection is not None else None
        certificate = secure.getpeercert(True) if secure is not None else None
        await self._gate.check(certificate, answer.header(b"authorization"), permission_for(method, path))
        match parse_call(path, scope["query_string"]):
            case Health():
                await answer.respond(b"ok", TEXT)
            case ListPods():
                await answer.respond(self._list_pods(), JSON)
            case Summary():
                await answer.respond(msgspec.json.encode(summarize(await self._sample())), JSON)
            case ResourceMetrics():
                await answer.respond(render_metrics(await self._sample()).encode(), METRICS)
            case Logs() as asked:
                await self._logs(asked, answer)
            case Exec() as asked:
                await self._exec(asked, answer)
            case Attach() as asked:
                await self._attach(asked, answer)
            case Forward() as asked:
                await self._forward(asked, answer)

    # ── What is asked about ─────────────────────────────────────────────────────────────────────

    def _find(self, container: Container) -> tuple[Served, Instance]:
        """Raises NotFound, InvalidState."""
        served = self._pods.find(container.namespace, container.pod)
        if served is None or (container.uid and served.pod.metadata.uid != container.uid):
            raise NotFound(f'pod "{container.pod}" does not exist')
        if container.name in _containers(served, "ephemeralContainers"):  # not 404: its text does not reach kubectl
            raise InvalidRequest(f'ephemeral container "{container.name}": {NO_EPHEMERAL}')
        if container.name and container.name not in _containers(served):
            raise NotFound(f'container "{container.name}" not found in pod "{container.pod}"')
        if served.instance is None:
            raise InvalidState(f'pod "{container.pod}" has no VM yet')
        return served, served.instance

    def _running(self, container: Container) -> Instance:
        """The instance, if it runs. Before anything about protocols: kubectl reports the refusal of its second attempt,
        by SPDY, in place of the first one's. Raises NotFound, InvalidState."""
        _, instance = self._find(container)
        if instance.state is not InstanceState.RUNNING:
            raise InvalidState(f'the VM of pod "{container.pod}" is {instance.state}')
        return instance

    def _list_pods(self) -> bytes:
        items = [served.pod for served in self._pods.all()]
        return msgspec.json.encode({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})

    async def _sample(self) -> Sample:
        found = await self._local.get("/stats", UsageOfAll)
        by_instance = {instance.instance_id: instance for instance in found.instances}
        read_at = found.time.timestamp()  # up to a second ago, as the counters
        pods = []
        for served in self._pods.all():
            usage = by_instance.get(served.instance.id) if served.instance is not None else None
            about = served.pod.metadata
            pods.append(
                PodUsage(
                    namespace=about.namespace,
                    pod=about.name,
                    uid=about.uid,
                    container=next(iter(_containers(served)), ""),
                    started_at=served.instance.started_at if served.instance is not None else None,
                    usage=usage,
                    cores=self._rates.of(usage.instance_id, usage.cpu_seconds, read_at) if usage is not None else None,
                )
            )
        node = await trio.to_thread.run_sync(self._node_usage)
        self._rates.keep({"", *by_instance})
        return Sample(node, tuple(pods), found.time)

    def _node_usage(self) -> NodeUsage:
        used = facts.cpu_seconds()
        return NodeUsage(
            name=self._node,
            read_at=datetime.now(UTC),
            booted_at=facts.booted_at(),
            cpu_seconds=used,
            cores=self._rates.of("", used, time.monotonic()),
            memory_total=facts.memory_bytes(),
            memory_available=facts.available_memory_bytes(),
            disk_total=facts.disk_bytes(self._data_dir),
            disk_free=facts.free_bytes(self._data_dir),
        )

    # ── Streams ─────────────────────────────────────────────────────────────────────────────────

    async def _logs(self, asked: Logs, answer: Answer) -> None:
        served, instance = self._find(asked.container)
        if asked.previous and not any(status.restart_count for status in served.pod.status.container_statuses):
            name, pod = asked.container.name, asked.container.pod
            raise InvalidRequest(f'previous terminated container "{name}" in pod "{pod}" not found')
        with self._one_log():
            await answer.stream(partial(send_log, self._local, instance.id, asked))

    @contextmanager
    def _one_log(self) -> Iterator[None]:
        """Raises RateLimited."""
        borrower = object()
        try:
            self._reading.acquire_on_behalf_of_nowait(borrower)
        except trio.WouldBlock:
            raise RateLimited(f"{MAX_LOGS} logs are being read from this node", retry_after=1) from None
        try:
            yield
        finally:
            self._reading.release_on_behalf_of(borrower)

    async def _exec(self, asked: Exec, answer: Answer) -> None:
        instance = self._running(asked.container)
        protocol = _chosen(channels.choose(answer.offered()))
        request = {"command": asked.command, "tty": asked.tty, "separate": True}
        async with open_exec(self._local, instance.id, request) as program:
            socket = await answer.accept(protocol)
            await _run(socket, program, asked)

    async def _attach(self, asked: Attach, answer: Answer) -> None:
        instance = self._running(asked.container)
        protocol = _chosen(channels.choose(answer.offered()))
        from_now_on = Logs(container=asked.container, follow=True, tail=0)
        with self._one_log():
            await self._show(instance, await answer.accept(protocol), from_now_on)

    async def _show(self, instance: Instance, socket: Socket, asked: Logs) -> None:
        async def write(data: bytes) -> None:
            await socket.send(channels.render(channels.Channel.STDOUT, data))

        last = channels.render_exit(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_gone, socket, nursery.cancel_scope)
            try:
                await send_log(self._local, instance.id, asked, write)
            except* LocalError as group:
                last = channels.render_failure(_first(group).message)
            await socket.send(last)
            nursery.cancel_scope.cancel()
        await socket.close()

    async def _forward(self, asked: Forward, answer: Answer) -> None:
        instance = self._running(asked.container)
        protocol = _chosen(portforward.choose(answer.offered()))
        address = instance.network.ip if instance.network is not UNSET else UNSET
        if not address:
            raise InvalidState(f'the VM of pod "{asked.container.pod}" has no address')
        dial = partial(portforward.dial_port, address)
        if protocol == portforward.V4 and not asked.ports:
            raise InvalidRequest("port: there is none")
        socket = await answer.accept(protocol)
        if protocol == portforward.V4:
            await portforward.forward_channels(socket, asked.ports, dial)
        else:
            try:
                await portforward.Tunnel(socket, dial).run()
            except* spdy.Malformed as group:
                log.warning("a port-forward ended: %s", group.exceptions[0])
        await socket.close()


async def _run(socket: Socket, program: Program, asked: Exec) -> None:
    """A program's output and exit code to the client; its marks of the two streams are the channels' numbers."""
    said = _Said(error="the program's end was not reported")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_feed, socket, program, asked, nursery.cancel_scope)
        try:
            while (message := await program.receive()) is not None:
                if isinstance(message, bytes):
                    await socket.send(message)
                else:
                    said = msgspec.json.decode(message, type=_Said)
        except LocalError as error:
            said = _Said(error=error.message)
        last = channels.render_failure(said.error) if said.exit_code is None else channels.render_exit(said.exit_code)
        await socket.send(last)
        nursery.cancel_scope.cancel()
    await socket.close()


async def _feed(socket: Socket, program: Program, asked: Exec, scope: trio.CancelScope) -> None:
    """The client's input to the program, until the client is gone."""
    try:
        if not asked.stdin:
            await program.send(b"")
        while (data := await socket.receive()) is not None:
            match channels.parse_message(data):
                case channels.Stdin(part) if asked.stdin:
                    await program.send(part)
                case channels.StdinEnd() if asked.stdin:
                    await program.send(b"")
                case channels.Resize(rows, cols) if asked.tty:
                    await program.send(msgspec.json.encode({"resize": {"rows": rows, "cols": cols}}).decode())
        scope.cancel()
    except LocalError:
        pass  # the program has ended; its last output and its exit code still follow


async def _cancel_when_gone(socket: Socket, scope: trio.CancelScope) -> None:
    while await socket.receive() is not None:
        pass
    scope.cancel()


def _chosen(protocol: str) -> str:
    if not protocol:
        raise InvalidRequest("none of the protocols that the WebSocket offers is known here")
    return protocol


def _containers(served: Served, field: str = "containers") -> Iterable[str]:
    return [str(each.get("name", "")) for each in served.pod.spec.get(field) or ()]


def _first(group: BaseExceptionGroup[HypemanError]) -> HypemanError:
    """Any of the failures; several at once have one cause."""
    found = group.exceptions[0]
    return found if isinstance(found, HypemanError) else _first(found)
