"""Generates and validates identifiers, names and tags.

The grammar is that of the API contract, §1.5 and §1.8.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

from hypeman.errors import InvalidRequest

_FIRST = "abcdefghijklmnopqrstuvwxyz"
_REST = _FIRST + "0123456789"
_ID_LENGTH = 24

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_TAG_KEY = re.compile(r"[A-Za-z0-9 _.:/=+@-]{1,128}")
_TAG_VALUE = re.compile(r"[A-Za-z0-9 _.:/=+@-]{0,256}")
_MAX_TAGS = 50

Tags = dict[str, str]

STACK_TAG, SERVICE_TAG = "hypeman.compose.name", "hypeman.compose.service"
"""By which the instances of a stack are found, and find each other by the names of their services."""


def new_id() -> str:
    """A new identifier in the format of a CUID2: 24 characters a–z0–9, the first one a letter.

    Drawn from the system's entropy (about 123 bits), so ids of different hosts do not collide either.
    """
    drawn = int.from_bytes(secrets.token_bytes(32))  # 256 bits for 124: the modulo bias is negligible
    drawn, first = divmod(drawn, len(_FIRST))
    letters = [_FIRST[first]]
    for _ in range(_ID_LENGTH - 1):
        drawn, letter = divmod(drawn, len(_REST))
        letters.append(_REST[letter])
    return "".join(letters)


def check_name(name: str, *, what: str = "name", max_length: int = 63) -> str:
    """``name`` if it is a legal name of an instance, ingress or snapshot. Raises InvalidRequest."""
    if len(name) > max_length or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{what} {name!r} must be 1 to {max_length} of a-z, 0-9 and '-', and begin and end with a letter or digit"
        )
    return name


def check_tags(tags: Mapping[str, str] | None) -> Tags:
    """A copy of ``tags`` (empty for None) if all pairs are legal. Raises InvalidRequest."""
    checked = dict(tags or {})
    if len(checked) > _MAX_TAGS:
        raise InvalidRequest(f"{len(checked)} tags given, at most {_MAX_TAGS} are allowed")
    for key, value in checked.items():
        if not _TAG_KEY.fullmatch(key):
            raise InvalidRequest(f"tag key {key!r} must be 1 to 128 of letters, digits and ' _.:/=+@-'")
        if not _TAG_VALUE.fullmatch(value):
            raise InvalidRequest(f"value of tag {key!r} must be up to 256 of letters, digits and ' _.:/=+@-'")
    return checked


def tags_match(tags: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether every wanted pair is among ``tags`` (no wanted pairs match everything)."""
    return all(tags.get(key) == value for key, value in wanted.items())


def stack_member(stack: str, service: str) -> str:
    """The name of the instance of ``service`` in ``stack``, unless its file gives it another one."""
    return f"{stack}-{service}".replace("_", "-")
