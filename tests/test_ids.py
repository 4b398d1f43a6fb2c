"""Identifiers, names and tags as the contract has them (§1.5, §1.8)."""

from __future__ import annotations

import pytest

from hypeman.errors import InvalidRequest
from hypeman.ids import check_name, check_tags, new_id, tags_match


def test_ids_look_like_cuid2_and_differ() -> None:
    made = {new_id() for _ in range(1000)}
    assert len(made) == 1000
    assert all(len(i) == 24 and i[0].isalpha() and i.isalnum() and i == i.lower() for i in made)


@pytest.mark.parametrize("name", ["a", "0", "web-1", "a" * 63])
def test_legal_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a" * 64, "a b", "a\n", "ä", "a/b"])
def test_illegal_names(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)


def test_tags() -> None:
    assert check_tags(None) == {}
    assert check_tags({"team": "", "a/b:c": "x y"}) == {"team": "", "a/b:c": "x y"}
    for bad in ({"": "x"}, {"k" * 129: "x"}, {"k": "v" * 257}, {"k\n": "v"}, {str(n): "" for n in range(51)}):
        with pytest.raises(InvalidRequest):
            check_tags(bad)


def test_a_filter_requires_all_its_pairs() -> None:
    assert tags_match({"a": "1", "b": "2"}, {"a": "1"})
    assert tags_match({}, {})
    assert not tags_match({"a": "1"}, {"a": "1", "b": "2"})
    assert not tags_match({"a": "1"}, {"a": "2"})
