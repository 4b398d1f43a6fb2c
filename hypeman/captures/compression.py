"""Compression of saved memory, off the critical path.

A standby request returns once the capture is on disk; compression follows, after a delay if one was
requested. The compressed file replaces the plain one by rename; the row says which one exists:

    compressed_bytes == 0   ``memory`` exists, as the VMM wrote it
    compressed_bytes > 0    ``memory.zst`` or ``memory.lz4`` exists instead

A restore needs the plain file. ``plain`` first cancels a running compression, then decompresses, and blocks new
ones until the restore is done, so the two never race. A compression interrupted by a fork restarts after it;
one interrupted by a crash restarts at server start, after partial files are removed.
Holes are preserved in both directions: zeros are not written.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lz4.frame
import msgspec
import trio
import zstandard

from hypeman.captures.records import CAPTURES, CaptureRow
from hypeman.captures.types import CompressionAlgorithm, SnapshotCompressionConfig
from hypeman.errors import StoreError
from hypeman.host.files import allocated_bytes
from hypeman.host.safe_open import open_regular
from hypeman.hypervisor.interface import CaptureInvalid
from hypeman.paths import Paths
from hypeman.store import Store, Txn

log = logging.getLogger(__name__)

MEMORY = "memory"
_SUFFIX = {CompressionAlgorithm.ZSTD: ".zst", CompressionAlgorithm.LZ4: ".lz4"}
_PACKING, _UNPACKED = ".packing", ".new"
"""Suffix of incomplete files."""
_CHUNK = 4 << 20
_AT_ONCE = 1
"""Concurrent compressions: they should use spare CPU time, not the guests'."""


class Compressor:
    def __init__(self, store: Store, paths: Paths) -> None:
        self._store = store
        self._paths = paths
        self._jobs: dict[str, _Job] = {}
        self._unpacking: dict[str, trio.Lock] = {}
        self._wanted_plain: dict[str, int] = {}
        """Capture → number of restores in progress from it."""
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compress pending captures, then newly scheduled ones, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for row in self._store.read(lambda txn: list(dict(txn.scan(CAPTURES)).values())):
                await trio.to_thread.run_sync(_remove_halves, self._paths.capture(row.id), row)
                if _is_wanted(row):
                    self.schedule(row.id)
            task_status.started()
            await trio.sleep_forever()

    def schedule(self, capture_id: str, *, delay: float = 0.0) -> None:
        """Compress the capture after ``delay`` seconds, unless a restore needs it uncompressed before then."""
        if self._nursery is not None and capture_id not in self._jobs and capture_id not in self._wanted_plain:
            job = self._jobs[capture_id] = _Job()
            self._nursery.start_soon(self._compress, capture_id, delay, job)

    def is_busy(self, capture_id: str) -> bool:
        """Whether the capture is being compressed or waits for it."""
        return capture_id in self._jobs

    def is_compressing(self, capture_id: str) -> bool:
        job = self._jobs.get(capture_id)
        return job is not None and job.active

    @asynccontextmanager
    async def plain(self, capture_id: str) -> AsyncIterator[None]:
        """Within the block the plain memory file exists and is not compressed. Raises CaptureInvalid."""
        self._wanted_plain[capture_id] = self._wanted_plain.get(capture_id, 0) + 1
        try:
            await self._unpack_once(capture_id)
            yield
        finally:
            self._wanted_plain[capture_id] -= 1
            if not self._wanted_plain[capture_id]:
                del self._wanted_plain[capture_id]
                with trio.CancelScope(shield=True):
                    await self._end_plain(capture_id)

    async def _end_plain(self, capture_id: str) -> None:
        """Remove the plain copy of a compressed memory; a VM that maps it keeps it. Or compress one that is to be."""
        lock = self._unpacking.setdefault(capture_id, trio.Lock())
        async with lock:
            if capture_id not in self._wanted_plain:  # otherwise another restore has come
                row = self._store.read(lambda txn: txn.get(CAPTURES, capture_id))
                if row is not None and row.compressed_bytes:
                    plain = self._paths.capture(capture_id) / MEMORY
                    await trio.to_thread.run_sync(partial(plain.unlink, missing_ok=True))
                elif row is not None and row.holders and _is_wanted(row):
                    self.schedule(capture_id)
        if not lock.statistics().locked:
            self._unpacking.pop(capture_id, None)

    async def _unpack_once(self, capture_id: str) -> None:
        lock = self._unpacking.setdefault(capture_id, trio.Lock())
        try:
            async with lock:  # concurrent forks of one snapshot decompress into the same file
                await self._make_plain(capture_id)
        finally:
            if not lock.statistics().locked:
                self._unpacking.pop(capture_id, None)

    async def _make_plain(self, capture_id: str) -> None:
        job = self._jobs.get(capture_id)
        if job is not None:
            job.scope.cancel()
            await job.ended.wait()
        row = self._store.read(lambda txn: txn.get(CAPTURES, capture_id))
        directory = self._paths.capture(capture_id)
        if row is None or row.compressed_bytes == 0 or (directory / MEMORY).exists():
            return
        packed = directory / (MEMORY + _suffix(row))
        try:
            await _pump(_unpacked(packed, row), directory / (MEMORY + _UNPACKED), size=row.memory_bytes)
            await trio.to_thread.run_sync(os.rename, directory / (MEMORY + _UNPACKED), directory / MEMORY)
        except (OSError, zstandard.ZstdError, RuntimeError, EOFError) as error:
            raise CaptureInvalid(f"the compressed memory of capture {capture_id} cannot be read: {error}") from error

    async def _compress(self, capture_id: str, delay: float, job: _Job) -> None:
        try:
            with job.scope:
                await trio.sleep(delay)
                async with self._slots:
                    await self._compress_now(capture_id)
        except Exception as error:  # the capture is valid uncompressed; a failure here must not stop the server
            log.warning("capture %s cannot be compressed: %s", capture_id, error)
            text = str(error)
            try:
                await self._store.write(lambda txn: _change(txn, capture_id, compression_error=text))
            except StoreError as refused:  # on a full disk; the next start compresses it
                log.warning("and that cannot be recorded: %s", refused)
        finally:
            del self._jobs[capture_id]
            job.ended.set()

    async def _compress_now(self, capture_id: str) -> None:
        row = self._store.read(lambda txn: txn.get(CAPTURES, capture_id))
        if row is None or not _is_wanted(row):
            return
        directory = self._paths.capture(capture_id)
        plain = directory / MEMORY
        if not plain.exists():  # a VMM that stores memory in its state file already omits zero pages
            await self._store.write(lambda txn: _change(txn, capture_id, compression=None))
            return
        side = directory / (MEMORY + _PACKING)
        self._jobs[capture_id].active = True
        try:
            size = await _pump(_packed(plain, row.compression), side)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                side.unlink()
            raise
        with trio.CancelScope(shield=True):  # only renames and the row update remain
            await trio.to_thread.run_sync(os.rename, side, directory / (MEMORY + _suffix(row)))
            packed = {"compressed_bytes": size, "compression": row.compression}  # the requested one may have changed
            await self._store.write(lambda txn: _change(txn, capture_id, **packed))
            await trio.to_thread.run_sync(plain.unlink)
            on_disk = await trio.to_thread.run_sync(allocated_bytes, directory)
            await self._store.write(lambda txn: _change(txn, capture_id, size_bytes=on_disk))


class _Job:
    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.active = False
        """It compresses; before, it waits."""


class _Packer(Protocol):
    def compress(self, data: bytes) -> bytes: ...
    def flush(self) -> bytes: ...


def _is_wanted(row: CaptureRow) -> bool:
    wanted = row.compression is not None and row.compression.enabled
    return wanted and row.compressed_bytes == 0 and row.compression_error is None


def _remove_halves(directory: Path, row: CaptureRow) -> None:
    """Remove every form of the memory file except the one recorded in the row."""
    there = MEMORY + _suffix(row) if row.compressed_bytes else MEMORY
    for name in (MEMORY, *(MEMORY + suffix for suffix in (*_SUFFIX.values(), _PACKING, _UNPACKED))):
        if name != there:
            (directory / name).unlink(missing_ok=True)


def _suffix(row: CaptureRow) -> str:
    algorithm = (row.compression.algorithm if row.compression else None) or CompressionAlgorithm.ZSTD
    return _SUFFIX[algorithm]


def _change(txn: Txn, capture_id: str, **changes: Any) -> None:
    row = txn.get(CAPTURES, capture_id)
    if row is not None:
        txn.put(CAPTURES, capture_id, msgspec.structs.replace(row, **changes))


async def _pump(chunks: Iterator[bytes], target: Path, *, size: int | None = None) -> int:
    """Write ``chunks`` to ``target``, zeros as holes, and flush; returns bytes written. One chunk per thread
    call, so that it can be cancelled between chunks."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    position = 0
    try:
        while (chunk := await trio.to_thread.run_sync(next, chunks, None)) is not None:
            if chunk.count(0) != len(chunk):
                await trio.to_thread.run_sync(_write_at, fd, chunk, position)
            position += len(chunk)
        if size is not None and position != size:
            raise EOFError(f"{position} bytes instead of {size}")
        os.ftruncate(fd, position)
        await trio.to_thread.run_sync(os.fsync, fd)
    finally:
        os.close(fd)
    return position


def _write_at(fd: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, position)
        view, position = view[written:], position + written


def _packed(plain: Path, config: SnapshotCompressionConfig | None) -> Iterator[bytes]:
    packer: _Packer
    if config is not None and config.algorithm is CompressionAlgorithm.LZ4:
        context = lz4.frame.LZ4FrameCompressor(compression_level=config.level or 0)
        begin: Callable[[], bytes] = context.begin
        packer = context
    else:
        level = config.level if config is not None and config.level else 1
        packer = zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj()
        begin = bytes
    with open(open_regular(plain, os.O_RDONLY), "rb", buffering=0) as file:  # its VMM may hold a lease on it
        yield begin()
        while data := file.read(_CHUNK):
            yield packer.compress(data)
        yield packer.flush()


def _unpacked(packed: Path, row: CaptureRow) -> Iterator[bytes]:
    with open(packed, "rb", buffering=0) as file:
        if _suffix(row) == _SUFFIX[CompressionAlgorithm.LZ4]:
            with lz4.frame.LZ4FrameFile(file) as reader:
                while data := reader.read(_CHUNK):
                    yield data
        else:
            with zstandard.ZstdDecompressor().stream_reader(file) as stream:
                while data := stream.read(_CHUNK):
                    yield data
