"""How a request to a guest fails, and what its agent's error numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypeman.errors import Conflict, HypemanError, InternalError, InUse, InvalidRequest, NotFound, NotSupported
from hypeman.guest.fields import MalformedFields
from hypeman.guest.protocol import Ended

_T = TypeVar("_T")

_NOT_THERE = {2, 20}  # Linux ENOENT, ENOTDIR, regardless of the host's numbers
_IN_THE_WAY = {17, 21, 39}  # EEXIST, EISDIR, ENOTEMPTY
_BUSY = 16
NOT_SUPPORTED = {38, 95}  # ENOSYS, EOPNOTSUPP
_INVALID = {22, 36, 40}  # EINVAL, ENAMETOOLONG, ELOOP


class GuestLost(InternalError):
    """The connection to the guest's agent has ended, or there is none."""


class GuestBroken(InternalError):
    """The guest's agent violates the protocol, or is not the one that we started."""


class GuestError(InternalError):
    """A request reached the guest and failed there; ``errno`` of the guest's kernel, 0 if there is none."""

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class GuestTimeout(HypemanError):
    """The guest did not answer in time; the request may or may not have taken effect."""

    status = 504
    default_code = "guest_timeout"


class VolumeBusy(InUse):
    """A volume cannot be unmounted; ``holders`` are the processes that use it, each as "pid (name)"."""

    def __init__(self, message: str, holders: tuple[str, ...]) -> None:
        super().__init__(message)
        self.holders = holders


def error_text(error: bytes, ended: Ended) -> str:
    return error.decode("utf-8", "replace") or ended.message or f"failed with code {ended.exit_code} in the guest"


def check(error: bytes, ended: Ended) -> None:
    """Raise the exception for a failed guest request."""
    if ended.exit_code == 0:
        return
    text, errno = error_text(error, ended), ended.exit_code
    if errno in _NOT_THERE:
        raise NotFound(text)
    if errno in _IN_THE_WAY or errno == _BUSY:
        raise Conflict(text)
    if errno in NOT_SUPPORTED:
        raise NotSupported(text)
    if errno in _INVALID:
        raise InvalidRequest(text)
    raise GuestError(text, errno=errno if errno < 128 else 0)


def parsed(parse: Callable[[bytes], _T], reply: bytes) -> _T:
    """The parsed reply. Raises GuestBroken if it is malformed."""
    try:
        return parse(reply)
    except MalformedFields as error:
        raise GuestBroken(str(error)) from error
