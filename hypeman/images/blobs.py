"""Blobs on disk: a bounded cache of compressed layers by digest, verified on use.

    blobs/sha256/<hex>        complete blobs; the modification time is that of the last use
    blobs/partial/<hex>       downloads in progress or interrupted by a server stop: they are resumed
    blobs/partial/import-…    files of an archive being imported; removed at start

A blob gets its final name only after its digest was checked and its bytes were flushed. Blobs are
checked again while they are unpacked (diff_id), so a corrupt file costs at most another pull.
All methods block; call them in a thread.

Eviction: ``begin_trim``, then what is in use is found, then ``trim``. Who publishes or finds a blob that is to be
recorded as being in use claims it until it is: what is claimed after ``begin_trim``, or was then, is not removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


class Blobs:
    """The cache in directory ``root``."""

    def __init__(self, root: Path) -> None:
        self._whole = root / "sha256"
        self._partial = root / "partial"
        self._lock = threading.Lock()
        self._claims: Counter[str] = Counter()
        self._claimed: set[str] = set()
        """All that were claimed since the last ``begin_trim``."""

    def prepare(self) -> None:
        """Create the directories and remove what an earlier run left of imports and evictions."""
        for path in (self._whole, self._partial):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left_over in self._partial.iterdir():
            if not _is_download(left_over.name):
                left_over.unlink()

    def path(self, digest: str) -> Path:
        return self._whole / digest.removeprefix("sha256:")

    def open(self, digest: str, size: int | None = None) -> int | None:
        """A descriptor of the blob if it is cached, complete and has ``size`` bytes; None otherwise."""
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | _FLAGS)
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(fd).st_size != size:
            os.close(fd)
            self.remove(digest)
            return None
        os.utime(fd)
        return fd

    def read(self, digest: str, limit: int) -> bytes | None:
        """The content of a small blob, None if it is not cached. One longer than ``limit`` is cut behind it: the
        caller's own check of length or digest fails then."""
        fd = self.open(digest)
        if fd is None:
            return None
        with open(fd, "rb") as file:
            return file.read(limit + 1)

    def begin(self, digest: str = "") -> tuple[int, Path]:
        """A partial file, open for reading and writing: that of the blob ``digest`` with the data of an
        earlier download, or a new one for a blob whose digest is not yet known."""
        if digest:
            path = self._partial / digest.removeprefix("sha256:")
            return os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600), path
        path = self._partial / f"import-{secrets.token_hex(8)}"
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600), path

    def downloads(self) -> list[str]:
        """Digests of partially downloaded blobs."""
        return [f"sha256:{name}" for name in os.listdir(self._partial) if _is_download(name)]

    def abandon_download(self, digest: str) -> None:
        self.abandon(self._partial / digest.removeprefix("sha256:"))

    def publish(self, fd: int, partial: Path, digest: str) -> None:
        """Rename a verified file to its final name."""
        os.fsync(fd)
        os.rename(partial, self.path(digest))

    def add(self, data: bytes, digest: str) -> None:
        """Write a small blob whose digest is known to be right."""
        fd, partial = self.begin()
        try:
            write_all(fd, data)
            self.publish(fd, partial, digest)
        except OSError:
            self.abandon(partial)
            raise
        finally:
            os.close(fd)

    def abandon(self, partial: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()

    def remove(self, digest: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path(digest).unlink()

    def remove_damaged(self, digests: Iterable[str]) -> None:
        """Remove those blobs whose bytes no longer match their digests."""
        for digest in digests:
            fd = self.open(digest)
            if fd is not None:
                with open(fd, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if f"sha256:{found}" != digest:
                    self.remove(digest)

    @contextlib.contextmanager
    def claim(self, *digests: str) -> Iterator[None]:
        """Within the block these blobs are not evicted; afterwards those are not that are recorded as being in use."""
        with self._lock:
            self._claims.update(digests)
            self._claimed.update(digests)
        try:
            yield
        finally:
            with self._lock:
                self._claims.subtract(digests)
                self._claims += Counter()  # without those that have none left

    def begin_trim(self) -> None:
        """Before it is found what is in use."""
        with self._lock:
            self._claimed = set(self._claims)

    def trim(self, limit: int, keep: Collection[str]) -> int:
        """Remove the least recently used blobs until ``limit`` bytes are left, except the digests in
        ``keep``. Returns the bytes removed."""
        blobs = sorted(self._all(), key=lambda item: item[1].st_mtime_ns)
        excess = sum(status.st_size for _, status in blobs) - limit
        removed = 0
        for digest, status in blobs:
            if removed >= excess:
                break
            if digest in keep:
                continue
            aside = self._partial / f"evicted-{secrets.token_hex(8)}"
            with self._lock:  # which the event loop takes, so not while the space of a large file is freed
                if digest in self._claimed:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    os.rename(self.path(digest), aside)
            self.abandon(aside)
            removed += status.st_size
        return removed

    def size(self) -> int:
        """Bytes of all complete blobs; 0 before ``prepare``."""
        return sum(status.st_size for _, status in self._all()) if self._whole.is_dir() else 0

    def _all(self) -> list[tuple[str, os.stat_result]]:
        found = []
        with os.scandir(self._whole) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((f"sha256:{entry.name}", entry.stat(follow_symlinks=False)))
        return found


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _is_download(name: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", name) is not None
