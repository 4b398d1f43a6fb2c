"""Creates, copies, publishes and removes files and directories. Blocking calls run in worker threads.

- ``publish`` makes a finished file or tree visible by rename and flushes the directory: never a partial file.
- ``copy`` shares blocks (reflink) where the file system supports it, and keeps holes elsewhere.
- Removing a missing file is a no-op: an undo may run twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import trio

from hypeman.errors import InternalError
from hypeman.host.safe_open import open_directory, open_regular

R = TypeVar("R")

_FICLONE = 0x40049409
_NO_REFLINK = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)
_COPY_CHUNK = 16 << 20
_LIBC = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2
_PIECE = 256 << 10


class HostError(InternalError):
    """The host refused a change; the message contains the path and the reason."""


class Files:
    """File system operations. Paths are absolute; modes are octal permission bits."""

    async def make_dir(self, path: Path, *, mode: int = 0o700, uid: int = 0, gid: int = 0) -> None:
        """Create ``path`` and its parents (0711, so that a VMM's user can traverse them) if missing; mode and owner
        are set in any case."""
        await _in_thread(_make_dir, path, mode, uid, gid)

    async def write(self, path: Path, data: bytes, *, mode: int = 0o600, uid: int = 0, gid: int = 0) -> None:
        """Write a temporary file, flush it and rename it into place."""
        await _in_thread(write_file, path, data, mode, uid, gid)

    async def copy(self, source: Path, target: Path, *, mode: int = 0o600, uid: int = 0, gid: int = 0) -> None:
        """Copy a file, sharing its blocks where possible and keeping holes; ``target`` is replaced atomically."""
        await _in_thread(_copy, source, target, mode, uid, gid)

    async def copy_open(self, source: int, target: Path) -> None:
        """``copy`` from a descriptor, which stays open; ``target`` gets mode 0600."""
        await _in_thread(_copy_open, source, target)

    async def make_sparse(self, path: Path, size: int, *, mode: int = 0o600, uid: int = 0, gid: int = 0) -> None:
        """Create a sparse file of ``size`` bytes; an existing one keeps its content and is resized."""
        await _in_thread(_make_sparse, path, size, mode, uid, gid)

    async def copy_all(self, source: Path, target: Path, pattern: str, *, uid: int = 0, gid: int = 0) -> None:
        """``copy`` all files in directory ``source`` whose name matches the glob into the directory ``target``."""
        await _in_thread(_copy_all, source, target, pattern, uid, gid)

    async def move_all(self, source: Path, target: Path, pattern: str, *, uid: int = 0, gid: int = 0) -> None:
        """Rename all matching files from ``source`` into ``target``, durably, and chown them if a user is given.
        May be rerun after an interruption."""
        await _in_thread(_move_all, source, target, pattern, uid, gid)

    async def publish(self, source: Path, target: Path) -> None:
        """Rename ``source`` to ``target`` (which may not exist as a non-empty directory), durably."""
        await _in_thread(_publish, source, target)

    async def remove(self, path: Path) -> None:
        """Remove a file or a whole tree; a no-op if there is none."""
        await _in_thread(_remove, path)

    async def allocated(self, path: Path) -> int:
        """Bytes that a file or tree occupies on disk; 0 if it is missing."""
        return await _in_thread(allocated_bytes, path)


async def read_pieces(fd: int, first: int, end: int) -> AsyncGenerator[bytes]:
    """The bytes of an open file from ``first`` to before ``end``, or its end; ``fd`` is closed afterwards."""
    try:
        while first < end:
            piece = await trio.to_thread.run_sync(os.pread, fd, min(_PIECE, end - first), first)
            if not piece:
                return
            first += len(piece)
            yield piece
    finally:
        os.close(fd)


async def _in_thread(fn: Callable[..., R], *args: object) -> R:
    try:
        return await trio.to_thread.run_sync(fn, *args)
    except OSError as error:
        raise HostError(f"{error.filename or args[0]}: {error.strerror}") from error


def _make_dir(path: Path, mode: int, uid: int, gid: int) -> None:
    for parent in reversed(path.parents):
        with contextlib.suppress(FileExistsError):
            parent.mkdir(mode=0o711)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=mode)
    directory = open_directory(path)
    try:
        if os.geteuid() == 0:
            os.fchown(directory, uid, gid)  # also an existing one with another owner
        os.fchmod(directory, mode)
    finally:
        os.close(directory)


def _own(path: Path | int, uid: int, gid: int) -> None:
    if (uid or gid) and os.geteuid() == 0:
        os.chown(path, uid, gid, follow_symlinks=isinstance(path, int))


@contextlib.contextmanager
def _beside(target: Path, mode: int, uid: int, gid: int) -> Iterator[int]:
    """A descriptor of a new file beside ``target`` that is flushed and replaces it if the block succeeds.
    The caller flushes the directory after its last file."""
    side = target.with_name(target.name + ".new")
    fd = os.open(side, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
        os.fchmod(fd, mode)
        _own(fd, uid, gid)
        os.fsync(fd)
    except OSError:
        os.unlink(side)
        raise
    finally:
        os.close(fd)
    os.rename(side, target)


def write_file(path: Path, data: bytes, mode: int = 0o600, uid: int = 0, gid: int = 0) -> None:
    """``Files.write`` for callers without an event loop: atomic, and never more accessible than ``mode`` allows;
    blocks."""
    with _beside(path, mode, uid, gid) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    flush_directory(path.parent)


def _copy(source: Path, target: Path, mode: int, uid: int, gid: int) -> None:
    _copy_unflushed(source, target, mode, uid, gid)
    flush_directory(target.parent)


def _copy_all(source: Path, target: Path, pattern: str, uid: int, gid: int) -> None:
    for file in sorted(source.glob(pattern)):
        _copy_unflushed(file, target / file.name, 0o600, uid, gid)
    flush_directory(target)


def _move_all(source: Path, target: Path, pattern: str, uid: int, gid: int) -> None:
    for file in sorted(source.glob(pattern)):
        _own(file, uid, gid)
        os.rename(file, target / file.name)
    flush_directory(target)


def _copy_unflushed(source: Path, target: Path, mode: int, uid: int, gid: int) -> None:
    with open(open_regular(source, os.O_RDONLY), "rb", buffering=0) as read, _beside(target, mode, uid, gid) as fd:
        _copy_content(read.fileno(), fd)


def _copy_open(source: int, target: Path) -> None:
    with _beside(target, 0o600, 0, 0) as fd:
        _copy_content(source, fd)
    flush_directory(target.parent)


def _copy_content(source: int, target: int) -> None:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_REFLINK:
            raise
        os.ftruncate(target, os.fstat(source).st_size)
        for start, end in data_ranges(source):
            copy_range(source, target, start, end)


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Start and end of each data range (not a hole) in the file."""
    size = os.fstat(fd).st_size
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole after this offset
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy inside the kernel; with ``sendfile`` if ``copy_file_range`` fails because it crosses file systems."""
    os.lseek(target, start, os.SEEK_SET)
    while start < end:
        count = min(end - start, _COPY_CHUNK)
        try:
            copied = os.copy_file_range(source, target, count, start)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copied = os.sendfile(target, source, start, count)
        if copied == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        start += copied


def start_writing(fd: int, start: int, end: int) -> None:
    """Have the kernel begin to write this range of the file to disk, so that flushing it later takes less. Never fails:
    it is only a hint."""
    _LIBC.sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(end - start), _SYNC_FILE_RANGE_WRITE)


def _make_sparse(path: Path, size: int, mode: int, uid: int, gid: int) -> None:
    fd = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, mode)
        _own(fd, uid, gid)
    finally:
        os.close(fd)


def _publish(source: Path, target: Path) -> None:
    flush_directory(source if source.is_dir() else source.parent)
    os.rename(source, target)
    flush_directory(target.parent)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def allocated_bytes(path: Path) -> int:
    """Bytes that a file or tree occupies on disk; blocks."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    total = status.st_blocks * 512
    if path.is_dir() and not path.is_symlink():
        total += sum(allocated_bytes(path / name) for name in os.listdir(path))
    return total


def flush_directory(path: Path) -> None:
    """Make names created or removed in it durable; blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
