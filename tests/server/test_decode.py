"""Whatever bytes come, the answer is a Struct or a SchemaViolation that names the place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from hypeman.fields import MAX_INT
from hypeman.instances.model.types import CreateInstanceRequest, InstanceState
from hypeman.server.api import UploadStream
from hypeman.server.decode import decode_body, decode_query, decode_segment
from hypeman.server.errors import SchemaViolation
from hypeman.server.routes import OPERATIONS
from hypeman.server.routes.instances import InstanceQuery, LogQuery
from hypeman.server.streams import WEBSOCKETS

DECODER = msgspec.json.Decoder(CreateInstanceRequest)
FIELDS = CreateInstanceRequest.__struct_fields__

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def decoded(data: bytes) -> CreateInstanceRequest | None:
    try:
        return decode_body(data, DECODER)  # type: ignore[no-any-return]
    except SchemaViolation as error:
        assert error.status == 400
        assert error.message
        return None


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    decoded(data)


@given(anything)
def test_any_json(value: Any) -> None:
    decoded(json.dumps(value).encode())


@given(st.dictionaries(st.sampled_from(FIELDS), anything))
def test_any_values_in_the_right_places(fields: dict[str, Any]) -> None:
    request = decoded(json.dumps({"name": "a", "image": "b", **fields}).encode())
    if request is not None:
        assert decoded(msgspec.json.encode(request)) == request


@given(st.binary())
def test_any_query(query: bytes) -> None:
    for wanted in (InstanceQuery, LogQuery):
        try:
            assert isinstance(decode_query(query, wanted), wanted)
        except SchemaViolation as error:
            assert error.message


@given(st.dictionaries(st.text(min_size=1).filter(lambda key: "[" not in key and "]" not in key), st.text()))
def test_tags_survive_the_query(tags: dict[str, str]) -> None:
    query = urlencode([("state", "Running"), *((f"tags[{key}]", value) for key, value in tags.items())])
    found = decode_query(query.encode(), InstanceQuery)
    assert (found.state, found.tags) == (InstanceState.RUNNING, tags)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_segments_are_decoded_once(text: str) -> None:
    assert decode_segment(quote(text, safe="")) == text
    assert decode_segment(quote(quote(text, safe=""), safe="")) == quote(text, safe="")


@pytest.mark.parametrize("segment", ["%ff", "a%00b", "%c3%28"])
def test_segments_that_are_no_text(segment: str) -> None:
    with pytest.raises(SchemaViolation):
        decode_segment(segment)


def test_the_place_is_named() -> None:
    with pytest.raises(SchemaViolation, match=r"\$\.network\.egress\.enforcement\.mode"):
        decode_body(b'{"name":"a","image":"b","network":{"egress":{"enforcement":{"mode":"x"}}}}', DECODER)
    with pytest.raises(SchemaViolation, match=r"query: .*\$\.tail"):
        decode_query(b"tail=many", LogQuery)


@pytest.mark.parametrize(
    "body",
    [
        b'{"name":"a","image":"b","vcpus":null,"size":null,"env":null,"network":null,"tags":null,"volumes":null}',
        b'{"name":"a","image":"b","network":{"enabled":null,"bandwidth_upload":null,"egress":{"enabled":null}}}',
        b'{"name":"a","image":"b","volumes":[{"volume_id":"v","mount_path":"/m","readonly":null}]}',
        b'{"name":"a","image":"b","credentials":{"K":{"source":{"env":"E"},"inject":[{"hosts":null,"as":'
        b'{"header":"h","format":"${value}"}}]}}}',
    ],
)
def test_null_is_as_good_as_absent_where_a_field_is_optional(body: bytes) -> None:
    decoder = msgspec.json.Decoder(CreateInstanceRequest)
    tree = msgspec.json.decode(body)

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if item is not None}
        return [strip(item) for item in value] if isinstance(value, list) else value

    assert decode_body(body, decoder) == decode_body(msgspec.json.encode(strip(tree)), decoder)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"name":null,"image":"b"}', "$.name"),
        (b'{"name":"a","image":"b","env":{"A":null}}', "$.env"),
        (b'{"name":"a","image":"b","vcpus":null,"size":1}', "$.size"),
        (b'{"name":"a","image":"b","volumes":[null]}', "$.volumes"),
    ],
)
def test_null_is_an_error_everywhere_else(body: bytes, place: str) -> None:
    with pytest.raises(SchemaViolation, match=re.escape(place)):
        decode_body(body, msgspec.json.Decoder(CreateInstanceRequest))


@pytest.mark.parametrize("query", [b"tags[]=x", b"tags[a][b]=x", b"tags[a]]=x"])
def test_tags_have_a_key(query: bytes) -> None:
    with pytest.raises(SchemaViolation, match="key"):
        decode_query(query, InstanceQuery)


def test_a_whole_number_is_an_integer() -> None:
    """As in JSON Schema; a fraction is none."""
    assert decode_body(b'{"name":"a","image":"b","vcpus":2.0}', DECODER).vcpus == 2
    with pytest.raises(SchemaViolation, match="vcpus"):
        decode_body(b'{"name":"a","image":"b","vcpus":2.5}', DECODER)


def integers(
    kind: inspect.Type, place: str, seen: frozenset[type] = frozenset()
) -> Iterator[tuple[str, inspect.IntType]]:
    """The integers of a type of request, with their places."""
    match kind:
        case inspect.Metadata():
            yield from integers(kind.type, place, seen)
        case inspect.IntType():
            yield place, kind
        case inspect.StructType() if kind.cls not in seen:
            for field in kind.fields:
                yield from integers(field.type, f"{place}.{field.encode_name}", seen | {kind.cls})
        case inspect.UnionType():
            for each in kind.types:
                yield from integers(each, place, seen)
        case inspect.DictType():
            yield from integers(kind.value_type, f"{place}{{}}", seen)
        case inspect.ListType() | inspect.VarTupleType():
            yield from integers(kind.item_type, f"{place}[]", seen)


def test_no_integer_is_larger_than_clients_can_read_back() -> None:
    """Some are echoed, and a float that is made of 400 digits is an exception."""
    asked = [
        (f"{operation.method} {operation.path}", kind)
        for operation in OPERATIONS
        for kind in (operation.body, operation.query, operation.form)
    ]
    asked += [(socket.path, message.form) for socket in WEBSOCKETS for message in socket.receives]
    found = {
        place: kind
        for name, type_ in asked
        if type_ is not None and type_ is not UploadStream
        for place, kind in integers(inspect.type_info(type_), name)
    }
    assert len(found) > 20
    assert [
        place for place, kind in found.items() if min(kind.le or MAX_INT + 1, (kind.lt or 2**64) - 1) > MAX_INT
    ] == []


@pytest.mark.parametrize("number", ["9223372036854775808", "1e19", "1e300", "1" + 400 * "0", "-9223372036854775809"])
def test_large_integers(number: str) -> None:
    with pytest.raises(SchemaViolation):
        decode_body(f'{{"name": "a", "image": "b", "vcpus": {number}}}'.encode(), DECODER)
    with pytest.raises(SchemaViolation):
        decode_query(f"tail={number}".encode(), LogQuery)
