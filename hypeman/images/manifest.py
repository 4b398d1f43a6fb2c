"""Parses image manifests, indexes and configs into validated Structs. Pure.

OCI image-spec 1.1 and Docker image manifest version 2, schema 2. Data from registries is not
trusted: sizes are bounded, digests must have canonical form, layers must have a known media type,
and unknown fields are ignored as the specification requires.
"""

from __future__ import annotations

import enum
import hashlib
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from hypeman.images.reference import Platform

MAX_MANIFEST_BYTES = 4 << 20
"""What registries allow."""
MAX_CONFIG_BYTES = 8 << 20
MAX_LAYERS = 512
MAX_INDEX_ENTRIES = 1024
MAX_VOLUMES = 256

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)

Digest = Annotated[str, Meta(pattern=r"^sha256:[a-f0-9]{64}$")]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]
_Text = Annotated[str, Meta(max_length=1 << 17)]

T = TypeVar("T")


class ManifestError(ValueError):
    """The registry or archive does not contain a usable image."""


class PlatformMissing(ManifestError):
    """The index has no image for the requested platform."""


class Compression(enum.StrEnum):
    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


_LAYER_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
_COMPRESSIONS = ("", "gzip", "zstd", "xz", "bzip2")
"""Suffixes of layer types. The compression is detected from the layer's bytes, and checked then."""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """Reference to a blob: media type, digest, size."""

    digest: Digest
    size: Size
    media_type: str = ""
    platform: dict[str, Any] | None = None
    annotations: dict[str, str] | None = None


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """One image for one platform."""

    schema_version: int
    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], Meta(max_length=MAX_LAYERS)] = ()
    media_type: str = ""


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """The images of one name for several platforms."""

    schema_version: int
    manifests: Annotated[tuple[Descriptor, ...], Meta(max_length=MAX_INDEX_ENTRIES)] = ()
    media_type: str = ""


class RootFs(msgspec.Struct, frozen=True):
    diff_ids: Annotated[tuple[Digest, ...], Meta(max_length=MAX_LAYERS)] = ()
    """Digests of the layers as plain tar archives, lowest first."""
    type: str = "layers"


class Run(msgspec.Struct, frozen=True):
    """The image's run configuration."""

    user: _Text = msgspec.field(name="User", default="")
    env: tuple[_Text, ...] | None = msgspec.field(name="Env", default=None)
    entrypoint: tuple[_Text, ...] | None = msgspec.field(name="Entrypoint", default=None)
    cmd: tuple[_Text, ...] | None = msgspec.field(name="Cmd", default=None)
    working_dir: _Text = msgspec.field(name="WorkingDir", default="")
    labels: dict[str, _Text] | None = msgspec.field(name="Labels", default=None)
    stop_signal: _Text | None = msgspec.field(name="StopSignal", default=None)
    exposed_ports: dict[str, Any] | None = msgspec.field(name="ExposedPorts", default=None)
    volumes: Annotated[dict[_Text, Any], Meta(max_length=MAX_VOLUMES)] | None = msgspec.field(
        name="Volumes", default=None
    )


class Config(msgspec.Struct, frozen=True):
    """The config blob of an image."""

    rootfs: RootFs
    architecture: str = ""
    os: str = ""
    variant: str = ""
    config: Run | None = None


class _Probe(msgspec.Struct, frozen=True, rename="camel"):
    """The fields needed to identify a document."""

    media_type: str = ""
    schema_version: int | None = None
    manifests: Any = None
    layers: Any = None
    fs_layers: Any = None


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, media_type: str = "") -> Manifest | Index:
    """The manifest or index in ``data``; ``media_type`` is the one stated by the sender, if any.

    Raises ManifestError.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"the manifest is {len(data)} bytes long; at most {MAX_MANIFEST_BYTES} are allowed")
    probe = decode(data, _Probe, "manifest")
    if probe.fs_layers is not None or probe.schema_version == 1:
        raise ManifestError("the image has a Docker schema 1 manifest, which was withdrawn; push it again")
    if probe.manifests is not None and probe.layers is not None:
        raise ManifestError("the manifest claims to be an index and an image at once")
    stated = probe.media_type or media_type.partition(";")[0].strip()
    is_index = probe.manifests is not None
    if stated in INDEX_TYPES + MANIFEST_TYPES and (stated in INDEX_TYPES) != is_index:
        raise ManifestError(f"the manifest is called {stated}, but its content is not that")
    if probe.media_type and probe.media_type not in INDEX_TYPES + MANIFEST_TYPES:
        raise ManifestError(f"the manifest has the unknown media type {probe.media_type[:100]!r}")
    document: Manifest | Index = decode(data, Index, "index") if is_index else decode(data, Manifest, "manifest")
    if document.schema_version != 2:
        raise ManifestError(f"the manifest has schema version {document.schema_version}; only 2 is known")
    if isinstance(document, Manifest):
        _check_image(document)
    return document


def _check_image(manifest: Manifest) -> None:
    if manifest.config.media_type not in CONFIG_TYPES:
        raise ManifestError(
            f"this is not a container image: its config has the media type {manifest.config.media_type[:100]!r}"
        )
    if manifest.config.size > MAX_CONFIG_BYTES:
        raise ManifestError(f"the image's config is {manifest.config.size} bytes; {MAX_CONFIG_BYTES} are allowed")
    for layer in manifest.layers:
        if not _is_layer_type(layer.media_type):
            raise ManifestError(f"a layer has the unknown media type {layer.media_type[:100]!r}")


def _is_layer_type(media_type: str) -> bool:
    return any(
        media_type.startswith(known) and media_type[len(known) :].lstrip("+.") in _COMPRESSIONS
        for known in _LAYER_TYPES
    )


def choose_platform(index: Index, wanted: Platform) -> Descriptor:
    """The first entry of ``index`` that runs on ``wanted``. Raises PlatformMissing.

    An entry without platform is used if it is the only image. A variant (as in arm64/v8) selects among
    several, but an unrequested or unstated one is not a reason to reject an entry.
    """
    images = [entry for entry in index.manifests if entry.media_type in INDEX_TYPES + MANIFEST_TYPES]
    fitting = [entry for entry in images if _fits(entry.platform, wanted)]
    exact = [entry for entry in fitting if wanted.variant and _field(entry.platform, "variant") == wanted.variant]
    if exact or fitting:
        return (exact or fitting)[0]
    if len(images) == 1 and images[0].platform is None:
        return images[0]
    offered = ", ".join(sorted({_shown(entry.platform) for entry in images if entry.platform})) or "none"
    raise PlatformMissing(f"the image is not made for {wanted}; it is offered for: {offered[:500]}")


def _fits(platform: dict[str, Any] | None, wanted: Platform) -> bool:
    if _field(platform, "os") != wanted.os or _field(platform, "architecture") != wanted.architecture:
        return False
    variant = _field(platform, "variant")
    return not wanted.variant or not variant or variant == wanted.variant


def _field(platform: dict[str, Any] | None, name: str) -> str:
    value = platform.get(name, "") if platform else ""
    return value if isinstance(value, str) else ""


def _shown(platform: dict[str, Any] | None) -> str:
    parts = (_field(platform, name) for name in ("os", "architecture", "variant"))
    return "/".join(part for part in parts if part)


def parse_config(data: bytes, manifest: Manifest) -> Config:
    """The config blob, which must name as many layers as the manifest. Raises ManifestError."""
    config = decode(data, Config, "config")
    if config.rootfs.type != "layers":
        raise ManifestError(f"the image's root is made of {config.rootfs.type[:60]!r}, not of layers")
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise ManifestError(
            f"the image's config names {len(config.rootfs.diff_ids)} layers, its manifest {len(manifest.layers)}"
        )
    return config


def platform_of(config: Config) -> Platform:
    """The platform in the image's config; amd64 Linux if unstated (old Docker images)."""
    return Platform(config.os or "linux", config.architecture or "amd64", config.variant)


_MAPS = frozenset(["Labels", "ExposedPorts", "Volumes", "annotations"])
"""Fields whose keys are data: a null beneath them is an empty value, not an absent field."""


def _without_nulls(value: Any, *, is_map: bool = False) -> Any:
    """``value`` as Go's decoder takes it, which most tools that write these documents are made with: null is what an
    absent field is, and an empty text in a list."""
    if isinstance(value, dict):
        return {
            key: "" if item is None else _without_nulls(item, is_map=key in _MAPS)
            for key, item in value.items()
            if item is not None or is_map
        }
    if isinstance(value, list):
        return ["" if item is None else _without_nulls(item) for item in value]
    return value


def decode(data: bytes, kind: type[T], what: str) -> T:
    """A document that describes an image, as Go's readers take it. Raises ManifestError, naming ``what`` it is."""
    try:
        return msgspec.convert(_without_nulls(msgspec.json.decode(data)), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"the image's {what} cannot be read: {error}") from None
