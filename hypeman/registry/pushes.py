"""Pushes images of this host to other registries, one layer after the other, two images at once.

    request ──► record (queued) ──► pushing ──► pushed
                             └─────────┴──────► failed, also if it is cancelled

An image that was made of an index, such as one for several platforms or with attestations, is pushed with all of it.
Blobs that the registry has already are not sent, so a push that is repeated is short. A push interrupted by a restart
is begun again, unless it used a login supplied with the request, which was kept in memory only.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import httpx
import msgspec
import trio

from hypeman import events
from hypeman.errors import Conflict, HypemanError, InvalidRequest, NotFound, RateLimited
from hypeman.host.files import read_pieces
from hypeman.ids import new_id
from hypeman.images.auth import NOBODY, Login, login_of
from hypeman.images.blobs import Blobs
from hypeman.images.manifest import (
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    digest_of,
    parse_manifest,
)
from hypeman.images.reference import Reference, parse_reference
from hypeman.images.registry import RegistryClient, RegistryError
from hypeman.images.types import Image, ImageStatus
from hypeman.registry.push_types import CreatePushRequest, Push, PushStatus
from hypeman.registry.records import index_of
from hypeman.store.store import Store
from hypeman.store.tables import Table, Txn

log = logging.getLogger(__name__)

_AT_ONCE = 2
_KEPT = 200
"""Finished pushes that are kept."""
_MAX_QUEUED = 1000
_ATTEMPTS = 4
_DELAY = 1.0
_MAX_DELAY = 60.0
"""Seconds that a registry may ask to wait."""
_CANCELLED = "cancelled"
"""The error of a cancelled push: for clients that know the contract's four states it has failed."""


class PushRow(msgspec.Struct, frozen=True):
    push: Push
    insecure: bool = False
    borrowed: bool = False
    """It uses a login that was supplied with the request."""


PUSHES = Table("pushes", PushRow)


class PushableImages(Protocol):
    async def get(self, name: str) -> Image: ...
    async def packaged(self, name: str) -> bytes: ...


class _Running:
    """A push that is under way."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.done = 0
        """Bytes of layers that the other registry has."""
        self.sent = 0
        """Bytes of the layer that is being sent."""
        self.naming = False
        """The manifest is being sent: the image appears, and the push can no longer be cancelled."""


class _Parts(msgspec.Struct, frozen=True, rename="camel"):
    """What any manifest that is here refers to."""

    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()


class _Sent:
    """A manifest that is sent, after its blobs."""

    def __init__(self, data: bytes, media_type: str) -> None:
        parts = msgspec.json.decode(data, type=_Parts)  # it was checked when it was received
        self.data = data
        self.media_type = media_type
        self.layers = parts.layers
        self.blobs = (*parts.layers, parts.config) if parts.config is not None else parts.layers


class Pushes:
    """One per server. ``run``, started in a nursery, does the work."""

    def __init__(
        self,
        *,
        store: Store,
        images: PushableImages,
        blobs: Blobs,
        client: RegistryClient,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        delay: float = _DELAY,
    ) -> None:
        self._store = store
        self._images = images
        self._blobs = blobs
        self._client = client
        self._now = now
        self._delay = delay
        self._queue: deque[str] = deque()
        self._queued = trio.Semaphore(0)
        self._logins: dict[str, Login] = {}
        self._running: dict[str, _Running] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Resume what was interrupted, then work until cancelled."""
        rows = self._store.read(lambda txn: [row for _, row in txn.scan(PUSHES)])
        for row in sorted(rows, key=lambda row: row.push.created_at):
            if row.push.status.is_final:
                continue
            if row.borrowed:
                await self._end(
                    row.push.id, error="interrupted by a restart, and its login was not kept; push it again"
                )
            else:
                self._enqueue(row.push.id)
        async with trio.open_nursery() as nursery:
            for _ in range(_AT_ONCE):
                nursery.start_soon(self._work)
            task_status.started()

    async def create(self, request: CreatePushRequest) -> Push:
        """Request a push; returns at once.

        Raises InvalidRequest ``invalid_name``, ``invalid_target``; NotFound; Conflict ``image_not_ready``.
        """
        image = await self._images.get(request.image)
        target = _target(request.target)
        if image.status is not ImageStatus.READY:
            raise Conflict(f"image {image.name} is {image.status}", code="image_not_ready")
        if len(self._queue) >= _MAX_QUEUED:
            raise Conflict(f"{_MAX_QUEUED} pushes are waiting already", code="conflict")
        login = login_of(request.credentials)
        push = Push(
            id=new_id(),
            image=image.name,
            digest=image.digest,
            target=str(target),
            status=PushStatus.QUEUED,
            created_at=self._now(),
        )
        row = PushRow(push, request.insecure, bool(login))

        def write(txn: Txn) -> None:
            txn.put(PUSHES, push.id, row)
            _note(txn, push, "created")
            _trim(txn)

        await self._store.write(write)
        self._logins[push.id] = login
        self._enqueue(push.id)
        return self._view(push)

    async def list(self) -> list[Push]:
        """All pushes, newest first."""
        rows = self._store.read(lambda txn: [row.push for _, row in txn.scan(PUSHES)])
        return [self._view(push) for push in sorted(rows, key=lambda push: push.created_at, reverse=True)]

    async def get(self, push_id: str) -> Push:
        """Raises NotFound."""
        row = self._store.read(lambda txn: txn.get(PUSHES, push_id))
        if row is None:
            raise NotFound(f"there is no push {push_id}")
        return self._view(row.push)

    async def cancel(self, push_id: str) -> None:
        """End a push; what was sent stays at the other registry, without a name. Raises NotFound; Conflict if it is
        over, or the image is just appearing."""
        await self.get(push_id)
        if (running := self._running.get(push_id)) is not None:
            if running.naming:
                raise Conflict(f"push {push_id} has sent everything; its image is just appearing")
            running.scope.cancel()
        if push_id in self._queue:
            self._queue.remove(push_id)
        with trio.CancelScope(shield=True):
            ended = await self._end(push_id, error=_CANCELLED)
            self._logins.pop(push_id, None)
        if not ended:
            raise Conflict(f"push {push_id} is over")

    def _view(self, push: Push) -> Push:
        running = self._running.get(push.id)
        if push.status is PushStatus.PUSHING and running is not None:
            return msgspec.structs.replace(push, bytes_done=running.done + running.sent)
        if push.status is PushStatus.QUEUED and push.id in self._queue:
            return msgspec.structs.replace(push, queue_position=self._queue.index(push.id) + 1)
        return push

    # Working

    def _enqueue(self, push_id: str) -> None:
        self._queue.append(push_id)
        self._queued.release()

    async def _work(self) -> None:
        while True:
            await self._queued.acquire()
            if self._queue:  # fewer than were queued, if some were cancelled
                await self._do(self._queue.popleft())

    async def _do(self, push_id: str) -> None:
        row = self._store.read(lambda txn: txn.get(PUSHES, push_id))
        if row is None or row.push.status.is_final:
            return  # cancelled meanwhile
        login = self._logins.get(push_id, NOBODY)
        running = self._running[push_id] = _Running()
        error = _CANCELLED
        try:
            with running.scope:
                await self._push(row, login, running)
                error = ""
        except HypemanError as failure:
            error = failure.message
        except OSError as failure:
            error = f"a blob cannot be read: {failure.strerror}"
        except Exception:
            log.exception("push %s failed", push_id)
            error = "an internal error; the server's log has its cause"
        finally:
            del self._running[push_id]
            self._logins.pop(push_id, None)
            self._client.forget(login)
        with trio.CancelScope(shield=True):
            await self._end(push_id, error=error)

    async def _push(self, row: PushRow, login: Login, running: _Running) -> None:
        name = row.push.image
        data = await self._images.packaged(name)
        manifest = parse_manifest(data)
        assert isinstance(manifest, Manifest)
        own = _Sent(data, manifest.media_type or MANIFEST_TYPES[0])
        index = self._store.read(lambda txn: index_of(txn, name, digest_of(data)))
        with self._blobs.claim(*(digest for digest, _ in index)):
            sent = [await trio.to_thread.run_sync(self._kept, *each) for each in index] or [own]
            with self._blobs.claim(*(blob.digest for each in sent for blob in each.blobs)):
                await self._images.packaged(name)  # what was evicted meanwhile is fetched, and stays
                await self._send(row, login, running, sent)

    def _kept(self, digest: str, media_type: str) -> _Sent:
        """Blocking. Raises RegistryError."""
        data = self._blobs.read(digest, MAX_MANIFEST_BYTES)
        if data is None or digest_of(data) != digest:
            raise RegistryError(f"manifest {digest} is no longer here")
        return _Sent(data, media_type)

    async def _send(self, row: PushRow, login: Login, running: _Running, manifests: Sequence[_Sent]) -> None:
        """The last of ``manifests`` gets the tag, the others go before it."""
        layers = [layer for manifest in manifests for layer in manifest.layers]
        size = sum(layer.size for layer in layers)
        await self._change(row.push.id, status=PushStatus.PUSHING, layers=len(layers), bytes=size)
        upload = _Upload(self._client, self._blobs, parse_reference(row.push.target), login, row.insecure, running)
        sent = set[str]()
        for manifest in manifests:
            for part in manifest.blobs:
                if part.digest not in sent:
                    await self._retried(partial(upload.blob, part))
                    sent.add(part.digest)
                running.sent = 0
                if part in manifest.layers:
                    running.done += part.size
            running.naming = manifest is manifests[-1]
            await self._retried(partial(upload.manifest, manifest, tagged=running.naming))

    async def _retried(self, attempt: Callable[[], Awaitable[None]]) -> None:
        delay = self._delay
        for left in reversed(range(_ATTEMPTS)):
            wait = delay
            try:
                await attempt()
                return
            except RegistryError:
                if not left:
                    raise
            except RateLimited as error:
                wait = max(delay, error.retry_after or 0.0)
                if not left or wait > _MAX_DELAY:
                    raise
            await trio.sleep(wait)
            delay *= 2

    async def _change(self, push_id: str, **fields: object) -> bool:
        """Of a push that is not over; whether it was one."""

        def write(txn: Txn) -> bool:
            row = txn.get(PUSHES, push_id)
            if row is None or row.push.status.is_final:
                return False
            push = msgspec.structs.replace(row.push, **fields)
            txn.put(PUSHES, push_id, msgspec.structs.replace(row, push=push))
            if push.status.is_final:
                _note(txn, push, push.status.value)
            return True

        return await self._store.write(write)

    async def _end(self, push_id: str, *, error: str) -> bool:
        """Record how it ended; False if that was recorded before."""
        fields: dict[str, object] = {"status": PushStatus.PUSHED}
        if error:
            fields = {"status": PushStatus.FAILED, "error": error[:2000]}
            if error != _CANCELLED:
                log.warning("push %s failed: %s", push_id, error)
        return await self._change(push_id, completed_at=self._now(), **fields)


class _Upload:
    """The push of one image."""

    def __init__(
        self,
        client: RegistryClient,
        blobs: Blobs,
        target: Reference,
        login: Login,
        insecure: bool,
        running: _Running,
    ) -> None:
        self._client = client
        self._blobs = blobs
        self._target = target
        self._login = login
        self._insecure = insecure
        self._running = running

    async def blob(self, part: Descriptor) -> None:
        base = f"/v2/{self._target.repository}/blobs"
        async with self._send("HEAD", f"{base}/{part.digest}") as response:
            if response.status_code == 200:
                return
        async with self._send("POST", f"{base}/uploads/", headers={"Content-Length": "0"}) as response:
            _check(response.status_code, self._target, (202,), "the begin of an upload")
            location = response.headers.get("location", "")
        if not location:
            raise RegistryError(f"{self._target.registry} names no location for the upload")
        place = f"{location}{'&' if '?' in location else '?'}digest={part.digest}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(part.size)}
        async with self._send("PUT", place, headers=headers, content=lambda: self._bytes_of(part)) as response:
            _check(response.status_code, self._target, (201, 204), f"blob {part.digest}")

    async def manifest(self, manifest: _Sent, *, tagged: bool) -> None:
        reference = self._target.tag if tagged else digest_of(manifest.data)
        path = f"/v2/{self._target.repository}/manifests/{reference}"
        headers = {"Content-Type": manifest.media_type}
        async with self._send("PUT", path, headers=headers, content=manifest.data) as response:
            _check(response.status_code, self._target, (200, 201, 202), "the manifest")

    def _send(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        content: Callable[[], AsyncIterator[bytes]] | bytes | None = None,
    ) -> AbstractAsyncContextManager[httpx.Response]:
        return self._client.send(
            self._target, method, url, self._login, headers=headers, content=content, insecure=self._insecure
        )

    async def _bytes_of(self, part: Descriptor) -> AsyncIterator[bytes]:
        fd = await trio.to_thread.run_sync(self._blobs.open, part.digest, part.size)
        if fd is None:
            raise RegistryError(f"blob {part.digest} is no longer here")
        self._running.sent = 0
        async with aclosing(read_pieces(fd, 0, part.size)) as pieces:
            async for piece in pieces:
                yield piece
                self._running.sent = min(self._running.sent + len(piece), part.size)


def _check(status: int, target: Reference, good: tuple[int, ...], what: str) -> None:
    if status in good:
        return
    if status in (401, 403):
        raise NotFound(f"{target.registry} does not let this login push to {target.repository}")
    if status in (400, 404, 405, 413):
        raise InvalidRequest(f"{target.registry} refuses {what} with status {status}")
    raise RegistryError(f"{target.registry} answers {what} with status {status}")


def _target(text: str) -> Reference:
    try:
        target = parse_reference(text)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, code="invalid_target") from None
    if target.digest:
        raise InvalidRequest("the target is a digest; an image is pushed to a tag", code="invalid_target")
    return target


def _note(txn: Txn, push: Push, action: str) -> None:
    data = {"target": push.target, "digest": push.digest, "error": push.error}
    events.record(txn, events.Kind.PUSH, action, push.id, name=push.image, data=data)


def _trim(txn: Txn) -> None:
    finished = [row.push for _, row in txn.scan(PUSHES) if row.push.status.is_final]
    for push in sorted(finished, key=lambda push: push.created_at, reverse=True)[_KEPT:]:
        txn.delete(PUSHES, push.id)
