"""A registry on the blobs and images of this host: push, pull, tags, referrers (OCI distribution specification 1.1).

What is pushed under a tag becomes an image of that name, from the same blobs. What was pulled or imported can be pulled
from here, too: its manifest is then found among the images, and blobs that are no longer cached are fetched again.

An upload is a file that exists only while the server runs; a client whose upload is unknown begins again. Blobs and
manifests are kept as long as a tag or a younger upload needs them (``records.collect``).
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from hypeman.actor import current_actor
from hypeman.errors import Conflict, HypemanError, InUse, InvalidRequest, NotFound
from hypeman.host.periodic import repeat
from hypeman.images.blobs import Blobs, write_all
from hypeman.images.manifest import (
    CONFIG_TYPES,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Index,
    Manifest,
    ManifestError,
    PlatformMissing,
    choose_platform,
    digest_of,
    parse_manifest,
)
from hypeman.images.reference import host_platform
from hypeman.registry import records
from hypeman.registry.names import Code, RegistryFailure, check_digest, is_digest
from hypeman.registry.records import BLOBS, MANIFESTS, TAGS, BlobRow, ManifestRow, TagRow
from hypeman.store.store import Store
from hypeman.store.tables import Txn
from hypeman.units import format_size

log = logging.getLogger(__name__)

MAX_UPLOADS = 256
"""Uploads at once."""
MAX_UPLOADS_EACH = 64
"""Of one caller."""
IDLE_EMPTY = timedelta(minutes=1)
"""After which an upload that has received nothing makes room for another one."""
IDLE = timedelta(hours=1)
"""After which an upload that receives nothing is dropped."""
KEPT = timedelta(hours=24)
"""How long blobs and manifests that nothing refers to are kept: clients upload blobs first and tags last."""
_UNCHECKED = 1 << 20
"""Bytes that a request may send until the room is looked at again."""
_COLLECT_SECONDS = 600.0
_RETRY_SECONDS = 30.0
_MAX_TAGS = 1000


class ImageStore(Protocol):
    async def adopt(self, name: str, manifest: Manifest, digest: str) -> str:
        """Make an image of blobs that are in the cache; returns its normalised name."""

    async def packaged(self, name: str) -> bytes:
        """The manifest of an image, all of whose blobs are in the cache. Raises NotFound."""

    def tags(self, repository: str) -> Sequence[str]:
        """Tags of the ready images of a repository."""

    async def delete(self, name: str) -> None:
        """Raises NotFound, InUse."""


class Opened(msgspec.Struct, frozen=True):
    """Content to send; the receiver closes ``fd``."""

    fd: int
    size: int
    digest: str
    media_type: str


class Upload:
    """A blob being received."""

    def __init__(self, repository: str, owner: str, fd: int, path: Path, now: datetime) -> None:
        self.repository = repository
        self.owner = owner
        self.fd = fd
        self.path = path
        self.size = 0
        self.hash = hashlib.sha256()
        self.lock = trio.Lock()
        self.over = False
        """Complete or dropped; the request that holds the lock closes the file."""
        self.touched = now

    def add(self, chunk: bytes) -> None:
        """Blocking. Raises OSError; what was received before stays."""
        try:
            write_all(self.fd, chunk)
        except OSError:
            os.ftruncate(self.fd, self.size)  # part of the chunk may be there
            os.lseek(self.fd, self.size, os.SEEK_SET)
            raise
        self.hash.update(chunk)
        self.size += len(chunk)

    def end(self) -> None:
        self.over = True
        if not self.lock.locked():
            os.close(self.fd)

    def let_go(self) -> None:
        """The request that holds the lock is done."""
        if self.over:
            os.close(self.fd)


class Registry:
    """One per server. ``run``, started in a nursery, removes what is no longer needed."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        images: ImageStore,
        max_blob_bytes: int,
        max_uploads_bytes: int = sys.maxsize,
        max_kept_bytes: int = 0,
        room: Callable[[], int] = lambda: sys.maxsize,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``max_uploads_bytes``: of uploads that are not complete, together. ``max_kept_bytes``: of all blobs that
        repositories have; 0 is unlimited. ``room``: bytes that uploads may have, from what the disk has free."""
        self._store = store
        self._blobs = blobs
        self._images = images
        self._max_blob_bytes = max_blob_bytes
        self._max_uploads_bytes = max_uploads_bytes
        self._max_kept_bytes = max_kept_bytes
        self._room = room
        self._now = now
        self._uploads: dict[str, Upload] = {}
        self._tagging = trio.Lock()
        """Of two pushes to one tag, the image is that of the later one, as the tag is."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._resume()
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._resume_often)
                await repeat(self.collect, interval=_COLLECT_SECONDS, what="collection of the registry's garbage")
        finally:
            for upload in self._uploads.values():
                upload.end()
            self._uploads.clear()

    async def _resume_often(self) -> None:
        await trio.sleep(_RETRY_SECONDS)
        await repeat(self._resume, interval=_RETRY_SECONDS, what="making images of pushed tags")

    async def _resume(self) -> None:
        """Make the images of tags that are only stored: an earlier server was killed before it made them, or this one
        could not. One that still cannot be made does not prevent the start, and is tried again."""
        pending = self._store.read(lambda txn: [key for key, row in txn.scan(TAGS) if row.adopting])
        for key in pending:
            repository, _, tag = key.rpartition(":")
            try:
                async with self._tagging:
                    await self._adopt_stored(repository, tag)
            except (HypemanError, OSError) as error:
                log.warning("no image was made of %s, which was pushed; it is tried again: %s", key, error)

    async def _adopt_stored(self, repository: str, tag: str) -> None:
        """Unless it was done meanwhile."""
        found = self._find(repository, tag)
        tagged = self._store.read(lambda txn: txn.get(TAGS, f"{repository}:{tag}"))
        if found is None or tagged is None or not tagged.adopting:
            return
        digest, row = found
        data = await trio.to_thread.run_sync(self._blobs.read, digest, MAX_MANIFEST_BYTES)
        await self._adopt(repository, tag, data or b"", row.media_type, digest)

    async def collect(self) -> None:
        """Drop idle uploads, and content that nothing refers to."""
        now = self._now()
        for name, upload in list(self._uploads.items()):
            if now - upload.touched > IDLE and not upload.lock.locked():
                await self._drop(name)
        await self._store.write(lambda txn: records.collect(txn, now - KEPT))

    # Blobs

    async def blob(self, repository: str, digest: str) -> Opened:
        """Raises RegistryFailure BLOB_UNKNOWN."""
        check_digest(digest)
        row = self._store.read(lambda txn: txn.get(BLOBS, f"{repository}@{digest}"))
        fd = await trio.to_thread.run_sync(self._blobs.open, digest) if row is not None else None
        if fd is None:
            raise RegistryFailure(Code.BLOB_UNKNOWN, f"{repository} has no blob {digest}")
        return Opened(fd, os.fstat(fd).st_size, digest, "application/octet-stream")

    async def delete_blob(self, repository: str, digest: str) -> None:
        """Remove a blob from a repository. Raises RegistryFailure BLOB_UNKNOWN, or DENIED if a manifest has it."""
        check_digest(digest)

        def delete(txn: Txn) -> None:
            for _, row in txn.scan(MANIFESTS, f"{repository}@"):
                if digest in row.blobs:
                    raise RegistryFailure(Code.DENIED, f"a manifest of {repository} has the blob {digest}")
            if not txn.delete(BLOBS, f"{repository}@{digest}"):
                raise RegistryFailure(Code.BLOB_UNKNOWN, f"{repository} has no blob {digest}")

        await self._store.write(delete)

    async def mount(self, repository: str, digest: str, source: str) -> bool:
        """Make a blob of ``source`` (empty: any repository) readable in ``repository``, too; False if there is none."""
        check_digest(digest)

        def write(txn: Txn) -> bool:
            """The file is looked for while it is claimed: it may just be evicted."""
            found = txn.get(BLOBS, f"{source}@{digest}") if source else _anywhere(txn, digest)
            if found is None or not self._blobs.path(digest).exists():
                return False
            txn.put(BLOBS, f"{repository}@{digest}", BlobRow(found.size, self._now()))
            return True

        with self._blobs.claim(digest):
            return await self._store.write(write)

    # Uploads

    async def begin(self, repository: str) -> str:
        """The id of a new upload. Raises RegistryFailure TOOMANYREQUESTS."""
        actor = current_actor()
        owner = actor.subject if actor is not None else ""
        if len(self._uploads) >= MAX_UPLOADS or self._uploads_of(owner) >= MAX_UPLOADS_EACH:
            now = self._now()
            for old, upload in list(self._uploads.items()):
                if not upload.size and not upload.lock.locked() and now - upload.touched > IDLE_EMPTY:
                    await self._drop(old)
        if self._uploads_of(owner) >= MAX_UPLOADS_EACH:
            raise RegistryFailure(Code.TOOMANYREQUESTS, f"{MAX_UPLOADS_EACH} of your uploads are under way")
        if len(self._uploads) >= MAX_UPLOADS:
            raise RegistryFailure(Code.TOOMANYREQUESTS, f"{MAX_UPLOADS} uploads are under way")
        fd, path = await trio.to_thread.run_sync(self._blobs.begin)
        name = secrets.token_hex(16)
        self._uploads[name] = Upload(repository, owner, fd, path, self._now())
        return name

    def _uploads_of(self, owner: str) -> int:
        return sum(upload.owner == owner for upload in self._uploads.values())

    def upload(self, repository: str, name: str) -> Upload:
        """Raises RegistryFailure BLOB_UPLOAD_UNKNOWN."""
        found = self._uploads.get(name)
        if found is None or found.repository != repository:
            raise _unknown_upload()
        return found

    async def receive(
        self, repository: str, name: str, chunks: AsyncIterable[bytes], span: tuple[int, int] | None = None
    ) -> int:
        """Append to an upload; returns its size. ``span``: first and last byte as the client counts.

        Raises RegistryFailure RANGE_INVALID for a span that does not continue the upload, SIZE_INVALID; DENIED or
        TOOMANYREQUESTS without room for it, and the upload can be continued later.
        """
        async with self._held(repository, name) as upload:
            upload.touched = self._now()
            if span is not None and span[0] != upload.size:
                raise RegistryFailure(
                    Code.RANGE_INVALID,
                    f"the upload has {upload.size} bytes",
                    headers={"Range": f"0-{max(0, upload.size - 1)}"},
                )
            begin = checked = upload.size
            async for chunk in chunks:
                if upload.size + len(chunk) > self._max_blob_bytes:
                    await self._drop(name)
                    raise RegistryFailure(Code.SIZE_INVALID, f"a blob may have {self._max_blob_bytes} bytes at most")
                if upload.size + len(chunk) > checked:
                    self._check_room(len(chunk))
                    checked = upload.size + len(chunk) + _UNCHECKED
                await trio.to_thread.run_sync(upload.add, chunk)
                if upload.over:
                    raise _unknown_upload()  # cancelled by another request
                upload.touched = self._now()
            if span is not None and upload.size - begin != span[1] - span[0] + 1:
                await self._drop(name)
                raise RegistryFailure(Code.SIZE_INVALID, "the body is not as long as Content-Range says")
            return upload.size

    def _check_room(self, size: int) -> None:
        """Raises RegistryFailure."""
        if size > (room := self._room()):
            raise RegistryFailure(
                Code.DENIED, f"the disk of this host is nearly full: {format_size(room)} are left for uploads"
            )
        if size + sum(upload.size for upload in self._uploads.values()) > self._max_uploads_bytes:
            most = format_size(self._max_uploads_bytes)
            message = f"uploads that are not complete may take {most} together (images.max_uploads_size)"
            raise RegistryFailure(Code.TOOMANYREQUESTS, message)

    @asynccontextmanager
    async def _held(self, repository: str, name: str) -> AsyncIterator[Upload]:
        """An upload, for one request at a time. Raises RegistryFailure BLOB_UPLOAD_UNKNOWN."""
        upload = self.upload(repository, name)
        async with upload.lock:
            if upload.over:
                raise _unknown_upload()
            try:
                yield upload
            finally:
                upload.let_go()

    async def finish(self, repository: str, name: str, digest: str) -> None:
        """Complete an upload. Raises RegistryFailure DIGEST_INVALID; the upload is then over."""
        async with self._held(repository, name) as upload:
            try:
                check_digest(digest)
            except RegistryFailure:
                await self._drop(name)
                raise
            if f"sha256:{upload.hash.hexdigest()}" != digest:
                await self._drop(name)
                raise RegistryFailure(Code.DIGEST_INVALID, f"the bytes received do not have the digest {digest}")
            with self._blobs.claim(digest):
                await trio.to_thread.run_sync(self._blobs.publish, upload.fd, upload.path, digest)
                self._uploads.pop(name, None)
                upload.end()
                row = BlobRow(upload.size, self._now())
                await self._store.write(lambda txn: self._keep(txn, repository, digest, row))

    def _keep(self, txn: Txn, repository: str, digest: str, row: BlobRow) -> None:
        """Raises RegistryFailure DENIED. The file of a blob that is refused leaves with the cache's eviction."""
        if self._max_kept_bytes:
            sizes = {key.rpartition("@")[2]: known.size for key, known in txn.scan(BLOBS)}
            if digest not in sizes and sum(sizes.values()) + row.size > self._max_kept_bytes:
                most = format_size(self._max_kept_bytes)
                raise RegistryFailure(Code.DENIED, f"the registry may keep {most} (images.max_registry_size)")
        txn.put(BLOBS, f"{repository}@{digest}", row)

    async def put_blob(self, repository: str, digest: str, chunks: AsyncIterable[bytes]) -> None:
        """A whole upload at once: nothing of it is left if it fails. Raises as ``receive`` and ``finish`` do."""
        name = await self.begin(repository)
        try:
            await self.receive(repository, name, chunks)
            await self.finish(repository, name, digest)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._drop(name)
            raise

    async def cancel(self, repository: str, name: str) -> None:
        """Raises RegistryFailure BLOB_UPLOAD_UNKNOWN."""
        self.upload(repository, name)
        await self._drop(name)

    async def _drop(self, name: str) -> None:
        upload = self._uploads.pop(name, None)
        if upload is not None:
            upload.end()
            await trio.to_thread.run_sync(self._blobs.abandon, upload.path)

    # Manifests

    async def manifest(self, repository: str, reference: str) -> Opened:
        """Raises RegistryFailure MANIFEST_UNKNOWN."""
        found = self._find(repository, reference) or await self._borrow(repository, reference)
        if found is not None:
            digest, row = found
            fd = await trio.to_thread.run_sync(self._blobs.open, digest)
            if fd is not None:
                return Opened(fd, row.size, digest, row.media_type)
        raise RegistryFailure(Code.MANIFEST_UNKNOWN, f"{repository} has no manifest {reference}")

    def _find(self, repository: str, reference: str) -> tuple[str, ManifestRow] | None:
        by_digest = is_digest(reference)

        def read(txn: Txn) -> tuple[str, ManifestRow] | None:
            digest = reference
            if not by_digest:
                tag = txn.get(TAGS, f"{repository}:{reference}")
                if tag is None:
                    return None
                digest = tag.digest
            row = txn.get(MANIFESTS, f"{repository}@{digest}")
            return None if row is None else (digest, row)

        return self._store.read(read)

    async def _borrow(self, repository: str, reference: str) -> tuple[str, ManifestRow] | None:
        """Make an image of that name readable, which was not pushed here. Its tag is not recorded: it may move."""
        separator = "@" if is_digest(reference) else ":"
        name = f"{repository}{separator}{reference}"
        data = await self._packaged(name)
        while data is not None:
            manifest = parse_manifest(data)
            assert isinstance(manifest, Manifest)
            digest, now = digest_of(data), self._now()
            row = _manifest_row(data, manifest.media_type or MANIFEST_TYPES[0], msgspec.json.decode(data), now)
            parts = (manifest.config, *manifest.layers)
            with self._blobs.claim(digest, *(part.digest for part in parts)):
                before, data = data, await self._packaged(name)  # what was evicted meanwhile is fetched, and stays
                if data == before:
                    await self._store.write(partial(_note_borrowed, repository, digest, row, parts))
                    return digest, row
        return None

    async def _packaged(self, name: str) -> bytes | None:
        """The manifest of an image, whose blobs are in the cache; None if there is none. Raises RegistryFailure."""
        try:
            return await self._images.packaged(name)
        except NotFound:
            return None
        except HypemanError as error:
            raise RegistryFailure(Code.UNAVAILABLE, error.message) from None

    async def put_manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> tuple[str, str]:
        """Store a manifest; under a tag it becomes an image. Returns its digest and that of its subject (or "").

        Raises RegistryFailure: MANIFEST_INVALID, DIGEST_INVALID, MANIFEST_BLOB_UNKNOWN, SIZE_INVALID.
        """
        digest = digest_of(data)
        if is_digest(reference) and digest != reference:
            raise RegistryFailure(Code.DIGEST_INVALID, f"the manifest has the digest {digest}, not {reference}")
        document = _decoded(data)
        declared = document.get("mediaType") or media_type
        if media_type and declared != media_type:
            raise RegistryFailure(Code.MANIFEST_INVALID, f"mediaType is {declared}, Content-Type is {media_type}")
        row = _manifest_row(data, declared or MANIFEST_TYPES[0], document, self._now())
        with self._blobs.claim(digest):
            await trio.to_thread.run_sync(self._blobs.add, data, digest)
            await self._put_manifest(repository, reference, data, document, digest, row)
        return digest, row.subject

    async def _put_manifest(
        self, repository: str, reference: str, data: bytes, document: dict[str, Any], digest: str, row: ManifestRow
    ) -> None:
        """Record a manifest whose bytes are here."""
        by_digest = is_digest(reference)

        def write(txn: Txn) -> None:
            for blob in row.blobs:
                if not txn.exists(BLOBS, f"{repository}@{blob}") and not _is_foreign(document, blob):
                    raise RegistryFailure(Code.MANIFEST_BLOB_UNKNOWN, f"{repository} has no blob {blob}")
            for child in row.manifests:
                if not txn.exists(MANIFESTS, f"{repository}@{child}"):
                    raise RegistryFailure(Code.MANIFEST_BLOB_UNKNOWN, f"{repository} has no manifest {child}")
            txn.put(MANIFESTS, f"{repository}@{digest}", row)
            if not by_digest:
                txn.put(TAGS, f"{repository}:{reference}", TagRow(digest, self._now(), adopting=True))

        if by_digest:
            await self._store.write(write)
            return
        async with self._tagging:
            await self._store.write(write)
            try:
                await self._adopt(repository, reference, data, row.media_type, digest)
            except Conflict as error:  # it is being made for others
                log.info("%s:%s was pushed, and becomes an image later: %s", repository, reference, error)

    async def _adopt(self, repository: str, tag: str, data: bytes, media_type: str, digest: str) -> None:
        """Make an image of what was tagged, if it is one for this host. Other artifacts are only stored. A client that
        leaves changes nothing; a server that is killed, or cannot do it now, continues later.

        Raises HypemanError, OSError: it can be tried again.
        """
        name = ""
        try:
            document = parse_manifest(data, media_type)
            if isinstance(document, Index):
                digest = choose_platform(document, host_platform()).digest
                found = await trio.to_thread.run_sync(self._blobs.read, digest, MAX_MANIFEST_BYTES)
                if found is None:
                    raise ManifestError(f"{digest} is not here")
                document = parse_manifest(found)
            if isinstance(document, Manifest) and document.config.media_type in CONFIG_TYPES:
                with trio.CancelScope(shield=True):
                    name = await self._images.adopt(f"{repository}:{tag}", document, digest)
        except (ManifestError, PlatformMissing, InvalidRequest) as error:
            log.info("%s:%s was pushed, and is not an image here: %s", repository, tag, error)
        await self._store.write(lambda txn: _adopted(txn, f"{repository}:{tag}", name))

    async def delete_manifest(self, repository: str, reference: str) -> None:
        """A tag, or a manifest with its tags, and the images that were made of them, unless they are in use.

        Raises RegistryFailure MANIFEST_UNKNOWN.
        """
        by_digest = is_digest(reference)

        def delete(txn: Txn) -> tuple[bool, list[str]]:
            keys = [
                (key, tag)
                for key, tag in txn.scan(TAGS, f"{repository}:")
                if (tag.digest == reference if by_digest else key == f"{repository}:{reference}")
            ]
            for key, _ in keys:
                txn.delete(TAGS, key)
            found = txn.delete(MANIFESTS, f"{repository}@{reference}") if by_digest else bool(keys)
            return found, [tag.image for _, tag in keys if tag.image]

        found, images = await self._store.write(delete)
        if not found:
            raise RegistryFailure(Code.MANIFEST_UNKNOWN, f"{repository} has no manifest {reference}")
        for name in images:
            with suppress(NotFound, InUse):
                await self._images.delete(name)

    async def tags(self, repository: str, *, last: str, limit: int | None) -> tuple[list[str], bool]:
        """Tags after ``last`` in order, at most ``limit``, and whether there are more; also those of images that were
        not pushed here. Raises NAME_UNKNOWN."""
        images = self._images.tags(repository)

        def read(txn: Txn) -> tuple[set[str], bool]:
            known = {key.rpartition(":")[2] for key in txn.keys(TAGS, f"{repository}:")}.union(images)
            return known, bool(known) or any(True for _ in txn.keys(BLOBS, f"{repository}@"))

        tags, exists = self._store.read(read)
        found = list(tags)
        if not exists:
            raise RegistryFailure(Code.NAME_UNKNOWN, f"there is no repository {repository}")
        found = [tag for tag in sorted(found) if tag > last]
        most = min(limit if limit is not None else _MAX_TAGS, _MAX_TAGS)
        return found[:most], len(found) > most

    async def referrers(self, repository: str, digest: str, artifact_type: str) -> bytes:
        """An index of the manifests whose subject is ``digest``."""
        check_digest(digest)
        found = self._store.read(lambda txn: list(txn.scan(MANIFESTS, f"{repository}@")))
        rows = [(key.rpartition("@")[2], row) for key, row in found if row.subject == digest]
        described = [
            {
                "mediaType": row.media_type,
                "digest": name,
                "size": row.size,
                **({"artifactType": row.artifact_type} if row.artifact_type else {}),
                **({"annotations": row.annotations} if row.annotations else {}),
            }
            for name, row in rows
            if not artifact_type or row.artifact_type == artifact_type
        ]
        return msgspec.json.encode({"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": described})


def _unknown_upload() -> RegistryFailure:
    return RegistryFailure(Code.BLOB_UPLOAD_UNKNOWN, "there is no such upload; begin again")


def _note_borrowed(repository: str, digest: str, row: ManifestRow, parts: Sequence[Descriptor], txn: Txn) -> None:
    txn.put(MANIFESTS, f"{repository}@{digest}", row)
    for part in parts:
        txn.put(BLOBS, f"{repository}@{part.digest}", BlobRow(part.size, row.created_at))


def _adopted(txn: Txn, key: str, image: str) -> None:
    row = txn.get(TAGS, key)
    if row is not None:
        txn.put(TAGS, key, msgspec.structs.replace(row, image=image, adopting=False))


def _anywhere(txn: Txn, digest: str) -> BlobRow | None:
    return next((row for key, row in txn.scan(BLOBS) if key.endswith(f"@{digest}")), None)


def _decoded(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_MANIFEST_BYTES:
        raise RegistryFailure(Code.SIZE_INVALID, f"a manifest may have {MAX_MANIFEST_BYTES} bytes at most")
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise RegistryFailure(Code.MANIFEST_INVALID, f"the manifest is not JSON: {error}") from None


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int = 0
    media_type: str = ""


class _Parts(msgspec.Struct, frozen=True, rename="camel"):
    """What a manifest of any kind refers to."""

    config: _Part | None = None
    layers: tuple[_Part, ...] | None = None
    manifests: tuple[_Part, ...] | None = None
    subject: _Part | None = None
    artifact_type: str = ""
    annotations: dict[str, str] | None = None


def _manifest_row(data: bytes, media_type: str, document: dict[str, Any], now: datetime) -> ManifestRow:
    try:
        parts = msgspec.convert(document, _Parts)
    except msgspec.ValidationError as error:
        raise RegistryFailure(Code.MANIFEST_INVALID, f"the manifest is not valid: {error}") from None
    if parts.config is None and parts.manifests is None and parts.layers is None:
        raise RegistryFailure(Code.MANIFEST_INVALID, "the manifest has neither config, layers nor manifests")
    blobs = [part.digest for part in (*((parts.config,) if parts.config else ()), *(parts.layers or ()))]
    children = [part.digest for part in parts.manifests or ()]
    for digest in (*blobs, *children, *((parts.subject.digest,) if parts.subject else ())):
        check_digest(digest)
    return ManifestRow(
        media_type=media_type,
        size=len(data),
        created_at=now,
        blobs=tuple(dict.fromkeys(blobs)),
        manifests=tuple(dict.fromkeys(children)),
        subject=parts.subject.digest if parts.subject else "",
        artifact_type=parts.artifact_type or (parts.config.media_type if parts.config else ""),
        annotations=parts.annotations or {},
    )


def _is_foreign(document: dict[str, Any], digest: str) -> bool:
    """A layer that clients fetch from elsewhere."""
    layers = document.get("layers")
    return isinstance(layers, list) and any(
        isinstance(layer, dict) and layer.get("digest") == digest and layer.get("urls") for layer in layers
    )
