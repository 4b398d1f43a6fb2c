"""Serves the application on sockets: Hypercorn's protocol code in our own nursery.

Hypercorn's own ``serve`` does not report which socket a connection came from and cannot drop a
client that never reads, so the accept loop is here and only its connection class is used, with a short
path for plain requests (plain.py).

- TCP, and a unix socket whose file permissions are the authentication (``Connection.trusted``).
- Shutdown: no new connections, event streams end at once, everything else gets a grace period; then
  sockets that are still sending are shut down (Hypercorn shields its sends from cancellation).
- Disconnects are detected by epoll, even while a handler does not read (a client can send megabytes of
  stdin to a sleeping program and disconnect: unread bytes hide the end of the stream from a reader).
- No signal handlers: the owner of the nursery sets ``shutdown``.
"""

from __future__ import annotations

import errno
import grp
import logging
import os
import select
import socket
import ssl
import stat
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState

from hypeman.errors import HypemanError
from hypeman.server.connection import Connection
from hypeman.server.plain import PlainConnection
from hypeman.server.plain_routes import PlainRoutes
from hypeman.telemetry import metrics

_log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""Grace period for requests in progress at shutdown."""
HANG_UP_SECONDS = 5.0
"""Delay from a client's disconnect to cancelling its handler, unless the handler reads to the end first."""
_BACKLOG = 1024

Application = Callable[..., Awaitable[None]]


class ServeError(HypemanError):
    """A socket cannot be bound; the message says which and why."""


class Server:
    """One application on some sockets; ``plain`` requests do not reach it (plain.py).

    With ``tls`` every connection begins with its handshake, and none is plain. A certificate that is loaded into the
    context later is used from the next connection on.
    """

    def __init__(
        self,
        app: Application,
        *,
        plain: PlainRoutes | None = None,
        grace: float = GRACE_SECONDS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._app = ASGIWrapper(app)
        self._tls = tls
        self._plain = plain
        self._grace = grace
        self._config = _hypercorn_config()
        self._context = WorkerContext(None)
        self._open: dict[int, Connection] = {}
        self._one_less = trio.Event()
        self._hang_ups = select.epoll()

    async def run(
        self,
        sockets: Sequence[socket.socket],
        shutdown: trio.Event,
        *,
        trusted: Sequence[socket.socket] = (),
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve listening ``sockets`` and ``trusted`` ones until ``shutdown`` is set; closes and removes them."""
        paths = [sock.getsockname() for sock in (*sockets, *trusted) if sock.family == socket.AF_UNIX]
        with self._hang_ups:
            async with trio.open_nursery() as connections:
                try:
                    async with trio.open_nursery() as accepting:
                        accepting.start_soon(self._watch_hang_ups)
                        accepting.start_soon(self._close_idle)
                        for group, trust in ((sockets, False), (trusted, True)):
                            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in group]
                            serve = partial(trio.serve_listeners, handler_nursery=connections)
                            if listeners:
                                accepting.start_soon(serve, partial(self._handle, trust), listeners)
                        task_status.started()
                        await shutdown.wait()
                        accepting.cancel_scope.cancel()
                    for path in paths:
                        with suppress(FileNotFoundError):
                            os.unlink(path)
                    await self._finish()
                finally:
                    for connection in list(self._open.values()):
                        connection.abort()

    async def _finish(self) -> None:
        """Let requests in progress finish within the grace period."""
        await self._context.terminated.set()
        for connection in list(self._open.values()):
            if connection.streaming:
                connection.abort()
            elif connection.idle_until != inf:
                connection.close_idle()
        with trio.move_on_after(self._grace):
            while self._open:
                self._one_less = trio.Event()
                await self._one_less.wait()

    async def _handle(self, trusted: bool, stream: trio.SocketStream) -> None:
        connection = Connection(stream, trusted)
        number = stream.socket.fileno()
        self._open[number] = connection
        self._hang_ups.register(number, select.EPOLLRDHUP | select.EPOLLONESHOT)
        state = ConnectionState(LifespanState({"connection": connection}))
        try:
            with connection.scope:
                if self._tls is None:
                    await PlainConnection(self._app, self._config, self._context, connection, state, self._plain)
                else:
                    secure = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
                    connection.secure = secure
                    await TCPServer(self._app, self._config, self._context, state, secure)
        except Exception:
            _log.exception("a connection failed")
        finally:
            if (
                self._open.get(number) is connection
            ):  # otherwise the stream was closed and a newer one reuses its number
                del self._open[number]
            self._one_less.set()
            await trio.aclose_forcefully(stream)  # also removes the registration in epoll

    async def _close_idle(self) -> None:
        """Close connections without a request for the keep-alive time.

        Deadlines only move on while this sleeps, and one that is set later ends later than the sleep.
        """
        while True:
            now = trio.current_time()
            wake = now + self._config.keep_alive_timeout
            for connection in list(self._open.values()):
                if connection.idle_until <= now:
                    connection.close_idle()
                else:
                    wake = min(wake, connection.idle_until)
            await trio.sleep_until(wake)

    async def _watch_hang_ups(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._hang_ups.fileno())
            for number, _ in self._hang_ups.poll(0):
                connection = self._open.get(number)
                if connection is not None:
                    connection.scope.deadline = trio.current_time() + HANG_UP_SECONDS


def _hypercorn_config() -> HypercornConfig:
    config = HypercornConfig()
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = 75  # longer than clients' connection pools, so that clients close first
    config.keep_alive_max_requests = 100_000  # a poller keeps its connection
    config.h11_max_incomplete_size = 64 * 1024
    config.websocket_max_message_size = 2**20
    return config


def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, one for each address of ``host``. Raises ServeError."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Inherited by connections: detects vanished clients and keeps idle shells alive through NATs.
            # WebSocket pings are not used: Hypercorn's hold each connection for up to an interval after its end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        hint = "; something else listens there" if error.errno == errno.EADDRINUSE else ""
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}{hint}") from None
    return sockets


def bind_unix(path: str, *, mode: int, group: str = "") -> socket.socket:
    """A listening unix socket created with exactly these permissions. Raises ServeError.

    A socket without a listener is left over from a killed server and is replaced.
    """
    _remove_leftover(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        before = os.umask(0o777)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        if group:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        os.chmod(path, mode)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except KeyError:
        sock.close()
        raise ServeError(f"the group {group!r} of the socket {path} does not exist") from None
    except OSError as error:
        sock.close()
        raise ServeError(f"cannot listen on {path}: {error.strerror or error}") from None
    return sock


def _remove_leftover(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ServeError(f"cannot listen on {path}: there is a file of that name")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
        else:
            raise ServeError(f"cannot listen on {path}: another server answers there")


async def metrics_app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """``/metrics`` and nothing else; a separate application, so that it can have its own listener."""
    if scope["type"] != "http":
        return
    found = scope["path"] == "/metrics"
    if found:
        await metrics.refresh()
    body = metrics.render_metrics() if found else b"see /metrics\n"
    media_type = metrics.CONTENT_TYPE if found else "text/plain"
    headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200 if found else 404, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
