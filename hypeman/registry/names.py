"""Paths and errors of the distribution API (OCI distribution specification 1.1). Pure."""

from __future__ import annotations

import enum
import re
from typing import Any

from msgspec import Struct

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The first part may be a registry's host and port, since clients upload under the full name of a remote image.
_HOST = r"(?:[a-zA-Z0-9]+(?:(?:\.|-+)[a-zA-Z0-9]+)*(?::[0-9]{1,5})?)"
_REPOSITORY = re.compile(rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
_ANY_DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+")
_MAX_REPOSITORY = 255
_KINDS = (
    (re.compile(r"(?P<repository>.+)/blobs/uploads/?"), "uploads"),
    (re.compile(r"(?P<repository>.+)/blobs/uploads/(?P<reference>[^/]+)"), "upload"),
    (re.compile(r"(?P<repository>.+)/blobs/(?P<reference>[^/]+)"), "blob"),
    (re.compile(r"(?P<repository>.+)/manifests/(?P<reference>[^/]+)"), "manifest"),
    (re.compile(r"(?P<repository>.+)/tags/list"), "tags"),
    (re.compile(r"(?P<repository>.+)/referrers/(?P<reference>[^/]+)"), "referrers"),
)


class Code(enum.StrEnum):
    """Codes of the specification, and what registries use beyond it."""

    BLOB_UNKNOWN = "BLOB_UNKNOWN"
    BLOB_UPLOAD_INVALID = "BLOB_UPLOAD_INVALID"
    BLOB_UPLOAD_UNKNOWN = "BLOB_UPLOAD_UNKNOWN"
    DIGEST_INVALID = "DIGEST_INVALID"
    MANIFEST_BLOB_UNKNOWN = "MANIFEST_BLOB_UNKNOWN"
    MANIFEST_INVALID = "MANIFEST_INVALID"
    MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"
    NAME_INVALID = "NAME_INVALID"
    NAME_UNKNOWN = "NAME_UNKNOWN"
    SIZE_INVALID = "SIZE_INVALID"
    RANGE_INVALID = "RANGE_INVALID"
    UNAUTHORIZED = "UNAUTHORIZED"
    DENIED = "DENIED"
    UNSUPPORTED = "UNSUPPORTED"
    TOOMANYREQUESTS = "TOOMANYREQUESTS"
    UNAVAILABLE = "UNAVAILABLE"
    UNKNOWN = "UNKNOWN"


_STATUS = {
    Code.BLOB_UNKNOWN: 404,
    Code.BLOB_UPLOAD_UNKNOWN: 404,
    Code.MANIFEST_UNKNOWN: 404,
    Code.NAME_UNKNOWN: 404,
    Code.RANGE_INVALID: 416,
    Code.UNAUTHORIZED: 401,
    Code.DENIED: 403,
    Code.UNSUPPORTED: 405,
    Code.TOOMANYREQUESTS: 429,
    Code.UNAVAILABLE: 502,
    Code.UNKNOWN: 500,
}


class RegistryFailure(Exception):
    """A request that is refused, with the code of the specification."""

    def __init__(self, code: Code, message: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.headers = headers or {}

    @property
    def status(self) -> int:
        return _STATUS.get(self.code, 400)

    @property
    def body(self) -> dict[str, Any]:
        return {"errors": [{"code": self.code.value, "message": self.message}]}


class Target(Struct, frozen=True):
    """What a path below ``/v2/`` addresses."""

    kind: str
    """``uploads``, ``upload``, ``blob``, ``manifest``, ``tags`` or ``referrers``."""
    repository: str
    reference: str = ""
    """Digest, tag or upload id."""


def parse_path(rest: str) -> Target:
    """The target of ``/v2/<rest>``. Raises RegistryFailure: NAME_INVALID, NAME_UNKNOWN for any other path."""
    for pattern, kind in _KINDS:
        if (found := pattern.fullmatch(rest)) is not None:
            target = Target(kind, found["repository"], found.groupdict().get("reference", ""))
            check_repository(target.repository)
            return target
    raise RegistryFailure(Code.NAME_UNKNOWN, "there is nothing at this path")


def check_repository(name: str) -> str:
    """Raises RegistryFailure NAME_INVALID."""
    if len(name) > _MAX_REPOSITORY or not _REPOSITORY.fullmatch(name):
        raise RegistryFailure(Code.NAME_INVALID, f"{name[:100]!r} is not a repository name")
    return name


def check_digest(text: str) -> str:
    """Raises RegistryFailure DIGEST_INVALID."""
    if not _DIGEST.fullmatch(text):
        raise RegistryFailure(Code.DIGEST_INVALID, f"{text[:100]!r} is not a sha256 digest")
    return text


def is_digest(reference: str) -> bool:
    """Whether a manifest's reference is a digest. Raises RegistryFailure for one that is neither digest nor tag."""
    if _ANY_DIGEST.fullmatch(reference) and ":" in reference:
        check_digest(reference)
        return True
    if not _TAG.fullmatch(reference):
        raise RegistryFailure(Code.MANIFEST_INVALID, f"{reference[:150]!r} is neither a tag nor a digest")
    return False


def parse_content_range(text: str) -> tuple[int, int]:
    """First and last byte of an upload's ``Content-Range``, which has no unit. Raises RegistryFailure RANGE_INVALID."""
    found = re.fullmatch(r"(?:bytes[ =])?([0-9]{1,18})-([0-9]{1,18})(?:/(?:[0-9]+|\*))?", text.strip())
    if found is None or int(found[2]) < int(found[1]):
        raise RegistryFailure(Code.RANGE_INVALID, f"Content-Range {text[:60]!r} is not FIRST-LAST")
    return int(found[1]), int(found[2])


def parse_byte_range(text: str, size: int) -> tuple[int, int] | None:
    """First byte and the end of a single ``Range: bytes=…`` of ``size`` bytes; None to send everything (RFC 9110 14.2).
    Raises RegistryFailure RANGE_INVALID if it cannot be satisfied."""
    found = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", text.strip())
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        first, end = max(0, size - int(found[2])), size
    else:
        first, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
    if first >= end:
        raise RegistryFailure(
            Code.RANGE_INVALID, f"the range is beyond {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return first, end
