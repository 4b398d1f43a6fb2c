"""Opens files whose names another user may have chosen, or could have changed in the past.

    open_beneath    below a directory descriptor: follows no link, leaves the directory by no way
    open_regular    a regular file by its path; the last two parts of the path may not be links
    open_log        a log to append to, or to read

Rules:

- No open here blocks: a FIFO without a reader is refused and not waited for.
- What is opened is checked by its descriptor and not by its name, so there is no moment in between.
- The directories above belong to root (``ownership``), so that no other user can move them. These
  functions are the second barrier: with a directory that was taken over, they still follow nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from pathlib import Path

_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_WITHOUT_OPENAT2 = (errno.ENOSYS, errno.EPERM)
"""Linux before 5.6; and sandboxes that know of no such system call."""

_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(directory: int, name: str, flags: int, mode: int = 0o600) -> int:
    """A descriptor of ``name``, relative to the directory descriptor ``directory``. Raises OSError.

    ELOOP if a symbolic link is anywhere in ``name``, EXDEV if it leads out of the directory.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    how = struct.pack(
        "=QQQ",
        flags,
        mode if flags & os.O_CREAT else 0,
        _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS,
    )
    descriptor = int(_libc.syscall(_OPENAT2, directory, os.fsencode(name), how, len(how)))
    if descriptor >= 0:
        return descriptor
    code = ctypes.get_errno()
    if code not in _WITHOUT_OPENAT2:
        raise OSError(code, os.strerror(code), name)
    return _open_part_by_part(directory, name, flags, mode)


def _open_part_by_part(directory: int, name: str, flags: int, mode: int) -> int:
    """The same with only openat."""
    *parents, last = name.split("/")
    if any(part in ("", "..") for part in (*parents, last)):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
    here = os.dup(directory)
    try:
        for part in parents:
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        return os.open(last, flags, mode, dir_fd=here)
    finally:
        os.close(here)


def open_directory(path: Path | str) -> int:
    """A descriptor of the directory at ``path``, which may not be a symbolic link. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def open_regular(path: Path | str, flags: int, mode: int = 0o600, *, links: int = 0) -> int:
    """A descriptor of the regular file at ``path``. Raises OSError.

    ELOOP for a symbolic link, EINVAL for anything else that is not a regular file. ``links``: how many names the
    file may have at most; 0 for any number.
    """
    parent, name = os.path.split(path)
    directory = open_directory(parent or ".")
    try:
        descriptor = open_beneath(directory, name, flags | os.O_NONBLOCK | os.O_NOCTTY, mode)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(directory)
    try:
        check_regular(descriptor, path, links=links)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(descriptor: int, path: Path | str, *, links: int = 0) -> os.stat_result:
    """What ``descriptor`` is. Raises OSError (EINVAL) if it is not a regular file, or has more than ``links`` names."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if links and found.st_nlink > links:
        raise OSError(errno.EINVAL, "the file has other names as well", str(path))
    return found


def open_log(path: Path | str, flags: int = os.O_WRONLY | os.O_APPEND | os.O_CREAT) -> int:
    """A descriptor of a log: a regular file, of mode 0600 if made now. Raises OSError. It may have one other name:
    Firecracker's log has one in its jail."""
    return open_regular(path, flags, 0o600, links=2)


def read_start(path: Path | str, limit: int) -> bytes:
    """The first ``limit`` bytes of the regular file at ``path``, however large it is. Raises OSError."""
    descriptor = open_regular(path, os.O_RDONLY)
    with open(descriptor, "rb") as file:
        return file.read(limit)
