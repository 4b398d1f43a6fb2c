"""The ingress worker: a process that carries requests and decides nothing.

The server passes it listening sockets and routes over the protocol of ``protocol.py`` and answers where instances are.
Once it has the first message it confines itself permanently, as the egress engine does (``ext/egress/confine.c``): it
opens no files, runs no programs, and becomes a user without any rights. It ends with its server.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - nothing can be imported once the process is confined
import socket
import sys
from collections import deque
from collections.abc import Callable
from functools import partial

import trio

from hypeman._native.egress import confine
from hypeman.host.descriptors import passed, room_for
from hypeman.ingress import protocol
from hypeman.ingress.protocol import ProtocolError, Served
from hypeman.ingress.proxy import Place, Proxy

_MAX_KEPT = 10_000
"""Requests that wait to be logged."""
_AT_ONCE = 100
_LOG_INTERVAL = 0.2
_FIRST_MESSAGE = 60.0


class Worker:
    """Serves one control connection."""

    def __init__(self, control: trio.socket.SocketType, confine: Callable[[int], bool]) -> None:
        self._control = control
        self._confine = confine
        self._proxy = Proxy(self._ask, self._keep)
        self._sending = trio.Lock()
        self._tokens = 0
        self._asked: dict[int, trio.MemorySendChannel[Place]] = {}
        self._listeners: dict[int, trio.CancelScope] = {}
        self._kept: deque[Served] = deque()
        self._lost = 0

    async def run(self) -> None:
        """Until the connection ends. Raises ProtocolError, OSError."""
        with trio.fail_after(_FIRST_MESSAGE):
            first = await self._receive()
        if first is None:
            return
        if not isinstance(first[0], protocol.Start):
            raise ProtocolError("not started yet")
        self._confine(first[0].uid)
        await self._send(protocol.Ready())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._log)
            while (got := await self._receive()) is not None:
                await self._do(nursery, *got)
            nursery.cancel_scope.cancel()

    async def _receive(self) -> tuple[protocol.Request, list[socket.socket]] | None:
        data, ancillary, flags, _ = await self._control.recvmsg(
            protocol.MAX_MESSAGE + 1, room_for(protocol.MAX_LISTENERS), socket.MSG_CMSG_CLOEXEC
        )
        if not data:
            return None
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise ProtocolError("a message was cut")
        return protocol.decode_request(data), [socket.socket(fileno=each) for each in passed(ancillary)]

    async def _send(self, message: protocol.Report) -> None:
        async with self._sending:
            await self._control.send(protocol.encode(message))

    async def _do(self, nursery: trio.Nursery, request: protocol.Request, sockets: list[socket.socket]) -> None:
        match request:
            case protocol.Listen():
                self._stop(request.port)
                scope = self._listeners[request.port] = trio.CancelScope()
                nursery.start_soon(self._listen, scope, sockets, request.port)
            case protocol.Unlisten():
                self._stop(request.port)
            case protocol.Put():
                self._proxy.put(request.ingress, request.routes)
            case protocol.Drop():
                self._proxy.drop(request.ingress)
            case protocol.Certify():
                self._try(partial(self._proxy.certificates.certify, request.name, request.chain, request.key))
            case protocol.Uncertify():
                self._proxy.certificates.uncertify(request.name)
            case protocol.Challenge(_, name, token, answer, chain, key):
                self._try(partial(self._proxy.certificates.challenge, name, token, answer, chain, key))
            case protocol.Unchallenge():
                self._proxy.certificates.unchallenge(request.name)
            case protocol.Target():
                waiting = self._asked.pop(request.token, None)
                if waiting is not None:
                    waiting.send_nowait(Place(request.address, request.exists))
                return
            case protocol.Start():
                raise ProtocolError("started twice")
        await self._send(protocol.Done(request.id))

    def _try(self, put: Callable[[], None]) -> None:
        """The server has checked what it sends; what else OpenSSL finds must not end the connections of others."""
        try:
            put()
        except Exception as error:
            print(f"ingress worker: a certificate cannot be used: {error!r}", file=sys.stderr, flush=True)

    async def _listen(self, scope: trio.CancelScope, sockets: list[socket.socket], port: int) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                for each in sockets:
                    each.setblocking(False)
                    nursery.start_soon(self._proxy.serve, trio.socket.from_stdlib_socket(each), port)

    def _stop(self, port: int) -> None:
        scope = self._listeners.pop(port, None)
        if scope is not None:
            scope.cancel()

    async def _ask(self, instance: str) -> Place:
        self._tokens += 1
        token = self._tokens
        answer, place = trio.open_memory_channel[Place](1)
        self._asked[token] = answer
        try:
            await self._send(protocol.Ask(token, instance))
            return await place.receive()
        finally:
            self._asked.pop(token, None)

    def _keep(self, served: Served) -> None:
        if len(self._kept) >= _MAX_KEPT:
            self._lost += 1
        else:
            self._kept.append(served)

    async def _log(self) -> None:
        before = (0, 0)
        while True:
            await trio.sleep(_LOG_INTERVAL)
            while self._kept or self._lost or before != (self._proxy.connections, self._proxy.refused):
                batch = tuple(self._kept.popleft() for _ in range(min(_AT_ONCE, len(self._kept))))
                lost, self._lost = self._lost, 0
                before = (self._proxy.connections, 0)
                refused, self._proxy.refused = self._proxy.refused, 0
                await self._send(protocol.Log(batch, lost, before[0], refused))


def main(fd: int, confine: Callable[[int], bool] = confine) -> int:
    """Serve on the control connection ``fd``; returns the exit code."""
    control = socket.socket(fileno=fd)
    control.setblocking(False)

    async def serve() -> None:
        await Worker(trio.socket.from_stdlib_socket(control), confine).run()

    try:
        trio.run(serve)
    except BaseException as error:
        print(f"ingress worker: {error!r}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
