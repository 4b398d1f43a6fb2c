"""All errors that are reported to a caller.

One hierarchy, because the HTTP layer, the command line and the log report the same failures: each
class has the ``status`` and the default ``code`` of the API contract (§1.4), and a message written
for the person who has to act on it. Anything that is not a ``HypemanError`` is a bug and is answered
with 500 ``internal_error``.

    HypemanError
    ├── InvalidRequest        400  the request itself is wrong (``code`` names the field)
    ├── Unauthorized          401
    ├── Forbidden             403
    ├── NotFound              404
    ├── Conflict              409
    │   ├── Ambiguous              the name or prefix matches several objects
    │   ├── AlreadyExists
    │   ├── NameConflict
    │   ├── InvalidState           legal, but not now
    │   ├── InUse
    │   │   └── PortInUse          of the host, by an instance or another program
    │   └── InsufficientResources
    ├── RateLimited           429  an upstream registry throttles
    ├── InternalError         500  the machine refused: disk, kernel, VMM
    │   └── StoreError             the database cannot be used; nothing was changed
    └── NotSupported          501  this server, host or hypervisor cannot do it
"""

from __future__ import annotations

from typing import ClassVar


class HypemanError(Exception):
    """Base of all errors that are reported to a caller."""

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal_error"
    retryable: bool = True
    """False if the same request fails again until something is changed: SDKs automatically retry 409 and every
    5xx unless they get ``X-Should-Retry: false``."""

    def __init__(self, message: str, *, code: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        if retryable is not None:
            self.retryable = retryable


class InvalidRequest(HypemanError):
    """The request is invalid regardless of the current state."""

    status = 400
    default_code = "invalid_request"


class Unauthorized(HypemanError):
    status = 401
    default_code = "Unauthorized"


class Forbidden(HypemanError):
    status = 403
    default_code = "Forbidden"


class NotFound(HypemanError):
    status = 404
    default_code = "not_found"


class Conflict(HypemanError):
    """Final unless raised with ``retryable=True``: what passes by itself within seconds."""

    status = 409
    retryable = False
    default_code = "conflict"


class Ambiguous(Conflict):
    default_code = "ambiguous"


class AlreadyExists(Conflict):
    default_code = "already_exists"


class NameConflict(Conflict):
    default_code = "name_conflict"


class InvalidState(Conflict):
    """The command is legal, but not in the object's current state; the message names both."""

    default_code = "invalid_state"


class InUse(Conflict):
    default_code = "in_use"


class PortInUse(InUse):
    """A port of the host belongs to an instance or another program, which the message names."""

    retryable = False
    default_code = "port_in_use"


class InsufficientResources(Conflict):
    """Capacity is taken; it becomes free when others end."""

    retryable = True
    default_code = "insufficient_resources"

    def __init__(self, message: str, *, resource: str = "", amount: int = 0) -> None:
        """``amount``: how much of ``resource`` is missing, if that is known."""
        super().__init__(message)
        self.resource = resource
        self.amount = amount


class RateLimited(HypemanError):
    """An upstream throttles; ``retry_after`` in seconds if it gave a delay."""

    status = 429
    default_code = "rate_limited"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InternalError(HypemanError):
    """The host failed: a disk, the kernel, a VMM."""


class StoreError(InternalError):
    """The database cannot be opened or written; existing data is unchanged."""


class NotSupported(HypemanError):
    """This server, host or hypervisor cannot do it; raised before anything was changed."""

    status = 501
    retryable = False
    default_code = "not_supported"


def cause_of(error: BaseException) -> str:
    """What has happened: the text of ``error``, or of the nearest of its causes that has one, as a failed TLS handshake
    does, which is reported as an exception without text; else its type."""
    found: BaseException | None = error
    while found is not None:
        if text := str(found):
            return text
        found = found.__cause__ or found.__context__  # httpcore hides it: ``raise … from None``
    return type(error).__name__
