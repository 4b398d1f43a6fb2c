"""Renders the contract as an OpenAPI 3.1 document from the Operations and their types. Pure.

Nothing is duplicated: paths, scopes and statuses come from the declarations next to the handlers,
schemas from the Structs that decode requests and encode responses, so the document cannot differ
from the server's behaviour. ``tests/server/golden/openapi.json`` is the last reviewed version; a
difference there is a change of the contract and must be intended.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, get_args, get_origin

import msgspec

from hypeman import API_VERSION
from hypeman.server import examples
from hypeman.server.api import EventStream, Message, Operation, Page, UploadStream, WebSocketRoute
from hypeman.server.errors import ErrorBody

_INFO = {
    "title": "hypeman",
    "version": API_VERSION,
    "summary": "OCI images as micro-VMs on one host",
    "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
}
_TOKEN = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A repeated call with the same key and request returns the first one's response (for a day)",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_NOT_SCHEMAS = (None, EventStream, Page, UploadStream)


def render_document(operations: Iterable[Operation], sockets: Iterable[WebSocketRoute] = ()) -> dict[str, Any]:
    """The whole document; equal operations give byte-identical documents.

    OpenAPI has no WebSockets: ``sockets`` are GET operations whose success is 101, with the messages in the extension
    ``x-websocket``.
    """
    operations, sockets = tuple(operations), tuple(sockets)
    schemas = _Schemas(operations, sockets)
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas)
    for socket in sockets:
        paths.setdefault(socket.path, {})["get"] = _websocket(socket, schemas)
    return {
        "openapi": "3.1.0",
        "info": _INFO,
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(operation.tag for operation in operations)],
        "paths": paths,
        "components": {"securitySchemes": {"bearerAuth": _TOKEN}, "schemas": schemas.components()},
    }


class _Schemas:
    """The schemas of all types that the operations use."""

    def __init__(self, operations: tuple[Operation, ...], sockets: tuple[WebSocketRoute, ...]) -> None:
        messages = [message.form for socket in sockets for message in (*socket.receives, *socket.sends)]
        mentioned = [
            kind
            for operation in operations
            for kind in (operation.body, operation.answer, operation.or_list, operation.query, operation.form)
        ]
        wanted = [kind for kind in dict.fromkeys([ErrorBody, *mentioned, *messages]) if kind not in _NOT_SCHEMAS]
        found, components = msgspec.json.schema_components(wanted, ref_template="#/components/schemas/{name}")
        self._found: dict[Any, dict[str, Any]] = dict(zip(wanted, found, strict=True))
        self._components = components
        for name in _reachable(
            [self._found[operation.body] for operation in operations if operation.body in self._found], components
        ):
            _allow_null(components[name])
        self._queries = {operation.query.__name__ for operation in operations if operation.query is not None}

    def of(self, kind: Any) -> dict[str, Any]:
        return self._found[kind]

    def query_fields(self, kind: Any) -> tuple[dict[str, Any], list[str]]:
        schema = self._components[kind.__name__]
        return schema["properties"], schema.get("required", [])

    def components(self) -> dict[str, Any]:
        return {name: schema for name, schema in sorted(self._components.items()) if name not in self._queries}


def _reachable(schemas: Iterable[Any], components: dict[str, Any]) -> set[str]:
    """Names of the components that ``schemas`` refer to, directly or not."""
    names: set[str] = set()
    waiting = list(schemas)
    while waiting:
        match waiting.pop():
            case {"$ref": str(reference)} if (name := reference.rpartition("/")[2]) not in names:
                names.add(name)
                waiting.append(components[name])
            case dict() as schema:
                waiting.extend(schema.values())
            case list() as schemas:
                waiting.extend(schemas)
    return names


def _allow_null(component: dict[str, Any]) -> None:
    """In a request, null for a field that may be absent is as good as none (decode.py)."""
    for name, schema in component.get("properties", {}).items():
        if name not in component.get("required", ()) and {"type": "null"} not in schema.get("anyOf", ()):
            outer = {key: schema[key] for key in ("description", "default", "examples") if key in schema}
            inner = {key: value for key, value in schema.items() if key not in outer}
            choices = inner["anyOf"] if inner.keys() == {"anyOf"} else [inner]
            component["properties"][name] = {"anyOf": [*choices, {"type": "null"}], **outer}


def _operation(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [
            *_path_parameters(operation),
            *_query_parameters(operation, schemas),
            *_header_parameters(operation),
        ],
        "responses": _responses(operation, schemas),
    }
    if operation.description:
        described["description"] = operation.description
    if operation.body is not None:
        described["requestBody"] = _request_body(operation, schemas)
    described["security"] = [{"bearerAuth": [str(scope)]} for scope in operation.scopes]
    return described


def _websocket(socket: WebSocketRoute, schemas: _Schemas) -> dict[str, Any]:
    error = _error(schemas)
    fails = [400, 401, 403, 404, 409, 426, 500, 504]
    return {
        "operationId": socket.name,
        "tags": [socket.tag],
        "summary": socket.summary,
        "description": socket.description,
        "parameters": [_path_parameter(socket.path, "id")],
        "responses": {"101": {"description": HTTPStatus(101).phrase}}
        | {str(status): {"description": HTTPStatus(status).phrase, "content": error} for status in fails},
        "security": [{"bearerAuth": [str(socket.scope)]}],
        "x-websocket": {
            "receives": [_message(message, schemas) for message in socket.receives],
            "sends": [_message(message, schemas) for message in socket.sends],
        },
    }


def _message(message: Message, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": message.kind, "description": message.description}
    if message.form is not None:
        described |= {"schema": schemas.of(message.form), "example": _without_defaults(message.example)}
    return described


def _path_parameters(operation: Operation) -> list[dict[str, Any]]:
    return [_path_parameter(operation.path, name) for name in operation.path_parameters]


def _path_parameter(path: str, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
        "example": examples.path_value(path, name),
    }


def _without_defaults(value: Any) -> Any:
    """``value`` as a client would write it: without the fields that have their default."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        found = {config.tag_field: config.tag} if config.tag_field else {}
        for field in msgspec.structs.fields(value):
            own = getattr(value, field.name)
            default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            if own != default:
                found[field.encode_name] = _without_defaults(own)
        return found
    if isinstance(value, tuple):
        return [_without_defaults(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_defaults(each) for key, each in value.items()}
    return msgspec.to_builtins(value)


def _example_of(kind: Any) -> Any:
    """An example of a response of type ``kind``."""
    if get_origin(kind) is list:
        [item] = get_args(kind)
        return [] if item is Any else [_example_of(item)]
    return msgspec.to_builtins(examples.ANSWERS[kind])


def _error(schemas: _Schemas) -> dict[str, Any]:
    return {"application/json": {"schema": schemas.of(ErrorBody)}}


def _query_parameters(operation: Operation, schemas: _Schemas) -> list[dict[str, Any]]:
    if operation.query is None:
        return []
    fields, required = schemas.query_fields(operation.query)
    parameters = []
    for name, schema in fields.items():
        parameter: dict[str, Any] = {"name": name, "in": "query", "required": name in required, "schema": schema}
        if schema.get("type") == "object":
            parameter |= {"style": "deepObject", "explode": True}
        if (example := examples.QUERIES.get(operation.name, {}).get(name)) is not None:
            parameter["example"] = example
        parameters.append(parameter)
    return parameters


def _header_parameters(operation: Operation) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in operation.request_headers.items()
    ] + ([_IDEMPOTENCY_KEY] if _takes_key(operation) else [])


def _takes_key(operation: Operation) -> bool:
    return operation.method == "POST" and bool(operation.scopes)


def _request_body(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    if operation.form is not None:
        example = _without_defaults(examples.BODIES[operation.form])
        form = {"schema": schemas.of(operation.form), "example": example}
        return {"required": True, "content": {"multipart/form-data": form}}
    if operation.body is UploadStream:
        return {"required": True, "content": {"application/octet-stream": {}}}
    example = _without_defaults(examples.BODIES[operation.body])
    content = {"application/json": {"schema": schemas.of(operation.body), "example": example}}
    return {"required": operation.body_required, "content": content}


def _responses(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    success: dict[str, Any] = {"description": HTTPStatus(operation.status).phrase}
    if operation.answer in (EventStream, Page):
        success["content"] = {operation.media_type: _text_example(operation)}
        if operation.or_list is not None:
            as_list = {"schema": schemas.of(operation.or_list), "example": _example_of(operation.or_list)}
            success["content"]["application/json"] = as_list
    elif operation.answer is not None:
        success["content"] = {operation.media_type: {"schema": schemas.of(operation.answer)}}
        if operation.answer is not Any:
            success["content"][operation.media_type]["example"] = _example_of(operation.answer)
    failures = set(operation.fails)
    if operation.path_parameters or operation.query is not None:
        failures.add(400)
    if _takes_key(operation):
        failures |= {400, 422}
    if operation.scopes:
        failures |= {401, 403, 500}
    if operation.body not in (None, UploadStream):
        failures |= {400, 408, 413, 503}
    if not operation.unlimited and operation.scopes:
        failures.add(504)
    error = _error(schemas)
    return {str(operation.status): success} | {
        str(status): {"description": HTTPStatus(status).phrase, "content": error} for status in sorted(failures)
    }


def _text_example(operation: Operation) -> dict[str, Any]:
    """Of a response that is no JSON of a type; the document itself is its own example."""
    return {"example": examples.TEXTS[operation.name]} if operation.name in examples.TEXTS else {}
