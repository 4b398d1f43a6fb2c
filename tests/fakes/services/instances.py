"""Instances, their snapshots and policies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import trio
from msgspec import UNSET

from hypeman.errors import (
    Ambiguous,
    HypemanError,
    InvalidRequest,
    InvalidState,
    NameConflict,
    NotFound,
)
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.types import CopyEntry, PathInfo
from hypeman.ids import check_name, check_tags, new_id, tags_match
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
from hypeman.resources.types import (
    MemoryReclaimAction,
    MemoryReclaimRequest,
    MemoryReclaimResponse,
)
from hypeman.units import parse_duration
from tests.fakes.services.common import NOW, Tags
from tests.fakes.services.sessions import FakeCopyIn, FakeCopyOut, FakeExec


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
