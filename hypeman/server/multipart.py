"""Forms (multipart/form-data, RFC 7578) read as they arrive: pieces of their fields in order, never a whole file.

Werkzeug's decoder is not used: it adds a byte to a field if a chunk ends within the boundary that follows it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator

from hypeman.errors import InvalidRequest
from hypeman.server.api import UploadStream

MAX_PARTS = 100
_MAX_HEAD = 64 << 10
"""Bytes before a part, or of its headers."""
_MAX_BOUNDARY = 200
_PARAMETER = re.compile(r""";[ \t]*(?:([\w!#$%&'*+.^`|~-]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"|[^\s;"]*)[ \t]*)?""")
"""Of a header's value. Python's parser of mail takes time that grows with the square of the value's length."""


async def read_form(body: UploadStream, content_type: str | None) -> AsyncGenerator[tuple[str, bytes]]:
    """Name of a field and a piece of its content; each field has at least one piece, which may be empty.

    Raises InvalidRequest if ``body`` is no such form, or ends before it does. What follows the form is not read.
    """
    kind, boundary = (content_type or "").partition(";")[0].strip().lower(), _option(content_type or "", "boundary")
    if kind != "multipart/form-data" or not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise InvalidRequest("the body must be multipart/form-data, with its boundary in Content-Type")
    form = _Form(boundary)
    async for chunk in body:
        for piece in form.feed(chunk):
            yield piece
        if form.ended:
            return
    raise InvalidRequest("the form is not complete")


class _Form:
    """A form in pieces; pure."""

    def __init__(self, boundary: str) -> None:
        self._delimiter = b"\r\n--" + boundary.encode()
        self._buffer = bytearray(b"\r\n")  # the first boundary has no line before it
        self._name: str | None = None
        """Of the field whose content is next; None before its headers."""
        self._between = True
        """Before the first boundary, or behind one that may be the last."""
        self._begun = False
        self._parts = 0
        self.ended = False

    def feed(self, chunk: bytes) -> Iterator[tuple[str, bytes]]:
        self._buffer += chunk
        while not self.ended:
            if not self._begun:
                if not self._find_first():
                    return
            elif self._between:
                if not self._end_boundary():
                    return
            elif self._name is None:
                name = self._read_head()
                if name is None:
                    return
                self._name = name
                yield name, b""
            else:
                piece, whole = self._take()
                if piece:
                    yield self._name, piece
                if not whole:
                    return
                self._name = None

    def _find_first(self) -> bool:
        found = self._buffer.find(self._delimiter)
        if found < 0:
            self._check_head("a boundary was expected")
            return False
        del self._buffer[: found + len(self._delimiter)]
        self._begun = True
        return True

    def _end_boundary(self) -> bool:
        """What follows a boundary: the end of the form, or of the line."""
        if self._buffer.startswith(b"--"):
            self.ended = True
            return True
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            if len(self._buffer) > _MAX_BOUNDARY:
                raise InvalidRequest("the form cannot be read: a boundary does not end its line")
            return False
        if line.strip(b" \t"):
            raise InvalidRequest("the form cannot be read: a boundary does not end its line")
        self._buffer = bytearray(b"\r\n") + rest  # so that headers begin behind a line's end, also if there are none
        self._between = False
        return True

    def _read_head(self) -> str | None:
        """The name of the field that begins, once its headers are there."""
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            self._check_head("the end of a field's headers was expected")
            return None
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"a form may have {MAX_PARTS} fields")
        self._buffer = rest
        return _name_in(bytes(head))

    def _take(self) -> tuple[bytes, bool]:
        """Content of the field, and whether that is its end."""
        found = self._buffer.find(self._delimiter)
        if found >= 0:
            piece = bytes(self._buffer[:found])
            del self._buffer[: found + len(self._delimiter)]
            self._between = True
            return piece, True
        sure = max(0, len(self._buffer) - len(self._delimiter) + 1)
        piece = bytes(self._buffer[:sure])
        del self._buffer[:sure]
        return piece, False

    def _check_head(self, what: str) -> None:
        if len(self._buffer) > _MAX_HEAD:
            raise InvalidRequest(f"the form cannot be read: {what} within {_MAX_HEAD} bytes")


def _name_in(head: bytes) -> str:
    """The field's name in the headers of a part."""
    try:
        lines = head.decode().split("\r\n")
    except UnicodeDecodeError:
        raise InvalidRequest("the form cannot be read: its headers must be UTF-8") from None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-disposition" and (name := _option(value, "name")):
            return name
    raise InvalidRequest("the form has a field without a name")


def _option(header: str, name: str) -> str:
    """The parameter ``name`` of the header's value, without quotes; empty if there is none."""
    at = header.find(";")
    while at >= 0 and (found := _PARAMETER.match(header, at)):
        key, value = found.groups("")
        if key.lower() == name:
            return re.sub(r'\\(["\\])', r"\1", value[1:-1]) if value.startswith('"') else value
        at = found.end()
    return ""
