"""Relays from sockets of the host to guests, for what the kernel does not translate to published ports: IPv6, and IPv4
that comes in by an interface that does not forward.

A connection is two sockets and two copying tasks. Ends and resets are passed on in both directions; each instance has
at most ``MAX_CONNECTIONS``, and a UDP client is forgotten after ``UDP_IDLE`` seconds without a datagram. A relay ends
with the server: unlike translated ones, these connections do not survive its restart. The guest sees the gateway's
address as their source.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from typing import Any

import trio

from hypeman.host.port_holds import PortHold

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Of one instance, over all its ports; UDP clients count as one each. More are reset or dropped."""
UDP_IDLE = 60.0
_CONNECT = 10.0
_CHUNK = 64 << 10
_RETRY = 0.1
"""Seconds after an accept that failed, for example without a free descriptor."""
_NO_LINGER = struct.pack("ii", 1, 0)
_IP_PKTINFO = 8
_ANCILLARY = socket.CMSG_SPACE(20)

Target = tuple[str, int]
"""Address and port of a guest."""


class Relays:
    """All relays. ``open`` and ``close`` may come before ``run``, which must run in a nursery."""

    def __init__(self) -> None:
        self._open: dict[PortHold, tuple[str, Target, trio.CancelScope]] = {}
        self._counts: dict[str, int] = {}
        self._nursery: trio.Nursery | None = None

    def open(self, hold: PortHold, instance_id: str, target: Target) -> None:
        """Serve an open hold; a no-op if it is served with this target already."""
        known = self._open.get(hold)
        if known is not None and known[1] == target:
            return
        self.close(hold)
        scope = trio.CancelScope()
        self._open[hold] = (instance_id, target, scope)
        self._start(hold)

    def close(self, hold: PortHold) -> None:
        """Stop serving; connections are reset. Idempotent."""
        known = self._open.pop(hold, None)
        if known is not None:
            known[2].cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for hold in self._open:
                self._start(hold)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    @property
    def connections(self) -> int:
        """Number of connections and UDP clients at present."""
        return sum(self._counts.values())

    def _start(self, hold: PortHold) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._serve, hold, *self._open[hold])

    async def _serve(self, hold: PortHold, instance_id: str, target: Target, scope: trio.CancelScope) -> None:
        with scope, hold.socket.dup() as ours:  # a released hold must not close what a task waits for
            async with trio.open_nursery() as nursery:
                if ours.type == socket.SOCK_STREAM:
                    await self._accept(ours, instance_id, target, nursery)
                else:
                    await _Datagrams(self, ours, instance_id, target).run(nursery)

    async def _accept(self, ours: socket.socket, instance_id: str, target: Target, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(ours)
            try:
                client, _ = ours.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                log.warning("a connection to a published port of instance %s was not accepted: %s", instance_id, error)
                await trio.sleep(_RETRY)
                continue
            if self.enter(instance_id):
                nursery.start_soon(self._connection, client, instance_id, target)
            else:
                _reset(client)
                client.close()

    def enter(self, instance_id: str) -> bool:
        """Count one more connection, unless there are too many."""
        count = self._counts.get(instance_id, 0)
        if count >= MAX_CONNECTIONS:
            return False
        self._counts[instance_id] = count + 1
        return True

    def leave(self, instance_id: str) -> None:
        left = self._counts[instance_id] - 1
        if left:
            self._counts[instance_id] = left
        else:
            del self._counts[instance_id]

    async def _connection(self, accepted: socket.socket, instance_id: str, target: Target) -> None:
        client = trio.socket.from_stdlib_socket(accepted)
        guest = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        finished = False
        try:
            for each in (client, guest):
                _watch_peer(each)
            with trio.fail_after(_CONNECT):
                await guest.connect(target)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_copy, client, guest)
                await _copy(guest, client)
            finished = True
        except* (OSError, trio.TooSlowError):
            pass  # the other side sees a reset
        finally:
            for each in (client, guest):
                if not finished:
                    with contextlib.suppress(OSError):
                        _reset(each)
                each.close()
            self.leave(instance_id)


class _Datagrams:
    """Relays one UDP port: a socket towards the guest for each client."""

    def __init__(self, relays: Relays, ours: socket.socket, instance_id: str, target: Target) -> None:
        self._relays = relays
        self._ours = ours
        self._instance_id = instance_id
        self._target = target
        self._clients: dict[Any, socket.socket] = {}
        if ours.family == socket.AF_INET6:
            ours.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            ours.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)

    async def run(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            try:
                data, ancillary, _, client = self._ours.recvmsg(_CHUNK, _ANCILLARY)
            except OSError:  # nothing there after all, or an ICMP error for an earlier answer
                continue
            towards = self._clients.get(client)
            if towards is None:
                if not self._relays.enter(self._instance_id):
                    continue
                towards = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                towards.connect(self._target)
                self._clients[client] = towards
                nursery.start_soon(self._answers, client, towards, ancillary)
            with contextlib.suppress(OSError):  # a datagram may be lost
                towards.send(data)

    async def _answers(self, client: Any, towards: socket.socket, ancillary: Any) -> None:
        """Carry answers back, from the address that the client sent to, until none came for a while."""
        try:
            while True:
                with trio.move_on_after(UDP_IDLE) as idle:
                    await trio.lowlevel.wait_readable(towards)
                if idle.cancelled_caught:
                    return
                with contextlib.suppress(OSError):
                    self._ours.sendmsg([towards.recv(_CHUNK)], ancillary, 0, client)
        finally:
            del self._clients[client]
            towards.close()
            self._relays.leave(self._instance_id)


async def _copy(source: trio.socket.SocketType, target: trio.socket.SocketType) -> None:
    """Copy until the end of ``source``, and pass that on. Raises OSError if either side is reset."""
    while data := await source.recv(_CHUNK):
        rest = memoryview(data)
        while rest:
            rest = rest[await target.send(rest) :]
    target.shutdown(socket.SHUT_WR)


def _watch_peer(peer: trio.socket.SocketType) -> None:
    """A peer that has vanished is noticed within some two minutes."""
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _reset(closing: Any) -> None:
    """Let a close send RST, so that the peer does not take it for the regular end."""
    closing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
