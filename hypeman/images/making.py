"""Builds the root disk of one image: layers are fetched concurrently while earlier ones are applied.

    manifest, config ──► layer 1 ─┐ fetched at once, at most    ┌─► worker: applied in order,
                         layer 2 ─┤ max_concurrent_downloads    │   at most max_concurrent_builds
                         layer 3 ─┘ of all images together  ────┘   of all images at work
                                                            then: verified, published

Every failure ends in MakeFailed with a message for the user; the incomplete root disk is removed,
and so are the blobs of an image that is itself at fault.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import trio

from hypeman.config import ImagesConfig
from hypeman.errors import HypemanError, NotFound
from hypeman.host.processes import Processes
from hypeman.images import disks, worker
from hypeman.images.auth import NOBODY, Login
from hypeman.images.blobs import Blobs
from hypeman.images.convert import Conversion, ConversionFailed, running_worker
from hypeman.images.disks import Disks, Stored
from hypeman.images.failures import first_failure
from hypeman.images.manifest import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Config,
    Descriptor,
    Manifest,
    ManifestError,
    parse_config,
    parse_manifest,
    platform_of,
)
from hypeman.images.reference import Platform, Reference
from hypeman.images.registry import RegistryClient
from hypeman.images.types import ImageConfig, ImageStatus, LayerProgress, Progress

_SPARE_BYTES = 64 << 20
"""Free space that must remain on the host when a pull begins."""


class MakeFailed(Exception):
    """No disk was built; the message is for the user."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        """``transient``: because this host lacked something, such as disk space."""
        super().__init__(message)
        self.transient = transient


class _Blob:
    """A layer's blob being fetched."""

    def __init__(self, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        self.here = trio.Event()
        self.fd = -1
        self.done = 0


class Job:
    """The build of one image, from the request until its disk exists."""

    def __init__(
        self, digest: str, source: Reference | None, *, login: Login = NOBODY, platform: Platform | None = None
    ) -> None:
        """``source`` names the registry and repository; None if all blobs are in the cache already.
        An image for a different ``platform`` is rejected."""
        self.digest = digest
        self.source = source
        self.login = login
        self.platform = platform
        self.manifest: Manifest | None = None
        """None if not known yet: it is fetched."""
        self.status = ImageStatus.PENDING
        self.blobs: dict[str, _Blob] = {}
        self.conversion: Conversion | None = None
        self.scope = trio.CancelScope()
        self.given_up = False
        """No longer wanted."""
        self.asked_for = True
        """Requested for itself, not only by creates of instances."""
        self.broken = False
        """It will fail: its downloads are not kept."""
        self.settled = False
        """Its outcome is being recorded: what asks for the image after that needs another job."""
        self.done = trio.Event()

    @property
    def progress(self) -> Progress:
        layers = tuple(LayerProgress(b.descriptor.digest, b.descriptor.size, b.done) for b in self.blobs.values())
        return Progress(self.status, layers, self.conversion.bytes if self.conversion is not None else 0)


class Maker:
    """Shared by all jobs: enforces their common limits."""

    def __init__(
        self, *, config: ImagesConfig, registry: RegistryClient, blobs: Blobs, disks: Disks, conversions: int
    ) -> None:
        self._config = config
        self._registry = registry
        self._blobs = blobs
        self._disks = disks
        self._downloads = trio.CapacityLimiter(config.max_concurrent_downloads)
        self.turns = trio.CapacityLimiter(conversions)
        """Workers that may run concurrently."""
        self._max_bytes = config.max_image_size
        self._processes = Processes()
        self._fetching: dict[str, trio.Lock] = {}

    async def make(self, job: Job) -> Stored:
        """Build and publish the disk of ``job``. Raises MakeFailed."""
        fetched: list[str] = []
        try:
            try:
                return await self._make(job, fetched)
            except BaseExceptionGroup as group:
                raise first_failure(group) from None
        except ConversionFailed as error:
            await trio.to_thread.run_sync(self._forget, fetched)
            if error.blame_image:  # or our copy of one of its layers is, and the next try must fetch it
                await trio.to_thread.run_sync(self._blobs.remove_damaged, list(job.blobs))
            raise MakeFailed(error.message, transient=not error.blame_image) from None
        except ManifestError as error:
            await trio.to_thread.run_sync(self._forget, fetched)
            raise MakeFailed(str(error)) from None
        except HypemanError as error:
            raise MakeFailed(error.message) from None
        except OSError as error:
            await trio.to_thread.run_sync(self._forget, fetched)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            text = "the disk is full" if full else f"{error.filename or 'disk'}: {error.strerror}"
            raise MakeFailed(text, transient=True) from None
        finally:
            for blob in job.blobs.values():
                if blob.fd >= 0:
                    os.close(blob.fd)
                    blob.fd = -1

    def in_use(self, job: Job) -> set[str]:
        """Digests of blobs that must stay cached while ``job`` is running."""
        config = {job.manifest.config.digest} if job.manifest is not None else set()
        return set(job.blobs) | config | {job.digest}

    async def _make(self, job: Job, fetched: list[str]) -> Stored:
        manifest, config = await self._describe(job)
        platform = platform_of(config)
        if job.platform is not None and not _runs_on(platform, job.platform):
            raise ManifestError(f"the image is made for {platform}, not for {job.platform}")
        job.blobs = {layer.digest: _Blob(layer) for layer in manifest.layers}
        compressed = sum(blob.descriptor.size for blob in job.blobs.values())
        if compressed > self._max_bytes:
            raise ManifestError(f"the image has {compressed} bytes of layers; at most {self._max_bytes} are allowed")
        made = await trio.to_thread.run_sync(self._begin, compressed)
        try:
            async with trio.open_nursery() as nursery:
                for blob in job.blobs.values():
                    nursery.start_soon(self._obtain, job, blob, fetched)
                nursery.start_soon(self._watch_downloads, job)
                try:
                    done = await self._convert(job, manifest, config, made)
                except Exception:
                    job.broken = True
                    raise
            disk = made / "root.erofs"
            await trio.to_thread.run_sync(disks.verify, disk, done.size)
            if self._config.root_fs == "ext4":
                disk = await disks.make_ext4(
                    self._processes, made, content_bytes=done.content_bytes, entries=done.entries
                )
            stored = Stored(self._config.root_fs, disk.stat().st_size, str(platform), _image_config(config))
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._disks.publish, made, job.digest, stored)
        except ValueError as error:
            raise MakeFailed(str(error)) from None
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._disks.abandon, made)
        return stored

    def _begin(self, needed: int) -> Path:
        made = self._disks.begin()
        status = os.statvfs(made)
        free = status.f_bavail * status.f_frsize
        if free < needed + _SPARE_BYTES:
            self._disks.abandon(made)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return made

    async def _describe(self, job: Job) -> tuple[Manifest, Config]:
        """Manifest and config, from the registry or, for an imported image, from the cache."""
        if job.manifest is None:
            if job.source is not None:
                ref = Reference(job.source.registry, job.source.repository, digest=job.digest)
                data = (await self._registry.manifest(ref, job.login)).data
            else:
                data = await self._cached(job.digest, MAX_MANIFEST_BYTES)
            document = parse_manifest(data)
            if not isinstance(document, Manifest):
                raise ManifestError("the digest is that of an index, not of an image")
            job.manifest = document
        wanted = job.manifest.config
        if job.source is not None:
            data = await self._registry.small_blob(job.source, wanted, job.login, limit=MAX_CONFIG_BYTES)
        else:
            data = await self._cached(wanted.digest, MAX_CONFIG_BYTES)
        return job.manifest, parse_config(data, job.manifest)

    async def _cached(self, digest: str, limit: int) -> bytes:
        data = await trio.to_thread.run_sync(self._blobs.read, digest, limit)
        if data is None:
            raise MakeFailed("what was imported is no longer there; import it again")
        return data

    async def package(self, digest: str, source: Reference | None) -> bytes:
        """The manifest of an image that exists; its config and layers are in the cache afterwards.

        Raises NotFound if they are not and there is no ``source``, and as ``RegistryClient.blob`` does.
        """
        data = await trio.to_thread.run_sync(self._blobs.read, digest, MAX_MANIFEST_BYTES)
        if data is None:
            if source is None:
                raise NotFound("the layers of the image are no longer here; import it again")
            data = (await self._registry.manifest(source)).data
            await trio.to_thread.run_sync(self._blobs.add, data, digest)
        manifest = parse_manifest(data)
        if not isinstance(manifest, Manifest):
            raise ManifestError("the digest is that of an index, not of an image")
        for part in (manifest.config, *manifest.layers):
            await self._refetch(part, source)
        return data

    async def _refetch(self, part: Descriptor, source: Reference | None) -> None:
        async with self._alone_with(part.digest):
            found = await trio.to_thread.run_sync(self._blobs.open, part.digest, part.size)
            if found is not None:
                os.close(found)
                return
            if source is None:
                raise NotFound("the layers of the image are no longer here; import it again")
            async with self._downloads:
                fd, partial = await trio.to_thread.run_sync(self._blobs.begin, part.digest)
                try:
                    await self._registry.blob(source, part, fd, NOBODY, lambda done: None)
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._blobs.publish, fd, partial, part.digest)
                finally:
                    os.close(fd)

    async def collect_downloads(self) -> None:
        """Remove partial downloads that no job will resume."""
        for digest in await trio.to_thread.run_sync(self._blobs.downloads):
            if digest in self._fetching:
                continue
            async with self._alone_with(digest):
                await trio.to_thread.run_sync(self._blobs.abandon_download, digest)

    @contextlib.asynccontextmanager
    async def _alone_with(self, digest: str) -> AsyncIterator[None]:
        """Serialises fetches per digest, so that images sharing a layer fetch it once."""
        lock = self._fetching.setdefault(digest, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._fetching.get(digest) is lock:
                del self._fetching[digest]

    async def _obtain(self, job: Job, blob: _Blob, fetched: list[str]) -> None:
        """Get one layer's blob from the cache or the registry."""
        digest, size = blob.descriptor.digest, blob.descriptor.size
        async with self._alone_with(digest):
            found = await trio.to_thread.run_sync(self._blobs.open, digest, size)
            if found is not None:
                blob.fd, blob.done = found, size
                blob.here.set()
                return
            if job.source is None:
                raise MakeFailed("what was imported is no longer there; import it again")
            async with self._downloads:
                fd, partial = await trio.to_thread.run_sync(self._blobs.begin, digest)
                blob.fd = fd  # closed with the job
                try:
                    await self._registry.blob(
                        job.source, blob.descriptor, fd, job.login, lambda done: setattr(blob, "done", done)
                    )
                    # The worker may start while the bytes are still being flushed.
                    blob.here.set()
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(self._blobs.publish, fd, partial, digest)
                    fetched.append(digest)
                except BaseException as error:
                    job.broken = job.broken or isinstance(error, Exception)
                    if job.broken or job.given_up:
                        with trio.CancelScope(shield=True):
                            await trio.to_thread.run_sync(self._blobs.abandon, partial)
                    raise  # the server is stopping: the next one resumes the partial download

    async def _watch_downloads(self, job: Job) -> None:
        for blob in job.blobs.values():
            await blob.here.wait()
        job.status = ImageStatus.CONVERTING

    async def _convert(self, job: Job, manifest: Manifest, config: Config, made: Path) -> worker.Done:
        with _opened(made / "root.erofs") as disk, _opened(made / "scratch") as scratch:
            (made / "scratch").unlink()

            async with running_worker(self.turns) as conversion:
                job.conversion = conversion
                uuid = job.digest.removeprefix("sha256:")[:32]
                begin = worker.Begin(self._max_bytes, self._config.max_image_entries, uuid)
                await conversion.send(begin, [disk, scratch])
                for layer, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True):
                    blob = job.blobs[layer.digest]
                    await blob.here.wait()  # without a turn: a stalled download delays no other image
                    await conversion.apply(worker.Layer(f"layer {layer.digest}", diff_id), blob.fd)
                return await conversion.finish()

    def _forget(self, digests: list[str]) -> None:
        for digest in digests:
            self._blobs.remove(digest)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _runs_on(image: Platform, wanted: Platform) -> bool:
    variant_fits = not wanted.variant or not image.variant or wanted.variant == image.variant
    return (image.os, image.architecture) == (wanted.os, wanted.architecture) and variant_fits


def _image_config(config: Config) -> ImageConfig:
    run = config.config
    if run is None:
        return ImageConfig()
    env = dict(pair.split("=", 1) for pair in run.env or () if "=" in pair[1:])
    return ImageConfig(
        entrypoint=run.entrypoint or (),
        cmd=run.cmd or (),
        env=env,
        user=run.user,
        working_dir=run.working_dir,
        labels=run.labels or {},
        stop_signal=run.stop_signal or "",
        exposed_ports=tuple(sorted(run.exposed_ports or {})),
        volumes=tuple(sorted(path for path in run.volumes or {} if path.startswith("/") and "\0" not in path)),
    )
