"""One client's connection, as the server, the application and the connection's own task see it."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf

import trio
from msgspec import UNSET, UnsetType

_UCRED = struct.Struct("3i")
"""Process, user and group id."""


@dataclass(eq=False)
class Connection:
    """A request through Quart finds it in ``scope["state"]["connection"]``."""

    stream: trio.SocketStream
    trusted: bool
    """Came over a socket whose permissions authenticate the client."""
    streaming: bool = False
    """Set by a response that does not end by itself."""
    secure: trio.SSLStream[trio.SocketStream] | None = None
    """With TLS: knows the client's certificate."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    idle_until: float = inf
    """When to close it, in Trio's time, if no request comes before; infinite during a request."""

    def __post_init__(self) -> None:
        self.peer = self._look_up_peer()
        """Address of a TCP client, or user id of one on a unix socket."""

    def _look_up_peer(self) -> tuple[str | UnsetType, int | UnsetType]:
        sock = self.stream.socket
        try:
            if sock.family == socket.AF_UNIX:
                credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
                return UNSET, _UCRED.unpack(credentials)[1]
            return sock.getpeername()[0], UNSET
        except OSError:  # it disconnected
            return UNSET, UNSET

    def abort(self) -> None:
        """Close it now, even in the middle of a send."""
        self.scope.cancel()
        with suppress(OSError):  # already closed
            self.stream.socket.shutdown(socket.SHUT_RDWR)

    def close_idle(self) -> None:
        """Close it, which wakes its reader; only while it is idle."""
        self.idle_until = inf
        self.stream.socket.close()
