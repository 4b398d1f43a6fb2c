"""Snapshots: captures of an instance that are independent of it.

A snapshot has its own copy of the writable disks (``snapshots/<id>/``) and, for kind Standby, holds a
capture of memory and devices. It pins its image. It is therefore independent of later changes to its
source, and its forks are independent of it: memory is shared through the capture's holders, disks
are copied.

The row is written once everything is on disk; a directory without a row is removed at server start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial

import msgspec
import trio
from msgspec import UNSET

from hypeman.captures import records as captures
from hypeman.captures.records import CAPTURES, CaptureRow
from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.config import SnapshotsConfig
from hypeman.errors import Conflict, InvalidRequest, InvalidState, NotFound, NotSupported
from hypeman.hypervisor.catalog import Catalog
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.ids import Tags, check_name, check_tags, new_id, tags_match
from hypeman.instances.forks import Forks, check_forkable, run_again
from hypeman.instances.ledger import (
    AddSnapshot,
    CompressCapture,
    Ledger,
    NoteRestored,
    PinImage,
    RequireSnapshot,
    ShareCapture,
)
from hypeman.instances.life.operations.copies import copied_out, revert
from hypeman.instances.life.owned import Owned
from hypeman.instances.machine.machine import Machine
from hypeman.instances.model.admission import Command
from hypeman.instances.model.phases import utc_now
from hypeman.instances.model.plan import plan_free
from hypeman.instances.model.record import InstanceRecord, SnapshotRow, StopCause
from hypeman.instances.model.snapshot_types import (
    CompressionState,
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    RestoreSnapshotRequest,
    SetSnapshotPoolRequest,
    Snapshot,
    SnapshotKind,
    SnapshotPool,
)
from hypeman.instances.model.types import Instance, InstanceState, TargetState
from hypeman.instances.model.validate import check_compression, usual_compression
from hypeman.instances.pools import Pools
from hypeman.instances.rows import SNAPSHOTS, check_snapshot_name_free, find_snapshot
from hypeman.instances.tasks import Tasks
from hypeman.saga import carry_forward
from hypeman.store import Store, Txn
from hypeman.telemetry import metrics

_DEFAULT_TARGET = {SnapshotKind.STANDBY: TargetState.RUNNING, SnapshotKind.STOPPED: TargetState.STOPPED}
_ALLOWED_TARGETS = {
    SnapshotKind.STANDBY: frozenset(TargetState),
    SnapshotKind.STOPPED: frozenset({TargetState.STOPPED, TargetState.RUNNING}),
}


class Snapshots:
    def __init__(
        self,
        *,
        store: Store,
        tasks: Tasks,
        ledger: Ledger,
        forks: Forks,
        pools: Pools,
        machine: Machine,
        catalog: Catalog,
        settings: SnapshotsConfig,
        render: Callable[[InstanceRecord], Instance],
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._ledger = ledger
        self._forks = forks
        self._pools = pools
        self._machine = machine
        self._catalog = catalog
        self._settings = settings
        self._render = render
        self._now = now
        self._readers: dict[str, int] = {}
        """Snapshot → number of forks and restores reading its disks."""

    async def start(self) -> None:
        """Remove incomplete snapshots left by a crash."""
        known = self._store.read(lambda txn: set(txn.keys(SNAPSHOTS)))
        if self._machine.paths.snapshots.is_dir():
            for directory in self._machine.paths.snapshots.iterdir():
                if directory.name not in known:
                    await self._machine.context.files.remove(directory)

    async def list(
        self, *, source_instance_id: str | None, kind: SnapshotKind | None, name: str | None, tags: Mapping[str, str]
    ) -> Sequence[Snapshot]:
        def fits(row: SnapshotRow) -> bool:
            return (
                (source_instance_id is None or row.source.id == source_instance_id)
                and (kind is None or row.kind is kind)
                and (name is None or row.name == name)
                and tags_match(row.tags, tags)
            )

        return self._store.read(lambda txn: [self._view(txn, row) for _, row in txn.scan(SNAPSHOTS) if fits(row)])

    async def get(self, snapshot: str) -> Snapshot:
        return self._store.read(lambda txn: self._view(txn, find_snapshot(txn, snapshot)))

    async def create(self, ref: str, request: CreateSnapshotRequest, *, schedule: str = "") -> Snapshot:
        """Capture an instance; a running one is paused only for the capture. ``schedule`` is the id of the schedule
        that asks for it."""
        await self._catalog.wait_ready()
        if request.name is not None and request.name:
            check_name(request.name)
        tags = check_tags(request.tags)
        compression = check_compression(request.compression)
        if request.kind is SnapshotKind.STOPPED and request.compression is not None:
            raise InvalidRequest("compression is for snapshots of kind Standby: a stopped one has no memory")
        task = self._tasks.of(ref)
        row = await task.perform(None, lambda owned: self._create(owned, request, tags, compression, schedule))
        return await self.get(row.id)

    async def _create(
        self,
        owned: Owned,
        request: CreateSnapshotRequest,
        tags: Tags,
        compression: SnapshotCompressionConfig | None,
        schedule: str,
    ) -> SnapshotRow:
        source = owned.record
        _check_kind(request.kind, source)
        check_forkable(source)
        self._store.read(lambda txn: check_snapshot_name_free(txn, source.id, request.name))
        snapshot_id = new_id()
        directory = self._machine.paths.snapshot(snapshot_id)
        files, holder = self._machine.context.files, captures.of_snapshot(snapshot_id)
        with_memory = request.kind is SnapshotKind.STANDBY
        try:
            async with copied_out(owned, str(directory), with_memory=with_memory, holder=holder) as copy:
                memory = copy.capture
                row = SnapshotRow(
                    id=snapshot_id,
                    kind=request.kind,
                    name=request.name or None,
                    tags=tags,
                    created_at=self._now(),
                    source=msgspec.structs.replace(source, handle=None),
                    size_bytes=(disks := await files.allocated(directory)) + (memory.size_bytes if memory else 0),
                    disks_bytes=disks,
                    capture=memory.id if memory is not None else None,
                    schedule=schedule,
                )
                usual = usual_compression(source.spec, self._settings)
                compress = () if memory is None else (CompressCapture(memory.id, compression, usual),)
                copy.changes = (AddSnapshot(row), PinImage(source.digest, holder), *compress)
        except Exception:
            await files.remove(directory)
            raise
        if row.capture is not None:  # scheduled before the next command, so that a queued restore can cancel it
            self._machine.captures.compressor.schedule(row.capture)
        return row

    async def delete(self, snapshot: str) -> None:
        """Delete the snapshot, with its pool. Its forks are not affected."""
        known = self._store.read(lambda txn: find_snapshot(txn, snapshot))
        async with self._pools.closed(known.id):
            row = await self._ledger.remove_snapshot(known.id, is_read=lambda each: each in self._readers)
        with trio.CancelScope(shield=True):  # no other code knows what to remove
            await carry_forward(plan_free(row.capture), self._machine)
            await self._machine.context.files.remove(self._machine.paths.snapshot(row.id))

    async def restore(self, ref: str, snapshot: str, request: RestoreSnapshotRequest) -> Instance:
        """Restore an instance to one of its snapshots."""
        await self._catalog.wait_ready()
        task = self._tasks.of(ref)
        row = self._store.read(lambda txn: find_snapshot(txn, snapshot))
        if row.source.id != task.record.id:
            raise NotFound(f"instance {task.record.name!r} has no snapshot {snapshot!r}")
        target = _check_target(row, request.target_state, request.target_hypervisor)
        kind = self._kind(row, request.target_hypervisor)

        async def roll_back() -> Instance:
            with self._reading(row):
                await task.perform(Command.RESTORE_SNAPSHOT, lambda owned: self._revert(owned, row, kind, target))
            if target is TargetState.RUNNING:
                await run_again(task)
            return self._render(task.record)

        return await self._tasks.run_detached(roll_back)

    async def _revert(
        self, owned: Owned, row: SnapshotRow, kind: HypervisorKind, target: TargetState
    ) -> InstanceRecord:
        now, before = self._now(), owned.record
        capture = row.capture if target is not TargetState.STOPPED else None
        if before.spec.volumes != row.source.spec.volumes:
            raise Conflict("the instance has other volumes than at the time of the snapshot; attach the same first")
        state = InstanceState.STANDBY if capture is not None else InstanceState.STOPPED
        record = msgspec.structs.replace(
            before,
            spec=msgspec.structs.replace(
                row.source.spec,
                tags=before.spec.tags,
                hypervisor=kind,
                access=before.spec.access,
                auto_remove=before.spec.auto_remove and capture is not None,
            ),
            digest=row.source.digest,
            ports=row.source.ports,
            nonce=row.source.nonce,
            state=state,
            phases=before.phases.entered(state.value.lower(), now),
            capture=capture,
            fresh=capture is not None and row.source.fresh,
            exit_code=None,
            exit_message=None,
            stop_cause=None if capture is not None else StopCause.REQUESTED,
        )

        holder = captures.of_instance(record.id)
        shared = () if capture is None else (ShareCapture(capture, holder),)
        return await revert(
            owned,
            str(self._machine.paths.snapshot(row.id)),
            record,
            RequireSnapshot(row.id),  # it may be deleted while its disks are copied
            PinImage(record.digest, record.id),
            NoteRestored(row),
            *shared,
        )

    async def fork(self, snapshot: str, request: ForkSnapshotRequest) -> Instance:
        """A new instance from a snapshot."""
        await self._catalog.wait_ready()
        check_name(request.name)
        row = self._store.read(lambda txn: find_snapshot(txn, snapshot))
        target = _check_target(row, request.target_state, request.target_hypervisor)
        kind = self._kind(row, request.target_hypervisor)

        async def make() -> Instance:
            claimed = await self._pools.claim(row, request.name) if target is TargetState.RUNNING else None
            metrics.snapshot_forks.labels("snapshot" if claimed is None else "pool").inc()
            if claimed is not None:
                return self._render(claimed)
            with self._reading(row):
                return self._render(await self._forks.of_snapshot(row, request.name, target=target, hypervisor=kind))

        return await self._tasks.run_detached(make)

    async def get_pool(self, snapshot: str) -> SnapshotPool:
        return self._pools.get(snapshot)

    async def set_pool(self, snapshot: str, request: SetSnapshotPoolRequest) -> SnapshotPool:
        """Keep forks of the snapshot ready."""
        await self._catalog.wait_ready()
        return await self._tasks.run_detached(partial(self._pools.set_size, snapshot, request.size))

    async def delete_pool(self, snapshot: str) -> None:
        """End the snapshot's pool; nothing of it is left on return."""
        await self.set_pool(snapshot, SetSnapshotPoolRequest(size=0))

    def _kind(self, row: SnapshotRow, wanted: HypervisorKind | None) -> HypervisorKind:
        if wanted is None or wanted is row.source.spec.hypervisor:
            return row.source.spec.hypervisor
        if row.kind is SnapshotKind.STANDBY:
            raise NotSupported(
                f"saved memory of {row.source.spec.hypervisor.value} cannot be restored by {wanted.value}"
            )
        return self._catalog.driver(wanted).kind

    def _reading(self, row: SnapshotRow) -> _Reading:
        return _Reading(self._readers, row.id)

    def _view(self, txn: Txn, row: SnapshotRow) -> Snapshot:
        capture = txn.get(CAPTURES, row.capture) if row.capture else None
        view = Snapshot(
            id=row.id,
            kind=row.kind,
            source_instance_id=row.source.id,
            source_instance_name=row.source.name,
            source_hypervisor=row.source.spec.hypervisor,
            created_at=row.created_at,
            size_bytes=row.size_bytes,
            name=row.name,
            tags=row.tags or UNSET,
        )
        if capture is None:
            return view
        return msgspec.structs.replace(
            view,
            size_bytes=row.size_bytes if row.disks_bytes is None else row.disks_bytes + capture.size_bytes,
            compression=capture.compression or UNSET,
            compression_state=self._compression_state(capture),
            compression_error=capture.compression_error,
            compressed_size_bytes=capture.compressed_bytes or None,
            uncompressed_size_bytes=capture.memory_bytes,
        )

    def _compression_state(self, capture: CaptureRow) -> CompressionState:
        if capture.compression_error is not None:
            return CompressionState.ERROR
        if capture.compressed_bytes:
            return CompressionState.COMPRESSED
        return (
            CompressionState.COMPRESSING
            if self._machine.captures.compressor.is_compressing(capture.id)
            else CompressionState.NONE
        )


class _Reading:
    """Context manager: within it, the snapshot is not deleted."""

    def __init__(self, readers: dict[str, int], snapshot_id: str) -> None:
        self._readers = readers
        self._id = snapshot_id

    def __enter__(self) -> None:
        self._readers[self._id] = self._readers.get(self._id, 0) + 1

    def __exit__(self, *_: object) -> None:
        self._readers[self._id] -= 1
        if not self._readers[self._id]:
            del self._readers[self._id]


def _check_kind(kind: SnapshotKind, source: InstanceRecord) -> None:
    wanted = (
        (InstanceState.STOPPED,) if kind is SnapshotKind.STOPPED else (InstanceState.RUNNING, InstanceState.STANDBY)
    )
    if source.state not in wanted:
        raise InvalidState(
            f"a snapshot of kind {kind.value} requires instance {source.name!r} to be "
            f"{' or '.join(state.value for state in wanted)}; it is {source.state.value}",
            code="conflict",
        )


def _check_target(row: SnapshotRow, target: TargetState | None, hypervisor: HypervisorKind | None) -> TargetState:
    if hypervisor is not None and row.kind is not SnapshotKind.STOPPED:
        raise InvalidRequest("target_hypervisor is for snapshots of kind Stopped")
    chosen = target or _DEFAULT_TARGET[row.kind]
    if chosen not in _ALLOWED_TARGETS[row.kind]:
        raise InvalidRequest(f"a snapshot of kind {row.kind.value} cannot end {chosen.value}")
    return chosen
