"""Client of the server on this host: its public REST API, as any other client uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
import msgspec
import trio

from hypeman import __version__
from hypeman.errors import HypemanError, cause_of
from hypeman.text import one_line

REQUEST_SECONDS = 60.0
"""The server ends a request by itself after so long."""
SILENCE_SECONDS = 60.0
"""The server sends something at least so often on a stream of events."""

T = TypeVar("T")


class LocalError(HypemanError):
    """A request to this host's server failed."""


class LocalUnreachable(LocalError):
    """No answer: the server may have done what it was asked to, or not."""


class LocalRefused(LocalError):
    """The server answered with an error: its status and its code, such as ``not_found``."""

    def __init__(self, message: str, *, http: int, code: str) -> None:
        super().__init__(message, code=code)
        self.http = http


class LocalServer:
    """One per program; connections are shared. Close with ``aclose``."""

    def __init__(self, base_url: str, api_key: str = "", transport: httpx.AsyncBaseTransport | None = None) -> None:
        """``transport`` replaces the network, for tests."""
        socket = base_url.removeprefix("unix://") if base_url.startswith("unix://") else None
        self.socket = socket
        """Path of the socket; None for TCP."""
        self.base_url = "http://localhost" if socket else base_url.rstrip("/")
        self._headers = {"User-Agent": f"hypeman-node/{__version__}", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._client = httpx.AsyncClient(
            transport=transport or httpx.AsyncHTTPTransport(uds=socket, limits=_LIMITS),
            headers=self._headers,
            timeout=REQUEST_SECONDS,
            trust_env=False,
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of every request, for a WebSocket that is opened elsewhere."""
        return self._headers

    async def get(self, path: str, kind: type[T], query: Mapping[str, str] | None = None) -> T:
        return self._decoded(await self.call("GET", path, query=query), kind)

    async def post(self, path: str, body: object, kind: type[T], *, timeout: float = REQUEST_SECONDS) -> T:
        return self._decoded(await self.call("POST", path, body, timeout=timeout), kind)

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, str] | None = None,
        timeout: float = REQUEST_SECONDS,
    ) -> bytes:
        """The body of the answer. Raises LocalRefused, LocalUnreachable."""
        content = None if body is None else msgspec.json.encode(body)
        return await self.send(method, path, content, "application/json", query=query, timeout=timeout)

    async def send(
        self,
        method: str,
        path: str,
        content: bytes | None,
        content_type: str,
        *,
        query: Mapping[str, str] | None = None,
        timeout: float = REQUEST_SECONDS,
    ) -> bytes:
        """As ``call``, with a body of any kind."""
        headers = {} if content is None else {"Content-Type": content_type}
        try:
            with trio.fail_after(timeout):
                response = await self._client.request(
                    method,
                    self.base_url + path,
                    params=query or None,
                    content=content,
                    headers=headers,
                    timeout=timeout,
                )
        except trio.TooSlowError:
            raise LocalUnreachable(f"{method} {path}: no answer in {timeout:g} s") from None
        except (httpx.HTTPError, OSError) as error:
            raise LocalUnreachable(f"{method} {path}: {cause_of(error)}") from None
        if response.status_code >= 400:
            raise refusal(method, path, response.status_code, response.content)
        return response.content

    @asynccontextmanager
    async def stream(
        self, path: str, *, silence: float | None = SILENCE_SECONDS, **query: str
    ) -> AsyncIterator[httpx.Response]:
        """A response that is read as it arrives, such as a log. Raises LocalRefused, LocalUnreachable."""
        try:
            async with self._client.stream(
                "GET",
                self.base_url + path,
                params=query or None,
                headers={"Accept": "text/event-stream"},
                timeout=httpx.Timeout(REQUEST_SECONDS, read=silence),
            ) as response:
                if response.status_code >= 400:
                    raise refusal("GET", path, response.status_code, await response.aread())
                yield response
        except (httpx.HTTPError, OSError) as error:
            raise LocalUnreachable(f"GET {path}: {cause_of(error)}") from None

    @staticmethod
    def _decoded(content: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            raise LocalUnreachable(f"the server's answer is no {kind}: {error}") from None


_LIMITS = httpx.Limits(max_connections=256, max_keepalive_connections=16, keepalive_expiry=30)


def refusal(method: str, path: str, status: int, content: bytes) -> LocalRefused:
    code, message = "", content[:500].decode(errors="replace").strip()
    try:
        error: Any = msgspec.json.decode(content)
        code, message = str(error["code"]), str(error["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        pass
    return LocalRefused(one_line(message or f"{method} {path}: {status}"), http=status, code=code)
