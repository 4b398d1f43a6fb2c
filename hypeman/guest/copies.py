"""Files and trees that are copied into a guest and out of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType

import trio

from hypeman.guest.channel import Channel, Session
from hypeman.guest.failures import GuestBroken, check, parsed
from hypeman.guest.fields import Fields, FieldWriter, Tag
from hypeman.guest.protocol import Op
from hypeman.guest.types import CopyEntry, FileKind, parse_copy_entry


class CopyIn:
    """A file being copied into the guest. ``finish`` moves it into place; leaving the context without it undoes
    everything."""

    def __init__(self, channel: Channel, session: Session) -> None:
        self._channel = channel
        self._session = session

    async def send(self, data: bytes) -> None:
        """Waits while the guest is busy. Errors of the guest are raised by ``finish``."""
        await self._session.send(data)

    async def finish(self) -> int:
        """Bytes written. Raises InvalidRequest, Conflict, NotFound or GuestError on failure."""
        self._channel.send_end(self._session.id)
        reply, error, ended = await self._session.finish()
        self._channel.close(self._session)
        check(error, ended)
        return parsed(Fields, reply).u64(Tag.SIZE)

    async def aclose(self) -> None:
        self._channel.close(self._session)
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> CopyIn:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close(self._session)


class CopyOut:
    """A file or tree being copied out of the guest: each entry, followed for files by the data in chunks, ``size``
    bytes in total.

    Errors of the guest are raised by the iteration: NotFound if the path does not exist, else GuestError.
    """

    def __init__(self, channel: Channel, request: FieldWriter) -> None:
        self._channel = channel
        self._request = request
        self._session: Session | None = None
        self._items: AsyncGenerator[CopyEntry | bytes, None] | None = None

    async def open(self) -> None:
        self._session = await self._channel.open(Op.COPY_FROM, self._request)
        self._items = _read_tree(self._session)

    def __aiter__(self) -> CopyOut:
        return self

    async def __anext__(self) -> CopyEntry | bytes:
        assert self._items is not None, "it is open"
        return await self._items.__anext__()

    async def aclose(self) -> None:
        if self._session is not None:
            self._channel.close(self._session)
        if self._items is not None:
            await self._items.aclose()

    async def __aenter__(self) -> CopyOut:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


async def _read_tree(session: Session) -> AsyncGenerator[CopyEntry | bytes, None]:
    """The reply of COPY_FROM: u32 length, entry, then exactly the data that the entry announces."""
    reader = _TreeReader(session)
    while (header := await reader.read_header()) is not None:
        entry = parsed(parse_copy_entry, header)
        yield entry
        left = entry.size if entry.kind is FileKind.FILE else 0
        while left:
            data = await reader.read_some(left)
            left -= len(data)
            yield data


class _TreeReader:
    """Reads the stream of a tree in exact lengths."""

    _MAX_HEADER = 16384

    def __init__(self, session: Session) -> None:
        self._session = session
        self._buffer = b""
        self._error: list[bytes] = []

    async def read_header(self) -> bytes | None:
        """The next entry, or None at the end."""
        if not await self._fill(4, may_end=True):
            return None
        length = int.from_bytes(self._take(4), "little")
        if length > self._MAX_HEADER:
            raise GuestBroken("an entry of impossible size")
        await self._fill(length)
        return self._take(length)

    async def read_some(self, limit: int) -> bytes:
        await self._fill(1)
        return self._take(min(limit, len(self._buffer)))

    def _take(self, count: int) -> bytes:
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def _fill(self, count: int, *, may_end: bool = False) -> bool:
        while len(self._buffer) < count:
            chunk = await self._session.receive()
            if chunk is None:
                ended = self._session.ended
                assert ended is not None
                check(b"".join(self._error), ended)
                if may_end and not self._buffer:
                    return False
                raise GuestBroken("the tree ends in the middle of an entry")
            if chunk.stderr:
                self._error.append(chunk.data)
                if len(self._error) > 64:
                    raise GuestBroken("the guest's error text does not end")
            else:
                self._buffer = self._buffer + chunk.data if self._buffer else chunk.data
        return True
