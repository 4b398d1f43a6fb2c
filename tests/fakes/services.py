"""Capabilities without anything below them: records in dictionaries, a shell that upper-cases.

Enough to be asked everything that a route can ask, with every refusal that the contract knows. Tests
change what they hold directly.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import trio
from msgspec import UNSET

from hypeman.builds.types import (
    Build,
    Builder,
    BuilderStatus,
    BuildEvent,
    BuildEventType,
    BuildStatus,
    CreateBuilderRequest,
)
from hypeman.devices.types import AvailableDevice, CreateDeviceRequest, Device, DeviceType
from hypeman.egress.rules import check_url
from hypeman.egress.types import (
    AccessAction,
    AccessDefault,
    AccessRule,
    CredentialPolicy,
    CredentialSource,
    EgressApproval,
    EgressCheck,
    EgressEnforcementMode,
    EgressPolicy,
    EgressProposal,
    EgressRecord,
    InjectAs,
    InjectRule,
)
from hypeman.errors import (
    Ambiguous,
    Conflict,
    HypemanError,
    InternalError,
    InUse,
    InvalidRequest,
    InvalidState,
    NameConflict,
    NotFound,
)
from hypeman.events.types import Event, EventFilter, EventObject, Kind
from hypeman.guest.copies import CopyIn, CopyOut
from hypeman.guest.programs import ExecResult, ExecSession, Output
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.types import CopyEntry, PathInfo
from hypeman.ids import check_name, check_tags, new_id, tags_match
from hypeman.images.types import CreateImageRequest, Image, ImageStatus, LayerProgress, Progress
from hypeman.ingress.types import CertificateState, CreateIngressRequest, Ingress, IngressCertificate
from hypeman.ingress.validate import check_request
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    RestoreSnapshotRequest,
    SetSnapshotPoolRequest,
    SetSnapshotScheduleRequest,
    Snapshot,
    SnapshotKind,
    SnapshotPool,
    SnapshotSchedule,
)
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    AutoStandbyReason,
    AutoStandbyState,
    AutoStandbyStatus,
    CreateInstanceRequest,
    ForkInstanceRequest,
    Instance,
    InstanceNetwork,
    InstanceState,
    InstanceStats,
    InstanceUsage,
    LogSource,
    StandbyInstanceRequest,
    StartInstanceRequest,
    StopInstanceRequest,
    UpdateInstanceRequest,
    UsageOfAll,
    VolumeMount,
    WaitForStateResponse,
)
from hypeman.metering.types import Query, UsageReport, UsageRow, UsageVerification
from hypeman.registry.names import Code, RegistryFailure
from hypeman.registry.push_types import CreatePushRequest, Push, PushStatus
from hypeman.resources.types import (
    MemoryReclaimAction,
    MemoryReclaimRequest,
    MemoryReclaimResponse,
    ResourceAllocation,
    Resources,
    ResourceStatus,
)
from hypeman.server.services import RegistryService, Services
from hypeman.server.types import (
    Capabilities,
    DefaultRuntime,
    HostPlatform,
    ImageCapabilities,
    NetworkCapabilities,
    Runtime,
    ServerVersion,
)
from hypeman.telemetry import traces
from hypeman.telemetry.findings import Finding, Verdict
from hypeman.units import parse_duration
from hypeman.volumes.types import CreateVolumeRequest, Volume

Tags = Mapping[str, str]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DIGEST = "sha256:" + "ab" * 32


def normalized(ref: str) -> str:
    """As much of Docker's rules as the tests need."""
    ref = ref if ref.rpartition("/")[2].count(":") else ref + ":latest"
    if "/" not in ref:
        ref = "library/" + ref
    return ref if "." in ref.split("/")[0] else "docker.io/" + ref


@dataclass
class FakeImages:
    images: dict[str, Image] = field(default_factory=dict)
    looks: int = 0
    """Looks at an image on its way before it is ready."""
    imported: bytes = b""
    asked: list[CreateImageRequest] = field(default_factory=list)

    async def create(self, request: CreateImageRequest) -> Image:
        self.asked.append(request)
        name = normalized(request.name)
        image = Image(name, DIGEST, ImageStatus.PENDING, NOW, tags=request.tags or UNSET)
        return self.images.setdefault(name, image)

    async def create_named(self, name: str) -> Image:
        return await self.create(CreateImageRequest(name))

    async def list(self, *, tags: Tags) -> Sequence[Image]:
        return [image for image in self.images.values() if tags_match(image.tags or {}, tags)]

    async def get(self, ref: str) -> Image:
        name = normalized(ref)
        if name not in self.images:
            raise NotFound(f"image {name} is not here")
        image = self.images[name]
        if not image.status.is_final:
            order = [ImageStatus.PENDING, ImageStatus.PULLING, ImageStatus.CONVERTING, ImageStatus.READY]
            status = order[order.index(image.status) + 1]
            self.images[name] = msgspec.structs.replace(image, status=status)
        return image

    async def progress(self, ref: str) -> Progress:
        image = await self.get(ref)
        return Progress(image.status, (LayerProgress(DIGEST, 1000, 400),))

    async def tag(self, ref: str, target: str) -> Image:
        image = msgspec.structs.replace(await self.get(ref), name=normalized(target))
        self.images[image.name] = image
        return image

    async def delete(self, ref: str) -> None:
        await self.get(ref)
        del self.images[normalized(ref)]

    async def import_path(self, path: str, *, name: str, tags: Tags, default_name: str) -> Image:
        raise InvalidRequest(f"{path} is not below one of images.import_paths")

    async def import_archive(self, chunks: AsyncIterable[bytes], *, name: str, tags: Tags, default_name: str) -> Image:
        self.imported = b"".join([chunk async for chunk in chunks])
        if not self.imported:
            raise InvalidRequest("the archive is empty", code="invalid_archive")
        name = normalized(name or default_name)
        image = Image(name, DIGEST, ImageStatus.PENDING, NOW, tags=dict(tags) or UNSET)
        self.images[image.name] = image
        return image


class FakeExec(ExecSession):
    """A program that says back what it reads in capitals and ends with its stdin, or at ``exit N``."""

    key = b""
    """It keeps no programs; ``tests/cli/test_exec_kept.py`` has the real agent for that."""

    def __init__(self, request: ExecRequest) -> None:
        self.request = request
        self.sizes: list[tuple[int, int]] = []
        self.closed = False
        self._send, self._receive = trio.open_memory_channel[bytes | Output | int](100)
        match list(request.command):
            case ["echo", *words]:
                self._send.send_nowait(" ".join(words).encode() + b"\n")
                self._send.send_nowait(0)
            case ["false"]:
                self._send.send_nowait(1)
            case ["big", size]:
                self._send.send_nowait(b"x" * int(size))
                self._send.send_nowait(0)
            case ["both", out, err]:
                self._send.send_nowait(out.encode())
                self._send.send_nowait(Output(err.encode(), stderr=True))
                self._send.send_nowait(0)
            case ["dies"]:
                self._send.close()
            case ["path"]:
                raise InternalError("/var/lib/hypeman/instances/abc/overlay.raw: No space left")

    async def send_stdin(self, data: bytes) -> None:
        if self.request.command[:1] == ("sleep",):
            await trio.sleep_forever()
        await self._send.send(data.upper())
        if found := re.search(rb"exit (\d+)", data):
            await self._send.send(int(found[1]))

    async def close_stdin(self) -> None:
        await self._send.send(0)

    async def resize(self, rows: int, cols: int) -> None:
        self.sizes.append((rows, cols))
        await self._send.send(f"{rows}x{cols}\r\n".encode())

    async def receive(self) -> Output | ExecResult:
        try:
            received = await self._receive.receive()
        except trio.EndOfChannel:
            raise HypemanError("the guest has gone") from None
        if isinstance(received, int):
            return ExecResult(received)
        return received if isinstance(received, Output) else Output(received)

    async def aclose(self) -> None:
        self.closed = True


class FakeCopyIn(CopyIn):
    def __init__(self, files: dict[str, tuple[CpRequest, bytes | None]], request: CpRequest) -> None:
        self._files = files
        self._request = request
        self._data = bytearray()
        self.closed = False

    async def send(self, data: bytes) -> None:
        if self._request.guest_path == "/full":
            raise HypemanError("no space left in the guest")
        self._data += data

    async def finish(self) -> int:
        self._files.pop(self._request.guest_path, None)  # so that their order is that of the last writing
        self._files[self._request.guest_path] = (self._request, None if self._request.is_dir else bytes(self._data))
        return len(self._data)

    async def aclose(self) -> None:
        self.closed = True


class FakeCopyOut(CopyOut):
    """Yields what it is given, and raises what is an error."""

    def __init__(self, items: list[CopyEntry | bytes | HypemanError]) -> None:
        self._left = iter(items)

    async def __anext__(self) -> CopyEntry | bytes:
        await trio.lowlevel.checkpoint()
        for item in self._left:
            if isinstance(item, HypemanError):
                raise item
            return item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        pass


@dataclass
class FakeInstances:
    """Also keeps what was asked of it: ``asked``, ``sessions``, ``files``."""

    log_directory: Path
    instances: dict[str, Instance] = field(default_factory=dict)
    encoded: bytes | None = None
    fails: BaseException | None = None
    """Raised by everything, where set."""
    hangs: bool = False
    asked: list[tuple[str, Any]] = field(default_factory=list)
    reclaimed: list[MemoryReclaimRequest] = field(default_factory=list)
    killed: int = 0
    """Deletes without a shutdown of the guest."""
    sessions: list[FakeExec] = field(default_factory=list)
    copies: list[FakeCopyIn] = field(default_factory=list)
    files: dict[str, tuple[CpRequest, bytes | None]] = field(default_factory=dict)
    tree: list[CopyEntry | bytes | HypemanError] = field(default_factory=list)

    def add(self, name: str, state: InstanceState = InstanceState.RUNNING, **changes: Any) -> Instance:
        """An instance that is simply there."""
        instance = Instance(
            id=changes.pop("id", None) or new_id(),
            name=name,
            image=changes.pop("image", "alpine"),
            state=state,
            created_at=NOW,
            size="1GB",
            vcpus=2,
            network=InstanceNetwork(
                enabled=True,
                name="default",
                ip="10.100.0.2",
                mac="02:00:00:00:00:02",
                groups=changes.pop("groups", UNSET),
            ),
            **changes,
        )
        self.instances[instance.id] = instance
        return instance

    def find(self, ref: str) -> Instance:
        if self.fails is not None:
            raise self.fails
        hits = [instance for instance in self.instances.values() if ref in (instance.id, instance.name)]
        hits = hits or [instance for instance in self.instances.values() if ref and instance.id.startswith(ref)]
        if len(hits) > 1:
            raise Ambiguous(f"{ref} fits {len(hits)} instances")
        if not hits:
            raise NotFound(f"instance {ref} is not here")
        return hits[0]

    def _change(self, instance: Instance, **changes: Any) -> Instance:
        changed = msgspec.structs.replace(instance, **changes)
        self.instances[instance.id] = changed
        return changed

    def _move(self, what: str, ref: str, wanted: InstanceState, after: InstanceState, request: Any = None) -> Instance:
        instance = self.find(ref)
        self.asked.append((what, request))
        if instance.state is not wanted:
            raise InvalidState(f"instance {instance.name} is {instance.state}; {what} wants {wanted}")
        return self._change(instance, state=after)

    async def list(self, state: InstanceState | None, tags: Tags) -> bytes | Sequence[Instance]:
        if self.fails is not None:
            raise self.fails
        if self.encoded is not None:
            return self.encoded
        return [
            instance
            for instance in self.instances.values()
            if state in (None, instance.state) and tags_match(instance.tags or {}, tags)
        ]

    async def get(self, ref: str) -> Instance:
        if self.hangs:
            await trio.sleep_forever()
        return self.find(ref)

    async def check_running(self, ref: str) -> str:
        instance = await self.get(ref)
        if instance.state is not InstanceState.RUNNING:
            raise InvalidState(f"instance {instance.name} is {instance.state}; it must be Running for this")
        return instance.id

    async def get_encoded(self, ref: str) -> Instance:
        return await self.get(ref)

    async def create(self, request: CreateInstanceRequest) -> Instance:
        self.asked.append(("create", request))
        if self.fails is not None:
            raise self.fails
        if any(instance.name == request.name for instance in self.instances.values()):
            raise NameConflict(f"there is an instance {request.name} already")
        check_name(request.name)
        if not request.image:
            raise InvalidRequest("image is empty", code="invalid_name")
        return self.add(
            request.name,
            image=request.image,
            env=request.env or UNSET,
            tags=request.tags or UNSET,
            volumes=request.volumes or UNSET,
            groups=request.network.groups or UNSET,
            phase_durations_ms={"created": 12, "initializing": 340, "running": 5},
            current_phase="running",
            current_phase_since=NOW,
        )

    async def update(self, ref: str, request: UpdateInstanceRequest) -> Instance:
        self.asked.append(("update", request))
        return self.find(ref)

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        del self.instances[self.find(ref).id]
        self.killed += not graceful

    async def start(self, ref: str, request: StartInstanceRequest) -> Instance:
        return self._move("start", ref, InstanceState.STOPPED, InstanceState.RUNNING, request)

    async def stop(self, ref: str, request: StopInstanceRequest) -> Instance:
        return self._move("stop", ref, InstanceState.RUNNING, InstanceState.STOPPED, request)

    async def standby(self, ref: str, request: StandbyInstanceRequest) -> Instance:
        return self._move("standby", ref, InstanceState.RUNNING, InstanceState.STANDBY, request)

    async def restore(self, ref: str) -> Instance:
        return self._move("restore", ref, InstanceState.STANDBY, InstanceState.RUNNING)

    async def fork(self, ref: str, request: ForkInstanceRequest) -> Instance:
        self.asked.append(("fork", request))
        check_name(request.name)
        source = self.find(ref)
        return self.add(request.name, source.state, tags=source.tags if request.tags is None else request.tags)

    async def wait_state(self, ref: str, state: InstanceState, timeout: float) -> WaitForStateResponse:
        self.asked.append(("wait", (state, timeout)))
        instance = self.find(ref)
        return WaitForStateResponse(state=instance.state, timed_out=instance.state is not state)

    async def stats(self, ref: str) -> InstanceStats:
        instance = self.find(ref)
        return InstanceStats(
            instance_id=instance.id,
            instance_name=instance.name,
            cpu_seconds=1.5,
            memory_rss_bytes=100 * 2**20,
            memory_vms_bytes=2**30,
            network_rx_bytes=1000,
            network_tx_bytes=2000,
            allocated_vcpus=2,
            allocated_memory_bytes=2**30,
            memory_utilization_ratio=0.1,
        )

    async def usage(self) -> UsageOfAll:
        running = [instance for instance in self.instances.values() if instance.state is InstanceState.RUNNING]
        return UsageOfAll(
            time=NOW,
            instances=tuple(
                InstanceUsage(
                    instance_id=one.id,
                    instance_name=one.name,
                    cpu_seconds=1.5,
                    memory_rss_bytes=100 * 2**20,
                    memory_vms_bytes=200 * 2**20,
                    allocated_vcpus=2,
                    allocated_memory_bytes=2**30,
                    network_rx_bytes=1000,
                    network_tx_bytes=2000,
                )
                for one in running
            ),
        )

    async def stat(self, ref: str, path: str, follow_links: bool) -> PathInfo:
        self.find(ref)
        if path.rstrip("/") in ("/tmp", "/etc"):
            return PathInfo(exists=True, is_dir=True, mode=0o755)
        if path in self.files:
            return PathInfo(exists=True, is_file=True, mode=0o644, size=len(self.files[path][1] or b""))
        return PathInfo(exists=False)

    async def exec(self, ref: str, request: ExecRequest) -> FakeExec:
        self.find(ref)
        if request.command[:1] == ("no-such-program",):
            raise NotFound("exec: no-such-program: not found")
        if request.command[:1] == ("bug",):
            raise RuntimeError("a bug with a secret in it")
        session = FakeExec(request)
        self.sessions.append(session)
        return session

    async def copy_to(self, ref: str, request: CpRequest) -> FakeCopyIn:
        self.find(ref)
        copy = FakeCopyIn(self.files, request)
        self.copies.append(copy)
        return copy

    async def copy_from(self, ref: str, request: CpRequest) -> FakeCopyOut:
        self.find(ref)
        if request.guest_path == "/missing":
            raise NotFound("/missing: no such file or directory")
        return FakeCopyOut(self.tree)

    async def log_path(self, ref: str, source: LogSource) -> Path:
        return self.log_directory / f"{self.find(ref).name}-{source}.log"

    async def attach_volume(self, ref: str, volume: str, request: AttachVolumeRequest) -> Instance:
        instance = self.find(ref)
        mount = VolumeMount(volume_id=volume, mount_path=request.mount_path, readonly=request.readonly)
        return self._change(instance, volumes=(*(instance.volumes or ()), mount))

    async def detach_volume(self, ref: str, volume: str) -> Instance:
        instance = self.find(ref)
        return self._change(instance, volumes=tuple(one for one in instance.volumes or () if one.volume_id != volume))

    async def reclaim_memory(self, request: MemoryReclaimRequest) -> MemoryReclaimResponse:
        """One guest of 4 GB lends whatever is asked."""
        self.reclaimed.append(request)
        lent = request.reclaim_bytes
        action = MemoryReclaimAction(
            instance_id="i1", instance_name="web", hypervisor="qemu", status="applied",
            assigned_memory_bytes=4 << 30, protected_floor_bytes=2 << 30,
            previous_target_guest_memory_bytes=4 << 30, planned_target_guest_memory_bytes=(4 << 30) - lent,
            target_guest_memory_bytes=(4 << 30) - lent, applied_reclaim_bytes=lent,
        )  # fmt: skip
        return MemoryReclaimResponse(
            requested_reclaim_bytes=lent, planned_reclaim_bytes=lent, applied_reclaim_bytes=lent,
            host_available_bytes=1 << 34, host_pressure_state="healthy", actions=(action,), hold_until=NOW,
        )  # fmt: skip


@dataclass
class FakeSnapshots:
    instances: FakeInstances
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    pools: dict[str, int] = field(default_factory=dict)

    async def create(self, ref: str, request: CreateSnapshotRequest) -> Snapshot:
        instance = await self.instances.get(ref)
        if request.name:
            check_name(request.name)
        made = Snapshot(
            id=new_id(),
            kind=request.kind,
            source_instance_id=instance.id,
            source_instance_name=instance.name,
            source_hypervisor=instance.hypervisor or "qemu",  # type: ignore[arg-type]
            created_at=NOW,
            size_bytes=4096,
            name=request.name,
            tags=request.tags or UNSET,
        )
        self.snapshots[made.id] = made
        return made

    async def restore(self, ref: str, snapshot: str, request: RestoreSnapshotRequest) -> Instance:
        self.instances.asked.append(("restore_snapshot", request))
        return await self.instances.get(ref)

    async def list(
        self, *, source_instance_id: str | None, kind: SnapshotKind | None, name: str | None, tags: Tags
    ) -> Sequence[Snapshot]:
        return [
            snapshot
            for snapshot in self.snapshots.values()
            if source_instance_id in (None, snapshot.source_instance_id)
            and kind in (None, snapshot.kind)
            and name in (None, snapshot.name)
            and tags_match(snapshot.tags or {}, tags)
        ]

    async def get(self, snapshot: str) -> Snapshot:
        if snapshot not in self.snapshots:
            raise NotFound(f"snapshot {snapshot} is not here")
        return self.snapshots[snapshot]

    async def delete(self, snapshot: str) -> None:
        await self.get(snapshot)
        del self.snapshots[snapshot]

    async def fork(self, snapshot: str, request: ForkSnapshotRequest) -> Instance:
        await self.get(snapshot)
        check_name(request.name)
        return self.instances.add(request.name)

    async def get_pool(self, snapshot: str) -> SnapshotPool:
        await self.get(snapshot)
        size = self.pools.get(snapshot, 0)
        return SnapshotPool(snapshot_id=snapshot, size=size, ready=size, memory_bytes=size << 25)

    async def set_pool(self, snapshot: str, request: SetSnapshotPoolRequest) -> SnapshotPool:
        await self.get(snapshot)
        self.pools[snapshot] = request.size
        return await self.get_pool(snapshot)

    async def delete_pool(self, snapshot: str) -> None:
        await self.set_pool(snapshot, SetSnapshotPoolRequest(size=0))


@dataclass
class FakeVolumes:
    volumes: dict[str, Volume] = field(default_factory=dict)
    archives: dict[str, bytes] = field(default_factory=dict)
    reads_slowly: trio.Event | None = None
    """Where set, an archive is read only after this."""

    async def list(self, *, tags: Tags) -> Sequence[Volume]:
        return [volume for volume in self.volumes.values() if tags_match(volume.tags or {}, tags)]

    async def get(self, ref: str) -> Volume:
        for volume in self.volumes.values():
            if ref in (volume.id, volume.name):
                return volume
        raise NotFound(f"volume {ref} is not here")

    async def create(self, request: CreateVolumeRequest) -> Volume:
        volume = Volume(
            id=request.id or new_id(),
            name=request.name,
            size_gb=request.size_gb,
            created_at=NOW,
            tags=request.tags or UNSET,
        )
        if volume.id in self.volumes:
            raise Conflict(f"there is a volume {volume.id} already", code="already_exists")
        self.volumes[volume.id] = volume
        return volume

    async def create_from_archive(self, request: CreateVolumeRequest, chunks: AsyncIterable[bytes]) -> Volume:
        if self.reads_slowly is not None:
            await self.reads_slowly.wait()
        volume = await self.create(request)
        self.archives[volume.id] = b"".join([chunk async for chunk in chunks])
        return volume

    async def delete(self, ref: str) -> None:
        volume = await self.get(ref)
        if volume.attachments:
            raise Conflict(f"volume {ref} is attached")
        del self.volumes[volume.id]


@dataclass
class FakeDevices:
    devices: dict[str, Device] = field(default_factory=dict)
    free: list[AvailableDevice] = field(default_factory=list)
    present: set[str] = field(default_factory=lambda: {"0000:03:00.0"})
    """Addresses that can be registered."""

    def list(self, tags: Tags) -> Sequence[Device]:
        return list(self.devices.values())

    async def available(self, *, everything: bool) -> Sequence[AvailableDevice]:
        return self.free if everything else [device for device in self.free if device.reason is UNSET]

    async def register(self, request: CreateDeviceRequest) -> Device:
        if request.pci_address not in self.present:
            raise NotFound(f"there is no {request.pci_address}", code="device_not_found")
        return self.add(request.name or request.pci_address, request.pci_address)

    def add(self, name: str, address: str = "0000:02:00.0") -> Device:
        """A device that is registered."""
        device = Device(
            id=new_id(), type=DeviceType.GPU, pci_address=address, vendor_id="10de", device_id="2204", iommu_group=1,
            bound_to_vfio=False, created_at=NOW, name=name,
        )  # fmt: skip
        self.devices[device.id] = device
        return device

    def get(self, ref: str) -> Device:
        for device in self.devices.values():
            if ref in (device.id, device.name):
                return device
        raise NotFound(f"device {ref} is not here")

    async def delete(self, ref: str) -> None:
        device = self.get(ref)
        if device.attached_to:
            raise InUse(f"device {ref} is attached to {device.attached_to}")
        del self.devices[device.id]


@dataclass
class FakeIngresses:
    instances: FakeInstances
    ingresses: dict[str, Ingress] = field(default_factory=dict)

    async def list(self, *, tags: Tags) -> Sequence[Ingress]:
        return [ingress for ingress in self.ingresses.values() if tags_match(ingress.tags or {}, tags)]

    async def get(self, ref: str) -> Ingress:
        for ingress in self.ingresses.values():
            if ref in (ingress.id, ingress.name):
                return ingress
        raise NotFound(f"ingress {ref} is not here")

    async def create(self, request: CreateIngressRequest) -> Ingress:
        record = check_request(request, lambda ref: self.instances.find(ref).name, refuse_tls, NOW)
        if any(ingress.name == record.name for ingress in self.ingresses.values()):
            raise Conflict(f"there is an ingress {record.name} already", code="already_exists")
        certificates = tuple(
            IngressCertificate(hostname=host, state=CertificateState.VALID, source="internal", not_after=NOW)
            for host in sorted(record.tls_hosts)
        )
        made = Ingress(
            id=record.id,
            name=record.name,
            rules=record.rules,
            created_at=NOW,
            tags=record.tags or UNSET,
            certificates=certificates or UNSET,
        )
        self.ingresses[made.id] = made
        return made

    async def delete(self, ref: str) -> None:
        del self.ingresses[(await self.get(ref)).id]

    async def internal_root(self) -> str:
        return "-----BEGIN CERTIFICATE-----\n"


def refuse_tls(hostname: str) -> None:
    if not hostname.endswith(".internal"):
        raise InvalidRequest(f"tls for {hostname}: no source of certificates", code="config_validation_failed")


class FakeEgressRecords:
    def __init__(self, records: Iterable[EgressRecord], new: trio.MemoryReceiveChannel[EgressRecord] | None) -> None:
        self._records = iter(records)
        self._new = new
        self.closed = False

    def __aiter__(self) -> AsyncIterator[EgressRecord]:
        return self

    async def __anext__(self) -> EgressRecord:
        await trio.lowlevel.checkpoint()
        for record in self._records:
            return record
        if self._new is None:
            raise StopAsyncIteration
        return await self._new.__anext__()

    async def aclose(self) -> None:
        self.closed = True


INJECT = InjectRule(hosts=("api.example.com",), as_=InjectAs(header="Authorization", format="Bearer ${value}"))


@dataclass
class FakeEgress:
    """Policies and records by the instance's name; followers get what is put into ``new``, until it is closed."""

    instances: FakeInstances
    policies: dict[str, EgressPolicy] = field(default_factory=dict)
    records: dict[str, list[EgressRecord]] = field(default_factory=dict)
    streams: list[FakeEgressRecords] = field(default_factory=list)
    held: dict[str, EgressApproval] = field(default_factory=dict)
    decided: list[tuple[str, bool, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.new, self._receive = trio.open_memory_channel[EgressRecord](100)

    def allow(self, instance: Instance, *rules: InjectRule) -> None:
        """Gives ``instance`` a policy with one credential, API_KEY, and these rules."""
        credential = CredentialPolicy(source=CredentialSource(env="REAL_KEY"), inject=rules or (INJECT,))
        self.policies[instance.name] = EgressPolicy(
            instance_id=instance.id,
            instance_name=instance.name,
            mode=EgressEnforcementMode.ALL,
            credentials={"API_KEY": credential},
        )

    def check(self, ref: str, url: str, method: str) -> EgressCheck:
        found = self.policy(ref).access
        access = found if found is not UNSET else None
        return check_url(access, url, method, NOW, web_only=True)

    def proposal(self, ref: str) -> EgressProposal:
        self.policy(ref)
        rule = AccessRule(action=AccessAction.ALLOW, hosts=("api.example.com",), ports=(443,), methods=("GET",))
        return EgressProposal(requests=2, complete=True, default=AccessDefault.DENY, rules=(rule,))

    def approvals(self, ref: str | None = None) -> list[EgressApproval]:
        instance = None if ref is None else self.policy(ref).instance_id
        return [each for each in self.held.values() if instance in (None, each.instance_id)]

    async def decide(self, ref: str, approval: str, *, allow: bool, seconds: float) -> EgressApproval:
        self.policy(ref)
        if approval not in self.held:
            raise NotFound(f"no request waits for approval {approval!r}", code="no_approval")
        self.decided.append((approval, allow, seconds))
        return self.held.pop(approval)

    def hold(self, instance: Instance) -> EgressApproval:
        """A request that waits for an approval."""
        held = EgressApproval(
            id="a1", instance_id=instance.id, rule="writes", scheme="https", host="api.example.com", port=443,
            method="POST", path="/v1/x", waiting=1, since=NOW, expires_at=NOW,
        )  # fmt: skip
        self.held[held.id] = held
        return held

    def ca_pem(self) -> bytes:
        return b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"

    def policy(self, ref: str) -> EgressPolicy:
        name = self.instances.find(ref).name
        if name not in self.policies:
            raise NotFound(f"the egress of instance {name} is not mediated", code="no_egress_policy")
        return self.policies[name]

    async def requests(self, ref: str, *, tail: int, follow: bool) -> FakeEgressRecords:
        name = self.policy(ref).instance_name
        kept = self.records.get(name, [])
        stream = FakeEgressRecords(kept[max(0, len(kept) - tail) :], self._receive if follow else None)
        self.streams.append(stream)
        return stream


@dataclass
class FakeMetering:
    """Reports what was asked; the ledger has one block with the hash aa…"""

    asked: list[Query] = field(default_factory=list)

    async def report(self, query: Query) -> UsageReport:
        self.asked.append(query)
        row = UsageRow(
            instance_id="i1", instance_name="web", begin=NOW, end=NOW, cpu_seconds=12.5, memory_gb_hours=2.0,
            disk_gb_hours=10.0, network_rx_bytes=5 << 20, network_tx_bytes=0,
        )  # fmt: skip
        return UsageReport(by=query.by, rows=(row,), total=row)

    async def verify(self, number: int = 0, expected: str = "") -> UsageVerification:
        fault = number and expected != "aa" * 32
        return UsageVerification(
            valid=not fault, first=1, last=1, hash="aa" * 32, entries=3,
            fault="it is not the block that was noted" if fault else UNSET, block=number if fault else UNSET,
        )  # fmt: skip


@dataclass
class FakeEvents:
    """What is in ``logged``; followers get it in one batch, then one heartbeat, or ``failure``."""

    logged: list[Event] = field(default_factory=list)
    failure: HypemanError | None = None

    def add(self, kind: Kind, action: str, name: str, **more: Any) -> Event:
        event = Event(
            cursor=self.last + 1, time=datetime.now(UTC), type=f"{kind}.{action}", object=EventObject(kind, name, name),
            **more,
        )  # fmt: skip
        self.logged.append(event)
        return event

    @property
    def last(self) -> int:
        return self.logged[-1].cursor if self.logged else 0

    def cursor_before(self, time: datetime) -> int:
        return sum(event.time < time for event in self.logged)

    async def list(self, cursor: int, wanted: EventFilter, limit: int) -> list[Event]:
        return [event for event in self.logged if event.cursor > cursor and wanted.fits(event)][:limit]

    def follow(self, cursor: int, wanted: EventFilter) -> FakeFollower:
        return FakeFollower(self, cursor, wanted)


@dataclass
class FakeFollower:
    events: FakeEvents
    cursor: int
    wanted: EventFilter
    quiet: bool = False

    def __aiter__(self) -> FakeFollower:
        return self

    async def __anext__(self) -> list[Event]:
        await trio.lowlevel.checkpoint()
        if self.events.failure is not None:
            raise self.events.failure
        cursor, self.cursor = self.cursor, self.events.last
        batch = await self.events.list(cursor, self.wanted, 1000)
        if not batch and self.quiet:
            await trio.sleep_forever()
        self.quiet = not batch
        return batch

    async def aclose(self) -> None:
        pass


class FakeResources:
    async def get(self) -> Resources:
        def status(kind: str, capacity: int) -> ResourceStatus:
            return ResourceStatus(
                type=kind,
                capacity=capacity,
                effective_limit=capacity,
                allocated=0,
                available=capacity,
                oversub_ratio=1.0,
                source="detected",
            )

        return Resources(
            cpu=status("cpu", 2),
            memory=status("memory", 8 * 2**30),
            disk=status("disk", 2**40),
            network=status("network", 125_000_000),
            allocations=(ResourceAllocation(instance_id="abc", instance_name="web", cpu=1, memory_bytes=2**30),),
        )


class FakeDoctor:
    async def examine(self) -> list[Finding]:
        return [
            Finding(name="rights", verdict=Verdict.OK, message="running as root"),
            Finding(name="kvm", verdict=Verdict.WARN, message="there is no /dev/kvm", remedy="modprobe kvm_intel"),
        ]


class FakeCapabilities:
    async def get(self) -> Capabilities:
        return Capabilities(
            server=ServerVersion("1234abcd", "0.3.0"),
            host=HostPlatform("linux", "amd64"),
            default_runtime=DefaultRuntime("qemu", True),
            runtimes=(Runtime("qemu", True, ("standby", "fork")),),
            network=NetworkCapabilities("bridge", False, "10.100.0.1", "10.100.0.0/16"),
            images=ImageCapabilities(("linux/amd64",), "linux/amd64"),
            features=("instances", "images"),
        )


@dataclass
class FakePolicies:
    instances: FakeInstances
    schedules: dict[str, SnapshotSchedule] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    in_use: list[str] = field(default_factory=list)

    async def standby_status(self, ref: str) -> AutoStandbyStatus:
        instance = await self.instances.get(ref)
        return AutoStandbyStatus(
            supported=True,
            configured=bool(instance.auto_standby),
            enabled=False,
            eligible=False,
            active_inbound_connections=0,
            status=AutoStandbyState.DISABLED,
            reason=AutoStandbyReason.POLICY_MISSING,
            hold_until=NOW if instance.id in self.held else None,
        )

    async def hold(self, ref: str) -> AutoStandbyStatus:
        self.held.add((await self.instances.get(ref)).id)
        return await self.standby_status(ref)

    @asynccontextmanager
    async def using(self, ref: str, what: str) -> AsyncIterator[None]:
        self.in_use.append(ref)
        try:
            yield
        finally:
            self.in_use.remove(ref)

    async def get_schedule(self, ref: str) -> SnapshotSchedule:
        instance = await self.instances.get(ref)
        if instance.id not in self.schedules:
            raise NotFound(f"instance {ref!r} has no snapshot schedule")
        return self.schedules[instance.id]

    async def set_schedule(self, ref: str, request: SetSnapshotScheduleRequest) -> SnapshotSchedule:
        instance = await self.instances.get(ref)
        if request.name_prefix:
            check_name(request.name_prefix, what="name_prefix", max_length=47)
        for duration in (request.interval, request.retention.max_age):
            if duration is not None:
                parse_duration(duration)
        made = SnapshotSchedule(
            instance_id=instance.id,
            interval=request.interval,
            retention=request.retention,
            next_run_at=NOW,
            created_at=NOW,
            updated_at=NOW,
            name_prefix=request.name_prefix,
            metadata=check_tags(request.metadata) or UNSET,
        )
        self.schedules[instance.id] = made
        return made

    async def delete_schedule(self, ref: str) -> None:
        schedule = await self.get_schedule(ref)
        del self.schedules[schedule.instance_id]


class FakePushes:
    """Pushes that are over at once; ``asked`` has the requests."""

    def __init__(self) -> None:
        self.asked: list[CreatePushRequest] = []
        self.pushes: dict[str, Push] = {}

    async def create(self, request: CreatePushRequest) -> Push:
        self.asked.append(request)
        made = Push(
            id=new_id(),
            image=request.image,
            digest="sha256:" + "0" * 64,
            target=request.target,
            status=PushStatus.PUSHED,
            created_at=datetime.now(UTC),
            layers=1,
            bytes=1,
        )
        self.pushes[made.id] = made
        return made

    async def list(self) -> list[Push]:
        return list(reversed(self.pushes.values()))

    async def get(self, push_id: str) -> Push:
        if push_id not in self.pushes:
            raise NotFound(f"there is no push {push_id}")
        return self.pushes[push_id]

    async def cancel(self, push_id: str) -> None:
        push = await self.get(push_id)
        if push.error:
            raise Conflict(f"push {push_id} is over")
        self.pushes[push_id] = msgspec.structs.replace(push, status=PushStatus.FAILED, error="cancelled")


class FakeBuilds:
    """Builds that stay queued, or are ready with ``outcome`` at once; ``fields`` has what was sent last."""

    def __init__(self) -> None:
        self.builders: dict[str, Builder] = {}
        self.builds: dict[str, Build] = {}
        self.fields: dict[str, bytes] = {}
        self.outcome: dict[str, str] = {}

    async def list_builders(self, *, tags: Tags) -> Sequence[Builder]:
        return list(self.builders.values())

    async def get_builder(self, builder_id: str) -> Builder:
        if builder_id not in self.builders:
            raise NotFound(f"there is no builder {builder_id}")
        return self.builders[builder_id]

    async def create_builder(self, request: CreateBuilderRequest) -> Builder:
        made = Builder(
            id=request.id or new_id(),
            disk_size_gb=request.disk_size_gb or 10,
            status=BuilderStatus.READY,
            created_at=NOW,
        )
        self.builders[made.id] = made
        return made

    async def delete_builder(self, builder_id: str) -> None:
        await self.get_builder(builder_id)
        del self.builders[builder_id]

    async def prune_builder(self, builder_id: str) -> Builder:
        return msgspec.structs.replace(await self.get_builder(builder_id), status=BuilderStatus.PRUNING)

    async def list(self, *, tags: Tags) -> Sequence[Build]:
        return list(self.builds.values())

    async def get(self, build_id: str) -> Build:
        if build_id not in self.builds:
            raise NotFound(f"there is no build {build_id}")
        return self.builds[build_id]

    async def create(self, parts: AsyncIterator[tuple[str, bytes]]) -> Build:
        self.fields = {}
        async for name, piece in parts:
            self.fields[name] = self.fields.get(name, b"") + piece
        made = Build(id=new_id(), status=BuildStatus.QUEUED, created_at=NOW, queue_position=1)
        if self.outcome:
            made = msgspec.structs.replace(made, status=BuildStatus.READY, queue_position=None, **self.outcome)
        self.builds[made.id] = made
        return made

    async def cancel(self, build_id: str) -> None:
        await self.get(build_id)
        self.builds[build_id] = msgspec.structs.replace(self.builds[build_id], status=BuildStatus.CANCELLED)

    async def events(self, build_id: str, *, follow: bool, progress: bool) -> FakeBuildEvents:
        await self.get(build_id)
        return FakeBuildEvents(follow)


class FakeBuildEvents:
    """One line, and, for who follows, the end."""

    def __init__(self, follow: bool) -> None:
        self._left = [BuildEvent(type=BuildEventType.LOG, timestamp=NOW, content="#1 FROM scratch")]
        if follow:
            self._left.append(BuildEvent(type=BuildEventType.STATUS, timestamp=NOW, status=BuildStatus.READY))

    def __aiter__(self) -> AsyncIterator[BuildEvent]:
        return self

    async def __anext__(self) -> BuildEvent:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)

    async def aclose(self) -> None:
        self._left.clear()


class EmptyRegistry:
    """A registry without content, to which nothing can be pushed."""

    def __getattr__(self, name: str) -> Any:
        raise RegistryFailure(Code.UNAVAILABLE, f"{name}: this server is a fake")


@dataclass
class FakeWorld:
    """All fakes, with their own types; ``services`` is what the server gets."""

    log_directory: Path

    def __post_init__(self) -> None:
        self.images = FakeImages()
        self.instances = FakeInstances(self.log_directory)
        self.snapshots = FakeSnapshots(self.instances)
        self.policies = FakePolicies(self.instances)
        self.volumes = FakeVolumes()
        self.devices = FakeDevices()
        self.ingresses = FakeIngresses(self.instances)
        self.egress = FakeEgress(self.instances)
        self.events = FakeEvents()
        self.registry: RegistryService = EmptyRegistry()
        self.pushes = FakePushes()
        self.builds = FakeBuilds()
        self.metering = FakeMetering()

    @property
    def services(self) -> Services:
        return Services(
            images=self.images,
            instances=self.instances,
            snapshots=self.snapshots,
            policies=self.policies,
            volumes=self.volumes,
            devices=self.devices,
            ingresses=self.ingresses,
            egress=self.egress,
            events=self.events,
            resources=FakeResources(),
            capabilities=FakeCapabilities(),
            doctor=FakeDoctor(),
            registry=self.registry,
            pushes=self.pushes,
            builds=self.builds,
            traces=traces.RECORDER,
            metering=self.metering,
        )
