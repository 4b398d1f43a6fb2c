"""The image service used by the rest of the server: create, wait, list, pin, delete.

    create ──► resolve name to digest ──► record (pending) ──► queue ──► pulling ──► converting ──► ready
                                                                └───────────┴────────────┴──────► failed

Invariants:

- A record is ``ready`` only after its disk is published (``disks.py``).
- Each digest is built once, regardless of the number of names and requests; a name that referred to
  another image keeps it until the new one is ready.
- A pinned image is not deleted, neither by a request nor by garbage collection.
- A job interrupted by a restart is restarted, unless it used a login supplied with the request.
- An image that was pushed or imported and failed because this host lacked something is built again later.
- Names and tags are changed in the same transaction as the record they refer to.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman.config import ImagesConfig
from hypeman.errors import (
    Conflict,
    HypemanError,
    InternalError,
    InUse,
    InvalidRequest,
    InvalidState,
    NotFound,
    StoreError,
)
from hypeman.ids import check_tags, tags_match
from hypeman.images import reference
from hypeman.images.archive import Bounds, Imported, import_file, import_stream
from hypeman.images.auth import Login, login_of
from hypeman.images.blobs import Blobs
from hypeman.images.convert import fill_volume
from hypeman.images.disks import Disks, Stored
from hypeman.images.making import Job, MakeFailed, Maker
from hypeman.images.manifest import Manifest, ManifestError, PlatformMissing, choose_platform, parse_manifest
from hypeman.images.outcomes import (
    fail_image,
    find_image,
    is_retried,
    make_ready,
    named_images,
    note_change,
    settle_image,
)
from hypeman.images.records import (
    HOLDERS,
    IMAGES,
    NAMES,
    PINS,
    HolderRow,
    ImageRow,
    NameRow,
    PinRow,
    is_pinned,
    named_digests,
    view,
)
from hypeman.images.reference import Platform, Reference, parse_platform, parse_reference
from hypeman.images.registry import RegistryClient, RegistryTimeout
from hypeman.images.types import CreateImageRequest, Image, ImageConfig, ImageStatus, Progress, ReadyImage
from hypeman.paths import Paths
from hypeman.store.store import Store
from hypeman.store.tables import Txn
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)

_RESOLVE_TIMEOUT = 20.0
"""Timeout in seconds for resolving a name at a registry while the client waits."""
_JOBS_AT_ONCE = 4
"""Images in progress; shared resources are bounded in ``making.Maker``."""
_MAX_NESTING = 3
"""Maximum depth of nested indexes."""
_COLLECT_INTERVAL = 600.0
_MAX_RETRY_INTERVAL = 24 * 3600.0
_RECORD_SECONDS = 5.0


class _Wait:
    """An instance that waits for an image. Counts from before its pull begins, when no digest is known yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.digest: str | None = None


class Images:
    """One per server. ``run``, started in a nursery, does the work."""

    def __init__(
        self,
        *,
        store: Store,
        paths: Paths,
        config: ImagesConfig,
        conversions: int = 1,
        registry: RegistryClient | None = None,
        kept: Callable[[Txn], set[str]] = lambda txn: set(),
        on_delete: Callable[[Txn, str], None] = lambda txn, name: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``conversions`` is ``limits.max_concurrent_builds``. ``kept``: digests of blobs that others need;
        ``on_delete`` is called with the name of a deleted image, in the same transaction."""
        self._store = store
        self._config = config
        self._now = now
        self._kept = kept
        self._on_delete = on_delete
        self._registry = self.client = registry or RegistryClient(config)
        self._blobs = self.blobs = Blobs(paths.blobs)
        self._disks = Disks(paths)
        self._maker = Maker(
            config=config, registry=self._registry, blobs=self._blobs, disks=self._disks, conversions=conversions
        )
        self._cache_size = config.blob_cache_size
        self._max_bytes = config.max_image_size
        self._jobs: dict[str, Job] = {}
        self._waits: set[_Wait] = set()
        self._queue: deque[Job] = deque()
        self._queued = trio.Semaphore(0)
        self._changing_disks = trio.Lock()
        """Held while disks are published or removed together with their records."""
        self._made = self._failed = 0
        self._retries: dict[str, tuple[float, float]] = {}
        """By digest: the time from which on, and the interval after which it is tried again."""

    # Service lifecycle

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Clean up, resume interrupted jobs, then work until cancelled."""
        await trio.to_thread.run_sync(self._disks.prepare)
        await trio.to_thread.run_sync(self._blobs.prepare)
        await self._resume()
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(_JOBS_AT_ONCE):
                    nursery.start_soon(self._work)
                task_status.started()
                while True:
                    await self._tidy(trio.current_time())
                    await trio.sleep(_COLLECT_INTERVAL)
        finally:
            with trio.CancelScope(shield=True):
                await self._registry.aclose()

    async def _resume(self) -> None:
        """Reconcile records and disks, and queue interrupted jobs."""
        rows = self._store.read(lambda txn: [row for _, row in txn.scan(IMAGES)])
        found = await trio.to_thread.run_sync(lambda: {row.digest: self._disks.read(row.digest) for row in rows})

        def settle(txn: Txn) -> None:
            for row in rows:
                stored = found[row.digest]
                if row.status is ImageStatus.READY and stored is None:
                    fail_image(txn, row, "its disk is gone; pull it again")
                elif not row.status.is_final and stored is not None:
                    make_ready(txn, row, stored)
                elif not row.status.is_final and row.borrowed:
                    fail_image(txn, row, "interrupted by a restart, and its login was not kept; ask for it again")

        await self._store.write(settle)
        rows = self._store.read(lambda txn: [row for _, row in txn.scan(IMAGES)])
        for row in sorted(rows, key=lambda row: row.created_at):
            if not row.status.is_final:
                source = parse_reference(f"{row.source}@{row.digest}") if row.source else None
                platform = parse_platform(row.platform) if row.platform else None
                self._enqueue(Job(row.digest, source, platform=platform))

    async def collect(self) -> None:
        """Remove unreferenced images, their disks, and blobs above the size limit."""
        async with self._changing_disks:
            keep = await self._store.write(self._collect_records)
            gone = await trio.to_thread.run_sync(self._disks.collect, keep)
        for digest in gone:
            log.info("removed the disk of image %s, which nothing uses", digest)
        self._blobs.begin_trim()
        in_use = self._store.read(self._kept).union(*(self._maker.in_use(job) for job in self._jobs.values()))
        await trio.to_thread.run_sync(self._blobs.trim, self._cache_size, in_use)
        if not self._jobs:  # a job's layers are known only once it runs
            await self._maker.collect_downloads()

    async def _tidy(self, now: float) -> None:
        """Collect and retry. What fails is left to the next time: a full disk takes no changes of the store."""
        for tidy in (self.collect, partial(self._retry, now)):
            try:
                await tidy()
            except (HypemanError, OSError) as error:
                log.warning("images were not tidied up, which is tried again: %s", error)

    async def _retry(self, now: float) -> None:
        """Build images again that failed because this host lacked something, at growing intervals, if their bytes are
        here. The client that pushed one does not repeat it: its push succeeded."""
        rows = self._store.read(lambda txn: [row for _, row in txn.scan(IMAGES) if is_retried(row)])
        before, self._retries = self._retries, {}
        for row in rows:
            at, interval = before.get(row.digest, (now, _COLLECT_INTERVAL))
            if at <= now:
                await self._make_again(row.digest)
                at, interval = now + interval, min(2 * interval, _MAX_RETRY_INTERVAL)
            self._retries[row.digest] = at, interval

    async def _make_again(self, digest: str) -> None:
        """Queue an image whose bytes are here, and which failed."""

        def write(txn: Txn) -> bool:
            row = txn.get(IMAGES, digest)
            if row is None or not is_retried(row):
                return False
            txn.put(IMAGES, digest, msgspec.structs.replace(row, status=ImageStatus.PENDING, error="", transient=False))
            return True

        if await self._store.write(write):
            self._enqueue(Job(digest, None))

    def _collect_records(self, txn: Txn) -> set[str]:
        """Drop unreferenced records; returns the digests of the remaining ones."""
        named = named_digests(txn)
        keep = set()
        for digest, row in list(txn.scan(IMAGES)):
            if digest in named or is_pinned(txn, digest) or not row.status.is_final:
                keep.add(digest)
            else:
                txn.delete(IMAGES, digest)
        return keep

    # Client requests

    async def create(self, request: CreateImageRequest) -> Image:
        """Request an image; returns as soon as its digest is known. Idempotent.

        Raises InvalidRequest (``invalid_name``, ``invalid_platform``), NotFound (``not_found``,
        ``platform_not_available``), Conflict (``credential_conflict``), RateLimited.
        """
        image = await self._create(request, asked_for=True)
        if (job := self._jobs.get(image.digest)) is not None:
            job.asked_for = True
        return image

    async def _create(self, request: CreateImageRequest, *, asked_for: bool) -> Image:
        ref = parse_reference(request.name)
        platform = parse_platform(request.platform) if request.platform else reference.host_platform()
        tags = None if request.tags is None else check_tags(request.tags)
        login = login_of(request.credentials)
        known = self._known(ref)
        if ref.digest and known is not None and known.status is not ImageStatus.FAILED:
            job, row = self._jobs.get(known.digest), known  # a digest never changes its meaning
        else:
            job, row = await self._resolve(ref, platform, login)
            job.asked_for = asked_for
        return await self._record(str(ref), row, job, tags)

    def platform(self, text: str | None) -> str:
        """``text`` as a supported platform; None is this host's."""
        return str(parse_platform(text) if text else reference.host_platform())

    async def import_archive(
        self,
        chunks: AsyncIterable[bytes],
        *,
        name: str = "",
        tags: Mapping[str, str] | None = None,
        default_name: str = "",
    ) -> Image:
        """Import an OCI or ``docker save`` archive from a stream.

        ``name`` is given to the image; empty: the names in the archive, or else ``default_name``. An archive may
        have several images: ``name`` then selects one; without it all are imported, and the first is returned.
        Returns when the archive has been received.
        Raises InvalidRequest (bad name, bad archive), InternalError (disk).
        """
        wanted = parse_reference(name) if name else None
        checked = check_tags(tags or {})
        found = await import_stream(chunks, self._blobs, self._import_bounds(), self._maker.turns)
        return await self._imported(found, wanted, default_name, checked)

    async def import_path(
        self, path: str, *, name: str = "", tags: Mapping[str, str] | None = None, default_name: str = ""
    ) -> Image:
        """Like ``import_archive``, from an archive or an OCI layout on this host.

        The path must be below one of ``images.import_paths`` after links are followed, else InvalidRequest.
        """
        wanted = parse_reference(name) if name else None
        checked = check_tags(tags or {})
        real, *allowed = await trio.to_thread.run_sync(
            lambda: [Path(one).resolve() for one in (path, *self._config.import_paths)]
        )
        if not any(real.is_relative_to(directory) for directory in allowed):
            raise InvalidRequest(f"{path} is not below one of images.import_paths, which the configuration allows")
        found = await import_file(real, self._blobs, self._import_bounds(), self._maker.turns)
        return await self._imported(found, wanted, default_name, checked)

    def _import_bounds(self) -> Bounds:
        return Bounds(self._max_bytes, self._config.max_image_entries, reference.host_platform())

    async def fill_volume(self, archive: int, disk: int, *, max_bytes: int) -> None:
        """``convert.fill_volume``, taking turns with image builds."""
        await fill_volume(self._maker.turns, archive, disk, max_bytes=max_bytes)

    async def list(self, *, tags: Mapping[str, str] | None = None) -> list[Image]:
        """All names with their images, newest first; with ``tags`` only those that have all of these pairs."""

        def read(txn: Txn) -> list[tuple[str, NameRow, ImageRow]]:
            found = []
            for name, naming in txn.scan(NAMES):
                row = txn.get(IMAGES, naming.digest)
                if row is not None and tags_match(naming.tags, tags or {}):
                    found.append((name, naming, row))
            return found

        rows = sorted(self._store.read(read), key=lambda item: item[1].created_at, reverse=True)
        return [self._view(*item) for item in rows]

    async def get(self, name: str) -> Image:
        """The image of that name. Raises NotFound, InvalidRequest ``invalid_name``."""
        return self._view(*self._look_up(parse_reference(name)))

    async def progress(self, name: str) -> Progress:
        """Progress of a pull per layer. Raises as ``get`` does."""
        _, naming, row = self._look_up(parse_reference(name))
        job = self._jobs.get(naming.wanted or row.digest)
        return job.progress if job is not None else Progress(row.status)

    async def wait_final(self, name: str) -> Image:
        """Wait until a pull has succeeded or failed, including one that will replace the name's image."""
        while True:
            _, naming, row = self._look_up(parse_reference(name))
            digest = naming.wanted or row.digest
            wanted = self._store.read(lambda txn: txn.get(IMAGES, digest))  # noqa: B023  # called here
            if wanted is None or wanted.status.is_final:
                return await self.get(name)
            await self._wait_for(digest)

    async def tag(self, name: str, target: str) -> Image:
        """Make the name ``target`` refer to the image ``name``, without a pull; returns the image under ``target``.

        The image that ``target`` referred to loses that name. Raises NotFound, InvalidRequest ``invalid_name``.
        """
        ref, wanted = parse_reference(name), parse_reference(target)
        if wanted.digest:
            raise InvalidRequest("the target is a digest; an image is given a tag", code="invalid_name")
        now = self._now()

        def write(txn: Txn) -> tuple[NameRow, ImageRow]:
            _, source, row = find_image(txn, ref)
            before = txn.get(NAMES, str(wanted))
            tags = before.tags if before is not None else source.tags
            naming = NameRow(row.digest, now, tags, wanted=source.wanted)
            txn.put(NAMES, str(wanted), naming)
            note_change(txn, str(wanted), naming, row, "tagged")
            return naming, row

        naming, row = await self._store.write(write)
        await self.collect()
        return self._view(str(wanted), naming, row)

    async def delete(self, name: str) -> None:
        """Delete the name, and with the last one the image. Raises NotFound, InUse, InvalidRequest."""
        ref = parse_reference(name)

        def remove(txn: Txn) -> str:
            key, naming, row = find_image(txn, ref)
            others = [
                other for other, found in txn.scan(NAMES) if other != key and row.digest in (found.digest, found.wanted)
            ]
            if not others and is_pinned(txn, row.digest):
                raise InUse(f"image {key} is in use by an instance or a snapshot")
            txn.delete(NAMES, key)
            self._on_delete(txn, key)
            note_change(txn, key, naming, row, "deleted")
            if others:
                return ""
            txn.delete(IMAGES, row.digest)
            return row.digest

        async with self._changing_disks:
            digest = await self._store.write(remove)
            job = self._jobs.pop(digest, None)
            if job is not None:
                job.given_up = True
                job.scope.cancel()
                with suppress(ValueError):
                    self._queue.remove(job)
                job.done.set()
            if digest:
                await trio.to_thread.run_sync(self._disks.remove, digest)

    # Used by other packages

    async def adopt(self, name: str, manifest: Manifest, digest: str) -> str:
        """Make an image of blobs that are in the cache, among them the manifest; returns its normalised name."""
        image = await self._record_import(parse_reference(name), Imported(manifest, digest, ()), None)
        return image.name

    def tags(self, repository: str) -> Sequence[str]:
        """Tags of the ready images of a repository. Raises InvalidRequest ``invalid_name``."""
        ref = parse_reference(repository)
        prefix = f"{ref.registry}/{ref.repository}:"

        def read(txn: Txn) -> list[str]:
            named = [(key.removeprefix(prefix), row) for key, row in txn.scan(NAMES, prefix)]
            rows = {row.digest: txn.get(IMAGES, row.digest) for _, row in named}
            return [tag for tag, row in named if (found := rows[row.digest]) and found.status is ImageStatus.READY]

        return self._store.read(read)

    async def packaged(self, name: str) -> bytes:
        """The manifest of a ready image; its config and layers are in the cache afterwards, fetched again if needed.

        Raises NotFound, InvalidRequest, RegistryError.
        """
        _, _, row = self._look_up(parse_reference(name))
        if row.status is not ImageStatus.READY:
            raise NotFound(f"image {name} is not ready")
        source = parse_reference(f"{row.source}@{row.digest}") if row.source else None
        return await self._maker.package(row.digest, source)

    async def wait_ready(self, name: str, platform: str | None = None) -> ReadyImage:
        """The converted image of that name and platform, pulled first if it is missing or has failed.

        Raises as ``create`` does, and InternalError if it cannot be built.
        """
        ref = parse_reference(name)
        wanted = self.platform(platform)
        wait = _Wait(str(ref))
        self._waits.add(wait)
        try:
            row = self._known(ref)
            if row is not None and is_retried(row):
                await self._make_again(row.digest)
                row = self._known(ref)
            if row is None or row.status is ImageStatus.FAILED or (row.platform and row.platform != wanted):
                image = await self._create(CreateImageRequest(str(ref), platform=wanted), asked_for=False)
                digest = wait.digest = image.digest
            else:
                digest = wait.digest = row.digest
            await self._wait_for(digest)
        finally:
            self._waits.remove(wait)
        row = self._store.read(lambda txn: txn.get(IMAGES, digest))
        if row is None:
            raise NotFound(f"image {ref} was deleted meanwhile")
        if row.status is not ImageStatus.READY:
            raise InternalError(f"image {ref} cannot be used: {row.error or row.status}")
        return self._ready_image(row)

    async def abandon(self, name: str) -> None:
        """Stop the pull that ``wait_ready`` began of this name, and forget the name, unless others want it, too."""
        ref = parse_reference(name)
        try:
            _, naming, row = self._look_up(ref)
        except NotFound:
            return
        job = self._jobs.get(row.digest)
        waited_for = any(str(ref) == wait.name or row.digest == wait.digest for wait in self._waits)
        if job is not None and not naming.wanted and not job.asked_for and not waited_for:
            with suppress(NotFound, InUse):
                await self.delete(str(ref))

    def find_ready(self, name: str, platform: str | None = None) -> ReadyImage | None:
        """The image of that name and platform, if it need not be pulled. Raises InvalidRequest."""
        ref, wanted = parse_reference(name), self.platform(platform)
        row = self._known(ref)
        if row is None or row.status is not ImageStatus.READY or (row.platform and row.platform != wanted):
            return None
        return self._ready_image(row)

    def _ready_image(self, row: ImageRow) -> ReadyImage:
        disk = self._disks.disk(row.digest, row.fs)
        return ReadyImage(row.digest, disk, row.fs, row.config, row.size, row.platform)

    def disk(self, digest: str) -> Path:
        """Root disk of a ready image. Raises NotFound."""
        return self._disks.disk(digest, self._ready(digest).fs)

    def root_fs(self, digest: str) -> str:
        """``erofs`` or ``ext4``. Raises NotFound."""
        return self._ready(digest).fs

    def config(self, digest: str) -> ImageConfig:
        """The image's run configuration. Raises NotFound."""
        return self._ready(digest).config

    def pin(self, txn: Txn, digest: str, holder: str) -> None:
        """Pin a ready image for ``holder`` (an instance, a snapshot), which has none or the same pinned.

        Part of the caller's transaction. Raises InvalidState if the image was deleted meanwhile.
        """
        row = txn.get(IMAGES, digest)
        if row is None or row.status is not ImageStatus.READY:
            raise InvalidState(f"image {digest} is no longer there; ask again", retryable=True)
        held = txn.get(HOLDERS, holder)
        if held is not None and held.digest != digest:
            txn.delete(PINS, f"{held.digest}/{holder}")
        txn.put(PINS, f"{digest}/{holder}", PinRow())
        txn.put(HOLDERS, holder, HolderRow(digest))

    def unpin(self, txn: Txn, holder: str) -> None:
        """Unpin the image that ``holder`` pinned, if any. An image without a name is removed by the next
        collection."""
        held = txn.get(HOLDERS, holder)
        if held is not None:
            txn.delete(PINS, f"{held.digest}/{holder}")
            txn.delete(HOLDERS, holder)

    def by_status(self) -> dict[tuple[str, ...], float]:
        """For metrics."""
        statuses = self._store.read(lambda txn: [row.status.value for _, row in txn.scan(IMAGES)])
        return {(status,): float(count) for status, count in Counter(statuses).items()}

    def statistics(self) -> dict[str, int]:
        """For metrics: bytes of disks, jobs running and queued, images built and failed since start."""
        rows = self._store.read(lambda txn: [row for _, row in txn.scan(IMAGES)])
        ready = [row.size for row in rows if row.status is ImageStatus.READY]
        return {
            "images": len(ready),
            "disk_bytes": sum(ready),
            "cache_bytes": self._blobs.size(),
            "queued": len(self._queue),
            "active": len(self._jobs) - len(self._queue),
            "made": self._made,
            "failed": self._failed,
        }

    # Resolving names

    async def _resolve(self, ref: Reference, platform: Platform, login: Login) -> tuple[Job, ImageRow]:
        """Resolve ``ref`` at the registry; returns a job for it and its initial record.

        An image that exists but is unusable is returned as a failed record.
        """
        digest = ref.digest
        error = ""
        manifest = None
        try:
            with trio.fail_after(_RESOLVE_TIMEOUT):
                current = ref
                for _ in range(_MAX_NESTING):
                    fetched = await self._registry.manifest(current, login, wait=False)
                    digest = fetched.digest
                    document = parse_manifest(fetched.data, fetched.media_type)
                    if isinstance(document, Manifest):
                        manifest = document
                        break
                    chosen = choose_platform(document, platform)
                    current = Reference(ref.registry, ref.repository, digest=chosen.digest)
                else:
                    raise ManifestError(f"the index points to indexes more than {_MAX_NESTING} levels deep")
        except trio.TooSlowError:
            raise RegistryTimeout(f"registry {ref.registry} did not answer in {_RESOLVE_TIMEOUT:.0f} seconds") from None
        except PlatformMissing as missing:
            raise NotFound(str(missing), code="platform_not_available") from None
        except ManifestError as bad:
            if not digest:
                raise InternalError(f"registry {ref.registry} sends no image: {bad}") from None
            error = str(bad)
        source = Reference(ref.registry, ref.repository, digest=digest)
        job = Job(digest, source, login=login, platform=platform)
        job.manifest = manifest
        row = ImageRow(
            digest=digest, status=ImageStatus.FAILED if error else ImageStatus.PENDING, created_at=self._now(),
            source=f"{ref.registry}/{ref.repository}", platform=str(platform), borrowed=bool(login), error=error[:2000],
        )  # fmt: skip
        return job, row

    async def _imported(
        self, found: Sequence[Imported], wanted: Reference | None, default: str, tags: Mapping[str, str]
    ) -> Image:
        """Record the images of an archive under their names; returns the first."""
        if wanted is not None and wanted.digest:
            raise InvalidRequest("an imported image is given a tag, not a digest", code="invalid_name")
        named = named_images(found, wanted, default)
        recorded = [await self._record_import(name, image, tags) for name, image in named]
        return recorded[0]

    async def _record_import(self, name: Reference, image: Imported, tags: Mapping[str, str] | None) -> Image:
        job = Job(image.digest, None)
        job.manifest = image.manifest
        row = ImageRow(digest=image.digest, status=ImageStatus.PENDING, created_at=self._now(), source="")
        return await self._record(str(name), row, job, None if tags is None else dict(tags))

    async def _record(self, name: str, new: ImageRow, job: Job | None, tags: dict[str, str] | None) -> Image:
        """Record that ``name`` is to refer to ``new``, and queue ``job`` unless it is running or done."""
        running = self._jobs.get(new.digest)
        if running is not None and job is not None and running is not job and running.login != job.login:
            raise Conflict(f"image {name} is being pulled with another login", code="credential_conflict")
        now = self._now()

        def write(txn: Txn) -> tuple[NameRow, ImageRow, bool]:
            row = txn.get(IMAGES, new.digest)
            begin = row is None or row.status is ImageStatus.FAILED
            if begin:
                # A failed record is retried from the beginning, a new failure is reported as is.
                row = new if new.status is not ImageStatus.READY else row
                assert row is not None
                txn.put(IMAGES, new.digest, row)
            assert row is not None
            naming = known = txn.get(NAMES, name)
            if naming is None:
                naming = NameRow(row.digest, now, tags or {})
            else:
                before = txn.get(IMAGES, naming.digest)
                keeps = before is not None and before.status is ImageStatus.READY and before.digest != row.digest
                if keeps and row.status is not ImageStatus.READY:
                    wanted = "" if row.status is ImageStatus.FAILED else row.digest
                    naming = msgspec.structs.replace(naming, wanted=wanted)
                else:
                    naming = msgspec.structs.replace(naming, digest=row.digest, wanted="")
                if tags is not None:
                    naming = msgspec.structs.replace(naming, tags=tags)
            txn.put(NAMES, name, naming)
            if known is None:
                note_change(txn, name, naming, row, "created")
            elif begin or known.digest != naming.digest:
                note_change(txn, name, naming, row, "updated")
            return naming, row, begin and row.status is ImageStatus.PENDING

        naming, row, begin = await self._store.write(write)
        if begin and job is not None:
            self._enqueue(job)
        return self._view(name, naming, row)

    # Working

    def _enqueue(self, job: Job) -> None:
        running = self._jobs.get(job.digest)
        if running is not None and not running.settled:
            return
        self._jobs[job.digest] = job
        self._queue.append(job)
        self._queued.release()

    async def _work(self) -> None:
        while True:
            await self._queued.acquire()
            if self._queue:  # a deleted job leaves its permit behind
                await self._do(self._queue.popleft())

    async def _do(self, job: Job) -> None:
        """Build one image and record the outcome. Only cancellation from outside propagates."""
        job.status = ImageStatus.PULLING
        stored: Stored | None = None
        error, transient = "", False
        with job.scope:
            try:
                with metrics.image_build_seconds.time():
                    stored = await self._maker.make(job)
            except MakeFailed as failure:
                error, transient = str(failure), failure.transient
            except Exception:
                log.exception("making the disk of image %s failed", job.digest)
                error = "internal error; the cause is in the server's log"
        if job.given_up:
            return
        await self._record_end(job, lambda txn: settle_image(txn, job.digest, stored, error, transient))
        if stored is not None:
            self._made += 1
            metrics.image_pulls.labels("success").inc()
            log.info("image %s is ready: %d bytes", job.digest, stored.size)
        else:
            self._failed += 1
            metrics.image_pulls.labels("error").inc()
            log.warning("image %s failed: %s", job.digest, error)
        if self._jobs.get(job.digest) is job:
            del self._jobs[job.digest]
        job.done.set()
        self._registry.forget(job.login)
        with suppress(HypemanError, OSError):
            await self.collect()

    async def _record_end(self, job: Job, settle: Callable[[Txn], None]) -> None:
        """Record the outcome of ``job``, as soon as the store takes changes: on a full disk it does not."""
        while True:
            try:
                async with self._changing_disks:
                    job.settled = True
                    with trio.CancelScope(shield=True):
                        await self._store.write(settle)
                return
            except StoreError as refused:
                job.settled = False
                log.warning("the outcome of image %s was not recorded, which is tried again: %s", job.digest, refused)
            await trio.sleep(_RECORD_SECONDS)

    async def _wait_for(self, digest: str) -> None:
        """Wait until the image with that digest is ready, failed or deleted."""
        while True:
            row = self._store.read(lambda txn: txn.get(IMAGES, digest))
            if row is None or row.status.is_final:
                await trio.lowlevel.checkpoint()
                return
            job = self._jobs.get(digest)
            if job is not None:
                await job.done.wait()
            else:  # its record was just written by a task that will queue it when it runs next
                await trio.sleep(0.005)

    # Reading

    def _ready(self, digest: str) -> ImageRow:
        row = self._store.read(lambda txn: txn.get(IMAGES, digest))
        if row is None or row.status is not ImageStatus.READY:
            raise NotFound(f"there is no ready image {digest}")
        return row

    def _known(self, ref: Reference) -> ImageRow | None:
        try:
            _, _, row = self._look_up(ref)
        except NotFound:
            return None
        return row

    def _look_up(self, ref: Reference) -> tuple[str, NameRow, ImageRow]:
        return self._store.read(lambda txn: find_image(txn, ref))

    def _view(self, name: str, naming: NameRow, row: ImageRow) -> Image:
        job = self._jobs.get(row.digest)
        if job is not None and not row.status.is_final:
            row = msgspec.structs.replace(row, status=job.status)
        position = self._queue.index(job) + 1 if job is not None and job in self._queue else None
        return view(name, naming, row, position)
