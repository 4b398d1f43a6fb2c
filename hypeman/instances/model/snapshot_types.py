"""API types of snapshots and their schedules: the contract's §2.4 to §2.6."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.fields import Count, Duration, Name, TagMap, Timestamp
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.model.types import TargetState


class SnapshotKind(enum.StrEnum):
    """What was captured: memory and disks, or disks only."""

    STANDBY = "Standby"
    STOPPED = "Stopped"


class CompressionState(enum.StrEnum):
    """Compression happens after the snapshot is durable."""

    NONE = "none"
    COMPRESSING = "compressing"
    COMPRESSED = "compressed"
    ERROR = "error"


class CreateSnapshotRequest(Struct, frozen=True, kw_only=True):
    kind: SnapshotKind
    name: Annotated[Name | None, Meta(description="Unique per source instance")] = None
    tags: TagMap = {}
    compression: Annotated[SnapshotCompressionConfig | None, Meta(description="Only for kind Standby")] = None


class RestoreSnapshotRequest(Struct, frozen=True, kw_only=True):
    target_state: Annotated[
        TargetState | None, Meta(description="Default: Running for kind Standby, Stopped for kind Stopped")
    ] = None
    target_hypervisor: Annotated[HypervisorKind | None, Meta(description="Only for kind Stopped")] = None


class ForkSnapshotRequest(Struct, frozen=True, kw_only=True):
    name: Name
    target_state: Annotated[
        TargetState | None, Meta(description="Default: Running for kind Standby, Stopped for kind Stopped")
    ] = None
    target_hypervisor: Annotated[HypervisorKind | None, Meta(description="Only for kind Stopped")] = None


class Snapshot(Struct, frozen=True, kw_only=True):
    """A capture that outlives its source."""

    id: str
    kind: SnapshotKind
    source_instance_id: str
    source_instance_name: Annotated[str, Meta(description="At the time of the capture")]
    source_hypervisor: HypervisorKind
    created_at: Timestamp
    size_bytes: Count
    name: str | None = None
    tags: TagMap | UnsetType = UNSET
    compression: SnapshotCompressionConfig | UnsetType = UNSET
    compression_state: CompressionState | UnsetType = UNSET
    compression_error: str | None = None
    compressed_size_bytes: int | None = None
    uncompressed_size_bytes: int | None = None


class SetSnapshotPoolRequest(Struct, frozen=True, kw_only=True):
    size: Annotated[int, Meta(ge=0, le=64, description="Forks to keep ready; 0: none")]


class SnapshotPool(Struct, frozen=True, kw_only=True):
    """Forks of a snapshot that are kept restored and paused. A fork of the snapshot takes one that is ready."""

    snapshot_id: str
    size: Annotated[Count, Meta(description="Requested; 0: the snapshot has no pool")]
    ready: Annotated[Count, Meta(description="They are created and replaced in the background")]
    memory_bytes: Annotated[Count, Meta(description="Memory of the host that the ready ones use (PSS)")]
    error: Annotated[str | None, Meta(description="Why there are fewer than requested, after a failure")] = None


class SnapshotRetention(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """At least one of the two is required."""

    max_count: Annotated[Count | None, Meta(description="0: no limit by count")] = None
    max_age: Duration | None = None


class SetSnapshotScheduleRequest(Struct, frozen=True, kw_only=True):
    interval: Annotated[Duration, Meta(description="At least 1m; a change restarts the cadence")]
    retention: SnapshotRetention
    name_prefix: Annotated[str | None, Meta(extra_json_schema={"maxLength": 47})] = None
    metadata: TagMap = {}


class SnapshotSchedule(Struct, frozen=True, kw_only=True):
    instance_id: str
    interval: Duration
    retention: SnapshotRetention
    next_run_at: Timestamp
    created_at: Timestamp
    updated_at: Timestamp
    name_prefix: str | None = None
    metadata: TagMap | UnsetType = UNSET
    last_run_at: Timestamp | None = None
    last_snapshot_id: str | None = None
    last_error: str | None = None
