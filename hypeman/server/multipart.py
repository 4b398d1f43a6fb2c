"""Forms (multipart/form-data, RFC 7578) read as they arrive: pieces of their fields in order, never a whole file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData

from hypeman.errors import InvalidRequest
from hypeman.server.api import UploadStream

_MAX_WAITING = 256 << 10
"""Bytes that may come without being a field or content of one."""
MAX_PARTS = 100


async def read_form(body: UploadStream, content_type: str | None) -> AsyncIterator[tuple[str, bytes]]:
    """Name of a field and a piece of its content; each field has at least one piece, which may be empty.

    Raises InvalidRequest if ``body`` is no such form, or ends before it does.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get("boundary", "")
    if kind != "multipart/form-data" or not boundary:
        raise InvalidRequest("the body must be multipart/form-data")
    decoder = MultipartDecoder(boundary.encode(), max_parts=MAX_PARTS)
    name, waiting = "", 0
    try:
        async for chunk in body:
            decoder.receive_data(chunk)
            waiting += len(chunk)
            for event in _events(decoder):
                waiting = 0
                if isinstance(event, Field | File):
                    if not (name := event.name):
                        raise InvalidRequest("the form has a field without a name")
                    yield name, b""
                elif isinstance(event, Data) and event.data:
                    yield name, event.data
            if waiting > _MAX_WAITING:
                raise InvalidRequest("the form has a part without content, or goes on after its end")
        decoder.receive_data(None)
        for _ in _events(decoder):  # raises unless the end was there
            pass
    except RequestEntityTooLarge:
        raise InvalidRequest(f"a form may have {MAX_PARTS} fields") from None
    except ValueError as error:
        raise InvalidRequest(f"the form cannot be read: {error}") from None


def _events(decoder: MultipartDecoder) -> Iterator[Event]:
    while not isinstance(event := decoder.next_event(), NeedData):
        yield event
        if isinstance(event, Epilogue):
            return
