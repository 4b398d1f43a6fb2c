"""What operations commit, as values, and the one place that writes them: each Commit is one transaction.

An instance's record changes together with everything that it reserves elsewhere: name, number, address, image pin,
devices, volumes, secrets, captures and its part of the host's capacity.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from hypeman.captures import records as captures
from hypeman.captures.records import CAPTURES, CaptureRow
from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.errors import Conflict, InsufficientResources, InternalError, NotFound
from hypeman.instances import rows
from hypeman.instances.changes import note_changed, note_created, note_deleted, note_pool, note_snapshot, note_updated
from hypeman.instances.model.record import InstanceRecord, Intent, MemberRow, PoolRow, SnapshotRow
from hypeman.instances.model.vm import assign_ports
from hypeman.instances.rows import INSTANCES, INTENTS, MEMBERS, POOLS, SNAPSHOTS
from hypeman.network.types import Lease, PortMapping
from hypeman.resources.accounting import Holding, Limits, hold, pool_holder
from hypeman.store import Store, Txn
from hypeman.volumes import records as volumes
from hypeman.volumes.records import Attachment

R = TypeVar("R")


class Hold(Struct, frozen=True):
    """The host resources that the instance holds from now on."""

    instance: str
    holding: Holding


class AddCapture(Struct, frozen=True):
    row: CaptureRow


class ShareCapture(Struct, frozen=True):
    capture: str
    holder: str


class ReleaseCapture(Struct, frozen=True):
    """A capture without holders is then removed by the step FreeCapture. None: no capture."""

    capture: str | None
    holder: str


class CompressCapture(Struct, frozen=True):
    """Compress the memory as ``wanted``, or else as planned already, or else as ``usual``; unless it is compressed."""

    capture: str
    wanted: SnapshotCompressionConfig | None
    usual: SnapshotCompressionConfig | None


class AttachVolume(Struct, frozen=True):
    attachment: Attachment


class DetachVolume(Struct, frozen=True):
    volume: str
    instance: str


class PinImage(Struct, frozen=True):
    """Fails if the image was deleted meanwhile."""

    digest: str
    holder: str


class SealSecrets(Struct, frozen=True):
    instance: str
    values: Mapping[str, str]


class AddInstance(Struct, frozen=True):
    """A new instance with its intent and everything it reserves; ``running``: also what a running one holds."""

    record: InstanceRecord
    intent: Intent
    running: bool
    ports: tuple[PortMapping, ...] = ()
    """A fork publishes none: those of its source are taken."""
    origin: Mapping[str, str] = MappingProxyType({})
    """For the event: what it was made from, besides its image."""


class SetPorts(Struct, frozen=True):
    """The ports that the instance publishes."""

    instance: str
    ports: tuple[PortMapping, ...]


class SetReach(Struct, frozen=True):
    """What the instance may reach, besides what the egress proxy decides, as its spec has it."""

    record: InstanceRecord


class AddSnapshot(Struct, frozen=True):
    """Fails if another snapshot of the source has its name."""

    row: SnapshotRow


class RequireSnapshot(Struct, frozen=True):
    """Fails if the snapshot was deleted meanwhile."""

    snapshot: str


class NoteUpdated(Struct, frozen=True):
    """An event: these fields of the instance were changed by its user."""

    record: InstanceRecord
    fields: tuple[str, ...]


class NoteRestored(Struct, frozen=True):
    """An event: an instance is as the snapshot has it."""

    row: SnapshotRow


Change = (
    Hold
    | AddCapture
    | ShareCapture
    | ReleaseCapture
    | CompressCapture
    | AttachVolume
    | DetachVolume
    | PinImage
    | SealSecrets
    | AddInstance
    | SetPorts
    | SetReach
    | AddSnapshot
    | RequireSnapshot
    | NoteUpdated
    | NoteRestored
)


class Commit(Struct, frozen=True):
    """An instance's record, its intent and changes to rows of others, all written in one transaction."""

    record: InstanceRecord
    intent: Intent | UnsetType | None = UNSET
    """None: the work is finished. UNSET: unchanged."""
    changes: tuple[Change, ...] = ()


class LeaseRows(Protocol):
    """Allocates addresses and ports, in the caller's transaction."""

    def take(self, txn: Txn, record: InstanceRecord, ports: tuple[PortMapping, ...]) -> Lease: ...
    def set_ports(self, txn: Txn, instance_id: str, ports: tuple[PortMapping, ...]) -> None: ...
    def set_reach(self, txn: Txn, record: InstanceRecord) -> None: ...
    def drop(self, txn: Txn, instance_id: str) -> None: ...


class DeviceClaims(Protocol):
    def claim(self, txn: Txn, instance_id: str, devices: tuple[str, ...], gpu_profile: str) -> tuple[str, ...]: ...
    def release(self, txn: Txn, instance_id: str) -> None: ...


class SecretRows(Protocol):
    """Credential values, sealed."""

    def seal(self, txn: Txn, instance_id: str, values: Mapping[str, str]) -> None: ...
    def drop(self, txn: Txn, instance_id: str) -> None: ...


class ImagePins(Protocol):
    """Pinned images are not deleted."""

    def pin(self, txn: Txn, digest: str, holder: str) -> None: ...
    def unpin(self, txn: Txn, holder: str) -> None: ...


class Ledger:
    """Writes commits. One per server."""

    def __init__(
        self,
        store: Store,
        *,
        leases: LeaseRows,
        images: ImagePins,
        devices: DeviceClaims,
        secrets: SecretRows,
        limits: Callable[[], Limits],
    ) -> None:
        self.store = store
        self._leases = leases
        self._images = images
        self._devices = devices
        self._secrets = secrets
        self._limits = limits
        self.make_room: Callable[[InsufficientResources], Awaitable[bool]] = _no_room
        """Frees what only pools hold; returns whether a repetition may succeed."""

    # Reading

    def record(self, instance_id: str) -> InstanceRecord:
        """Raises InternalError if there is none."""
        record = self.store.read(lambda txn: txn.get(INSTANCES, instance_id))
        if record is None:
            raise InternalError(f"instance {instance_id} has no record")
        return record

    def intent(self, instance_id: str) -> Intent | None:
        return self.store.read(lambda txn: txn.get(INTENTS, instance_id))

    def capture(self, capture_id: str) -> CaptureRow:
        """Raises InternalError if there is none."""
        return self.store.read(lambda txn: captures.get(txn, capture_id))

    def is_shared(self, capture_id: str, holder: str) -> bool:
        """Whether the capture has a holder other than ``holder``."""
        return self.store.read(lambda txn: captures.is_shared(txn, capture_id, holder))

    # Writing

    async def commit(self, commit: Commit) -> None:
        await self._write(partial(self._commit, commit))

    async def add(self, new: AddInstance, *changes: Change) -> InstanceRecord:
        """Record a new instance; returns the record as written."""
        return await self._write(partial(self._add_with, new, changes))

    async def remove(self, record: InstanceRecord) -> None:
        """Remove an instance and all that it holds, after its last effect was undone."""
        await self.store.write(partial(self._remove, record))

    # Pools of snapshots

    async def set_pool(self, snapshot: str, size: int) -> None:
        """How many forks of the snapshot are kept. Raises NotFound."""
        await self.store.write(partial(_set_pool, snapshot, size))

    async def add_member(self, member: MemberRow, holding: Holding) -> MemberRow:
        """Record a fork that is to be made for a pool, with what it reserves; returns the row as written.

        Raises InsufficientResources, and NotFound if the snapshot or its pool were deleted meanwhile.
        """
        return await self.store.write(partial(self._add_member, member, holding))

    async def hold_members(self, holdings: Mapping[str, Holding]) -> None:
        """What members (by id) really use, in place of what was reserved for them. The others keep what they hold."""

        def write(txn: Txn) -> None:
            for member_id, holding in holdings.items():
                if (member := txn.get(MEMBERS, member_id)) is not None:
                    hold(txn, pool_holder(member.snapshot, member_id), holding, Limits())

        await self.store.write(write)

    async def claim(self, record: InstanceRecord, intent: Intent, origin: Mapping[str, str]) -> InstanceRecord:
        """Make the member with the record's id an instance. Raises NameConflict, InsufficientResources."""
        return await self._write(partial(self._claim, record, intent, origin))

    async def remove_member(self, member: MemberRow) -> None:
        """Remove a member and all that it holds, after its last effect was undone."""
        await self.store.write(partial(self._remove_member, member))

    async def remove_snapshot(self, snapshot: str, *, is_read: Callable[[str], bool]) -> SnapshotRow:
        """Raises NotFound, or Conflict while ``is_read`` says so; returns the row."""
        return await self.store.write(partial(self._remove_snapshot, snapshot, is_read))

    async def _write(self, change: Callable[[Txn], R]) -> R:
        """In one transaction; if resources are missing, pools give way."""
        while True:
            try:
                return await self.store.write(change)
            except InsufficientResources as missing:
                if not await self.make_room(missing):
                    raise

    def _commit(self, commit: Commit, txn: Txn) -> None:
        record, intent = commit.record, commit.intent
        before = txn.get(INSTANCES, record.id)
        txn.put(INSTANCES, record.id, record)
        if before is not None:
            note_changed(txn, before, record)
        if intent is None:
            txn.delete(INTENTS, record.id)
        elif intent is not UNSET:
            _put_intent(txn, record.id, intent)
        for change in commit.changes:
            self._apply(txn, change)

    def _add_with(self, new: AddInstance, changes: tuple[Change, ...], txn: Txn) -> InstanceRecord:
        for change in changes:
            self._apply(txn, change)
        return self._add(txn, new)

    def _apply(self, txn: Txn, change: Change) -> None:
        match change:
            case Hold(instance, holding):
                hold(txn, instance, holding, self._limits())
            case AddCapture(row):
                txn.put(CAPTURES, row.id, row)
            case ShareCapture(capture, holder):
                captures.share(txn, capture, holder)
            case ReleaseCapture(capture, holder):
                captures.let_go(txn, capture, holder)
            case CompressCapture(capture, wanted, usual):
                _plan_compression(txn, capture, wanted, usual)
            case AttachVolume(attachment):
                volumes.attach(txn, attachment)
            case DetachVolume(volume, instance):
                volumes.detach(txn, volume, instance)
            case PinImage(digest, holder):
                self._images.pin(txn, digest, holder)
            case SealSecrets(instance, values):
                self._secrets.seal(txn, instance, values)
            case AddInstance():
                self._add(txn, change)
            case SetPorts(instance, ports):
                self._leases.set_ports(txn, instance, ports)
            case SetReach(record):
                self._leases.set_reach(txn, record)
            case AddSnapshot(snapshot):
                rows.check_snapshot_name_free(txn, snapshot.source.id, snapshot.name)
                txn.put(SNAPSHOTS, snapshot.id, snapshot)
                note_snapshot(txn, snapshot, "created")
            case RequireSnapshot(snapshot_id):
                rows.find_snapshot(txn, snapshot_id)
            case NoteUpdated(record, fields):
                note_updated(txn, record, fields)
            case NoteRestored(snapshot):
                note_snapshot(txn, snapshot, "restored")

    def _add(self, txn: Txn, new: AddInstance) -> InstanceRecord:
        record = new.record
        claimed = self._devices.claim(txn, record.id, record.spec.devices, record.spec.gpu_profile)
        mounts = tuple(
            msgspec.structs.replace(mount, volume_id=volumes.find_volume(txn, mount.volume_id).id)
            for mount in record.spec.volumes
        )
        spec = msgspec.structs.replace(record.spec, devices=claimed, volumes=mounts)
        record = msgspec.structs.replace(
            record,
            spec=spec,
            number=rows.free_number(txn),
            ports=record.ports or assign_ports(spec.volumes),  # a fork's disks are on the same ports as its source's
        )
        rows.insert(txn, record)
        note_created(txn, record, new.origin)
        self._leases.take(txn, record, new.ports)
        if record.digest:
            self._images.pin(txn, record.digest, record.id)
        for mount in mounts:
            attachment = Attachment(
                volume_id=mount.volume_id,
                instance_id=record.id,
                mount_path=mount.mount_path,
                readonly=mount.readonly,
            )
            volumes.attach(txn, attachment)
        _put_intent(txn, record.id, new.intent)
        hold(txn, record.id, holding_of(record, running=new.running), self._limits())
        return record

    def _remove(self, record: InstanceRecord, txn: Txn) -> None:
        rows.remove(txn, record)
        note_deleted(txn, record)
        self._leases.drop(txn, record.id)
        self._images.unpin(txn, record.id)
        self._devices.release(txn, record.id)
        self._secrets.drop(txn, record.id)
        for mount in record.spec.volumes:
            volumes.detach(txn, mount.volume_id, record.id)
        for capture in (record.capture, record.mapped):
            captures.let_go(txn, capture, captures.of_instance(record.id))
        hold(txn, record.id, Holding(), self._limits())

    def _add_member(self, member: MemberRow, holding: Holding, txn: Txn) -> MemberRow:
        snapshot = rows.find_snapshot(txn, member.snapshot)
        if snapshot.capture is None or not txn.exists(POOLS, snapshot.id):
            raise NotFound(f"snapshot {snapshot.id} has no pool")
        record = msgspec.structs.replace(member.record, number=rows.free_number(txn))
        member = msgspec.structs.replace(member, record=record)
        txn.put(MEMBERS, record.id, member)
        rows.take_number(txn, record)
        self._leases.take(txn, record, ())
        self._images.pin(txn, record.digest, record.id)
        captures.share(txn, snapshot.capture, captures.of_instance(record.id))
        hold(txn, pool_holder(snapshot.id, record.id), holding, self._limits())
        return member

    def _claim(self, record: InstanceRecord, intent: Intent, origin: Mapping[str, str], txn: Txn) -> InstanceRecord:
        member = txn.get(MEMBERS, record.id)
        if member is None:
            raise InternalError(f"the member {record.id} of a pool is gone")
        txn.delete(MEMBERS, record.id)
        rows.insert(txn, record)
        note_created(txn, record, origin)
        _put_intent(txn, record.id, intent)
        hold(txn, pool_holder(member.snapshot, record.id), Holding(), self._limits())
        hold(txn, record.id, holding_of(record, running=True), self._limits())
        return record

    def _remove_member(self, member: MemberRow, txn: Txn) -> None:
        record = member.record
        if not txn.exists(MEMBERS, record.id):
            return
        txn.delete(MEMBERS, record.id)
        rows.return_number(txn, record)
        self._leases.drop(txn, record.id)
        self._images.unpin(txn, record.id)
        captures.let_go(txn, record.capture, captures.of_instance(record.id))
        hold(txn, pool_holder(member.snapshot, record.id), Holding(), self._limits())

    def _remove_snapshot(self, snapshot: str, is_read: Callable[[str], bool], txn: Txn) -> SnapshotRow:
        row = rows.find_snapshot(txn, snapshot)
        if is_read(row.id):
            raise Conflict(f"snapshot {row.id} is being read by a fork or restore", retryable=True)
        txn.delete(SNAPSHOTS, row.id)
        txn.delete(POOLS, row.id)
        note_snapshot(txn, row, "deleted")
        holder = captures.of_snapshot(row.id)
        captures.let_go(txn, row.capture, holder)
        self._images.unpin(txn, holder)
        return row


async def _no_room(missing: InsufficientResources) -> bool:
    return False


def _set_pool(snapshot: str, size: int, txn: Txn) -> None:
    row = rows.find_snapshot(txn, snapshot)
    before = txn.get(POOLS, row.id) or PoolRow(0)
    if size == before.size:
        return
    if size:
        txn.put(POOLS, row.id, PoolRow(size))
    else:
        txn.delete(POOLS, row.id)
    note_pool(txn, row, size)


def _put_intent(txn: Txn, instance_id: str, intent: Intent) -> None:
    txn.put(INTENTS, instance_id, msgspec.structs.replace(intent, actor=txn.actor))


def holding_of(record: InstanceRecord, *, running: bool) -> Holding:
    """What an instance holds of the host while it has a VMM, or has none."""
    spec = record.spec
    holding = Holding(
        vcpus=spec.vcpus,
        memory=spec.memory_bytes + spec.hotplug_bytes,
        disk=spec.overlay_bytes,
        download=spec.download_bps,
        upload=spec.upload_bps,
        disk_io=spec.disk_io_bps,
    )
    return holding if running else holding.without_vmm()


def _plan_compression(
    txn: Txn, capture: str, wanted: SnapshotCompressionConfig | None, usual: SnapshotCompressionConfig | None
) -> None:
    row = txn.get(CAPTURES, capture)
    if row is not None and row.compressed_bytes == 0:  # otherwise it names the algorithm in use
        txn.put(CAPTURES, capture, msgspec.structs.replace(row, compression=wanted or row.compression or usual))
