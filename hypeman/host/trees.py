"""File trees inside of disk images: looked into through a read-only mount, and copied to another disk.

- Nothing in such a tree can act on the host: mounts are read-only, without devices, setuid or execution.
- A mount is gone when its block ends; one left by a killed server is taken away by ``unmount``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from hypeman.host.processes import Processes

_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


@asynccontextmanager
async def mounted(processes: Processes, disk: Path, where: Path, *, fs: str) -> AsyncIterator[Path]:
    """``disk`` mounted on the new directory ``where``. Raises ToolFailed, as on a kernel without ``fs``."""
    await trio.to_thread.run_sync(where.mkdir)
    try:
        options = "loop,ro,nosuid,nodev,noexec"
        await processes.run(["mount", "-t", fs, "-o", options, str(disk), str(where)])
        yield where
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_clear, where)


def _clear(where: Path) -> None:
    unmount(where)
    where.rmdir()


def unmount(where: Path) -> None:
    """Detach a mount immediately (lazy unmount); a no-op if there is none."""
    if where.is_mount():
        _libc.umount2(os.fsencode(where), _MNT_DETACH)


async def make_ext4(processes: Processes, tree: Path, target: Path, *, size: int, inodes: int) -> None:
    """A new ext4 file system of at least ``size`` bytes in file ``target``, with a copy of ``tree``.

    Without a journal: it is made to be read. Raises ToolFailed.
    """
    argv = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-b", "4096", "-N", str(inodes)]
    await processes.run([*argv, "-d", str(tree), str(target), f"{-(-size // 4096) * 4}k"], timeout=3600)
