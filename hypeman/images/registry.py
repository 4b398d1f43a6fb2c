"""Registry client: the pull part of the OCI distribution specification, over httpx.

    GET /v2/<repository>/manifests/<tag or digest>        small, kept in memory, digest checked
    GET /v2/<repository>/blobs/<digest>                   streamed to a file, digest and size checked

Rules:

- Content that does not match the requested digest and size is rejected.
- A login is sent only to its registry and to the token service that this registry names; never to a
  mirror or the target of a redirect, and never put into a log or an error.
- Plain HTTP only for registries named in the configuration; an HTTPS registry cannot redirect to it.
- No redirect, and no token service, leads from a registry elsewhere to a loopback or link-local address, such as a
  metadata service. A name is looked up once, and the address that was checked is the one that is dialled.
- Broken transfers are resumed (Range), also after a server restart; invalid answers are retried with backoff,
  a limited number of times. Throttling (429) is reported to the caller as RateLimited.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode

import httpx
import msgspec
import trio

from hypeman import __version__
from hypeman.config import ImagesConfig
from hypeman.errors import HypemanError, InternalError, NotFound, RateLimited, cause_of
from hypeman.host.tls import client_context
from hypeman.images.auth import NOBODY, Keychain, Login
from hypeman.images.manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    ManifestError,
    digest_of,
)
from hypeman.images.reference import Reference
from hypeman.logins import DEFAULT_REGISTRY, Challenge, parse_challenges

R = TypeVar("R")

ACCEPT = ", ".join(MANIFEST_TYPES + INDEX_TYPES)
_DOCKER_HUB = "registry-1.docker.io"
_PULL, _PUSH = "pull", "pull,push"
_MAX_REDIRECTS = 5
_QUICK_ATTEMPTS = 3
"""Attempts for a manifest while a client waits: enough to ride out a restart of one of several servers."""
_MAX_TOKEN_BYTES = 1 << 20
_MAX_RETRY_AFTER = 60.0
"""Seconds that a background pull waits for a throttling registry."""
_MIN_RATE = 32 << 10
"""Bytes per second below which a download is aborted, after an initial allowance."""
_WRITE_SIZE = 1 << 20


class RegistryError(InternalError):
    """The registry cannot be reached or violates the specification."""

    status = 502
    default_code = "Bad Gateway"


class RegistryTimeout(RegistryError):
    """The registry does not answer in time."""

    status = 504
    default_code = "Gateway Timeout"


class _Again(Exception):
    """Retryable: broken connection or server error."""

    def __init__(self, reason: str, *, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Patience(msgspec.Struct, frozen=True):
    """Retry limits. Seconds."""

    attempts: int = 6
    """Consecutive attempts without progress."""
    first_delay: float = 0.5
    longest_delay: float = 10.0
    connect: float = 10.0
    silence: float = 30.0
    """Longest wait for the next bytes."""
    grace: float = 120.0
    """Time for a download in addition to its size divided by _MIN_RATE."""


class Fetched(msgspec.Struct, frozen=True):
    """A manifest or index as received."""

    data: bytes
    media_type: str
    digest: str


class _Endpoint(msgspec.Struct, frozen=True):
    """The address of a registry or one of its mirrors."""

    host: str
    url: str
    login: Login


class RegistryClient:
    """One per server: connections and tokens are shared. Close with ``aclose``."""

    def __init__(self, config: ImagesConfig, *, keychain: Keychain | None = None, patience: Patience | None = None):
        self._config = config
        self._patience = patience or Patience()
        default = Path(config.docker_config or "~/.docker/config.json").expanduser()
        self._keychain = keychain or Keychain(default)
        self._tokens: dict[tuple[str, str, Login, str], tuple[str, float]] = {}
        self._inward: dict[str, bool] = {}
        self._client: httpx.AsyncClient | None = None

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def forget(self, login: Login) -> None:
        """Drop the tokens obtained with ``login``, so that a login from a request does not stay in memory."""
        for key in [key for key in self._tokens if key[2] == login]:
            del self._tokens[key]

    async def manifest(self, ref: Reference, login: Login = NOBODY, *, wait: bool = True) -> Fetched:
        """The manifest of ``ref``. Without ``wait``, throttling is reported at once
        and server failures after a few attempts.

        Raises NotFound, RateLimited, RegistryError.
        """

        async def once(endpoint: _Endpoint) -> Fetched:
            url = f"{endpoint.url}/v2/{ref.repository}/manifests/{ref.selector}"
            async with self._get(endpoint, ref.repository, url, {"Accept": ACCEPT}) as response:
                _check_status(response, ref, "manifest")
                data = await _read_bounded(response, MAX_MANIFEST_BYTES)
            digest = digest_of(data)
            if ref.digest and digest != ref.digest:
                raise ManifestError(f"{endpoint.host} sent a manifest with the digest {digest}, not {ref.digest}")
            return Fetched(data, response.headers.get("content-type", ""), digest)

        return await self._from_somewhere(ref, login, once, attempts=None if wait else _QUICK_ATTEMPTS)

    async def small_blob(self, ref: Reference, blob: Descriptor, login: Login, *, limit: int) -> bytes:
        """A blob of at most ``limit`` bytes, in memory. Raises as ``manifest`` does, and ManifestError."""

        async def once(endpoint: _Endpoint) -> bytes:
            url = f"{endpoint.url}/v2/{ref.repository}/blobs/{blob.digest}"
            async with self._get(endpoint, ref.repository, url, {}) as response:
                _check_status(response, ref, f"blob {blob.digest}")
                data = await _read_bounded(response, limit)
            if len(data) != blob.size or digest_of(data) != blob.digest:
                raise ManifestError(f"{endpoint.host} sent other bytes than blob {blob.digest} has")
            return data

        return await self._from_somewhere(ref, login, once)

    async def blob(
        self, ref: Reference, blob: Descriptor, fd: int, login: Login, progress: Callable[[int], None]
    ) -> None:
        """Download a blob into the open file ``fd``, resuming after the data already in it.

        ``progress(n)`` reports the bytes received.
        Raises NotFound, RateLimited, RegistryError, ManifestError (other content) and OSError (disk).
        """
        limit = self._patience.grace + blob.size / _MIN_RATE
        download = _Download(blob, fd, progress)
        if await trio.to_thread.run_sync(download.resume):
            return

        async def once(endpoint: _Endpoint) -> None:
            url = f"{endpoint.url}/v2/{ref.repository}/blobs/{blob.digest}"
            headers = {"Range": f"bytes={download.done}-"} if download.done else {}
            async with self._get(endpoint, ref.repository, url, headers) as response:
                await download.accept(response, ref)
                await download.receive(response, endpoint.host)

        with trio.move_on_after(limit) as scope:
            await self._from_somewhere(ref, login, once, progress=lambda: download.done)
        if scope.cancelled_caught:
            raise RegistryError(
                f"blob {blob.digest} came too slowly: {download.done} of {blob.size} bytes in {limit:.0f} seconds"
            )

    # Trying

    async def _from_somewhere(
        self,
        ref: Reference,
        login: Login,
        once: Callable[[_Endpoint], Awaitable[R]],
        *,
        attempts: int | None = None,
        progress: Callable[[], int] = lambda: 0,
    ) -> R:
        """Call ``once`` for each mirror, one try each, then for the registry itself with all retries."""
        for host in self._config.mirrors.get(ref.registry, ()):
            try:
                return await once(self._endpoint(host, self._keychain.login(host)))
            except (_Again, HypemanError, ManifestError):
                continue
        own = login or self._keychain.login(ref.registry)
        endpoint = self._endpoint(_DOCKER_HUB if ref.registry == DEFAULT_REGISTRY else ref.registry, own)
        left, delay, done = attempts or self._patience.attempts, self._patience.first_delay, progress()
        while True:
            try:
                return await once(endpoint)
            except _Again as error:
                left -= 1
                if progress() > done:
                    left, delay, done = self._patience.attempts, self._patience.first_delay, progress()
                if left <= 0:
                    raise RegistryError(f"{endpoint.host}: {error}") from None
                wait = error.after if error.after is not None else delay * random.uniform(0.5, 1.0)  # noqa: S311
            except RateLimited as error:
                left -= 1
                if left <= 0 or attempts is not None or error.retry_after is None:
                    raise
                if error.retry_after > _MAX_RETRY_AFTER:
                    raise
                wait = error.retry_after
            await trio.sleep(wait)
            delay = min(delay * 2, self._patience.longest_delay)

    def _endpoint(self, host: str, login: Login) -> _Endpoint:
        """Raises RegistryError if no URL can have this host: `[:]/y` is a legal reference."""
        url = f"{'http' if host in self._config.insecure_registries else 'https'}://{host}"
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise RegistryError(f"registry {host} cannot be asked: {error}") from None
        return _Endpoint(host, url, login)

    # Pushing

    @asynccontextmanager
    async def send(
        self,
        ref: Reference,
        method: str,
        url: str,
        login: Login,
        *,
        headers: Mapping[str, str] | None = None,
        content: Callable[[], AsyncIterator[bytes]] | bytes | None = None,
        insecure: bool = False,
    ) -> AsyncIterator[httpx.Response]:
        """A request of a push to the registry of ``ref``, with a login that may write; redirects are not followed.

        ``url``: a path, or what the registry named as the place of an upload, which gets the login only at the
        registry itself. ``insecure``: plain HTTP. Raises RegistryError, RateLimited; _Again becomes RegistryError.
        """
        host = _DOCKER_HUB if ref.registry == DEFAULT_REGISTRY else ref.registry
        endpoint = self._endpoint(host, login or self._keychain.login(ref.registry))
        if insecure:
            endpoint = msgspec.structs.replace(endpoint, url=f"http://{host}")
        home = httpx.URL(endpoint.url)
        try:
            target = home.join(url)
        except httpx.InvalidURL:
            raise RegistryError(f"{host} names a location for uploads that is not a URL") from None
        address = ""
        if _origin(target) != _origin(home):
            if target.scheme != "https" and home.scheme == "https":
                raise RegistryError(f"{host} directs uploads to {target.scheme}://{target.host}, which is not safe")
            inward = await self._is_inward(home.host)
            address = await _checked_address(target.host, inward, f"{host} directs uploads to")
        authorization = self._known_authorization(endpoint, ref.repository, _PUSH)
        refused = False
        while True:
            own = {"Authorization": authorization} if authorization and _origin(target) == _origin(home) else {}
            body = content() if callable(content) else content
            try:
                async with self._stream(method, target, {**(headers or {}), **own}, body, address=address) as response:
                    if response.status_code != 401 or refused:
                        yield response
                        return
                    refused = True
                    challenges = parse_challenges(response.headers.get_list("www-authenticate"))
            except _Again as error:
                raise RegistryError(f"{host}: {error}") from None
            self._tokens.pop((endpoint.host, ref.repository, endpoint.login, _PUSH), None)
            authorization = await self._log_in(endpoint, ref.repository, challenges, _PUSH)

    # One request

    @asynccontextmanager
    async def _get(
        self, endpoint: _Endpoint, repository: str, url: str, headers: dict[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """GET with login and redirects. Raises _Again for retryable failures."""
        authorization = self._known_authorization(endpoint, repository)
        refused = False
        while True:
            async with self._send(endpoint, url, headers, authorization) as response:
                if response.status_code != 401 or refused:
                    yield response
                    return
                refused = True
                challenges = parse_challenges(response.headers.get_list("www-authenticate"))
            self._tokens.pop((endpoint.host, repository, endpoint.login, _PULL), None)
            authorization = await self._log_in(endpoint, repository, challenges)

    @asynccontextmanager
    async def _send(
        self, endpoint: _Endpoint, url: str, headers: dict[str, str], authorization: str
    ) -> AsyncIterator[httpx.Response]:
        target = httpx.URL(url)
        home, address = _origin(target), ""
        inward = await self._is_inward(target.host)
        for _ in range(_MAX_REDIRECTS + 1):
            # Blob stores sign their own URLs and must not receive the registry's login.
            own = {"Authorization": authorization} if authorization and _origin(target) == home else {}
            async with self._stream("GET", target, {**headers, **own}, address=address) as response:
                if not response.has_redirect_location:
                    yield response
                    return
                try:
                    target = target.join(response.headers["location"])
                except httpx.InvalidURL:
                    raise RegistryError(f"{endpoint.host} redirects to something that is not a URL") from None
            if target.scheme not in ("http", "https") or (target.scheme == "http" and home[0] == "https"):
                raise RegistryError(f"{endpoint.host} redirects to {target.scheme}://{target.host}, which is not safe")
            address = await _checked_address(target.host, inward, f"{endpoint.host} redirects to")
        raise RegistryError(f"{endpoint.host} redirects more than {_MAX_REDIRECTS} times")

    async def _is_inward(self, registry: str) -> bool:
        """Whether a registry is on this host or its link, as it was found when it was asked for the first time: who
        answers for its name must not be able to change that."""
        if registry not in self._inward:
            if len(self._inward) > 1000:
                self._inward.clear()
            self._inward[registry] = any(map(_leads_inward, await _addresses_of(registry)))
        return self._inward[registry]

    @asynccontextmanager
    async def _stream(
        self,
        method: str,
        url: httpx.URL,
        headers: dict[str, str],
        content: bytes | AsyncIterator[bytes] | None = None,
        *,
        address: str = "",
    ) -> AsyncIterator[httpx.Response]:
        """One exchange, without authentication or redirects; network errors and 5xx become _Again.

        ``address``: dialled in the place of the URL's host, which is still who has to answer.
        """
        dialled, extensions = url, {}
        if address:
            dialled = url.copy_with(host=address)
            extensions = {"sni_hostname": url.host}
            # not kept open: it would be taken for one to whichever name has this address next
            headers = {**headers, "Host": url.netloc.decode("ascii"), "Connection": "close"}
        if self._client is None:
            self._client = await trio.to_thread.run_sync(self._make_client)
        try:
            async with self._client.stream(
                method, dialled, headers=headers, content=content, extensions=extensions
            ) as response:
                if response.status_code == 429:
                    after = retry_after(response.headers.get("retry-after"))
                    raise RateLimited(f"registry {url.host} throttles us", retry_after=after)
                if response.status_code >= 500 or response.status_code == 408:
                    after = retry_after(response.headers.get("retry-after"))
                    if after is not None and after > self._patience.longest_delay:
                        after = self._patience.longest_delay
                    raise _Again(f"answers with status {response.status_code}", after=after)
                yield response
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
            raise RegistryError(f"registry {url.host} cannot be asked: {error}") from None
        except httpx.TransportError as error:
            if _is_certificate_error(error):
                raise RegistryError(f"registry {url.host} is not who it claims to be: {error}") from None
            raise _Again(_describe(error)) from None

    def _make_client(self) -> httpx.AsyncClient:
        wait = self._patience
        timeout = httpx.Timeout(wait.silence, connect=wait.connect, pool=None)
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=8, keepalive_expiry=30)
        headers = {"User-Agent": f"hypeman/{__version__}", "Accept-Encoding": "identity"}
        context = _trust(self._config.ca_file)
        return httpx.AsyncClient(verify=context, timeout=timeout, limits=limits, headers=headers)

    # Logging in

    def _known_authorization(self, endpoint: _Endpoint, repository: str, actions: str = _PULL) -> str:
        known = self._tokens.get((endpoint.host, repository, endpoint.login, actions))
        return known[0] if known is not None and known[1] > time.monotonic() else ""

    async def _log_in(
        self, endpoint: _Endpoint, repository: str, challenges: list[Challenge], actions: str = _PULL
    ) -> str:
        """An Authorization header that should satisfy one of ``challenges``; empty if there is none."""
        login, lifetime = endpoint.login, 3600.0
        by_scheme = {challenge.scheme: challenge for challenge in challenges}
        if login.registry_token:
            authorization = f"Bearer {login.registry_token}"
        elif "bearer" in by_scheme:
            token, lifetime = await self._token(endpoint, repository, by_scheme["bearer"], actions)
            authorization = f"Bearer {token}"
        elif "basic" in by_scheme and login.username:
            authorization = login.basic
        else:
            return ""
        if len(self._tokens) > 1000:
            self._tokens.clear()
        self._tokens[endpoint.host, repository, login, actions] = (authorization, time.monotonic() + lifetime)
        return authorization

    async def _token(
        self, endpoint: _Endpoint, repository: str, challenge: Challenge, actions: str
    ) -> tuple[str, float]:
        """A token from the service named by the registry, and the seconds for which to use it."""
        login = endpoint.login
        try:
            realm = httpx.URL(challenge.parameters.get("realm", ""))
        except httpx.InvalidURL:
            realm = httpx.URL("")
        plain = realm.scheme == "http" and endpoint.url.startswith("http:")
        if not realm.host or not (realm.scheme == "https" or plain):
            raise RegistryError(f"{endpoint.host} names no safe token service")
        inward = await self._is_inward(httpx.URL(endpoint.url).host)
        address = await _checked_address(realm.host, inward, f"{endpoint.host} names as its token service")
        query = {"service": challenge.parameters.get("service", ""), "scope": f"repository:{repository}:{actions}"}
        headers, content, method = {}, None, "GET"
        if login.identity_token:
            method = "POST"
            query |= {"grant_type": "refresh_token", "refresh_token": login.identity_token, "client_id": "hypeman"}
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            content = urlencode(query).encode()
        else:
            realm = realm.copy_merge_params({name: value for name, value in query.items() if value})
            if login.username:
                headers["Authorization"] = login.basic
        async with self._stream(method, realm, headers, content, address=address) as response:
            if response.status_code in (401, 403):
                raise NotFound(f"{endpoint.host} does not accept the login for {repository}")
            if response.status_code != 200:
                raise RegistryError(f"the token service of {endpoint.host} answers {response.status_code}")
            data = await _read_bounded(response, _MAX_TOKEN_BYTES)
        try:
            reply = msgspec.json.decode(data, type=_TokenReply)
        except msgspec.DecodeError:
            raise RegistryError(f"the token service of {endpoint.host} sends no token") from None
        token = reply.token or reply.access_token
        if not token or not token.isascii() or not token.isprintable():
            raise RegistryError(f"the token service of {endpoint.host} sends no token")
        return token, max(reply.expires_in or 60, 60) * 0.8


class _TokenReply(msgspec.Struct, frozen=True):
    token: str | None = None
    access_token: str | None = None
    expires_in: int | None = None


class _Download:
    """One blob being downloaded into a file, over one or more responses."""

    def __init__(self, blob: Descriptor, fd: int, progress: Callable[[int], None]) -> None:
        self._blob = blob
        self._fd = fd
        self._progress = progress
        self._hash = hashlib.sha256()
        self.done = 0
        self._found = False
        """Some of the bytes are from an earlier process and not yet verified."""

    def resume(self) -> bool:
        """Resume from the data in the file; returns whether it is complete. Blocks."""
        found = os.fstat(self._fd).st_size
        if found > self._blob.size:
            self._restart()
            return False
        while self.done < found:
            data = os.pread(self._fd, min(_WRITE_SIZE, found - self.done), self.done)
            self._hash.update(data)
            self.done += len(data)
        self._found = self.done > 0
        self._progress(self.done)
        if self.done < self._blob.size:
            return False
        if "sha256:" + self._hash.hexdigest() == self._blob.digest:
            return True
        self._restart()
        return False

    def _restart(self) -> None:
        os.ftruncate(self._fd, 0)
        self._hash = hashlib.sha256()
        self.done = 0
        self._found = False
        self._progress(0)

    async def accept(self, response: httpx.Response, ref: Reference) -> None:
        """Check from a response's headers that it carries the missing bytes."""
        status = response.status_code
        if status == 206 and self.done:
            if response.headers.get("content-range") == f"bytes {self.done}-{self._blob.size - 1}/{self._blob.size}":
                return
            self._restart()
            raise _Again("sends another range than it was asked for")
        if status == 416 or status == 206:
            self._restart()
            raise _Again(f"answers a request for a blob with status {status}")
        _check_status(response, ref, f"blob {self._blob.digest}")
        stated = response.headers.get("content-length")
        if stated is not None and stated != str(self._blob.size):
            raise ManifestError(
                f"blob {self._blob.digest} is {stated} bytes long at the registry, {self._blob.size} in the manifest"
            )
        if self.done:
            self._restart()  # the server does not support ranges

    async def receive(self, response: httpx.Response, host: str) -> None:
        buffer = bytearray()
        try:
            async for chunk in response.aiter_raw():
                buffer += chunk
                if self.done + len(buffer) > self._blob.size:
                    raise ManifestError(
                        f"{host} sends more than the {self._blob.size} bytes that blob {self._blob.digest} has"
                    )
                if len(buffer) >= _WRITE_SIZE:
                    buffer = await self._write(buffer)
        except httpx.TransportError:
            await self._write(buffer)  # keep what arrived: the next request starts after it
            raise
        await self._write(buffer)
        if self.done < self._blob.size:
            raise _Again(f"ends blob {self._blob.digest} after {self.done} of {self._blob.size} bytes")
        digest = "sha256:" + self._hash.hexdigest()
        if digest != self._blob.digest and self._found:
            self._restart()
            raise _Again("does not continue what was there")
        if digest != self._blob.digest:
            raise ManifestError(f"{host} sent {digest} for blob {self._blob.digest}")

    async def _write(self, buffer: bytearray) -> bytearray:
        def work() -> None:
            self._hash.update(buffer)
            view, at = memoryview(buffer), self.done
            while view:
                written = os.pwrite(self._fd, view, at)
                view, at = view[written:], at + written

        if buffer:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(work)
            self.done += len(buffer)
            self._progress(self.done)
        return bytearray()


def retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds in a Retry-After header, which may be a number or a date; None if absent or invalid."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except (ValueError, TypeError, OverflowError):
        return None


def _check_status(response: httpx.Response, ref: Reference, what: str) -> None:
    status = response.status_code
    name = f"{ref.registry}/{ref.repository}"
    if status == 404:
        raise NotFound(f"{name} has no {what if what != 'manifest' else ref.selector}")
    if status in (401, 403):
        raise NotFound(f"{name} does not exist, or needs a login that may read it")
    if status != 200:
        raise RegistryError(f"registry {ref.registry} answers a request for {what} with status {status}")


async def _read_bounded(response: httpx.Response, limit: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit:
            raise RegistryError(f"{response.url.host} sends more than {limit} bytes where little was expected")
    return bytes(data)


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def _trust(ca_file: str) -> ssl.SSLContext:
    """The host's CA roots plus those in ``ca_file``. Raises RegistryError if that cannot be read."""
    try:
        return client_context(ca_file)
    except OSError as error:
        raise RegistryError(f"images.ca_file {ca_file} cannot be used: {error}") from None


def _is_certificate_error(error: BaseException) -> bool:
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ssl.SSLCertVerificationError):
            return True
        found = found.__cause__ or found.__context__
    return False


def _describe(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return "does not answer"
    if isinstance(error, httpx.TimeoutException):
        return "has gone silent"
    return f"the connection broke: {cause_of(error)}"


async def _checked_address(host: str, inward: bool, what: str) -> str:
    """The address to dial for ``host``, where a registry sends us; empty if ``host`` is one, or cannot be looked up
    here (perhaps a proxy can). Raises RegistryError if it leads to this host or its link, unless the registry itself is
    there (``inward``): otherwise anyone who can answer for a registry, especially a plain-HTTP one, could have this
    host send requests to its own services or a cloud's metadata service.
    """
    addresses = await _addresses_of(host)
    if not inward and any(map(_leads_inward, addresses)):
        raise RegistryError(f"{what} {host}, an address of this host or its link")
    return str(addresses[0]) if addresses and str(addresses[0]) != host.strip("[]") else ""


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


async def _addresses_of(host: str) -> list[_Address]:
    try:
        found = await trio.socket.getaddrinfo(host, None)
    except OSError:
        return []
    return [ipaddress.ip_address(str(row[4][0]).partition("%")[0]) for row in found]


def _leads_inward(address: _Address) -> bool:
    """Whether it is a loopback, link-local or unspecified address."""
    plain = getattr(address, "ipv4_mapped", None) or address
    return bool(plain.is_loopback or plain.is_link_local or plain.is_unspecified)
