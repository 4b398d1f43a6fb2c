"""Messages of the WebSocket protocols ``v4.channel.k8s.io`` and ``v5.channel.k8s.io``. Pure.

A binary message is a channel's number and its bytes. v5 has, beyond v4, the end of a channel: 255 and its number. The
last message of the server is a Status on the error channel, with the program's exit code.
"""

from __future__ import annotations

import enum

import msgspec
from msgspec import Struct

V4, V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
_CLOSE = 255


class Channel(enum.IntEnum):
    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4


class Stdin(Struct, frozen=True):
    data: bytes


class StdinEnd(Struct, frozen=True):
    pass


class Resize(Struct, frozen=True):
    rows: int
    cols: int


class _Size(Struct, frozen=True, rename="pascal"):
    width: int
    height: int


def choose(offered: list[str]) -> str:
    """The newest protocol of those that a client offers; empty if there is none."""
    return next((each for each in (V5, V4) if each in offered), "")


def parse_message(data: bytes) -> Stdin | StdinEnd | Resize | None:
    """What a client's message means; None if nothing, as an unknown channel."""
    match data[:1], data[1:]:
        case b"\x00", rest if rest:
            return Stdin(rest)
        case b"\xff", b"\x00":
            return StdinEnd()
        case b"\x04", rest:
            try:
                size = msgspec.json.decode(rest, type=_Size)
            except msgspec.DecodeError:
                return None
            return Resize(size.height, size.width)
    return None


def render(channel: Channel, data: bytes) -> bytes:
    return bytes([channel]) + data


def render_exit(code: int) -> bytes:
    """The last message of a program that ended with ``code``."""
    if code == 0:
        return render(Channel.ERROR, msgspec.json.encode({"metadata": {}, "status": "Success"}))
    status = {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }
    return render(Channel.ERROR, msgspec.json.encode(status))


def render_failure(message: str) -> bytes:
    """The last message if there is no exit code."""
    status = {"metadata": {}, "status": "Failure", "reason": "InternalError", "message": message, "code": 500}
    return render(Channel.ERROR, msgspec.json.encode(status))
