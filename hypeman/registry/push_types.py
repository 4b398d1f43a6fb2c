"""Pushes as the API shows them (§2.13). Pure."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from hypeman.fields import ImageName, Timestamp
from hypeman.images.types import PushCredentials


class PushStatus(enum.StrEnum):
    QUEUED = "queued"
    PUSHING = "pushing"
    PUSHED = "pushed"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in (PushStatus.PUSHED, PushStatus.FAILED)


class CreatePushRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An image of this host, to be pushed to another registry."""

    image: Annotated[ImageName, Meta(description="Name or digest of a ready image")]
    target: Annotated[ImageName, Meta(description="Full reference at the registry, with a tag")]
    insecure: Annotated[bool, Meta(description="Plain HTTP")] = False
    credentials: PushCredentials | None = None


class Push(msgspec.Struct, frozen=True, kw_only=True):
    """One push, from the time it was requested."""

    id: str
    image: Annotated[str, Meta(description="Normalised OCI reference")]
    digest: Annotated[str, Meta(description="Of its manifest")]
    target: str
    status: PushStatus
    created_at: Timestamp
    queue_position: Annotated[int | None, Meta(description="1 is next; only while queued")] = None
    error: Annotated[str | None, Meta(description="Only when failed")] = None
    layers: Annotated[int | UnsetType, Meta(description="Number of layers")] = UNSET
    bytes: Annotated[int | UnsetType, Meta(description="Compressed bytes of the layers")] = UNSET
    bytes_done: Annotated[
        int | UnsetType, Meta(description="Extension: of bytes, what was sent or is there already; only while pushing")
    ] = UNSET
    completed_at: Timestamp | None = None
