"""Heads of requests that the connection answers itself (plain.py). Pure.

What is read here is decided narrowly: anything unusual is None, and then Hypercorn reads the head again and decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

END = b"\r\n\r\n"
_LENGTH = re.compile(rb"[0-9]{1,6}")
_HEADERS = re.compile(rb"(?:[-!#$%&'*+.^_`|~0-9A-Za-z]+:[\t\x20-\x7e]*\r\n)+")
_MORE_THAN_A_RESPONSE = frozenset(
    (b"transfer-encoding", b"upgrade", b"expect", b"http2-settings", b"te", b"trailer", b"idempotency-key")
)
_OF_BROWSERS = frozenset((b"cookie", b"origin", b"sec-fetch-site"))
"""With these, where the request comes from decides whether it is answered: app.py looks at that."""
_NOT_OF_AN_UPGRADE = _OF_BROWSERS | {
    *(b"transfer-encoding", b"content-length", b"expect", b"http2-settings", b"sec-websocket-extensions"),
}
_ONCE = frozenset((b"host", b"connection", b"upgrade", b"sec-websocket-key", b"sec-websocket-version"))
_TOKENS = frozenset((b"upgrade", b"keep-alive"))


class Headers(NamedTuple):
    """What a plain request's header block holds for us."""

    authorization: str | None
    request_id: str
    length: int
    """Of the body, in bytes."""
    traceparent: str
    last: bool
    """The client asked to close the connection after the response."""


class Upgrade(NamedTuple):
    """What the header block of a WebSocket's request holds for us."""

    authorization: str | None
    request_id: str
    key: bytes


def plain_headers(block: bytes) -> Headers | None:
    """The headers in ``block``, the lines of a head after its request line; None if they ask for more than a response,
    or if Hypercorn might refuse them."""
    if not _HEADERS.fullmatch(block):
        return None
    authorization, given_id, length, hosts, traceparent, last = None, None, None, 0, "", False
    for name, value in _lines(block):
        if name in _MORE_THAN_A_RESPONSE or name in _OF_BROWSERS or _is_browser(name, value):
            return None
        if name == b"connection":
            if last or (lowered := value.lower()) not in (b"keep-alive", b"close"):
                return None
            last = lowered == b"close"
        elif name == b"host":
            hosts += 1
        elif name == b"authorization" and authorization is None:
            authorization = value.decode("ascii")
        elif name == b"x-request-id" and given_id is None:
            given_id = value.decode("ascii")
        elif name == b"traceparent":
            traceparent = value.decode("ascii")
        elif name == b"content-length":
            if length is not None or not _LENGTH.fullmatch(value):
                return None
            length = int(value)
    return Headers(authorization, given_id or "", length or 0, traceparent, last) if hosts == 1 else None


def h2_headers(fields: Iterable[tuple[bytes, bytes]]) -> Headers | None:
    """The same of a request over HTTP/2 without a body."""
    found: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in _MORE_THAN_A_RESPONSE or name in _OF_BROWSERS or _is_browser(name, value) or not value.isascii():
            return None
        found.setdefault(name, value)
    if found.get(b"content-length", b"0") != b"0":
        return None
    authorization = found.get(b"authorization")
    return Headers(
        None if authorization is None else authorization.decode("ascii"),
        found.get(b"x-request-id", b"").decode("ascii"),
        0,
        found.get(b"traceparent", b"").decode("ascii"),
        False,
    )


def upgrade_headers(block: bytes) -> Upgrade | None:
    """The headers in ``block`` of a request that opens a WebSocket (RFC 6455 §4.2.1); None if it is another request,
    asks for extensions of the protocol, or comes from a browser."""
    if not _HEADERS.fullmatch(block):
        return None
    found: dict[bytes, bytes] = {}
    for name, value in _lines(block):
        if name in _NOT_OF_AN_UPGRADE or _is_browser(name, value) or (name in _ONCE and name in found):
            return None
        found.setdefault(name, value)
    tokens = {token.strip().lower() for token in found.get(b"connection", b"").split(b",")}
    if not (
        b"upgrade" in tokens <= _TOKENS
        and found.get(b"upgrade", b"").lower() == b"websocket"
        and found.get(b"sec-websocket-version") == b"13"
        and b"host" in found
        and found.get(b"sec-websocket-key")
    ):
        return None
    authorization = found.get(b"authorization")
    return Upgrade(
        None if authorization is None else authorization.decode("ascii"),
        found.get(b"x-request-id", b"").decode("ascii"),
        found[b"sec-websocket-key"],
    )


def _lines(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each header's name in lower case, and its value."""
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        yield name.lower(), value.strip(b" \t")


def _is_browser(name: bytes, value: bytes) -> bool:
    return name == b"user-agent" and value.startswith(b"Mozilla/")
