"""Queries that several capabilities share."""

from __future__ import annotations

from msgspec import Struct

from hypeman.fields import TagMap


class TagQuery(Struct, frozen=True, kw_only=True):
    """``?tags[team]=backend&tags[env]=staging``: objects that have all these pairs."""

    tags: TagMap = {}
