"""SPDY/3.1 as far as port forwarding needs it: frames from bytes and bytes from frames. Pure.

kubectl's port-forward carries one SPDY connection in the messages of a WebSocket. Of the protocol it uses streams with
headers, data, resets and pings; no flow control, as its own library. Unknown control frames are skipped, as the
specification requires. Header blocks are compressed by zlib with the dictionary of the specification (§2.6.10.1).

Specification: https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping

from msgspec import Struct

MAX_FRAME = 1 << 20
"""Bytes; kubectl sends at most 32 KiB in one frame."""
MAX_HEADERS = 64 * 1024
REFUSED = 3
_CONTROL = 0x8000
_VERSION = 3
_FIN = 1
_SYN_REPLY, _RST_STREAM, _PING = 2, 3, 6

_WORDS = (
    "options|head|post|put|delete|trace|accept|accept-charset|accept-encoding|accept-language|accept-ranges|age|allow|"
    "authorization|cache-control|connection|content-base|content-encoding|content-language|content-length|"
    "content-location|content-md5|content-range|content-type|date|etag|expect|expires|from|host|if-match|"
    "if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|location|max-forwards|pragma|"
    "proxy-authenticate|proxy-authorization|range|referer|retry-after|server|te|trailer|transfer-encoding|upgrade|"
    "user-agent|vary|via|warning|www-authenticate|method|get|status|200 OK|version|HTTP/1.1|url|public|set-cookie|"
    "keep-alive|origin"
)
_TAIL = (
    b"100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritat"
    b"ive Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found5"
    b"00 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct N"
    b"ov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,applic"
    b"ation/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf"
    b"-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(struct.pack(">I", len(word)) + word.encode() for word in _WORDS.split("|")) + _TAIL


class Malformed(Exception):
    """Not SPDY/3, or beyond a limit: the connection must end."""


class SynStream(Struct, frozen=True):
    stream: int
    headers: Mapping[str, str]
    fin: bool = False


class Data(Struct, frozen=True):
    stream: int
    data: bytes
    fin: bool = False


class Reset(Struct, frozen=True):
    stream: int


class Ping(Struct, frozen=True):
    id: int


class GoAway(Struct, frozen=True):
    pass


Frame = SynStream | Data | Reset | Ping | GoAway


class Framer:
    """Both directions of one connection; header blocks share a compression state for each."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with ``data``. Raises Malformed."""
        self._received += data
        while len(self._received) >= 8:
            length = int.from_bytes(self._received[5:8])
            if length > MAX_FRAME:
                raise Malformed(f"a frame of {length} bytes")
            if len(self._received) < 8 + length:
                return
            head, body = bytes(self._received[:8]), bytes(self._received[8 : 8 + length])
            del self._received[: 8 + length]
            if (frame := self._parse(head, body)) is not None:
                yield frame

    def _parse(self, head: bytes, body: bytes) -> Frame | None:
        first, second = struct.unpack(">HH", head[:4])
        fin = bool(head[4] & _FIN)
        if not first & _CONTROL:
            return Data(int.from_bytes(head[:4]), body, fin)
        if first & ~_CONTROL != _VERSION:
            raise Malformed(f"version {first & ~_CONTROL} of SPDY")
        try:
            match second:
                case 1:  # SYN_STREAM: stream, associated stream, priority and slot, headers
                    return SynStream(_number(body), self._headers(body[10:]), fin)
                case 3:  # RST_STREAM
                    return Reset(_number(body))
                case 6:  # PING
                    return Ping(struct.unpack(">I", body)[0])
                case 7:  # GOAWAY
                    return GoAway()
                case 2 | 8:  # SYN_REPLY, HEADERS: of no use, but they advance the compression state
                    self._headers(body[4:])
        except (struct.error, zlib.error, UnicodeDecodeError) as error:
            raise Malformed(f"control frame {second}: {error}") from None
        return None

    def _headers(self, block: bytes) -> dict[str, str]:
        plain = self._inflate.decompress(block, MAX_HEADERS)
        if self._inflate.unconsumed_tail:
            raise Malformed("the headers are too long")
        (count,) = struct.unpack_from(">I", plain)
        at, texts = 4, []
        if count > len(plain):
            raise Malformed(f"{count} headers")
        for _ in range(2 * count):
            (length,) = struct.unpack_from(">I", plain, at)
            texts.append(plain[at + 4 : at + 4 + length].decode())
            at += 4 + length
        if at > len(plain):
            raise Malformed("a header that is cut off")
        return {name.lower(): value for name, value in zip(texts[::2], texts[1::2], strict=True)}

    def render_reply(self, stream: int) -> bytes:
        """SYN_REPLY without headers."""
        block = self._deflate.compress(struct.pack(">I", 0)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        return _control(_SYN_REPLY, struct.pack(">I", stream) + block)

    def render_data(self, stream: int, data: bytes, *, fin: bool = False) -> bytes:
        return struct.pack(">I", stream) + bytes([_FIN if fin else 0]) + len(data).to_bytes(3) + data

    def render_reset(self, stream: int, status: int) -> bytes:
        return _control(_RST_STREAM, struct.pack(">II", stream, status))

    def render_ping(self, number: int) -> bytes:
        return _control(_PING, struct.pack(">I", number))


def _control(kind: int, body: bytes) -> bytes:
    return struct.pack(">HH", _CONTROL | _VERSION, kind) + b"\0" + len(body).to_bytes(3) + body


def _number(body: bytes) -> int:
    """The stream at the beginning of a frame. Raises struct.error."""
    return int(struct.unpack_from(">I", body)[0]) & 0x7FFFFFFF
