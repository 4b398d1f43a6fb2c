"""Structs of images in the contract (§2.2, §2.13), used for HTTP and for stored documents."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from hypeman.fields import ImageName, Platform, TagMap, Timestamp


class ImageStatus(enum.StrEnum):
    """``pending → pulling → converting → ready``, or ``failed`` from any of them but the last."""

    PENDING = "pending"
    PULLING = "pulling"
    CONVERTING = "converting"
    READY = "ready"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in (ImageStatus.READY, ImageStatus.FAILED)


class PushCredentials(msgspec.Struct, frozen=True, omit_defaults=True):
    """A login for one registry, for this request only: kept in memory, never stored or logged."""

    username: str = ""
    password: str = ""
    registry_token: Annotated[str, Meta(description="sent as bearer token")] = ""

    def __bool__(self) -> bool:
        return bool(self.username or self.password or self.registry_token)

    def __repr__(self) -> str:
        return "PushCredentials(…)" if self else "PushCredentials()"


class CreateImageRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Pull an image and build a root disk from it."""

    name: ImageName
    platform: Platform | None = None
    credentials: PushCredentials | None = None
    tags: TagMap | None = None


class TagImageRequest(msgspec.Struct, frozen=True):
    """Give an image another name."""

    target: Annotated[ImageName, Meta(description="OCI reference with a tag; without one, latest")]


class Image(msgspec.Struct, frozen=True):
    """An image, from the time it was requested."""

    name: Annotated[str, Meta(description="normalised OCI reference")]
    digest: Annotated[str, Meta(description="manifest digest, sha256:…")]
    status: ImageStatus
    created_at: Timestamp
    platform: Platform | UnsetType = UNSET
    queue_position: Annotated[int | None, Meta(description="1 is next; only while queued")] = None
    error: Annotated[str | None, Meta(description="only when failed")] = None
    size_bytes: Annotated[int | None, Meta(description="size of the root disk, once ready")] = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    working_dir: str | None = None
    env: dict[str, str] | UnsetType = UNSET
    tags: TagMap | UnsetType = UNSET


class ImageConfig(msgspec.Struct, frozen=True):
    """An image's run configuration; also the ``config.json`` next to its root disk."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    user: str = ""
    working_dir: str = ""
    labels: dict[str, str] = {}
    stop_signal: str = ""
    exposed_ports: tuple[str, ...] = ()
    """As in the image: ``80/tcp``."""
    volumes: tuple[str, ...] = ()
    """Directories that the image declares as volumes."""


class ReadyImage(msgspec.Struct, frozen=True):
    """A converted image, from which instances are created."""

    digest: str
    disk: Path
    """Read-only root disk, shared by all instances of the image."""
    fs: str
    """``erofs`` or ``ext4``."""
    config: ImageConfig
    size: int
    """Bytes of ``disk``."""
    platform: str = ""


class LayerProgress(msgspec.Struct, frozen=True):
    """Progress of one layer, in compressed bytes."""

    digest: str
    size: int
    done: int


class Progress(msgspec.Struct, frozen=True):
    """Progress of an image pull."""

    status: ImageStatus
    layers: tuple[LayerProgress, ...] = ()
    converted_bytes: int = 0
    """Uncompressed bytes of the layers applied."""
