"""Files that a program needs to run in a chroot: itself, its loader and libraries."""

from __future__ import annotations

import functools
import os
import struct
import subprocess
from collections.abc import Callable

_PT_INTERP = 3


class NotRunnable(Exception):
    """The files of a program cannot be found; the message has the reason."""


def once_per_version(find: Callable[[str], tuple[str, ...]]) -> Callable[[str], tuple[str, ...]]:
    """Decorator: ``find`` is called once for each version of the file that is its argument, which its inode, time and
    size tell apart. Raises NotRunnable if there is no such file."""

    @functools.lru_cache(maxsize=64)
    def found(binary: str, *version: int) -> tuple[str, ...]:
        return find(binary)

    @functools.wraps(find)
    def look(binary: str) -> tuple[str, ...]:
        try:
            status = os.stat(binary)
        except OSError as error:
            raise NotRunnable(f"{binary}: {error.strerror}") from None
        return found(binary, status.st_ino, status.st_mtime_ns, status.st_size)

    return look


@once_per_version
def files_of(binary: str) -> tuple[str, ...]:
    """``binary`` and everything that the dynamic loader loads with it, sorted. Raises NotRunnable. Blocks for some
    10 ms, once for each version of the file."""
    loader = _loader_of(binary)
    if not loader:
        return (binary,)
    try:
        listed = subprocess.run(
            [loader, "--list", binary], capture_output=True, text=True, timeout=60, check=True, env={"LANG": "C.UTF-8"}
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotRunnable(f"the libraries of {binary} cannot be listed: {error}") from None
    found = {binary, loader}
    for line in listed.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        path = (rest if arrow else name).rsplit(" (", 1)[0]
        if path == "not found":
            raise NotRunnable(f"{binary} requires {name}, which is not installed")
        if path.startswith("/"):
            found.add(path)
    return tuple(sorted(found))


def _loader_of(binary: str) -> str:
    """The dynamic loader that an ELF program names; empty for a static one. Raises NotRunnable for anything else."""
    with open(binary, "rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
            raise NotRunnable(f"{binary} is not a program for this processor")
        (offset,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        for index in range(count):
            file.seek(offset + index * size)
            entry = file.read(size)
            if struct.unpack_from("<I", entry)[0] == _PT_INTERP:
                begin, length = struct.unpack_from("<Q", entry, 8)[0], struct.unpack_from("<Q", entry, 32)[0]
                file.seek(begin)
                return file.read(length).rstrip(b"\0").decode()
    return ""
