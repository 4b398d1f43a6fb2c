"""Devices of the host, registrations and their owners. The public interface of this package.

The store records the owners; the host is made to match (binding.py, slots.py). The order for an
instance is: ``claim`` in the transaction that creates it, ``bind`` before its VMM starts, ``unbind`` when
it is deleted, after its VMM has exited, ``release`` in the transaction that removes it. So a stopped instance
keeps its devices, bound as they are. ``bind`` and ``unbind`` may be repeated at any time. A server restart never
takes devices from a stored instance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from uuid import uuid4
from weakref import WeakValueDictionary

import trio
from msgspec import UNSET

from hypeman.config import DevicesConfig
from hypeman.devices import binding, registry, slots, vgpu
from hypeman.devices.binding import Binder
from hypeman.devices.facts import VFIO_DRIVER, check_device_name, default_name, parse_address
from hypeman.devices.pciids import PciIds
from hypeman.devices.registry import DEVICES, VGPUS, binding_rows
from hypeman.devices.slots import Slots
from hypeman.devices.types import (
    AvailableDevice,
    Binding,
    CreateDeviceRequest,
    Device,
    DeviceRecord,
    DeviceType,
    PciFunction,
    VgpuRecord,
)
from hypeman.devices.view import Watcher
from hypeman.errors import Conflict, HypemanError, NotFound
from hypeman.host.mdev import Mdev
from hypeman.host.pci import Pci
from hypeman.host.sysfs import Sysfs
from hypeman.ids import check_tags, new_id
from hypeman.resources.types import GpuDevice, GpuProfile, GPUResourceStatus
from hypeman.store import Store, Txn

log = logging.getLogger(__name__)


LOOK_EVERY = 5.0
"""Seconds. A check is one stat per function that an instance has."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Devices:
    """The devices service. ``run`` in a nursery cleans up after an earlier server, then keeps running."""

    def __init__(
        self,
        store: Store,
        config: DevicesConfig,
        *,
        uplink: str = "",
        sysfs: Sysfs | None = None,
        proc_root: Path = Path("/proc"),
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._config = config
        self._now = now
        self._on_vanished: Callable[[str, str], object] = lambda instance_id, text: None
        self.look_every = LOOK_EVERY
        """Seconds between checks that functions in use by instances still exist."""
        self._sysfs = sysfs or Sysfs(Path(config.sysfs_root))
        self._pci = Pci(self._sysfs, Path(config.dev_root))
        mdev = Mdev(self._sysfs)
        self._watcher = Watcher(self._pci, mdev, proc_root=proc_root, uplink=uplink)
        self._binder = Binder(store, self._pci, proc_root=proc_root)
        self._slots = Slots(store, mdev, self._pci)
        self._locks: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()

    def on_vanished(self, react: Callable[[str, str], object]) -> None:
        """Call ``react`` with the instance's id and a text when a device that an instance has disappears."""
        self._on_vanished = react

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Give back devices without an owner. Reports started after the first attempt; retries whenever a
        stuck kernel change has returned. Run it before instances start."""
        await self.prepare()
        await self._settle()
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_vanished)
            while True:
                await self._sysfs.wait_returned()
                await self._settle()

    async def _watch_vanished(self) -> None:
        """Report functions that disappear while an instance has them: unplugged, or lost by a failing bus."""
        reported: set[str] = set()
        while True:
            await trio.sleep(self.look_every)
            bound = {binding.address: binding for binding in self._store.read(binding_rows) if not binding.leaving}
            missing = {address for address in bound if not self._pci.exists(address)}
            for address in sorted(missing - reported):
                await self._report_vanished(bound[address])
            for address in sorted(reported & bound.keys() - missing):
                log.warning("PCI function %s is there again; its instance must be stopped and started", address)
            reported = missing

    async def _report_vanished(self, binding: Binding) -> None:
        text = f"PCI function {binding.address} has vanished from the host while the instance has it"
        log.error("instance %s: %s", binding.instance_id, text)
        self._on_vanished(binding.instance_id, text)
        try:
            await self._store.write(partial(registry.note_vanished, binding=binding))
        except HypemanError as error:
            log.error("the event cannot be recorded: %s", error.message)

    # The registry

    async def register(self, request: CreateDeviceRequest) -> Device:
        """Raises InvalidRequest ``invalid_pci_address`` or ``invalid_name``, NotFound ``device_not_found``,
        Conflict if the address or the name is taken or the function cannot be passed through."""
        address = parse_address(request.pci_address)
        name = check_device_name(request.name) if request.name else default_name(address)
        tags = check_tags(request.tags)
        view = await self._watcher.look()
        function = view.functions.get(address)
        if function is None:
            raise NotFound(f"this host has no PCI function {address}", code="device_not_found")
        if address in view.obstacles:
            raise Conflict(f"PCI function {address} cannot be passed through: {view.obstacles[address]}")
        record = DeviceRecord(
            id=new_id(),
            name=name,
            pci_address=address,
            type=function.type,
            vendor_id=f"{function.vendor:04x}",
            device_id=f"{function.device:04x}",
            iommu_group=function.iommu_group,
            created_at=self._now(),
            tags=tags,
        )
        await self._store.write(lambda txn: registry.insert(txn, record))
        return self._device(record)

    def list(self, tags: Mapping[str, str] | None = None) -> tuple[Device, ...]:
        """All devices, or those that have all of ``tags``; sorted by age."""
        wanted = (tags or {}).items()
        records = [record for _, record in self._store.read(lambda txn: list(txn.scan(DEVICES)))]
        records.sort(key=lambda record: record.created_at)
        return tuple(self._device(record) for record in records if wanted <= record.tags.items())

    def get(self, ref: str) -> Device:
        """The device with this id or name; raises NotFound."""
        return self._device(self._store.read(lambda txn: registry.find(txn, ref)))

    async def delete(self, ref: str) -> None:
        """Delete the registration. Raises NotFound, or InUse while an instance has the device, or while the kernel
        has not returned from giving it back; then with the first failure."""
        await self._store.write(lambda txn: registry.remove(txn, ref, self._binder.failures))

    async def available(self, *, everything: bool = False) -> tuple[AvailableDevice, ...]:
        """Functions that can be passed through; with ``everything`` also those that cannot, and why."""
        view = await self._watcher.glance()
        return tuple(
            self._available(function, view.obstacles.get(address))
            for address, function in view.functions.items()
            if everything or address not in view.obstacles
        )

    async def gpu_status(self) -> GPUResourceStatus | None:
        """Slots and profiles if there are vGPUs, else the cards; None without either."""
        view = await self._watcher.glance()
        if view.parents:
            claims = self._store.read(slots.claims)
            total, used = vgpu.slots(view.parents, claims)
            profiles = tuple(
                GpuProfile(name=name, framebuffer_mb=size, available=count)
                for name, size, count in vgpu.profiles(view.parents, claims)
            )
            return GPUResourceStatus(mode="vgpu", total_slots=total, used_slots=used, profiles=profiles)
        records = {record.pci_address: record for _, record in self._store.read(lambda txn: list(txn.scan(DEVICES)))}
        cards = [
            GpuDevice(name=self._name(function) or address, available=_is_free(records.get(address)))
            for address, function in view.functions.items()
            if function.type is DeviceType.GPU and (address in records or address not in view.obstacles)
        ]
        if not cards:
            return None
        used = sum(not card.available for card in cards)
        return GPUResourceStatus(mode="passthrough", total_slots=len(cards), used_slots=used, devices=tuple(cards))

    # For instances

    async def prepare(self) -> None:
        """Scan the host, so that ``claim`` uses current facts. Never fails: if the scan fails, the last
        view is kept, and ``bind`` scans again."""
        try:
            await self._watcher.look()
        except HypemanError as error:
            log.warning("the host's devices could not be looked at: %s", error.message)

    def claim(self, txn: Txn, instance_id: str, devices: tuple[str, ...], gpu_profile: str) -> tuple[str, ...]:
        """Make the instance the owner of ``devices`` (ids or names) and of a slot for ``gpu_profile``
        (empty for none); returns the devices' ids. The host is not changed yet.

        Raises NotFound ``device_not_found``, InUse, InvalidRequest for an unknown profile,
        InsufficientResources if all slots are taken.
        """
        view = self._watcher.view
        ids = registry.attach(txn, instance_id, devices, view.functions)
        if gpu_profile:
            parent, kind = vgpu.choose(view.parents, slots.claims(txn), gpu_profile)
            txn.put(
                VGPUS,
                instance_id,
                VgpuRecord(
                    instance_id=instance_id,
                    uuid=str(uuid4()),
                    profile=kind.name,
                    type_id=kind.id,
                    parent=parent.address,
                    kind=parent.kind,
                ),
            )
        return ids

    def release(self, txn: Txn, instance_id: str) -> None:
        """The reverse of ``claim``. A no-op if there is no claim."""
        registry.detach(txn, instance_id)
        slots.release(txn, instance_id)

    async def bind(self, instance_id: str, *, uid: int = 0, gid: int = 0) -> None:
        """Make the claimed devices usable by a VMM that runs as ``uid``, or change nothing.

        Raises Conflict, with the device's name, for one that is missing or has become unusable, HostError if the
        kernel refused a change.
        """
        records, claim = self._store.read(
            lambda txn: (registry.attached(txn, instance_id), txn.get(VGPUS, instance_id))
        )
        if not records and claim is None:
            return
        async with self._lock(instance_id):
            try:
                view = await self._watcher.look()
                groups = await self._binder.take(instance_id, records, view) if records else ()
                made = await self._slots.make(instance_id)
                for group in (*groups, *(() if made is None else (made,))):
                    await self._pci.lend_group(group, uid=uid, gid=gid)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._unbind_quietly(instance_id)
                raise

    async def unbind(self, instance_id: str) -> None:
        """Give every function back to the driver it had and remove the vGPU; claims stay.

        Only after the instance's VMM has exited. Raises HostError if something could not be released; it
        is retried at the next start, or when the kernel returns.
        """
        async with self._lock(instance_id):
            await self._unbind(instance_id)

    def sysfs_paths(self, instance_id: str) -> tuple[str, ...]:
        """Sysfs paths of the instance's devices, in the requested order."""
        records, claim = self._store.read(
            lambda txn: (registry.attached(txn, instance_id), txn.get(VGPUS, instance_id))
        )
        paths = tuple(self._pci.path(record.pci_address) for record in records)
        return paths if claim is None else (*paths, self._slots.path(claim))

    def mdev_uuid(self, instance_id: str) -> str:
        """UUID of the instance's vGPU; empty if it has none."""
        claim = self._store.read(lambda txn: txn.get(VGPUS, instance_id))
        return "" if claim is None else claim.uuid

    # Inside

    def _lock(self, instance_id: str) -> trio.Lock:
        """Serialises operations per instance; others do not wait."""
        return self._locks.setdefault(instance_id, trio.Lock())

    async def _unbind(self, instance_id: str) -> None:
        try:
            await self._binder.give_back(instance_id)
        finally:
            await self._slots.remove(instance_id)
        await self.prepare()

    async def _unbind_quietly(self, instance_id: str) -> None:
        """Unbind after a failure; only the original failure is raised."""
        try:
            await self._unbind(instance_id)
        except HypemanError as error:
            log.error("devices of instance %s could not be released: %s", instance_id, error.message)

    async def _settle(self) -> None:
        """Finish giving back devices where it was started, or where the owner no longer exists."""
        due = self._store.read(lambda txn: (*binding.unsettled(txn), *slots.unsettled(txn)))
        for instance_id in dict.fromkeys(due):
            async with self._lock(instance_id):
                await self._unbind_quietly(instance_id)

    @cached_property
    def _names(self) -> PciIds:
        return PciIds.open(self._config.pci_ids)

    def _name(self, function: PciFunction) -> str:
        return self._names.device(function.vendor, function.device)

    def _device(self, record: DeviceRecord) -> Device:
        return Device(
            id=record.id,
            type=record.type,
            pci_address=record.pci_address,
            vendor_id=record.vendor_id,
            device_id=record.device_id,
            iommu_group=record.iommu_group,
            bound_to_vfio=self._pci.driver(record.pci_address) == VFIO_DRIVER,
            created_at=record.created_at,
            name=record.name,
            attached_to=record.attached_to,
            missing=UNSET if self._pci.exists(record.pci_address) else True,
            tags=record.tags or UNSET,
        )

    def _available(self, function: PciFunction, reason: str | None) -> AvailableDevice:
        return AvailableDevice(
            pci_address=function.address,
            vendor_id=f"{function.vendor:04x}",
            device_id=f"{function.device:04x}",
            iommu_group=function.iommu_group,
            vendor_name=self._names.vendor(function.vendor) or UNSET,
            device_name=self._name(function) or UNSET,
            current_driver=function.driver,
            reason=reason or UNSET,
        )


def _is_free(record: DeviceRecord | None) -> bool:
    return record is None or record.attached_to is None
