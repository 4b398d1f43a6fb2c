"""One client's connection, as the server, the application and the connection's own task see it."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf

import trio


@dataclass(eq=False)
class Connection:
    """A request through Quart finds it in ``scope["state"]["connection"]``."""

    stream: trio.SocketStream
    trusted: bool
    """Came over a socket whose permissions authenticate the client."""
    streaming: bool = False
    """Set by a response that does not end by itself."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    idle_until: float = inf
    """When to close it, in Trio's time, if no request comes before; infinite during a request."""

    def abort(self) -> None:
        """Close it now, even in the middle of a send."""
        self.scope.cancel()
        with suppress(OSError):  # already closed
            self.stream.socket.shutdown(socket.SHUT_RDWR)

    def close_idle(self) -> None:
        """Close it, which wakes its reader; only while it is idle."""
        self.idle_until = inf
        self.stream.socket.close()
