"""Client of the Kubernetes API server: JSON over HTTP/1.1, decoded into Structs.

    get, list, create, patch, delete      one request, at most ``REQUEST_SECONDS``
    watch                                 changes after a resourceVersion, until the server ends it

Every failure is one of two exceptions: Unreachable (nothing is known about what the server did) or Refused (it
answered with an error). Nothing is retried here: the callers are loops that come again, and know what a repetition
means.

A watch that stays silent for ``SILENCE_SECONDS`` counts as broken: the server sends bookmarks about once a minute.
"""

from __future__ import annotations

import enum
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx
import msgspec
import trio

from hypeman import __version__
from hypeman.errors import HypemanError, cause_of
from hypeman.kube.credentials import Access
from hypeman.kube.types import ListMeta, Status
from hypeman.urls import segment

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
SILENCE_SECONDS = 150.0
WATCH_SECONDS = 300
"""After so long the server ends a watch by itself; the next one continues."""
PAGE = 500
"""Objects in one response of a list."""

T = TypeVar("T", bound=msgspec.Struct)


class ApiError(HypemanError):
    """A request to the API server failed."""

    status = 502


class Unreachable(ApiError):
    """No answer, or not a whole one: the server may have done what it was asked to, or not."""


class Refused(ApiError):
    """The API server answered with an error: its status and its reason, such as ``AlreadyExists``."""

    def __init__(self, message: str, *, code: int, reason: str, about: str = "") -> None:
        super().__init__(message)
        self.http = code
        self.reason = reason
        self.about = about
        """Name of the object concerned, if the server named one."""

    @property
    def is_absent(self) -> bool:
        """404 that names the object: it does not exist. A kind that is not served is a 404 without a name."""
        return self.http == 404 and bool(self.about)

    @property
    def is_conflict(self) -> bool:
        """Somebody else was faster: another uid or version, or the object exists already."""
        return self.http == 409

    @property
    def is_expired(self) -> bool:
        """The resourceVersion is too old: list again."""
        return self.http == 410


class Patch(enum.StrEnum):
    """How a patch is merged."""

    MERGE = "application/merge-patch+json"
    STRATEGIC = "application/strategic-merge-patch+json"
    """Lists with a merge key, such as conditions, are merged entry by entry; only for built-in kinds."""


class Change(enum.StrEnum):
    """What happened to the object of a WatchEvent."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"
    """Only its resourceVersion counts."""


class WatchEvent(msgspec.Struct, Generic[T], frozen=True):
    type: Change
    object: T


class Listed(msgspec.Struct, Generic[T], frozen=True):
    """All objects of a list, and where a watch continues."""

    items: tuple[T, ...]
    version: str


class _Page(msgspec.Struct, Generic[T], frozen=True):
    items: tuple[T, ...] | None = ()
    metadata: ListMeta = ListMeta()


class _RawEvent(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class ApiClient:
    """One per program; connections are shared. Close with ``aclose``."""

    clock_ahead = 0.0
    """Seconds by which this host's clock was ahead of the API server's at the last answer; exact to about a second."""

    def __init__(self, access: Access, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """``transport`` replaces the network, for tests."""
        self.access = access
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self._version: tuple[int, ...] = ()
        self._in_use: Counter[httpx.AsyncClient] = Counter()
        """How many requests each client has. Those that were replaced are closed with their last one."""

    async def aclose(self) -> None:
        for client in {*self._in_use, *([self._client] if self._client else [])}:
            await client.aclose()
        self._client = None

    async def get(self, path: str, kind: type[T]) -> T:
        return _decoded(await self._call("GET", path), kind)

    async def list(self, path: str, kind: type[T], **query: str) -> Listed[T]:
        """All objects below ``path``, page by page; ``query`` such as ``fieldSelector``."""
        items: list[T] = []
        more = ""
        while True:
            asked = {**query, "limit": str(PAGE), **({"continue": more} if more else {})}
            page = _decoded(await self._call("GET", path, query=asked), _Page[kind])  # type: ignore[valid-type]
            items += page.items or ()
            more = page.metadata.continue_
            if not more:
                return Listed(tuple(items), page.metadata.resource_version)

    async def create(self, path: str, body: object, kind: type[T]) -> T:
        return _decoded(await self._call("POST", path, body), kind)

    async def patch(self, path: str, body: object, kind: type[T], *, how: Patch = Patch.MERGE) -> T:
        return _decoded(await self._call("PATCH", path, body, content_type=how.value), kind)

    async def replace(self, path: str, body: object, kind: type[T]) -> T:
        return _decoded(await self._call("PUT", path, body), kind)

    async def delete(self, path: str, *, uid: str = "", grace: int | None = None) -> None:
        """Delete the object if its uid is ``uid``; ``grace`` in seconds. Raises Refused, also if it is absent."""
        body: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid:
            body["preconditions"] = {"uid": uid}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        await self._call("DELETE", path, body)

    @asynccontextmanager
    async def watch(
        self, path: str, kind: type[T], version: str, **query: str
    ) -> AsyncIterator[AsyncIterator[WatchEvent[T]]]:
        """Changes after ``version``. The iterator ends when the server ends the watch; it raises ApiError."""
        asked = {
            **query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        async with self._current() as client:
            request = client.build_request(
                "GET",
                self.access.server + path,
                params=asked,
                headers=self._headers(),
                timeout=httpx.Timeout(REQUEST_SECONDS, read=SILENCE_SECONDS),
            )
            try:
                with trio.move_on_after(REQUEST_SECONDS) as patience:
                    response = await client.send(request, stream=True)
                if patience.cancelled_caught:
                    raise Unreachable(f"GET {path}: no answer in {REQUEST_SECONDS:g} s")
                try:
                    if response.status_code != 200:
                        raise _refusal("GET", path, response.status_code, await response.aread())
                    yield _events(response, kind)
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                        await response.aclose()
            except (httpx.HTTPError, OSError) as error:
                raise _unreachable("GET", path, error) from None

    # ── One request ─────────────────────────────────────────────────────────────────────────────

    async def _call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        content = None if body is None else msgspec.json.encode(body)
        headers = self._headers() if content is None else {**self._headers(), "Content-Type": content_type}
        try:
            async with self._current() as client:
                with trio.fail_after(REQUEST_SECONDS):
                    response = await client.request(
                        method, self.access.server + path, params=query, content=content, headers=headers
                    )
        except trio.TooSlowError:
            raise Unreachable(f"{method} {path}: no answer in {REQUEST_SECONDS:g} s") from None
        except (httpx.HTTPError, OSError) as error:
            raise _unreachable(method, path, error) from None
        self._compare_clocks(response)
        if response.status_code >= 300:
            raise _refusal(method, path, response.status_code, response.content)
        return response.content

    def _compare_clocks(self, response: httpx.Response) -> None:
        with suppress(KeyError, ValueError, TypeError):
            there = parsedate_to_datetime(response.headers["Date"])
            self.clock_ahead = (datetime.now(UTC) - there).total_seconds() - 0.5  # it has whole seconds

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": f"hypeman-node/{__version__}"}
        try:
            token = self.access.bearer()
        except OSError as error:
            raise Unreachable(f"the token cannot be read: {error}") from None
        return {**headers, "Authorization": f"Bearer {token}"} if token else headers

    @asynccontextmanager
    async def _current(self) -> AsyncIterator[httpx.AsyncClient]:
        """The client with the certificates as they are now, for one request; a watch keeps the one that it began with.
        Raises Unreachable."""
        before, client = self._client, self._newest()
        self._in_use[client] += 1
        try:
            if before is not None and before is not client and not self._in_use[before]:
                await _close(before)
            yield client
        finally:
            self._in_use[client] -= 1
            if not self._in_use[client]:
                del self._in_use[client]
                if client is not self._client:
                    await _close(client)

    def _newest(self) -> httpx.AsyncClient:
        version = self.access.version()
        if self._client is not None and version == self._version:
            return self._client
        try:
            context = self.access.context() if self.access.server.startswith("https:") else False
        except OSError as error:
            if self._client is not None:  # halfway through being replaced
                return self._client
            raise Unreachable(f"certificates of the cluster cannot be read: {error}") from None
        self._version = version
        self._client = httpx.AsyncClient(
            verify=context, timeout=REQUEST_SECONDS, trust_env=False, limits=_LIMITS, transport=self._transport
        )
        return self._client


async def _close(client: httpx.AsyncClient) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
        await client.aclose()


_LIMITS = httpx.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=30)


_CHANGES = frozenset(change.value for change in Change)


async def _events(response: httpx.Response, kind: type[T]) -> AsyncIterator[WatchEvent[T]]:
    failure: Refused | None = None
    try:
        async for line in response.aiter_lines():
            if not line:
                continue
            raw = _decoded(line.encode(), _RawEvent)
            if raw.type == "ERROR":
                status = _decoded(bytes(raw.object), Status)
                failure = Refused(status.message or "the watch failed", code=status.code, reason=status.reason)
                continue  # the server ends the response now; its parts are closed when it is read to the end
            if raw.type in _CHANGES:
                yield WatchEvent(Change(raw.type), _decoded(bytes(raw.object), kind))
    except (httpx.HTTPError, OSError) as error:
        raise _unreachable("GET", str(response.url.path), error) from None
    if failure is not None:
        raise failure


def _decoded(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise Unreachable(f"the API server's answer is no {kind}: {error}") from None


def _unreachable(method: str, path: str, error: Exception) -> Unreachable:
    text = cause_of(error)
    if any(words in text for words in _OF_ANOTHER_TIME):
        text += f" (by this host's clock, at which it is {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ})"
    return Unreachable(f"{method} {path}: {text}")


_OF_ANOTHER_TIME = ("certificate is not yet valid", "certificate has expired")
"""How OpenSSL refuses a certificate that is not of this time."""


def _refusal(method: str, path: str, code: int, content: bytes) -> Refused:
    try:
        status = msgspec.json.decode(content, type=Status)
    except msgspec.DecodeError:
        status = Status(message=content[:200].decode(errors="replace").strip())
    about = status.details.name if status.details is not None else ""
    text = f"{method} {path}: {code} {status.message or status.reason}"
    return Refused(text, code=code, reason=status.reason, about=about)


def pods_path(namespace: str, name: str) -> str:
    return f"/api/v1/namespaces/{segment(namespace)}/pods/{segment(name)}"


def node_path(name: str) -> str:
    return f"/api/v1/nodes/{segment(name)}"
