"""HTTP/1.1 over a unix socket, for VMMs with such an API: h11 on a Trio stream.

One connection per request: connecting takes 30 µs, and a restarted VMM or a cancelled request leaves no
state that could affect the next one. Response sizes are bounded, since they come from a process that a
guest may have compromised.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Any

import h11
import msgspec
import trio

from hypeman.host.descriptors import passing
from hypeman.hypervisor.interface import VmmBroken, VmmGone

_TIME_LIMIT = 30.0
_MAX_BODY = 4 * 1024 * 1024


class ApiRefused(VmmBroken):
    """The VMM rejected a request."""

    def __init__(self, message: str, *, answered: int) -> None:
        super().__init__(message)
        self.answered = answered


class UnixHttp:
    """The API at one socket path. Keeps no connection open."""

    def __init__(self, path: str, *, pid: int = 0) -> None:
        """``pid``: process that must be listening, if the socket is in a directory that another user can write to."""
        self.path = path
        self._pid = pid

    async def request(
        self,
        method: str,
        target: str,
        body: object = None,
        *,
        fds: Sequence[int] = (),
        timeout: float = _TIME_LIMIT,
    ) -> Any:
        """The decoded response, None if it is empty. ``fds`` are sent with the request (SCM_RIGHTS).

        Raises ApiRefused for a status of 400 and above, VmmGone if there is no listener or the connection
        breaks, VmmBroken for an invalid response or a timeout.
        """
        what = f"{method} {target}"
        try:
            with trio.fail_after(timeout):
                status, answer = await self._exchange(method, target, body, fds)
        except trio.TooSlowError:
            raise VmmBroken(f"the VMM did not answer {what} within {timeout:g} s") from None
        except (OSError, trio.BrokenResourceError) as error:
            raise VmmGone(f"the VMM's API is gone: {error}") from None
        except h11.RemoteProtocolError as error:
            raise VmmBroken(f"the VMM sent a malformed answer to {what}: {error}") from None
        if status >= 400:
            raise ApiRefused(f"the VMM refused {what}: {_reason(answer)}", answered=status)
        if not answer:
            return None
        try:
            return msgspec.json.decode(answer)
        except (msgspec.MsgspecError, UnicodeError):
            raise VmmBroken(f"the VMM sent a malformed answer to {what}: {answer[:100]!r}") from None

    async def _exchange(self, method: str, target: str, body: object, fds: Sequence[int]) -> tuple[int, bytes]:
        data = b"" if body is None else msgspec.json.encode(body)
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", "localhost"), ("Accept", "application/json"), ("Content-Length", str(len(data)))]
        if data:
            headers.append(("Content-Type", "application/json"))
        message = connection.send(h11.Request(method=method, target=target, headers=headers)) or b""
        message += connection.send(h11.Data(data)) or b""
        message += connection.send(h11.EndOfMessage()) or b""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            await sock.connect(self.path)
            if self._pid and _listener(sock) != self._pid:
                raise VmmBroken(f"another process than the VMM listens at {self.path}")
            sent = await sock.sendmsg([message], passing(fds))
            await trio.SocketStream(sock).send_all(message[sent:])
            return await _answer(sock, connection)


def _listener(sock: trio.socket.SocketType) -> int:
    """The pid of the listening process."""
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


async def _answer(sock: trio.socket.SocketType, connection: h11.Connection) -> tuple[int, bytes]:
    status, body = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await sock.recv(65536))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _MAX_BODY:
                raise h11.RemoteProtocolError(f"an answer of more than {_MAX_BODY} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return status, bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("the connection was closed before an answer")


def _reason(answer: bytes) -> str:
    """The VMM's error message: JSON in its own format, or plain text."""
    try:
        decoded = msgspec.json.decode(answer)
    except (msgspec.MsgspecError, UnicodeError):
        return answer[:500].decode(errors="replace") or "without a word"
    if isinstance(decoded, dict) and "fault_message" in decoded:
        return str(decoded["fault_message"])
    if isinstance(decoded, list):
        return ": ".join(str(part) for part in decoded)
    return str(decoded)
