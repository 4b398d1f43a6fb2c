"""The HTTP client of the command line: one connection, blocking calls, no event loop.

Uses ``http.client`` and msgspec, because commands must start quickly: importing an asynchronous
client takes longer than most requests.
"""

from __future__ import annotations

import base64
import http.client
import select
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec

from hypeman import __version__
from hypeman.cli.settings import Settings
from hypeman.text import one_line

TIMEOUT = 120.0
"""Seconds without a byte; the server ends a request after 60."""

COME_BACK_SECONDS = 60.0
"""For a server whose connection was lost, as in an upgrade. A guest keeps a program as long."""
RETRY_SECONDS = 0.2


class ApiError(Exception):
    """The server refused: ``status`` and the error body (§1.4)."""

    def __init__(self, method: str, path: str, status: int, body: bytes) -> None:
        self.request = f"{method} {path}"
        self.status = status
        self.body = body
        self.code, self.message = _error_of(body)
        super().__init__(self.message)


class Unreachable(Exception):
    """There is no server, or the connection was lost."""


def _error_of(body: bytes) -> tuple[str, str]:
    try:
        error = msgspec.json.decode(body)
        return str(error["code"]), str(error["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return "", body.decode(errors="replace").strip() or "no reason given"


class Client:
    """Calls one server. ``debug`` shows every request on stderr, without the token."""

    def __init__(self, settings: Settings, *, debug: bool = False) -> None:
        self.settings = settings
        self.debug = debug
        self._connection: http.client.HTTPConnection | None = None
        self._position = ""
        """Of the last line of a log: where the next one is asked for."""

    # Calls

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        timeout: float = TIMEOUT,
    ) -> Any:
        """The decoded response, None if it is empty. Raises ApiError, Unreachable."""
        data = None if body is None else msgspec.json.encode(body)
        headers = {} if data is None else {"Content-Type": "application/json"}
        response = self._request(method, _with_query(path, query), data, headers, timeout)
        content = response.read()
        return msgspec.json.decode(content) if content else None

    def get(self, path: str, **query: Any) -> Any:
        return self.call("GET", path, query=query)

    def text(self, path: str) -> str:
        """A response that is not JSON."""
        return self._request("GET", path, None, {}, TIMEOUT).read().decode()

    def post(self, path: str, body: Any = None) -> Any:
        return self.call("POST", path, body)

    def upload(self, path: str, chunks: Iterable[bytes], media_type: str, query: Mapping[str, Any]) -> Any:
        """POST a body of unknown length."""
        response = self._request("POST", _with_query(path, query), chunks, {"Content-Type": media_type}, None)
        return msgspec.json.decode(response.read())

    def events(self, path: str, **query: Any) -> Iterator[Any]:
        """The decoded data of server-sent events, as they arrive."""
        response = self._request("GET", _with_query(path, query), None, {"Accept": "text/event-stream"}, None)
        try:
            for line in response:
                if line.startswith(b"data: "):
                    yield msgspec.json.decode(line[6:])
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"the connection failed: {error}") from None
        finally:
            self.close()

    def lines(self, path: str, **query: Any) -> Iterator[tuple[bytes, bool]]:
        """Lines of a log as they arrive: their bytes, and whether that is the end of the line. With ``times`` a line
        begins with when it was written."""
        response = self._request("GET", _with_query(path, query), None, {"Accept": "text/event-stream"}, None)
        exact, ends, begins, written = None, True, True, b""
        try:
            for line in response:
                if line.startswith(b"id: "):
                    self._position = line[4:].decode().strip()
                elif line.startswith(b": time="):
                    written = line[7:].strip() + b" " if begins else b""
                elif line.startswith((b": bytes=", b": piece=")):
                    exact, ends = base64.b64decode(line[8:]), line.startswith(b": bytes=")
                elif line.startswith(b"data: "):
                    text = msgspec.json.decode(line[6:], type=str).encode() if exact is None else exact
                    yield written + text, ends
                    exact, ends, begins, written = None, True, ends, b""
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"the connection failed: {error}") from None
        finally:
            self.close()

    def followed_lines(self, path: str, **query: Any) -> Iterator[tuple[bytes, bool]]:
        """As ``lines`` with ``follow``, and over the end of the server, as in an upgrade: no line is lost, none comes
        twice. Ends with the log."""
        self._position = ""
        lost = None
        while True:
            after = {"after": self._position} if self._position else {}
            try:
                for line in self.lines(path, follow=True, positions=True, **after, **query):
                    lost = None
                    yield line
            except Unreachable:
                if not self._position:
                    raise
            except ApiError as error:
                if lost is not None and error.status == 404:  # the instance is gone, and so is its log
                    return
                if lost is None or error.status < 500:
                    raise
            if not self._position:  # of a server that gives none
                return
            if lost is None:
                lost = time.monotonic()
            elif time.monotonic() - lost > COME_BACK_SECONDS:
                raise Unreachable("the server did not come back")
            time.sleep(RETRY_SECONDS)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # Internals

    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        headers = {"User-Agent": f"Hypeman/CLI {__version__}", "Accept": "application/json"}
        if self.settings.api_key:
            headers["Authorization"] = f"Bearer {self.settings.api_key}"
        return headers

    def dial(self) -> socket.socket:
        """A separate connected socket, for a WebSocket. Raises Unreachable."""
        connection = self._open(None)
        assert connection.sock is not None
        return connection.sock

    @property
    def host(self) -> str:
        return urlsplit(self.settings.base_url).netloc or "localhost"

    @property
    def prefix(self) -> str:
        """The path of the base URL."""
        url = urlsplit(self.settings.base_url)
        return "" if url.scheme == "unix" else url.path

    def _request(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], timeout: float | None
    ) -> http.client.HTTPResponse:
        if self.debug:
            print(f"> {method} {self.settings.base_url}{path}", file=sys.stderr)
        if self._connection is not None and select.select([self._connection.sock], [], [], 0)[0]:
            self.close()  # the server has closed the idle connection meanwhile
        connection = self._connection or self._open(timeout)
        self._connection = connection
        assert connection.sock is not None
        connection.sock.settimeout(timeout)
        try:
            chunked = body is not None and not isinstance(body, bytes)
            try:
                connection.request(method, self.prefix + path, body, {**self.headers(), **headers})
            except (BrokenPipeError, ConnectionResetError):
                if not chunked:
                    raise
                # The server responded before it had received everything; the response says why.
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unreachable(f"{self.settings.base_url} broke off: {str(error) or type(error).__name__}") from None
        if self.debug:
            print(one_line(f"< {response.status} {response.headers.get('X-Request-Id', '')}"), file=sys.stderr)
        if response.status >= 400:
            raise ApiError(method, path, response.status, response.read())
        return response

    def _open(self, timeout: float | None) -> http.client.HTTPConnection:
        url = urlsplit(self.settings.base_url)
        connection = http.client.HTTPConnection("localhost", timeout=timeout)
        try:
            if url.scheme == "unix":
                if not hasattr(socket, "AF_UNIX"):
                    raise Unreachable("this system has no unix sockets; use --base-url http://… or https://…")
                connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.sock.connect(url.path)
            else:
                kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
                connection = kind(url.hostname or "", url.port, timeout=timeout)
                connection.connect()
        except (OSError, ValueError) as error:
            connection.close()
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise Unreachable(f"{self.settings.base_url} cannot be reached: {reason}") from None
        return connection


def _with_query(path: str, query: Mapping[str, Any] | None) -> str:
    """Omits absent values, writes booleans as words and ``tags`` as ``tags[key]=value``."""
    pairs: list[tuple[str, str]] = []
    for key, value in (query or {}).items():
        if isinstance(value, dict):
            pairs += [(f"{key}[{inner}]", str(text)) for inner, text in value.items()]
        elif isinstance(value, bool):
            pairs.append((key, "true" if value else "false"))
        elif value is not None:
            pairs.append((key, str(value)))
    return f"{path}?{urlencode(pairs)}" if pairs else path
