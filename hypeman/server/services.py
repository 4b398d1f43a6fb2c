"""What the server needs from each capability: one Protocol each, and the bundle that ``app.py`` fills.

Contains only what routes call. All methods raise HypemanErrors; every ``ref`` is as the client wrote
it (id, name, or prefix where the contract allows one) and is resolved by the service. Requested work
continues when the caller is cancelled, because clients disconnect.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from hypeman.devices.types import AvailableDevice, CreateDeviceRequest, Device
from hypeman.egress.types import EgressPolicy, EgressRecord
from hypeman.events.types import Event, EventFilter
from hypeman.guest.client import CopyIn, CopyOut, ExecSession
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.types import PathInfo
from hypeman.images.types import CreateImageRequest, Image, Progress
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    RestoreSnapshotRequest,
    SetSnapshotScheduleRequest,
    Snapshot,
    SnapshotKind,
    SnapshotSchedule,
)
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    AutoStandbyStatus,
    CreateInstanceRequest,
    ForkInstanceRequest,
    Instance,
    InstanceState,
    InstanceStats,
    LogSource,
    StandbyInstanceRequest,
    StartInstanceRequest,
    UpdateInstanceRequest,
    WaitForStateResponse,
)
from hypeman.resources.types import MemoryReclaimRequest, MemoryReclaimResponse, Resources
from hypeman.server.types import Capabilities
from hypeman.volumes.types import CreateVolumeRequest, Volume

Tags = Mapping[str, str]


class ImageService(Protocol):
    """A ``ref`` is an OCI reference as the client wrote it."""

    async def create(self, request: CreateImageRequest) -> Image: ...
    async def list(self, *, tags: Tags) -> Sequence[Image]: ...
    async def get(self, ref: str) -> Image: ...
    async def progress(self, ref: str) -> Progress: ...
    async def tag(self, ref: str, target: str) -> Image:
        """Make ``target`` a name of the same image, without a pull."""
        ...

    async def delete(self, ref: str) -> None: ...

    async def import_archive(self, chunks: AsyncIterable[bytes], *, name: str, tags: Tags, default_name: str) -> Image:
        """``chunks`` are an OCI or docker-save archive; ``name`` is the image's name. Empty: the one in the
        archive, or else ``default_name``."""
        ...

    async def import_path(self, path: str, *, name: str, tags: Tags, default_name: str) -> Image:
        """The same from a path on this host, which the configuration must allow."""
        ...


class InstanceService(Protocol):
    async def list(self, state: InstanceState | None, tags: Tags) -> bytes | Sequence[Instance]:
        """May return the encoded JSON array as bytes, for a service that caches encoded instances."""
        ...

    async def get(self, ref: str) -> Instance: ...
    async def get_encoded(self, ref: str) -> bytes | Instance:
        """``get`` for a response; likewise."""
        ...

    async def create(self, request: CreateInstanceRequest) -> Instance: ...
    async def update(self, ref: str, request: UpdateInstanceRequest) -> Instance: ...

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        """Delete the instance. Without ``graceful`` its guest is not asked to shut down first."""
        ...

    async def start(self, ref: str, request: StartInstanceRequest) -> Instance: ...
    async def stop(self, ref: str) -> Instance: ...
    async def standby(self, ref: str, request: StandbyInstanceRequest) -> Instance: ...
    async def restore(self, ref: str) -> Instance: ...
    async def fork(self, ref: str, request: ForkInstanceRequest) -> Instance: ...
    async def wait_state(self, ref: str, state: InstanceState, timeout: float) -> WaitForStateResponse: ...
    async def stats(self, ref: str) -> InstanceStats: ...
    async def stat(self, ref: str, path: str, follow_links: bool) -> PathInfo: ...
    async def exec(self, ref: str, request: ExecRequest) -> ExecSession: ...
    async def copy_to(self, ref: str, request: CpRequest) -> CopyIn: ...
    async def copy_from(self, ref: str, request: CpRequest) -> CopyOut: ...
    async def log_path(self, ref: str, source: LogSource) -> Path: ...
    async def attach_volume(self, ref: str, volume: str, request: AttachVolumeRequest) -> Instance: ...
    async def detach_volume(self, ref: str, volume: str) -> Instance: ...
    async def reclaim_memory(self, request: MemoryReclaimRequest) -> MemoryReclaimResponse: ...


class SnapshotService(Protocol):
    async def list(
        self, *, source_instance_id: str | None, kind: SnapshotKind | None, name: str | None, tags: Tags
    ) -> Sequence[Snapshot]: ...
    async def get(self, snapshot: str) -> Snapshot: ...
    async def delete(self, snapshot: str) -> None: ...
    async def fork(self, snapshot: str, request: ForkSnapshotRequest) -> Instance: ...

    async def create(self, ref: str, request: CreateSnapshotRequest) -> Snapshot:
        """Snapshot the instance ``ref``."""
        ...

    async def restore(self, ref: str, snapshot: str, request: RestoreSnapshotRequest) -> Instance:
        """Restore the instance ``ref`` to the snapshot."""
        ...


class PolicyService(Protocol):
    async def standby_status(self, ref: str) -> AutoStandbyStatus: ...
    async def hold(self, ref: str) -> AutoStandbyStatus: ...
    def using(self, ref: str, what: str) -> AbstractAsyncContextManager[None]:
        """Within the block, a client uses the instance over the API: ``what`` is exec, cp, logs or stat."""
        ...

    async def get_schedule(self, ref: str) -> SnapshotSchedule: ...
    async def set_schedule(self, ref: str, request: SetSnapshotScheduleRequest) -> SnapshotSchedule: ...
    async def delete_schedule(self, ref: str) -> None: ...


class VolumeService(Protocol):
    async def list(self, *, tags: Tags) -> Sequence[Volume]: ...
    async def get(self, ref: str) -> Volume: ...
    async def create(self, request: CreateVolumeRequest) -> Volume: ...

    async def create_from_archive(self, request: CreateVolumeRequest, chunks: AsyncIterable[bytes]) -> Volume:
        """Create a volume filled from ``chunks``, a tar.gz."""
        ...

    async def delete(self, ref: str) -> None: ...


class DeviceService(Protocol):
    def list(self, tags: Tags) -> Sequence[Device]: ...
    def get(self, ref: str) -> Device: ...
    async def available(self, *, everything: bool) -> Sequence[AvailableDevice]:
        """With ``everything`` also devices that cannot be passed through, and why."""
        ...

    async def register(self, request: CreateDeviceRequest) -> Device: ...
    async def delete(self, ref: str) -> None: ...


class ResourceService(Protocol):
    async def get(self) -> Resources: ...


class EgressRecords(Protocol):
    """Mediated requests of one instance, as they complete."""

    def __aiter__(self) -> AsyncIterator[EgressRecord]: ...
    async def __anext__(self) -> EgressRecord: ...
    async def aclose(self) -> None: ...


class EgressService(Protocol):
    """Raises NotFound for an instance whose egress is not mediated."""

    def ca_pem(self) -> bytes:
        """The certificate that guests must trust."""
        ...

    def policy(self, ref: str) -> EgressPolicy: ...

    async def requests(self, ref: str, *, tail: int, follow: bool) -> EgressRecords:
        """The last ``tail`` requests; with ``follow`` then each new one until the instance is deleted."""
        ...


class EventFollower(Protocol):
    """Batches of events as they are logged; an empty one now and then. ``cursor`` is how far the log was read."""

    @property
    def cursor(self) -> int: ...
    def __aiter__(self) -> AsyncIterator[Sequence[Event]]: ...
    async def __anext__(self) -> Sequence[Event]: ...
    async def aclose(self) -> None: ...


class EventService(Protocol):
    """The log of life-cycle changes. Raises CursorGone for a cursor that it does not reach back to."""

    @property
    def last(self) -> int:
        """Cursor of the newest event."""
        ...

    def cursor_before(self, time: datetime) -> int: ...
    def follow(self, cursor: int, wanted: EventFilter) -> EventFollower: ...
    async def list(self, cursor: int, wanted: EventFilter, limit: int) -> Sequence[Event]: ...


class CapabilityService(Protocol):
    async def get(self) -> Capabilities: ...


@dataclass(frozen=True)
class Services:
    """All services available to routes."""

    images: ImageService
    instances: InstanceService
    snapshots: SnapshotService
    policies: PolicyService
    volumes: VolumeService
    devices: DeviceService
    egress: EgressService
    events: EventService
    resources: ResourceService
    capabilities: CapabilityService
