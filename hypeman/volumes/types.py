"""API types of volumes (contract §2.7)."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.fields import MAX_INT, TagMap, Timestamp

Gigabytes = Annotated[int, Meta(ge=1, le=MAX_INT, description="Units of 2^30 bytes")]


class CreateVolumeRequest(Struct, frozen=True, kw_only=True):
    name: str
    size_gb: Gigabytes
    id: Annotated[str | None, Meta(description="Chosen by the caller; default: a new one")] = None
    tags: TagMap = {}


class VolumeAttachment(Struct, frozen=True, kw_only=True):
    instance_id: str
    mount_path: str
    readonly: bool


class Volume(Struct, frozen=True, kw_only=True):
    """A disk that outlives its instances."""

    id: str
    name: str
    size_gb: int
    created_at: Timestamp
    tags: TagMap | UnsetType = UNSET
    attachments: Annotated[
        tuple[VolumeAttachment, ...] | UnsetType, Meta(description="The instances that use it; absent if none")
    ] = UNSET
