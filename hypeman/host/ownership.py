"""Makes the directories that root works in owned by root, including those that older versions gave to VMM users.

In older versions the user of a VMM owned ``instances/<id>``, its ``logs``, ``captures/<id>`` and ``run/vm/<id>``, and
so could replace files that root opens there by links, FIFOs or other users' files. ``repair`` reclaims these
directories at startup, before anything in them is opened, and removes what does not belong there:

    in                      stays
    instances/<id>          regular files of root or of the VMM's user; logs/, staged/, jail/
    instances/<id>/logs     the same, with one name (two where there is a jail)
    captures/<id>           regular files of root or of the VMM's user
    run/vm/<id>             what root made, and sockets: those of VMMs that are still running

Each directory is first locked down (owner and mode) and then searched through its descriptor, so a VMM that is
still running can change nothing in between. It is idempotent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from hypeman.host.safe_open import open_beneath, open_directory

_INSTANCE_PARTS = ("logs", "staged", "jail", "room")
_JAIL = "jail"
"""Created and removed as a whole by its driver, which follows no links in it; its files have hard links outside."""

_MODE = 0o711
Keep = Callable[[os.stat_result], bool]

_log = logging.getLogger(__name__)


def repair(data_dir: Path, run_dir: Path) -> list[str]:
    """Reclaim all directories; returns what was removed. Blocks. Raises OSError."""
    removed: list[str] = []
    for directory, path in _directories(data_dir / "instances", removed):
        _repair_instance(directory, path, removed)
    for name in ("captures", "snapshots", "volumes"):
        for directory, path in _directories(data_dir / name, removed):
            _sweep(directory, path, removed, keep=_kept_in(_close(directory), links=0))
    for directory, path in _directories(run_dir / "vm", removed):
        _close(directory)
        _sweep(directory, path, removed, keep=_kept_beside_vmm)
    for path in removed:
        _log.warning("removed %s, which a VMM could have put there", path)
    return removed


def take_back(path: str | Path) -> None:
    """Make one directory owned by root and writable only by root, before a VMM starts that could change names in it,
    or while it runs. Raises OSError; ENOTDIR or ELOOP for a link."""
    directory = open_directory(path)
    try:
        found = os.fstat(directory)
        if stat.S_IMODE(found.st_mode) & 0o022:
            os.fchmod(directory, stat.S_IMODE(found.st_mode) & ~0o022)
        if os.geteuid() == 0 and (found.st_uid or found.st_gid):
            os.fchown(directory, 0, 0)
    finally:
        os.close(directory)


def _repair_instance(directory: int, path: str, removed: list[str]) -> None:
    links = 2 if _is_directory(directory, _JAIL) else 1
    keep = _kept_in(_close(directory), links=links)
    for part in ("logs", "staged"):
        if _is_directory(directory, part):
            below = open_beneath(directory, part, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _sweep(below, f"{path}/{part}", removed, keep=_kept_in(_close(below), links=links))
            finally:
                os.close(below)
    _sweep(directory, path, removed, keep=keep, keep_directories=_INSTANCE_PARTS)


def _directories(parent: Path, removed: list[str]) -> Iterator[tuple[int, str]]:
    """Each directory in ``parent``, open; symbolic links are skipped."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(parent)):
            path = os.path.join(parent, name)
            try:
                directory = open_directory(path)
            except NotADirectoryError:
                if os.path.islink(path):
                    os.unlink(path)
                    removed.append(path)
                continue
            except FileNotFoundError:
                continue
            try:
                yield directory, path
            finally:
                os.close(directory)


def _close(directory: int) -> int | None:
    """Make ``directory`` owned and writable only by root. Returns the previous owner, None if it already was."""
    found = os.fstat(directory)
    mode = stat.S_IMODE(found.st_mode)
    if mode & ~_MODE:
        os.fchmod(directory, mode & _MODE)
    if found.st_uid == os.geteuid() and not mode & 0o022:
        return None
    if os.geteuid() == 0:
        os.fchown(directory, 0, 0)
    return found.st_uid


def _sweep(
    directory: int,
    path: str,
    removed: list[str],
    *,
    keep: Keep,
    keep_directories: tuple[str, ...] = (),
) -> None:
    for name in os.listdir(directory):
        entry = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISDIR(entry.st_mode):
            if entry.st_uid == 0 or name in keep_directories:
                continue
            shutil.rmtree(name, dir_fd=directory)
        elif keep(entry):
            continue
        else:
            os.unlink(name, dir_fd=directory)
        removed.append(f"{path}/{name}")


def _kept_in(owner: int | None, *, links: int) -> Keep:
    """What to keep in a directory that ``owner`` could write to until now: regular files owned by it or by root, with
    at most ``links`` hard links (0: any number). If no user could write to it, all regular files are kept."""

    def keep(entry: os.stat_result) -> bool:
        if not stat.S_ISREG(entry.st_mode):
            return False
        return owner is None or (entry.st_uid in (0, owner) and not (links and entry.st_nlink > links))

    return keep


def _kept_beside_vmm(entry: os.stat_result) -> bool:
    return entry.st_uid == os.geteuid() or stat.S_ISSOCK(entry.st_mode)


def _is_directory(directory: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
