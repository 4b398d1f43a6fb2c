"""API types of the server's own state (§2.1)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType


class Health(Struct, frozen=True):
    status: Literal["ok"] = "ok"


class ServerVersion(Struct, frozen=True):
    version: str
    api_version: Annotated[str, Meta(description="Revision of the contract")]


class HostPlatform(Struct, frozen=True):
    os: str
    arch: str


class DefaultRuntime(Struct, frozen=True):
    name: str
    available: Annotated[bool, Meta(description="Can launch now")]


class Runtime(Struct, frozen=True):
    """A hypervisor that this build supports on this platform."""

    name: str
    available: Annotated[bool, Meta(description="False: something it needs is missing, launches fail")]
    features: tuple[str, ...]


class NetworkCapabilities(Struct, frozen=True):
    model: Literal["bridge", "nat"]
    guest_to_guest: bool
    gateway: str | UnsetType = UNSET
    subnet: str | UnsetType = UNSET


class ImageCapabilities(Struct, frozen=True):
    platforms: tuple[str, ...]
    default_platform: str


class Capabilities(Struct, frozen=True):
    """What this server can do on this host."""

    server: ServerVersion
    host: HostPlatform
    default_runtime: DefaultRuntime
    runtimes: tuple[Runtime, ...]
    network: NetworkCapabilities
    images: ImageCapabilities
    features: tuple[str, ...]
