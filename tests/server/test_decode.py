"""Whatever bytes come, the answer is a Struct or a SchemaViolation that names the place."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.instances.model.types import CreateInstanceRequest, InstanceState
from hypeman.server.decode import decode_body, decode_query, decode_segment
from hypeman.server.errors import SchemaViolation
from hypeman.server.routes.instances import InstanceQuery, LogQuery

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
