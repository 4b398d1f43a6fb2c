"""Decodes the bytes of a request into the Struct that a route expects. Pure.

Bodies are strict (``"2"`` is not a number); queries are text and therefore lax. Unknown keys are
ignored, as the contract says; any other mismatch is a SchemaViolation that names the location.
``tags[key]=value`` pairs (deepObject, §1.8) become the dict ``tags``.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec

from hypeman.server.errors import SchemaViolation

_MAX_QUERY_FIELDS = 200


def decode_body(data: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Decode the Struct in ``data``. Raises SchemaViolation."""
    if not data:
        raise SchemaViolation("a JSON body is required")
    try:
        return _decode(data, decoder)
    except msgspec.ValidationError as error:
        raise SchemaViolation(f"body: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SchemaViolation(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise SchemaViolation("the body is not JSON: nested too deeply") from None


def _decode(data: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    """A null for a field with a default is as good as none, and 2.0 is an integer, as in JSON Schema. Raises msgspec's
    exceptions."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError:
        tree = without_nulls(msgspec.json.decode(data), _type_info(decoder.type))  # type: ignore[arg-type]  # classes are hashable
        return decoder.decode(msgspec.json.encode(tree))


@cache
def _type_info(kind: type[Any]) -> msgspec.inspect.Type:
    """Kept for each type of body: msgspec evaluates every annotation, which takes longer than the rest of a request."""
    return msgspec.inspect.type_info(kind)


def without_nulls(value: Any, kind: msgspec.inspect.Type) -> Any:
    """``value`` without null where ``kind`` has a Struct's field that may be absent, and with whole numbers as ints
    where ``kind`` has integers."""
    match kind:
        case msgspec.inspect.Metadata():
            return without_nulls(value, kind.type)
        case msgspec.inspect.IntType() if isinstance(value, float) and value.is_integer():
            return int(value)
        case msgspec.inspect.StructType() if isinstance(value, dict):
            fields = {field.encode_name: field for field in kind.fields}
            return {
                key: without_nulls(item, fields[key].type) if key in fields else item
                for key, item in value.items()
                if item is not None or key not in fields or fields[key].required
            }
        case msgspec.inspect.UnionType():
            structs = [_inner(each) for each in kind.types if isinstance(_inner(each), _CONTAINERS)]
            return without_nulls(value, structs[0]) if len(structs) == 1 else value
        case msgspec.inspect.DictType() if isinstance(value, dict):
            return {key: without_nulls(item, kind.value_type) for key, item in value.items()}
        case msgspec.inspect.VarTupleType() | msgspec.inspect.ListType() if isinstance(value, list):
            return [without_nulls(item, kind.item_type) for item in value]
    return value


_CONTAINERS = (
    msgspec.inspect.StructType,
    msgspec.inspect.IntType,
    msgspec.inspect.DictType,
    msgspec.inspect.VarTupleType,
    msgspec.inspect.ListType,
)


def _inner(kind: msgspec.inspect.Type) -> msgspec.inspect.Type:
    return _inner(kind.type) if isinstance(kind, msgspec.inspect.Metadata) else kind


def decode_query(query: bytes, wanted: type[Any]) -> Any:
    """Decode the Struct ``wanted`` from a raw query string. Raises SchemaViolation."""
    try:
        text = query.decode("ascii")
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=_MAX_QUERY_FIELDS, errors="strict")
    except ValueError:
        raise SchemaViolation("the query string is malformed or too long") from None
    fields: dict[str, Any] = {}
    for key, value in pairs:
        name, bracket, inner = key.partition("[")
        if bracket and inner.endswith("]"):
            if inner == "]" or "[" in inner or "]" in inner[:-1]:
                raise SchemaViolation(f"query: write {name}[key]=value")
            group = fields.setdefault(name, {})
            if isinstance(group, dict):
                group[inner[:-1]] = value
        else:
            fields[name] = value
    try:
        return msgspec.convert(fields, wanted, strict=False)
    except msgspec.ValidationError as error:
        raise SchemaViolation(f"query: {error}") from None


def decode_segment(segment: str) -> str:
    """A path parameter, percent-decoded once. Raises SchemaViolation unless it is UTF-8 without NUL."""
    try:
        text = unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise SchemaViolation("the path is not UTF-8") from None
    if "\0" in text:
        raise SchemaViolation("the path holds a NUL")
    return text
