"""Lending a file of ours to one user for the moment in which his program opens it.

A file of mode 0600 stays so; an access control entry names the one borrower. Several may borrow the
same file at once; the last to give it back leaves it as it was.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from hypeman.errors import InternalError

_ACCESS = "system.posix_acl_access"
_VERSION = 2
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NOBODY_IN_PARTICULAR = 0xFFFFFFFF
_READ_WRITE = 6

_borrowers: dict[tuple[int, int], list[int]] = {}


@contextlib.contextmanager
def lent(path: Path, uid: int) -> Iterator[None]:
    """Let ``uid`` open ``path`` for reading and writing, as long as the block runs."""
    if uid in (0, path.stat().st_uid):
        yield
        return
    file = path.stat()
    users = _borrowers.setdefault((file.st_dev, file.st_ino), [])
    users.append(uid)
    try:
        _set_acl(path, users)
        yield
    finally:
        users.remove(uid)
        with contextlib.suppress(FileNotFoundError):
            _set_acl(path, users)
        if not users:
            _borrowers.pop((file.st_dev, file.st_ino), None)


def _set_acl(path: Path, users: list[int]) -> None:
    try:
        if not users:
            os.removexattr(path, _ACCESS)
            path.chmod(0o600)  # with entries, the group bits showed their mask
        else:
            os.setxattr(path, _ACCESS, encode_acl(users))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InternalError(f"{path} can not be lent to a VMM's user: {error.strerror}") from error


def encode_acl(users: list[int]) -> bytes:
    """Owner and ``users`` read and write, all others nothing, in the kernel's form (acl(5))."""
    entries = [
        (_USER_OBJ, _READ_WRITE, _NOBODY_IN_PARTICULAR),
        *((_USER, _READ_WRITE, user) for user in sorted(set(users))),
        (_GROUP_OBJ, 0, _NOBODY_IN_PARTICULAR),
        (_MASK, _READ_WRITE, _NOBODY_IN_PARTICULAR),
        (_OTHER, 0, _NOBODY_IN_PARTICULAR),
    ]
    return struct.pack("<I", _VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
