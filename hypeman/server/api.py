"""Route declarations: an ordinary function with its method, path and scope next to it.

    routes = Routes("devices")

    @routes.get("/devices/{id}", Scope.DEVICE_READ, fails=(404,))
    async def get_device(services: Services, id: str) -> Device:
        \"\"\"One device, by id or name.\"\"\"
        return await services.devices.get(id)

The signature is the declaration: ``body`` is decoded from JSON into its annotation (or is the
UploadStream), ``query`` likewise from the query string, ``context`` is the Context; every other
parameter is a path parameter.
A ``body`` with the default None is optional. The return annotation is the response type, the
docstring the documentation. The server (``app.py``) and the document (``openapi.py``) both use the
Operation created here, so that they cannot disagree. Pure: independent of the web framework.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal, Protocol, TypedDict, Unpack

from msgspec import Struct

from hypeman.telemetry.metrics import InstanceVerb
from hypeman.tokens import Caller, Scope

_PATH_PARAMETER = re.compile(r"{(\w+)}")


class UploadStream(Protocol):
    """A request body too large for memory: chunks as they arrive, with backpressure on the sender."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class ByteStream(Protocol):
    """A streamed response; closed when it ends or the client disconnects."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def __anext__(self) -> bytes: ...
    async def aclose(self) -> None: ...


class Page(Struct, frozen=True):
    """A response that is not JSON."""

    content: bytes
    media_type: str


class EventStream(Struct, frozen=True):
    """Server-sent events."""

    chunks: ByteStream


SSE_HEADERS = {"Cache-Control": "no-cache", "Connection": "keep-alive", "X-Accel-Buffering": "no"}
"""Headers of an event stream: proxies must not cache or buffer it."""


class Context(Struct, frozen=True):
    """The request as a handler sees it, if it has a parameter ``context``."""

    caller: Caller
    header: Callable[[str], str | None]
    """The value of a request header; None if it is absent."""


class Operation(Struct, frozen=True, kw_only=True):
    """One method on one path."""

    method: str
    path: str
    """Path template with ``{name}`` for parameters."""
    name: str
    tag: str
    scopes: tuple[Scope, ...]
    """The caller must have one of them. Empty: no authentication."""
    handler: Callable[..., Awaitable[Any]]
    summary: str
    description: str
    path_parameters: tuple[str, ...]
    query: Any = None
    body: Any = None
    body_required: bool = False
    answer: Any = None
    """None: no content."""
    status: int
    fails: tuple[int, ...]
    """Error statuses besides those common to all operations."""
    media_type: str
    measure: InstanceVerb | None
    """The verb whose duration metric covers this operation; None for none."""
    unlimited: bool
    """No time limit: a stream, or a wait requested by the client."""
    headers: dict[str, str]
    location: str = ""
    """Template of the Location header, from the fields of the answer."""
    request_headers: dict[str, str] = {}
    """Request headers that the handler reads, with their descriptions."""
    takes_context: bool = False
    or_list: Any = None
    """What the handler may return instead of an EventStream, as JSON."""
    form: type[Struct] | None = None
    """Fields of a form (multipart/form-data) that the handler reads from its UploadStream."""


class Message(Struct, frozen=True):
    """One kind of message of a WebSocket."""

    kind: Literal["text", "binary"]
    description: str
    form: Any = None
    """Type of the JSON in it, if it is JSON."""
    example: Any = None


class WebSocketRoute(Struct, frozen=True, kw_only=True):
    """One path that is a WebSocket."""

    path: str
    name: str
    tag: str
    scope: Scope
    handler: Callable[..., Awaitable[None]]
    summary: str
    description: str
    receives: tuple[Message, ...]
    """What the server receives; the first message must be the first of them."""
    sends: tuple[Message, ...]


class Options(TypedDict, total=False):
    """What a route may declare besides its method, path and scope."""

    status: int | None
    fails: tuple[int, ...]
    media_type: str
    unlimited: bool
    headers: dict[str, str] | None
    location: str
    measure: InstanceVerb | None
    request_headers: dict[str, str]
    form: type[Struct] | None


_Scopes = Scope | tuple[Scope, ...] | None
"""One scope, several of which one is enough, or None for no authentication."""


class Routes:
    """The operations of one capability."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.operations: list[Operation] = []

    def get(self, path: str, scope: _Scopes, **options: Unpack[Options]) -> Callable[[_Handler], _Handler]:
        return self.declare("GET", path, scope, **options)

    def post(self, path: str, scope: _Scopes, **options: Unpack[Options]) -> Callable[[_Handler], _Handler]:
        return self.declare("POST", path, scope, **options)

    def put(self, path: str, scope: _Scopes, **options: Unpack[Options]) -> Callable[[_Handler], _Handler]:
        return self.declare("PUT", path, scope, **options)

    def patch(self, path: str, scope: _Scopes, **options: Unpack[Options]) -> Callable[[_Handler], _Handler]:
        return self.declare("PATCH", path, scope, **options)

    def delete(self, path: str, scope: _Scopes, **options: Unpack[Options]) -> Callable[[_Handler], _Handler]:
        return self.declare("DELETE", path, scope, **options)

    def declare(
        self,
        method: str,
        path: str,
        scope: _Scopes,
        *,
        status: int | None = None,
        fails: tuple[int, ...] = (),
        media_type: str = "application/json",
        unlimited: bool = False,
        headers: dict[str, str] | None = None,
        location: str = "",
        measure: InstanceVerb | None = None,
        request_headers: dict[str, str] | None = None,
        form: type[Struct] | None = None,
    ) -> Callable[[_Handler], _Handler]:
        def declare(handler: _Handler) -> _Handler:
            hints = typing.get_type_hints(handler, include_extras=True)
            answer, or_list = _answer_of(hints["return"])
            body, body_required = _body_of(handler, hints)
            doc = inspect.getdoc(handler) or ""
            summary, _, description = doc.partition("\n\n")
            self.operations.append(
                Operation(
                    method=method,
                    path=path,
                    name=handler.__name__,
                    tag=self.tag,
                    scopes=(scope,) if isinstance(scope, Scope) else scope or (),
                    handler=handler,
                    summary=" ".join(summary.split()),
                    description=" ".join(description.split()),
                    path_parameters=tuple(_PATH_PARAMETER.findall(path)),
                    query=hints.get("query"),
                    body=body,
                    body_required=body_required,
                    answer=answer,
                    status=status or (200 if answer is not None else 204),
                    fails=fails,
                    media_type=media_type,
                    unlimited=unlimited,
                    headers=headers or {},
                    location=location,
                    measure=measure,
                    request_headers=request_headers or {},
                    takes_context="context" in hints,
                    or_list=or_list,
                    form=form,
                )
            )
            return handler

        return declare


_Handler = typing.TypeVar("_Handler", bound=Callable[..., Awaitable[Any]])


def _answer_of(hint: Any) -> tuple[Any, Any]:
    """The type of the response, None for no content, and the alternative to an event stream."""
    if hint is types.NoneType:
        return None, None
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
    if EventStream in members:
        return EventStream, next(kind for kind in members if kind is not EventStream)
    return hint, None


def _body_of(handler: Callable[..., Any], hints: dict[str, Any]) -> tuple[Any, bool]:
    """The type of the body without its ``| None``, and whether it is required."""
    if "body" not in hints:
        return None, False
    wanted = hints["body"]
    optional = inspect.signature(handler).parameters["body"].default is None
    if optional:
        wanted = next(kind for kind in typing.get_args(wanted) if kind is not types.NoneType)
    return wanted, not optional
