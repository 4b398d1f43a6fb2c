"""Moments in queries: an RFC 3339 time, or a duration before now."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypeman.errors import InvalidRequest
from hypeman.units import parse_duration


def parse_moment(text: str, name: str, *, others: str = "") -> datetime:
    """The moment that the parameter ``name`` gives; ``others`` is what it may be instead.

    Raises InvalidRequest ``invalid_<name>``.
    """
    code = f"invalid_{name}"
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        try:
            found = datetime.now(UTC) - timedelta(seconds=parse_duration(text, code=code))
        except (InvalidRequest, OverflowError):
            wanted = f"{others}a duration or an RFC 3339 time"
            raise InvalidRequest(f"{name} must be {wanted}, not {text[:80]!r}", code=code) from None
    if found.tzinfo is None:
        raise InvalidRequest(f"{name} lacks a time zone, such as Z", code=code)
    return found
