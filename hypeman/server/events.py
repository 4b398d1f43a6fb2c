"""Objects as server-sent events: one event per object, with its JSON as the data. Those of the event log also have
its cursor as their id."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

from hypeman.errors import HypemanError
from hypeman.server.errors import failure_of
from hypeman.server.services import EventFollower

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


class LoggedEvents:
    """Batches of the event log as bytes to send. Without events, the id still moves on: a client whose filter matches
    little reconnects near the end of the log."""

    def __init__(self, source: EventFollower) -> None:
        self._source = source
        self._ended = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._ended:
            raise StopAsyncIteration
        try:
            batch = await self._source.__anext__()
        except HypemanError as error:
            self._ended = True
            return b"event: error\ndata: " + failure_of(error).encode() + b"\n\n"
        if not batch:
            return b": alive\nid: %d\n\n" % self._source.cursor
        return b"".join([b"id: %d\ndata: %b\n\n" % (event.cursor, _encode(event)) for event in batch])

    async def aclose(self) -> None:
        await self._source.aclose()
