"""Fields: what is written is read back, and nothing else is read."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.errors import InvalidRequest
from hypeman.guest.fields import Fields, FieldWriter, MalformedFields, Tag, parse_fields, parse_text
from hypeman.guest.types import parse_copy_entry, parse_event, parse_metrics, parse_path_info

pairs = st.lists(st.tuples(st.sampled_from(Tag), st.binary(max_size=100)), max_size=20)


@given(pairs)
def test_round_trip(fields: list[tuple[Tag, bytes]]) -> None:
    writer = FieldWriter()
    for tag, value in fields:
        writer.add(tag, value)
    assert list(parse_fields(writer.render())) == fields


@given(pairs.filter(bool), st.data())
def test_a_cut_anywhere_inside_a_field_is_noticed(fields: list[tuple[Tag, bytes]], data: st.DataObject) -> None:
    writer = FieldWriter()
    ends = {0}
    for tag, value in fields:
        writer.add(tag, value)
        ends.add(len(writer.render()))
    whole = writer.render()
    cut = data.draw(st.integers(0, len(whole)).filter(lambda cut: cut not in ends))
    with pytest.raises(MalformedFields):
        list(parse_fields(whole[:cut]))


@given(st.binary(max_size=300))
def test_parsers_of_guest_bytes_raise_nothing_else(data: bytes) -> None:
    for parse in (parse_event, parse_path_info, parse_copy_entry, parse_metrics, Fields):
        with contextlib.suppress(MalformedFields):
            parse(data)


@given(st.text().filter(lambda text: "\0" not in text))
def test_text_keeps_every_character(text: str) -> None:
    encodable = text.encode("utf-8", "ignore").decode()
    [(_, value)] = parse_fields(FieldWriter().text(Tag.PATH, encodable).render())
    assert parse_text(value) == encodable


def test_file_names_that_are_no_utf8_survive() -> None:
    [(_, value)] = parse_fields(FieldWriter().text(Tag.PATH, "a\udcffb").render())
    assert value == b"a\xffb\0"
    assert parse_text(value) == "a\udcffb"


def test_a_field_that_cannot_be_sent_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="arg contains a NUL"):
        FieldWriter().text(Tag.ARG, "a\0b")
    with pytest.raises(InvalidRequest, match="path is not text"):
        FieldWriter().text(Tag.PATH, "\ud800")
    with pytest.raises(InvalidRequest, match="uid 4294967296 is out of range"):
        FieldWriter().u32(Tag.UID, 1 << 32)
    with pytest.raises(InvalidRequest, match="out of range"):
        FieldWriter().u8(Tag.PREFIX, -1)


def test_text_that_is_not_well_formed_is_refused() -> None:
    for bad in (b"", b"abc", b"a\0b\0"):
        with pytest.raises(MalformedFields):
            parse_text(bad)


@pytest.mark.parametrize("path", ["", "/etc", "../x", "a/../b", "a//b", "a/.", "a/"])
def test_entry_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    header = FieldWriter().text(Tag.PATH, path).u8(Tag.KIND, 1).render()
    with pytest.raises(MalformedFields):
        parse_copy_entry(header)
