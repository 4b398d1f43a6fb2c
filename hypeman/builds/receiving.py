"""Forms of build requests as they arrive: the context becomes a file, the other fields stay in memory. Both are
bounded, for each form and for all together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio

from hypeman.builds.request import MAX_FIELD
from hypeman.errors import Conflict, InsufficientResources, InvalidRequest
from hypeman.host.files import HostError
from hypeman.images.blobs import write_all
from hypeman.units import format_size

MAX_FIELDS = 64
MAX_FORM = 8 << 20
"""Bytes of all fields of a form besides the source: they are received into memory."""
MAX_FORMS = 64 << 20
"""Of all forms that are being received."""
RECEIVING_SECONDS = 60.0
"""For the next piece of a form."""
_GZIP = b"\x1f\x8b"


class Receiver:
    """One per server. Counts contexts until ``forget``: also those of builds that wait or run."""

    def __init__(self, *, max_source: int, max_sources: int, room: Callable[[], int]) -> None:
        """Bytes of one context, of all, and of what the disk has left for them."""
        self._max_source = max_source
        self._max_sources = max_sources
        self._room = room
        self._sources: dict[str, int] = {}
        self._held = 0
        """Bytes of fields of forms that are being received."""

    @property
    def source_bytes(self) -> int:
        """Of all contexts that are kept or being received."""
        return sum(self._sources.values())

    def remember(self, build_id: str, size: int) -> None:
        """A context that an earlier server has received."""
        self._sources[build_id] = size

    def forget(self, build_id: str) -> None:
        """The context was removed, or is about to be. Idempotent."""
        self._sources.pop(build_id, None)

    async def receive(
        self, parts: AsyncIterator[tuple[str, bytes]], build_id: str, source: Path
    ) -> tuple[dict[str, bytes], str]:
        """The fields besides the source, which is written to the new file ``source``, and its sha256.

        Raises InvalidRequest (``invalid_request``, ``invalid_source``), InsufficientResources, Conflict, HostError.
        """
        fields: dict[str, bytearray] = {}
        held = 0
        fd = os.open(source, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        context = _Context(fd)
        try:
            while (part := await _next_part(parts)) is not None:
                name, piece = part
                if name == "source":
                    self._count(build_id, len(piece))
                    await context.add(piece)
                    continue
                field = fields.setdefault(name, bytearray())
                field += piece
                held += len(piece)
                self._held += len(piece)
                if len(field) > MAX_FIELD or len(fields) > MAX_FIELDS or held > MAX_FORM:
                    raise InvalidRequest(
                        f"{name[:80]!r}: a field may have at most {MAX_FIELD} bytes, and a form {MAX_FIELDS} fields "
                        f"with at most {MAX_FORM} bytes"
                    )
                if self._held > MAX_FORMS:
                    raise Conflict("too many large forms are being received; try again", retryable=True)
            await trio.to_thread.run_sync(os.fsync, fd)
        except OSError as error:
            raise HostError(f"the context cannot be stored: {error.strerror}") from error
        finally:
            self._held -= held
            os.close(fd)
        return {name: bytes(value) for name, value in fields.items()}, context.checked()

    def _count(self, build_id: str, size: int) -> None:
        total = self._sources[build_id] = self._sources.get(build_id, 0) + size
        if total > self._max_source:
            raise InvalidRequest(f"the context is larger than {format_size(self._max_source)}", code="invalid_source")
        if self.source_bytes > self._max_sources:
            raise InsufficientResources(
                f"contexts of builds that are not over may take {format_size(self._max_sources)} together "
                "(build.max_sources_size); try again when some are over",
                resource="disk",
            )
        if size > (room := self._room()):
            raise InsufficientResources(
                f"the context does not fit: {format_size(room)} are left for contexts on the server's disk",
                resource="disk",
            )


class _Context:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = hashlib.sha256()
        self._begin = b""

    async def add(self, piece: bytes) -> None:
        if len(self._begin) < len(_GZIP):
            self._begin += piece[: len(_GZIP)]
        if piece:
            await trio.to_thread.run_sync(self._store, piece)

    def _store(self, piece: bytes) -> None:
        write_all(self._fd, piece)
        self._digest.update(piece)

    def checked(self) -> str:
        """Its sha256. Raises InvalidRequest ``invalid_source``."""
        if not self._begin:
            raise InvalidRequest("source is missing: it is the context as a gzip-compressed tar", code="invalid_source")
        if self._begin[: len(_GZIP)] != _GZIP:
            raise InvalidRequest("source is not gzip-compressed", code="invalid_source")
        return f"sha256:{self._digest.hexdigest()}"


async def _next_part(parts: AsyncIterator[tuple[str, bytes]]) -> tuple[str, bytes] | None:
    """None at the end. Raises InvalidRequest if nothing comes."""
    try:
        with trio.fail_after(RECEIVING_SECONDS):
            return await anext(parts, None)
    except trio.TooSlowError:
        raise InvalidRequest(f"no data of the form arrived for {RECEIVING_SECONDS:.0f} s") from None
