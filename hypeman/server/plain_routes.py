"""What a request line means, if it is that of a plain request or a WebSocket (plain.py). No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import msgspec

from hypeman.server.api import EventStream, Operation, UploadStream, WebSocketRoute
from hypeman.server.exchange import ServerSettings
from hypeman.server.routes import OPERATIONS
from hypeman.server.services import Services
from hypeman.server.streams import WEBSOCKETS
from hypeman.tokens import Verifier

_MAX_KNOWN = 1000
_MAX_KNOWN_LENGTH = 256
"""Bytes of a request target that is worth remembering."""
_REQUEST = re.compile(rb"([A-Z]+) (/[\w.~%:@!$&'()*+,;=/-]*(?:\?[\w.~%:@!$&'()*+,;=/?\[\]-]*)?)")


class Found(NamedTuple):
    """What a method and a request target mean."""

    operation: Operation
    decoder: msgspec.json.Decoder[Any] | None
    """For the body."""
    segments: Mapping[str, str]
    """Path parameters as the client wrote them."""
    query: bytes
    limit: float
    """Seconds."""


class FoundSocket(NamedTuple):
    """The WebSocket that a request target means."""

    route: WebSocketRoute
    segments: Mapping[str, str]


class PlainRoutes:
    """Those of ``operations`` that neither stream nor upload, found by request line, and ``sockets``; and what their
    answers need."""

    def __init__(
        self,
        operations: Iterable[Operation],
        sockets: Iterable[WebSocketRoute],
        services: Services,
        settings: ServerSettings,
        verifier: Verifier,
    ) -> None:
        self.services = services
        self.verifier = verifier
        self._limit = settings.request_timeout
        self._known: dict[bytes, Found | None] = {}
        self._templates: dict[tuple[str, int], list[_Template]] = {}
        self._sockets = [(tuple(route.path.split("/")[1:]), route) for route in sockets]
        self._fixed: dict[str, set[str]] = {}
        """Methods of paths without parameters; the others are not those of an operation whose parameter matches."""
        for operation in operations:
            parts = tuple(operation.path.split("/")[1:])
            if "{" not in operation.path:
                self._fixed.setdefault(operation.path, set()).add(operation.method)
            streams = operation.answer is EventStream or operation.body is UploadStream
            if not streams and not operation.takes_context and all(parts):
                decoder = None if operation.body is None else msgspec.json.Decoder(operation.body)
                of_this_length = self._templates.setdefault((operation.method, len(parts)), [])
                of_this_length.append(_Template(parts, operation, decoder))
        for templates in self._templates.values():  # a fixed segment goes before a parameter, from the left
            templates.sort(key=lambda each: [part.startswith("{") for part in each.parts])

    def find(self, line: bytes) -> Found | None:
        """The operation that ``line`` names, a request line without its version; None if Quart must decide."""
        try:
            return self._known[line]
        except KeyError:
            found = self._search(line)
        if len(line) <= _MAX_KNOWN_LENGTH:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[line] = found
        return found

    def _search(self, line: bytes) -> Found | None:
        match = _REQUEST.fullmatch(line)
        if match is None:
            return None
        path, _, query = match[2].partition(b"?")
        parts = path.decode("ascii").split("/")[1:]
        method = match[1].decode("ascii")
        if not all(parts) or method not in self._fixed.get(path.decode("ascii"), {method}):
            return None
        for template in self._templates.get((method, len(parts)), ()):
            if (segments := _segments(template.parts, parts)) is not None:
                limit = inf if template.operation.unlimited else self._limit
                return Found(template.operation, template.decoder, segments, query, limit)
        return None

    def find_socket(self, line: bytes) -> FoundSocket | None:
        """The WebSocket that ``line`` names; None if Quart must decide."""
        match = _REQUEST.fullmatch(line)
        if match is None or match[1] != b"GET":
            return None
        parts = match[2].partition(b"?")[0].decode("ascii").split("/")[1:]
        for template, route in self._sockets:
            if all(parts) and (segments := _segments(template, parts)) is not None:
                return FoundSocket(route, segments)
        return None


def routes_of(services: Services, settings: ServerSettings) -> PlainRoutes:
    """Those of the whole API."""
    return PlainRoutes(OPERATIONS, WEBSOCKETS, services, settings, Verifier(settings.jwt_secret))


def _segments(template: Sequence[str], parts: Sequence[str]) -> dict[str, str] | None:
    """The path parameters if ``parts`` of a path are those of ``template``."""
    if len(template) != len(parts) or not all(
        name == part or name.startswith("{") for name, part in zip(template, parts, strict=True)
    ):
        return None
    return {name[1:-1]: part for name, part in zip(template, parts, strict=True) if name.startswith("{")}


class _Template(NamedTuple):
    parts: tuple[str, ...]
    operation: Operation
    decoder: msgspec.json.Decoder[Any] | None
