"""Host capacity and allocations (contract §2.10). vCPUs, bytes, bytes per second."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.fields import MAX_INT, Duration, Timestamp


class ResourceStatus(Struct, frozen=True, kw_only=True):
    type: str
    capacity: int
    effective_limit: Annotated[int, Meta(description="capacity × oversub_ratio")]
    allocated: int
    available: Annotated[
        int, Meta(description="effective_limit − allocated; of the disk not more than its file system has free")
    ]
    oversub_ratio: float
    source: Literal["detected", "configured"] | UnsetType = UNSET


class DiskBreakdown(Struct, frozen=True, kw_only=True):
    images_bytes: int | UnsetType = UNSET
    oci_cache_bytes: int | UnsetType = UNSET
    volumes_bytes: int | UnsetType = UNSET
    overlays_bytes: int | UnsetType = UNSET


class ResourceAllocation(Struct, frozen=True, kw_only=True):
    """Resources allocated to one instance."""

    instance_id: str | UnsetType = UNSET
    instance_name: str | UnsetType = UNSET
    cpu: int | UnsetType = UNSET
    memory_bytes: int | UnsetType = UNSET
    disk_bytes: int | UnsetType = UNSET
    network_download_bps: Annotated[int | UnsetType, Meta(description="Bytes per second")] = UNSET
    network_upload_bps: Annotated[int | UnsetType, Meta(description="Bytes per second")] = UNSET
    disk_io_bps: Annotated[int | UnsetType, Meta(description="Bytes per second")] = UNSET


class PoolAllocation(Struct, frozen=True, kw_only=True):
    """What the forks that are kept for a snapshot hold; they give way when an instance needs it."""

    snapshot_id: str
    members: int
    memory_bytes: Annotated[int, Meta(description="That they use (PSS); while one is made, what it may use")]
    disk_bytes: int


class GpuProfile(Struct, frozen=True, kw_only=True):
    name: str
    framebuffer_mb: int
    available: int


class GpuDevice(Struct, frozen=True, kw_only=True):
    name: str
    available: bool


class GPUResourceStatus(Struct, frozen=True, kw_only=True):
    mode: Literal["vgpu", "passthrough"]
    total_slots: int
    used_slots: int
    profiles: Annotated[tuple[GpuProfile, ...] | UnsetType, Meta(description="Only in mode vgpu")] = UNSET
    devices: Annotated[tuple[GpuDevice, ...] | UnsetType, Meta(description="Only in mode passthrough")] = UNSET


class Resources(Struct, frozen=True, kw_only=True):
    cpu: ResourceStatus
    memory: ResourceStatus
    disk: ResourceStatus
    network: ResourceStatus
    allocations: tuple[ResourceAllocation, ...]
    disk_io: Annotated[ResourceStatus | UnsetType, Meta(description="Absent if the disk's rate is not known")] = UNSET
    disk_breakdown: DiskBreakdown | UnsetType = UNSET
    gpu: GPUResourceStatus | None = None
    pools: Annotated[
        tuple[PoolAllocation, ...] | UnsetType,
        Meta(description="Extension: pools of snapshots, included in `allocated`; absent if there are none"),
    ] = UNSET


class MemoryReclaimRequest(Struct, frozen=True, kw_only=True):
    reclaim_bytes: Annotated[
        int,
        Meta(
            le=MAX_INT,
            description="Memory to reclaim from all guests together, in place of what is reclaimed now; 0: none",
            extra_json_schema={"minimum": 0},
        ),
    ]
    hold_for: Annotated[
        Duration | None, Meta(description="How long, up to 1h; default: 5m. Then the guests have it back")
    ] = None
    dry_run: Annotated[bool, Meta(description="Only return what would be done")] = False
    reason: Annotated[str, Meta(max_length=256, description="For the log")] | None = None


class MemoryReclaimAction(Struct, frozen=True, kw_only=True):
    """Effect on one running instance. The target is the memory left to the guest."""

    instance_id: str
    instance_name: str
    hypervisor: str
    status: Annotated[str, Meta(description="applied, unchanged, planned (dry run), unsupported or error")]
    assigned_memory_bytes: int
    protected_floor_bytes: Annotated[int, Meta(description="What is never taken")]
    previous_target_guest_memory_bytes: int
    planned_target_guest_memory_bytes: int
    target_guest_memory_bytes: int
    applied_reclaim_bytes: Annotated[int, Meta(description="What the guest was asked to lend, in all")]
    error: str | UnsetType = UNSET


class MemoryReclaimResponse(Struct, frozen=True, kw_only=True):
    requested_reclaim_bytes: int
    planned_reclaim_bytes: int
    applied_reclaim_bytes: int
    host_available_bytes: int
    host_pressure_state: Literal["healthy", "pressure"]
    actions: tuple[MemoryReclaimAction, ...]
    hold_until: Timestamp | UnsetType = UNSET
