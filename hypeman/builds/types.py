"""API types of builders and builds (contract §2.11, §2.12, §3.4). Pure."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from hypeman.fields import Positive, TagMap, Timestamp


class BuilderStatus(enum.StrEnum):
    READY = "ready"
    PRUNING = "pruning"
    DELETING = "deleting"
    ERROR = "error"


class CreateBuilderRequest(Struct, frozen=True, kw_only=True):
    """A builder: a cache that outlives its builds, and a queue of builds that use it one after the other."""

    id: Annotated[str | None, Meta(description="Chosen by the caller; default: a new one")] = None
    name: Annotated[Annotated[str, Meta(max_length=255)] | None, Meta(description="Need not be unique")] = None
    disk_size_gb: Annotated[Positive | None, Meta(description="Size of the cache; default: build.disk_size")] = None
    tags: TagMap = {}


class Builder(Struct, frozen=True, kw_only=True):
    """A cache of builds, and its queue."""

    id: str
    disk_size_gb: int
    status: BuilderStatus
    created_at: Timestamp
    max_concurrency: Annotated[int, Meta(description="Builds on one builder run one after the other")] = 1
    queued_builds: Annotated[tuple[str, ...], Meta(description="Ids of waiting builds, oldest first")] = ()
    name: str | UnsetType = UNSET
    tags: TagMap | UnsetType = UNSET
    last_used_at: Timestamp | None = None
    active_build_id: Annotated[str | None, Meta(description="The build that is running")] = None


class BuildStatus(enum.StrEnum):
    QUEUED = "queued"
    BUILDING = "building"
    PUSHING = "pushing"
    """The result is being stored in this server's registry."""
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (BuildStatus.READY, BuildStatus.FAILED, BuildStatus.CANCELLED)


class BuildProvenance(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an image was built from."""

    base_image_digest: Annotated[str, Meta(description="Of the base image of the last stage that has one")] = ""
    source_hash: Annotated[str, Meta(description="sha256 of the uploaded context")] = ""
    lockfile_hashes: Annotated[dict[str, str], Meta(description="sha256 of lock files at the top of the context")] = {}
    buildkit_version: str = ""
    timestamp: Timestamp | None = None


class Build(Struct, frozen=True, kw_only=True):
    """One build, from the time it was requested."""

    id: str
    status: BuildStatus
    created_at: Timestamp
    queue_position: Annotated[int | None, Meta(description="1 is next; only while queued")] = None
    image_digest: Annotated[str | None, Meta(description="Of the manifest, once ready")] = None
    image_ref: Annotated[str | None, Meta(description="Normalised name, once ready")] = None
    error: Annotated[str | None, Meta(description="Only when failed")] = None
    started_at: Timestamp | None = None
    completed_at: Timestamp | None = None
    duration_ms: Annotated[int | None, Meta(description="From start to completion")] = None
    builder_id: str | None = None
    builder_instance_id: Annotated[str | None, Meta(description="The VM in which it runs, or ran")] = None
    provenance: BuildProvenance | UnsetType = UNSET
    tags: TagMap | UnsetType = UNSET


class BuildForm(Struct, frozen=True, kw_only=True):
    """The fields of `POST /builds`, sent as multipart/form-data. Numbers that cannot be read are as good as absent."""

    source: Annotated[
        str, Meta(extra_json_schema={"format": "binary"}, description="The context: a tar, compressed with gzip")
    ]
    dockerfile: Annotated[str, Meta(description="Text of the Dockerfile; default: the one in the context")] = ""
    base_image_digest: Annotated[str, Meta(description="A base image must have this digest, or the build fails")] = ""
    builder_id: Annotated[str, Meta(description="Builder whose cache is used; default: none is kept")] = ""
    cache_scope: Annotated[
        str, Meta(description="Cache of this name in the registry of the server: imported before, exported after")
    ] = ""
    global_cache_key: Annotated[
        str, Meta(description="Cache `cache/global/<key>`: imported; exported by admin builds only")
    ] = ""
    is_admin_build: Annotated[str, Meta(description="`true` or `1`: may export to the global cache")] = ""
    timeout_seconds: Annotated[str, Meta(description="Default: build.timeout")] = ""
    memory_mb: Annotated[str, Meta(description="Memory of the VM; default 2048")] = ""
    cpus: Annotated[str, Meta(description="Processors of the VM; default 2")] = ""
    image_name: Annotated[str, Meta(description="Name of the image; default `builds/<id>`")] = ""
    secrets: Annotated[
        str,
        Meta(
            description="JSON array of `{id, env_var}`. Extension: `value`, or `value_base64`, kept in memory until "
            "the build ends; without one, the file of that name in build.secrets_dir"
        ),
    ] = ""
    tags: Annotated[str, Meta(description="JSON object of tags")] = ""
    image_names: Annotated[str, Meta(description="Extension: JSON array of further names")] = ""
    dockerfile_path: Annotated[str, Meta(description="Extension: Dockerfile in the context; default `Dockerfile`")] = ""
    build_args: Annotated[str, Meta(description="Extension: JSON object")] = ""
    labels: Annotated[str, Meta(description="Extension: JSON object of labels of the image")] = ""
    target: Annotated[str, Meta(description="Extension: stage to build")] = ""
    platform: Annotated[str, Meta(description="Extension: `linux/amd64` and the like; default: the server's")] = ""
    no_cache: Annotated[str, Meta(description="Extension: `true`: run every step")] = ""
    pull: Annotated[str, Meta(description="Extension: `true`: ask registries for the newest base images")] = ""
    network: Annotated[str, Meta(description="Extension: `egress` (default), or `isolated`: the VM has none")] = ""
    ssh: Annotated[str, Meta(description="Extension: JSON array of `{id, value}` with private keys")] = ""
    cache_from: Annotated[str, Meta(description="Extension: JSON array of BuildKit's `type=registry,ref=…`")] = ""
    cache_to: Annotated[str, Meta(description="Extension: JSON array of `type=registry,ref=…` or `type=inline`")] = ""
    provenance: Annotated[str, Meta(description="Extension: `true`, or BuildKit's `mode=min` or `mode=max`")] = ""
    sbom: Annotated[str, Meta(description="Extension: `true`, or BuildKit's parameters of a generator")] = ""
    registry_auth: Annotated[
        str, Meta(description="Extension: a docker config.json with logins for base images and caches, for this build")
    ] = ""


class BuildEventType(enum.StrEnum):
    LOG = "log"
    STATUS = "status"
    HEARTBEAT = "heartbeat"
    PROGRESS = "progress"
    """Extension: a status update as BuildKit sends it; only if requested."""


class BuildEvent(Struct, frozen=True, kw_only=True):
    """One event of a build."""

    type: BuildEventType
    timestamp: Timestamp
    content: Annotated[str | UnsetType, Meta(description="A line, of log")] = UNSET
    status: Annotated[BuildStatus | UnsetType, Meta(description="Of status")] = UNSET
    progress: Annotated[
        Raw | UnsetType, Meta(description="Of progress: BuildKit's SolveStatus (vertexes, statuses, logs, warnings)")
    ] = UNSET
