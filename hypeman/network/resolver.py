"""The guests' name server on the gateway: names of the guests' network here, all others from the upstream server.

Each guest has a share: what it asks beyond that is dropped, and the rules let only so many packets of one guest
through (``ruleset``), so that a flood reaches neither the socket's queue nor the neighbours. While no server runs, the
rules send queries to the upstream server.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import trio

from hypeman.network.closed_names import is_cut
from hypeman.network.names import failure, same_question

log = logging.getLogger(__name__)

PORT = 53
MAX_QUERIES, MAX_CONNECTIONS = 64, 8
"""Of one guest at a time."""
MAX_ALL = 2048
"""Queries and connections of all guests together."""
_UPSTREAM_SECONDS = 4.0
"""A client asks again after 5 s."""
_IDLE_SECONDS = 10.0
_BURST = 16
"""Datagrams that are handled before others have their turn."""
_MAX_MESSAGE = 65535
_RETRY = 0.1
_SO_RCVBUFFORCE = 33
_QUEUE = 8 << 20
"""Bytes: room for what the rules let through of some thirty guests that flood at once."""

Answer = Callable[[bytes, str], bytes | None]
"""Query and the asker's address → answer; empty: none; None: ask the upstream server."""


class Instead(msgspec.Struct, frozen=True):
    """What is asked upstream instead of a guest's query, and what the guest gets for the answer."""

    query: bytes
    finish: Callable[[bytes], bytes]


Screen = Callable[[bytes, str], bytes | Instead | None]
"""The same of a query for the upstream server; None: as it is."""


def no_screen(query: bytes, asker: str) -> None:
    return None


class Resolver:
    """``bind`` once the gateway's address exists, then ``run`` in a nursery."""

    def __init__(
        self, address: str, upstream: str, answer: Answer, *, screen: Screen = no_screen, port: int = PORT
    ) -> None:
        self._address = address
        self._upstream = (upstream, PORT)
        self._answer = answer
        self._screen = screen
        self._port = port
        self._datagrams: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._counts: dict[tuple[str, int], int] = {}
        """(guest, most) → queries or connections at present."""
        self._all = 0

    @property
    def bound(self) -> bool:
        return self._listener is not None

    def bind(self) -> None:
        """Raises OSError, for example if another name server has the port on all addresses."""
        kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
        made = [socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) for kind in kinds]
        try:
            made[1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(PermissionError):
                made[0].setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE)
            for each in made:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # a guest may publish it, too
                each.bind((self._address, self._port))
            made[1].listen(64)
        except OSError:
            for each in made:
                each.close()
            raise
        self._datagrams, self._listener = made

    def close(self) -> None:
        """Idempotent."""
        for each in (self._datagrams, self._listener):
            if each is not None:
                each.close()
        self._datagrams = self._listener = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; a no-op if not bound."""
        if self._datagrams is None or self._listener is None:
            task_status.started()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, self._datagrams, nursery)
            nursery.start_soon(self._accept, self._listener, nursery)
            task_status.started()

    @contextmanager
    def _share(self, guest: str, most: int) -> Iterator[bool]:
        """Whether the guest may have one more, of at most ``most``; counted within the block."""
        key = guest, most
        allowed = self._counts.get(key, 0) < most and self._all < MAX_ALL
        if not allowed:
            yield False
            return
        self._counts[key] = self._counts.get(key, 0) + 1
        self._all += 1
        try:
            yield True
        finally:
            self._all -= 1
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]

    # Over UDP

    async def _receive(self, ours: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(ours)
            for _ in range(_BURST):
                try:
                    query, client = ours.recvfrom(_MAX_MESSAGE)
                except BlockingIOError:
                    break
                except OSError:  # an ICMP error for an earlier answer
                    continue
                reply = self._answered(query, client[0])
                if isinstance(reply, bytes):
                    if reply:
                        _send(ours, reply, client)
                else:
                    nursery.start_soon(self._forward, ours, query, reply, client)

    def _answered(self, query: bytes, guest: str) -> bytes | Instead | None:
        reply = self._answer(query, guest)
        return self._screen(query, guest) if reply is None else reply

    async def _forward(
        self, ours: socket.socket, query: bytes, instead: Instead | None, client: tuple[str, int]
    ) -> None:
        with self._share(client[0], MAX_QUERIES) as allowed:
            if allowed:
                reply = await (self._ask_by_udp(query) if instead is None else self._ask_instead(instead))
                _send(ours, reply, client)

    async def _ask_instead(self, instead: Instead) -> bytes:
        reply = await self._ask_by_udp(instead.query)
        if is_cut(reply):
            reply = await self._ask_by_tcp(instead.query)
        return instead.finish(reply)

    async def _ask_by_udp(self, query: bytes) -> bytes:
        """From a random port and with a random identifier."""
        asked = secrets.token_bytes(2) + query[2:]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as upstream:
            try:
                upstream.connect(self._upstream)
                upstream.send(asked)
                with trio.fail_after(_UPSTREAM_SECONDS):
                    while True:
                        await trio.lowlevel.wait_readable(upstream)
                        reply = upstream.recv(_MAX_MESSAGE)
                        if same_question(asked, reply):
                            return query[:2] + reply[2:]
            except (OSError, trio.TooSlowError):
                return failure(query)

    # Over TCP

    async def _accept(self, ours: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(ours)
            try:
                accepted, client = ours.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                log.warning("a connection to the guests' name server was not accepted: %s", error)
                await trio.sleep(_RETRY)
                continue
            nursery.start_soon(self._converse, accepted, client[0])

    async def _converse(self, accepted: socket.socket, guest: str) -> None:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(accepted)) as stream:
            with self._share(guest, MAX_CONNECTIONS) as allowed:
                if not allowed:
                    return
                with contextlib.suppress(trio.BrokenResourceError, trio.TooSlowError, EOFError):
                    while True:
                        with trio.fail_after(_IDLE_SECONDS):
                            query = await _read_message(stream)
                            reply = self._answered(query, guest)
                            if reply is None:
                                reply = await self._ask_by_tcp(query)
                            elif isinstance(reply, Instead):
                                reply = await self._ask_instead(reply)
                            if not reply:
                                return
                            await stream.send_all(len(reply).to_bytes(2, "big") + reply)

    async def _ask_by_tcp(self, query: bytes) -> bytes:
        try:
            with trio.fail_after(_UPSTREAM_SECONDS):
                async with await trio.open_tcp_stream(*self._upstream) as upstream:
                    await upstream.send_all(len(query).to_bytes(2, "big") + query)
                    reply = await _read_message(upstream)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError, EOFError):
            return failure(query)
        return reply if same_question(query, reply) else failure(query)


async def _read_message(stream: trio.SocketStream) -> bytes:
    """One message with its length before it. Raises EOFError."""
    length = int.from_bytes(await _read_exactly(stream, 2), "big")
    return await _read_exactly(stream, length)


async def _read_exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = await stream.receive_some(count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def _send(ours: socket.socket, reply: bytes, client: tuple[str, int]) -> None:
    with contextlib.suppress(OSError):  # a datagram may be lost
        ours.sendto(reply, client)
