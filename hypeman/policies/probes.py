"""One health check: connects to a guest, or runs a program in it. Raises CheckFailed; the caller sets the limit.

Connections are made in the server's network namespace, where each guest has a route. Their local port is reported
before they are opened, so that they are not taken for activity of others. Everything that a guest sends is bounded.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from hypeman.errors import HypemanError
from hypeman.guest.client import GuestClient
from hypeman.guest.programs import ExecResult, Output
from hypeman.guest.types import ExecRequest
from hypeman.instances.model.policies import HealthRules
from hypeman.instances.model.types import HealthCheckType

MAX_HEAD = 8192
"""Bytes that are read of a response, of which only the status line matters."""
MAX_OUTPUT = 512
"""Bytes of a program's output that are kept for the error."""

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r]")

Opening = Callable[[int], None]
"""Called with the local port of a connection before it is opened."""


class CheckFailed(Exception):
    """The check's answer is no; the message says why."""


class Probes:
    """Makes checks. Holds what they share: a TLS context, which takes 30 ms to make."""

    def __init__(self) -> None:
        self._tls: ssl.SSLContext | None = None

    async def check(
        self, rules: HealthRules, *, address: str, guest: GuestClient | None, opening: Opening = lambda port: None
    ) -> None:
        """Return if the check succeeds. Raises CheckFailed."""
        match rules.type:
            case HealthCheckType.TCP:
                (await _connect(address, rules.port, opening)).close()
            case HealthCheckType.HTTP:
                await self._http(rules, address, opening)
            case HealthCheckType.EXEC:
                await _exec(rules, guest)

    async def _http(self, rules: HealthRules, address: str, opening: Opening) -> None:
        connection = await _connect(address, rules.port, opening)
        with connection:
            stream: trio.abc.Stream = trio.SocketStream(connection)
            if rules.tls:
                stream = trio.SSLStream(stream, self._tls_context(), server_hostname=address, https_compatible=True)
            request = (
                f"GET {rules.path} HTTP/1.1\r\nHost: {address}:{rules.port}\r\n"
                "User-Agent: hypeman-health-check\r\nAccept: */*\r\nConnection: close\r\n\r\n"
            )
            with _failing("the connection broke"):
                await stream.send_all(request.encode())
            status = await _read_status(stream)
        first, last = rules.expected_status, rules.expected_status_max or rules.expected_status
        if not first <= status <= last:
            raise CheckFailed(f"HTTP status {status}, expected {first}{f' to {last}' if last > first else ''}")

    def _tls_context(self) -> ssl.SSLContext:
        """A guest's certificate is not verified: it has no name that the server knows."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.check_hostname = False
            self._tls.verify_mode = ssl.CERT_NONE
        return self._tls


async def _connect(address: str, port: int, opening: Opening) -> trio.socket.SocketType:
    connection = trio.socket.socket()
    try:
        connection.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        connection.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
        with _failing("cannot connect"):
            await connection.bind(("", 0))
            opening(connection.getsockname()[1])
            await connection.connect((address, port))
    except BaseException:
        connection.close()
        raise
    return connection


async def _read_status(stream: trio.abc.Stream) -> int:
    head = b""
    while b"\n" not in head:
        with _failing("the connection broke"):
            data = await stream.receive_some(MAX_HEAD)
        head += data
        if not data or len(head) > MAX_HEAD:
            raise CheckFailed("no HTTP response")
    match = _STATUS.match(head)
    if match is None:
        raise CheckFailed("no HTTP/1 response")
    return int(match[1])


async def _exec(rules: HealthRules, guest: GuestClient | None) -> None:
    if guest is None:
        raise CheckFailed("the guest agent does not answer")
    output = b""
    try:
        request = ExecRequest(argv=rules.command, cwd=rules.working_dir or None, timeout_seconds=rules.timeout)
        async with await guest.exec(request) as session:
            await session.close_stdin()
            while isinstance(got := await session.receive(), Output):
                output = (output + got.data)[-MAX_OUTPUT:]
    except HypemanError as error:
        raise CheckFailed(error.message) from None
    assert isinstance(got, ExecResult)
    if got.exit_code != 0 or got.message:
        last = output.decode(errors="replace").strip().splitlines()
        raise CheckFailed(got.message or f"exit code {got.exit_code}" + (f": {last[-1]}" if last else ""))


@contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ssl.SSLError) as error:
        raise CheckFailed(f"{what}: {error.strerror or error}") from None
    except trio.BrokenResourceError as error:
        raise CheckFailed(f"{what}: {error.__cause__ or error}") from None
