"""Heads of requests and responses on their way through: what is refused, removed and added. Pure."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from msgspec import Struct

from hypeman.ingress.hostnames import parse_host

Headers = Sequence[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings")
)  # fmt: skip
_OURS = frozenset((b"forwarded", b"x-real-ip"))
_OURS_BEFORE = b"x-forwarded-"


class BadRequest(Exception):
    """The request is not passed on."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Head(Struct, frozen=True):
    """What a request's head says."""

    method: bytes
    target: bytes
    """In origin form."""
    host: str
    host_header: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    is_chunked: bool
    upgrade: bytes
    """The protocol to which the client wants to change; empty for none."""

    @property
    def has_body(self) -> bool:
        return self.is_chunked or any(name == b"content-length" and value != b"0" for name, value in self.headers)


def read_head(method: bytes, target: bytes, version: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Head:
    """Names are in lower case. Raises BadRequest."""
    given = tuple((bytes(name), bytes(value)) for name, value in headers)
    if method in (b"CONNECT", b"TRACE"):
        raise BadRequest(405, "this method is not available here")
    if any(name == b"transfer-encoding" for name, _ in given) and any(name == b"content-length" for name, _ in given):
        raise BadRequest(400, "the request has two lengths")
    hosts = [value for name, value in given if name == b"host"]
    if len(hosts) != 1:
        raise BadRequest(400, "the request needs one Host header")
    host = parse_host(hosts[0].decode("latin-1"))
    if target[:1] != b"/" and target != b"*":
        target = _origin_form(target, hosts[0])
    if host is None:
        raise BadRequest(404, "no such site here")
    if target == b"*" and method != b"OPTIONS":
        raise BadRequest(400, "the request's target is not understood")
    nominated = _tokens(given, b"connection")
    upgrade = b""
    if version == b"1.1" and b"upgrade" in nominated:
        # Not to h2c: later requests on it would be neither routed nor checked.
        upgrade = b", ".join(value for name, value in given if name == b"upgrade" and b"h2c" not in value.lower())
    is_chunked = any(name == b"transfer-encoding" for name, _ in given)
    return Head(method, target, host, hosts[0], given, is_chunked, upgrade)


def _origin_form(target: bytes, host: bytes) -> bytes:
    """Of the absolute form, whose host must be that of the Host header."""
    try:
        parts = urlsplit(target.decode("ascii"))
    except (UnicodeDecodeError, ValueError):
        raise BadRequest(400, "the request's target is not understood") from None
    if parts.scheme.lower() not in ("http", "https") or parts.netloc.lower() != host.decode("latin-1").lower():
        raise BadRequest(400, "the request's target is not understood")
    rest = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return rest.encode("ascii")


def _tokens(headers: Headers, wanted: bytes) -> set[bytes]:
    return {token.strip().lower() for name, value in headers if name == wanted for token in value.split(b",")} - {b""}


def is_authorized(headers: Headers, name: str, value: str) -> bool:
    """Whether the header is there exactly once with this value. Compared in constant time."""
    given = [each for key, each in headers if key == name.lower().encode()]
    return len(given) == 1 and hmac.compare_digest(given[0], value.encode())


def request_headers(head: Head, *, client: str, scheme: str, secret: str = "") -> list[tuple[bytes, bytes]]:
    """What the guest gets. ``secret``: the name of the header that is not passed on.

    What a client claims about its own forwarding is removed, with all spellings that CGI regards as equal.
    """
    nominated = _tokens(head.headers, b"connection") - {b"host", b"content-length"}
    dropped = _HOP_BY_HOP | nominated | {_folded(secret.encode().lower())}
    kept = [
        (name, value)
        for name, value in head.headers
        if name not in dropped
        and not (folded := _folded(name)).startswith(_OURS_BEFORE)
        and folded not in _OURS
        and (not secret or folded != _folded(secret.encode().lower()))
    ]
    node = f'"[{client}]"' if ":" in client else client
    host = head.host_header.decode("latin-1")
    kept += [
        (b"x-forwarded-for", client.encode()),
        (b"x-forwarded-proto", scheme.encode()),
        (b"x-forwarded-host", head.host_header),
        (b"forwarded", f'for={node};host="{host}";proto={scheme}'.encode("latin-1")),
    ]
    if head.is_chunked:
        kept.append((b"transfer-encoding", b"chunked"))
    if head.upgrade:
        kept += [(b"connection", b"upgrade"), (b"upgrade", head.upgrade)]
    return kept


def response_headers(headers: Headers, *, switching: bool = False) -> list[tuple[bytes, bytes]]:
    """What the client gets; ``switching``: of a 101."""
    nominated = _tokens(headers, b"connection") - {b"content-length", b"set-cookie"}
    kept = [(name, value) for name, value in headers if name not in _HOP_BY_HOP and name not in nominated]
    if switching:
        kept += [(b"connection", b"upgrade"), *((name, value) for name, value in headers if name == b"upgrade")]
    return kept


def _folded(name: bytes) -> bytes:
    return name.replace(b"_", b"-")
