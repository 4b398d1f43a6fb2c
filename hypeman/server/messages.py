"""What all WebSockets share (streams.py, kept_exec.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Protocol

from msgspec import Meta, Struct

CHUNK = 32 * 1024
"""Bytes in a message; some clients have buffers of exactly this size."""

_Size = Annotated[int, Meta(gt=0, lt=2**32)]


class Socket(Protocol):
    """The part of Quart's websocket that is used here. An empty binary message is received as None."""

    async def receive(self) -> str | bytes | None: ...
    async def send(self, data: str | bytes) -> None: ...
    async def close(self, code: int) -> None: ...


class Resize(Struct, frozen=True):
    """The new size of a terminal's window."""

    rows: _Size
    cols: _Size


def chunks(data: bytes) -> Iterator[bytes]:
    """``data`` in pieces of one message each."""
    for begin in range(0, len(data), CHUNK):
        yield data[begin : begin + CHUNK]
