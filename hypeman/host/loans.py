"""Lending a file of ours to one user for the moment in which his program opens it.

The file keeps its owner and mode; an access control entry names the one borrower. Several may borrow the
same file at once; the last to give it back leaves it as it was.
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


class _Loan(msgspec.Struct):
    mode: int
    """Permission bits to go back to."""
    borrowers: list[tuple[int, int]] = []
    """User and permission of each, in order."""


_loans: dict[tuple[int, int], _Loan] = {}


@contextlib.contextmanager
def lent(path: Path, uid: int, *, write: bool = True) -> Iterator[None]:
    """Let ``uid`` open ``path`` for reading, and with ``write`` for writing, as long as the block runs."""
    file = path.stat()
    if uid in (0, file.st_uid) or (not write and file.st_mode & stat.S_IROTH):
        yield
        return
    key = file.st_dev, file.st_ino
    loan = _loans.setdefault(key, _Loan(stat.S_IMODE(file.st_mode)))
    borrower = uid, _READ | _WRITE if write else _READ
    loan.borrowers.append(borrower)
    try:
        _apply(path, loan)
        yield
    finally:
        loan.borrowers.remove(borrower)
        if not loan.borrowers:
            del _loans[key]
        with contextlib.suppress(FileNotFoundError):
            _apply(path, loan)


def _apply(path: Path, loan: _Loan) -> None:
    try:
        if loan.borrowers:
            permissions: dict[int, int] = {}
            for uid, permission in loan.borrowers:
                permissions[uid] = permissions.get(uid, 0) | permission
            os.setxattr(path, _ACCESS, encode_acl(loan.mode, permissions))
        else:
            with contextlib.suppress(OSError):  # it never came to one
                os.removexattr(path, _ACCESS)
            path.chmod(loan.mode)  # with entries, the group bits showed their mask
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InternalError(f"{path} cannot be lent to a VMM's user: {error.strerror}") from error


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
