"""Events as they are stored, sent and filtered. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from msgspec import UNSET, Struct, UnsetType

from hypeman.actor import Actor
from hypeman.errors import HypemanError
from hypeman.fields import TagMap, Timestamp
from hypeman.ids import tags_match
from hypeman.tokens import Scope


class Kind(enum.StrEnum):
    """What an event is about; the first part of its type."""

    INSTANCE = "instance"
    IMAGE = "image"
    VOLUME = "volume"
    SNAPSHOT = "snapshot"
    DEVICE = "device"
    INGRESS = "ingress"
    BUILD = "build"
    BUILDER = "builder"
    PUSH = "push"
    EGRESS = "egress"
    HOST = "host"


READ_SCOPE: Mapping[Kind, Scope] = {
    Kind.INSTANCE: Scope.INSTANCE_READ,
    Kind.IMAGE: Scope.IMAGE_READ,
    Kind.VOLUME: Scope.VOLUME_READ,
    Kind.SNAPSHOT: Scope.SNAPSHOT_READ,
    Kind.DEVICE: Scope.DEVICE_READ,
    Kind.INGRESS: Scope.INGRESS_READ,
    Kind.BUILD: Scope.BUILD_READ,
    Kind.BUILDER: Scope.BUILD_READ,
    Kind.PUSH: Scope.IMAGE_READ,
    Kind.EGRESS: Scope.INSTANCE_READ,
    Kind.HOST: Scope.RESOURCE_READ,
}
"""The scope that a caller needs to see events of a kind: the one for reading such objects."""

Datum = str | int | float | bool | None


class EventObject(Struct, frozen=True):
    """The object that changed, as it was when it changed."""

    kind: Kind
    id: str
    name: str | UnsetType = UNSET


class Event(Struct, frozen=True, kw_only=True):
    """One life-cycle change."""

    cursor: int
    """Grows with every event, also across restarts; ``since`` continues after it."""
    time: Timestamp
    type: str
    """``<kind>.<action>``, such as ``instance.created``."""
    object: EventObject
    instance_id: str | UnsetType = UNSET
    """The instance concerned, if the object is not an instance."""
    tags: TagMap | UnsetType = UNSET
    """Tags of the object."""
    actor: Actor | UnsetType = UNSET
    """Who requested the change; absent if no request caused it."""
    data: dict[str, Datum] | UnsetType = UNSET
    """What the type's description in the documentation lists."""


class EventFilter(Struct, frozen=True):
    """Filter for events; everything given must match."""

    kinds: frozenset[Kind] | None = None
    """None: all."""
    types: tuple[str, ...] = ()
    """Types, or kinds for all types of a kind."""
    instance: str = ""
    """Id or name of an instance: events about it and about what belongs to it."""
    tags: Mapping[str, str] = {}

    def fits(self, event: Event) -> bool:
        """Whether ``event`` matches."""
        about = event.object
        if self.kinds is not None and about.kind not in self.kinds:
            return False
        if self.types and event.type not in self.types and about.kind.value not in self.types:
            return False
        if self.instance:
            own = (about.id, about.name) if about.kind is Kind.INSTANCE else (event.instance_id,)
            if self.instance not in own:
                return False
        return tags_match(event.tags or {}, self.tags)


class CursorGone(HypemanError):
    """The log does not reach back to the cursor, or never had it: the reader has missed events and must list the
    objects again."""

    status = 410
    retryable = False
    default_code = "cursor_gone"
