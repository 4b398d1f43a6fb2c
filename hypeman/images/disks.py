"""Root disk files: published atomically by digest, read-only from then on.

    images/<hex>/root.erofs (or root.ext4)     0444: any VMM may open it
    images/<hex>/config.json                   the image's config and the length of the disk
    tmp/image-<random>/                        a disk being built

A directory below ``images`` is complete, because it is flushed before it gets its name, so it can be
used as is after a crash. All functions except ``make_ext4`` block.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

import msgspec

from hypeman.host import trees
from hypeman.host.files import flush_directory
from hypeman.host.processes import Processes
from hypeman.images.erofs import check_super_block
from hypeman.images.types import ImageConfig
from hypeman.paths import Paths

_TMP_PREFIX = "image-"
_CONFIG = "config.json"
_MOUNT = "mnt"


class Stored(msgspec.Struct, frozen=True):
    """The ``config.json`` beside a disk."""

    fs: str
    size: int
    platform: str
    config: ImageConfig


class Disks:
    def __init__(self, paths: Paths) -> None:
        self._images = paths.images
        self._tmp = paths.tmp

    def prepare(self) -> None:
        """Create the directories and remove incomplete disks of an earlier run."""
        self._images.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left_over in self._tmp.glob(f"{_TMP_PREFIX}*"):
            self.abandon(left_over)

    def directory(self, digest: str) -> Path:
        return self._images / digest.removeprefix("sha256:")

    def disk(self, digest: str, fs: str) -> Path:
        return self.directory(digest) / f"root.{fs}"

    def read(self, digest: str) -> Stored | None:
        """The metadata of a published disk; None if there is none or its length is wrong."""
        try:
            stored = msgspec.json.decode((self.directory(digest) / _CONFIG).read_bytes(), type=Stored)
            found = self.disk(digest, stored.fs).stat().st_size
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return None
        return stored if found == stored.size else None

    def begin(self) -> Path:
        """A new, empty directory to build a disk in."""
        path = self._tmp / f"{_TMP_PREFIX}{secrets.token_hex(8)}"
        path.mkdir(mode=0o711)
        return path

    def abandon(self, made: Path) -> None:
        """Remove a directory created by ``begin`` and its contents."""
        trees.unmount(made / _MOUNT)
        shutil.rmtree(made, ignore_errors=True)

    def publish(self, made: Path, digest: str, stored: Stored) -> None:
        """Durably rename the finished disk in ``made`` to its final name. Raises OSError.

        Only ``root.<fs>`` may be in ``made``, already flushed.
        """
        disk = made / f"root.{stored.fs}"
        os.chmod(disk, 0o444)
        with open(made / _CONFIG, "wb") as file:
            file.write(msgspec.json.encode(stored))
            file.flush()
            os.fsync(file.fileno())
        target = self.directory(digest)
        if target.exists():
            shutil.rmtree(target)  # orphan: its image has no ready record
        flush_directory(made)
        os.rename(made, target)
        flush_directory(self._images)

    def remove(self, digest: str) -> None:
        """Remove a disk. It is renamed first, so a crash in between leaves nothing that looks complete."""
        trash = self._tmp / f"{_TMP_PREFIX}{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.directory(digest), trash)
            self.abandon(trash)

    def collect(self, keep: Collection[str]) -> list[str]:
        """Remove every disk except the digests in ``keep``; returns the removed ones."""
        gone = [f"sha256:{path.name}" for path in self._images.iterdir() if f"sha256:{path.name}" not in keep]
        for digest in gone:
            self.remove(digest)
        return gone


def verify(disk: Path, size: int) -> None:
    """Read back and check the start of a disk. Raises ValueError."""
    with open(disk, "rb") as file:
        head = file.read(4096)
        found = os.fstat(file.fileno()).st_size
    if found != size:
        raise ValueError(f"the disk is {found} bytes long instead of {size}")
    check_super_block(head, size)


async def make_ext4(processes: Processes, made: Path, *, content_bytes: int, entries: int) -> Path:
    """Turn ``root.erofs`` in ``made`` into ``root.ext4``, copied by mke2fs from a read-only mount.

    Requires a host kernel with EROFS and loop devices. Raises ToolFailed.
    """
    source, target = made / "root.erofs", made / "root.ext4"
    inodes = entries + 64
    size = content_bytes * 21 // 20 + inodes * 512 + (16 << 20)
    async with trees.mounted(processes, source, made / _MOUNT, fs="erofs") as tree:
        await trees.make_ext4(processes, tree, target, size=size, inodes=inodes)
    source.unlink()
    return target
