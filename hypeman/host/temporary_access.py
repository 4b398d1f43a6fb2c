"""Temporary access to a file of ours for one user, by an ACL entry, while a program of that user opens it.

The file keeps its owner and mode. Several users may have access to the same file at once; when the last
access ends, the file has no ACL, as before.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from hypeman.errors import InternalError

_ACCESS = "system.posix_acl_access"
_VERSION = 2
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NOBODY_IN_PARTICULAR = 0xFFFFFFFF
_READ, _WRITE = 4, 2


class _Grants(msgspec.Struct):
    mode: int
    """Permission bits to restore."""
    users: list[tuple[int, int]] = []
    """User and permission of each, in order."""


_granted: dict[tuple[int, int], _Grants] = {}


@contextlib.contextmanager
def temporary_access(path: Path, uid: int, *, write: bool = True) -> Iterator[None]:
    """Let ``uid`` open ``path`` for reading, and with ``write`` for writing, during the block."""
    file = path.stat()
    if uid in (0, file.st_uid) or (not write and file.st_mode & stat.S_IROTH):
        yield
        return
    key = file.st_dev, file.st_ino
    grants = _granted.setdefault(key, _Grants(stat.S_IMODE(file.st_mode)))
    user = uid, _READ | _WRITE if write else _READ
    grants.users.append(user)
    try:
        _apply(path, grants)
        yield
    finally:
        grants.users.remove(user)
        if not grants.users:
            del _granted[key]
        with contextlib.suppress(FileNotFoundError):
            _apply(path, grants)


def _apply(path: Path, grants: _Grants) -> None:
    try:
        if grants.users:
            permissions: dict[int, int] = {}
            for uid, permission in grants.users:
                permissions[uid] = permissions.get(uid, 0) | permission
            os.setxattr(path, _ACCESS, encode_acl(grants.mode, permissions))
        else:
            with contextlib.suppress(OSError):  # none was set
                os.removexattr(path, _ACCESS)
            path.chmod(grants.mode)  # with entries, the group bits showed their mask
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InternalError(f"{path} cannot be made accessible to a VMM's user: {error.strerror}") from error


def encode_acl(mode: int, permissions: Mapping[int, int]) -> bytes:
    """``mode`` and beside it ``permissions`` by user, in the kernel's form (acl(5))."""
    mask = mode >> 3 & 7
    for permission in permissions.values():
        mask |= permission
    entries = [
        (_USER_OBJ, mode >> 6 & 7, _NOBODY_IN_PARTICULAR),
        *((_USER, permission, user) for user, permission in sorted(permissions.items())),
        (_GROUP_OBJ, mode >> 3 & 7, _NOBODY_IN_PARTICULAR),
        (_MASK, mask, _NOBODY_IN_PARTICULAR),
        (_OTHER, mode & 7, _NOBODY_IN_PARTICULAR),
    ]
    return struct.pack("<I", _VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
