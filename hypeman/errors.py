"""Everything that can go wrong and be told to a caller.

One tree, because the HTTP layer, the command line and the log all speak of the same failures:
each class has the ``status`` and the default ``code`` of the API contract (§1.4), and a message
written for the person who has to act on it. Anything that is not a ``HypemanError`` is a bug and
is answered with 500 ``internal_error``.

    HypemanError
    ├── InvalidRequest        400  the request itself is wrong (``code`` names the field)
    ├── Unauthorized          401
    ├── Forbidden             403
    ├── NotFound              404
    ├── Conflict              409
    │   ├── Ambiguous              the name or prefix fits several objects
    │   ├── AlreadyExists
    │   ├── NameConflict
    │   ├── InvalidState           legal, but not now
    │   ├── InUse
    │   └── InsufficientResources
    ├── RateLimited           429  an upstream registry throttles
    ├── InternalError         500  the machine refused: disk, kernel, VMM
    │   └── StoreError             the data base can not be used; nothing was changed
    └── NotSupported          501  this server, host or hypervisor can not do it
"""

from __future__ import annotations

from typing import ClassVar


class HypemanError(Exception):
    """Base of all failures that are told to a caller."""

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = True
    """False where the same request fails in the same way until somebody changes something: SDKs retry 409 and
    every 5xx by themselves unless they get ``X-Should-Retry: false``."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code


class InvalidRequest(HypemanError):
    """The request is wrong whatever the state of the world."""

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
    status = 409
    default_code = "conflict"


class Ambiguous(Conflict):
    retryable = False
    default_code = "ambiguous"


class AlreadyExists(Conflict):
    retryable = False
    default_code = "already_exists"


class NameConflict(Conflict):
    retryable = False
    default_code = "name_conflict"


class InvalidState(Conflict):
    """The command is legal, but not in the state the object is in; the message names both."""

    retryable = False
    default_code = "invalid_state"


class InUse(Conflict):
    default_code = "in_use"


class InsufficientResources(Conflict):
    default_code = "insufficient_resources"


class RateLimited(HypemanError):
    """An upstream throttles; ``retry_after`` seconds when it said how long."""

    status = 429
    default_code = "rate_limited"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InternalError(HypemanError):
    """The machine below us refused: a disk, the kernel, a VMM."""


class StoreError(InternalError):
    """The data base can not be opened or written; what was there is untouched."""


class NotSupported(HypemanError):
    """This server, host or hypervisor can not do it; said before anything was touched."""

    status = 501
    retryable = False
    default_code = "not_supported"
