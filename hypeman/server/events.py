"""Objects as server-sent events: one event per object, with its JSON as the data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

_encode = msgspec.json.Encoder().encode


class ObjectStream(Protocol):
    def __aiter__(self) -> AsyncIterator[Any]: ...
    async def __anext__(self) -> Any: ...
    async def aclose(self) -> None: ...


class JsonEvents:
    """Encodes ``source`` as bytes to send; closing it closes ``source``."""

    def __init__(self, source: ObjectStream) -> None:
        self._source = source

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return b"data: " + _encode(await self._source.__anext__()) + b"\n\n"

    async def aclose(self) -> None:
        await self._source.aclose()
