"""What the server wants of each capability: one Protocol each, and the bundle that ``app.py`` fills.

Only what a route calls stands here. All methods raise HypemanErrors; every ``ref`` is what a client
wrote (id, name, or prefix where the contract allows one) and is resolved by the service. Work that
was asked for goes on when the caller is cancelled, because clients hang up.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hypeman.devices.types import AvailableDevice, CreateDeviceRequest, Device
from hypeman.egress.types import EgressPolicy, EgressRecord
from hypeman.guest.types import PathInfo
from hypeman.images.types import CreateImageRequest, Image, Progress
from hypeman.instances.session_types import CopyEntry, CpRequest, EntryEnd, ExecRequest
from hypeman.instances.types import (
    AttachVolumeRequest,
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
from hypeman.snapshots.types import (
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    RestoreSnapshotRequest,
    Snapshot,
    SnapshotKind,
)
from hypeman.volumes.types import CreateVolumeRequest, Volume

Tags = Mapping[str, str]


class ImageService(Protocol):
    """A ``ref`` is an OCI reference as the client wrote it."""

    async def create(self, request: CreateImageRequest) -> Image: ...
    async def list(self, *, tags: Tags) -> Sequence[Image]: ...
    async def get(self, ref: str) -> Image: ...
    async def progress(self, ref: str) -> Progress: ...
    async def tag(self, ref: str, target: str) -> Image:
        """Have ``target`` stand for the same image, without a pull."""
        ...

    async def delete(self, ref: str) -> None: ...

    async def import_archive(self, chunks: AsyncIterable[bytes], *, name: str, tags: Tags, default_name: str) -> Image:
        """``chunks`` are an OCI or docker-save archive; ``name`` is given to the image. Empty: the one in
        the archive, or else ``default_name``."""
        ...

    async def import_path(self, path: str, *, name: str, tags: Tags, default_name: str) -> Image:
        """The same from a path on this host, which the configuration must allow."""
        ...


class ExecSession(Protocol):
    """A program in a guest. ``receive`` and the rest may be used by different tasks."""

    async def send_stdin(self, data: bytes) -> None:
        """Waits while the program does not read."""
        ...

    async def close_stdin(self) -> None: ...
    async def resize(self, rows: int, cols: int) -> None: ...

    async def receive(self) -> bytes | int:
        """Output as it comes, the exit code last."""
        ...

    async def aclose(self) -> None:
        """Kill what still runs, with all its children."""
        ...


class CopyIn(Protocol):
    """One file or directory on its way into a guest; nothing is to be seen of it before ``finish``."""

    async def send(self, data: bytes) -> None: ...

    async def finish(self) -> int:
        """Put it in its place; returns the bytes written."""
        ...

    async def aclose(self) -> None:
        """Throw away what is not finished."""
        ...


class CopyOut(Protocol):
    """A file or tree on its way out: for each entry its head, its bytes, its end."""

    def __aiter__(self) -> AsyncIterator[CopyEntry | bytes | EntryEnd]: ...
    async def __anext__(self) -> CopyEntry | bytes | EntryEnd: ...
    async def aclose(self) -> None: ...


class InstanceService(Protocol):
    async def list(self, state: InstanceState | None, tags: Tags) -> bytes | Sequence[Instance]:
        """Bytes are the whole JSON array, for a service that keeps instances encoded."""
        ...

    async def get(self, ref: str) -> Instance: ...
    async def create(self, request: CreateInstanceRequest) -> Instance: ...
    async def update(self, ref: str, request: UpdateInstanceRequest) -> Instance: ...

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        """Without ``graceful`` its guest is not asked to shut down first."""
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
        """Of the instance ``ref``."""
        ...

    async def restore(self, ref: str, snapshot: str, request: RestoreSnapshotRequest) -> Instance:
        """The instance ``ref`` becomes what it was."""
        ...


class VolumeService(Protocol):
    async def list(self, *, tags: Tags) -> Sequence[Volume]: ...
    async def get(self, ref: str) -> Volume: ...
    async def create(self, request: CreateVolumeRequest) -> Volume: ...

    async def create_from_archive(self, request: CreateVolumeRequest, chunks: AsyncIterable[bytes]) -> Volume:
        """``chunks`` are a tar.gz that fills the volume."""
        ...

    async def delete(self, ref: str) -> None: ...


class DeviceService(Protocol):
    def list(self, tags: Tags) -> Sequence[Device]: ...
    def get(self, ref: str) -> Device: ...
    async def available(self, *, everything: bool) -> Sequence[AvailableDevice]:
        """With ``everything`` also what can not be passed through, and why."""
        ...

    async def register(self, request: CreateDeviceRequest) -> Device: ...
    async def delete(self, ref: str) -> None: ...


class ResourceService(Protocol):
    async def get(self) -> Resources: ...


class EgressRecords(Protocol):
    """Mediated requests of one instance as they end."""

    def __aiter__(self) -> AsyncIterator[EgressRecord]: ...
    async def __anext__(self) -> EgressRecord: ...
    async def aclose(self) -> None: ...


class EgressService(Protocol):
    """An instance whose egress is not mediated is NotFound."""

    def ca_pem(self) -> bytes:
        """The certificate that guests must trust."""
        ...

    def policy(self, ref: str) -> EgressPolicy: ...

    async def requests(self, ref: str, *, tail: int, follow: bool) -> EgressRecords:
        """The last ``tail`` ones; with ``follow`` then every new one until the instance is gone."""
        ...


class CapabilityService(Protocol):
    async def get(self) -> Capabilities: ...


@dataclass(frozen=True)
class Services:
    """Everything that a route can ask."""

    images: ImageService
    instances: InstanceService
    snapshots: SnapshotService
    volumes: VolumeService
    devices: DeviceService
    egress: EgressService
    resources: ResourceService
    capabilities: CapabilityService
