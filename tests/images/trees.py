"""File trees described entry by entry, so that two ways of unpacking an image can be compared."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hypeman.images.erofs import Writer
from hypeman.images.layers import Tree
from hypeman.images.nodes import ENOUGH
from hypeman.images.tar import Source, TarReader

Described = dict[bytes, tuple[object, ...]]


class MemoryOutput:
    """An ``erofs.Output`` in memory."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.punched: list[tuple[int, int]] = []

    def write_at(self, data: bytes | bytearray, offset: int) -> None:
        self.data += bytes(max(0, offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data

    def read_at(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def punch(self, offset: int, length: int) -> None:
        self.punched.append((offset, length))
        self.data[offset : offset + length] = bytes(length)


def make_disk(
    layers: list[bytes], *, max_bytes: int = 1 << 30, max_entries: int = 100_000, enough: int = ENOUGH
) -> bytes:
    """The EROFS disk of uncompressed ``layers``, made in this process."""
    disk = MemoryOutput()
    with ThreadPoolExecutor(1) as pool:
        writer = Writer(disk, MemoryOutput(), pool, max_bytes=max_bytes)
        tree = Tree(max_entries=max_entries, enough=enough)
        for layer in layers:
            source = Source(iter([layer[at : at + 7001] for at in range(0, len(layer), 7001)]), limit=max_bytes)
            tree.apply(TarReader(source, max_entries=max_entries), writer)
        size, _ = writer.finish(tree, uuid=bytes(16))
    return bytes(disk.data[:size])


@contextmanager
def mounted(disk: Path, fs: str = "erofs") -> Iterator[Path]:
    """``disk`` mounted read-only by the kernel."""
    where = disk.parent / f"{disk.name}.mnt"
    where.mkdir()
    subprocess.run(["mount", "-t", fs, "-o", "ro,loop,noatime", disk, where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def describe(root: Path, *, without_times: frozenset[bytes] = frozenset()) -> Described:
    """Everything that can be seen of a tree: path → type, mode, owner, times, xattrs, content, hard-link set."""
    found: Described = {}
    links: dict[tuple[int, int], list[bytes]] = {}
    base = os.fsencode(root)
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        full = os.path.join(base, path)
        status = os.lstat(full)
        attributes = sorted(os.listxattr(full, follow_symlinks=False))
        xattrs = tuple((name, os.getxattr(full, name, follow_symlinks=False)) for name in attributes)
        content: object = None
        if stat.S_ISREG(status.st_mode):
            with open(full, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            if status.st_nlink > 1:
                links.setdefault((status.st_dev, status.st_ino), []).append(path)
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(full)
        elif stat.S_ISDIR(status.st_mode):
            waiting += [os.path.join(path, os.fsencode(name)) for name in os.listdir(full)]
        mtime = None if path in without_times else status.st_mtime_ns
        size = status.st_size if not stat.S_ISDIR(status.st_mode) else None
        found[path] = (
            oct(status.st_mode), status.st_uid, status.st_gid, mtime, size, status.st_rdev, xattrs, content,
        )  # fmt: skip
    for names in links.values():
        together = tuple(sorted(names))
        for name in names:
            found[name] += (together,)
    return found


def difference(ours: Described, theirs: Described) -> list[str]:
    """What differs, as lines for a person."""
    lines = []
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            lines.append(f"{path!r}\n  ours   {ours.get(path)}\n  theirs {theirs.get(path)}")
    return lines
