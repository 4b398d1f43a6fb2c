"""Creates and removes instances' vGPUs; the claim is stored first and removed last.

For the vendor kind a slot is a virtual function with a type written into it. A release of an
earlier owner that the kernel finishes late would clear the type of the next one; so a claim that is
leaving, and a function with a write under way, count as taken until the kernel has returned.
"""

from __future__ import annotations

import logging

import msgspec

from hypeman.devices.registry import VGPUS
from hypeman.devices.types import VgpuKind, VgpuRecord
from hypeman.host.files import HostError
from hypeman.host.mdev import Mdev
from hypeman.host.pci import Pci
from hypeman.store import Store, Txn

log = logging.getLogger(__name__)

_NO_TYPE = "0"


class Slots:
    """Creates and removes the vGPUs of claims."""

    def __init__(self, store: Store, mdev: Mdev, pci: Pci) -> None:
        self._store = store
        self._mdev = mdev
        self._pci = pci

    async def make(self, instance_id: str) -> int | None:
        """Make the instance's vGPU unless it is there; its IOMMU group. None if it has no claim."""
        record = self._store.read(lambda txn: txn.get(VGPUS, instance_id))
        if record is None:
            return None
        if not record.made or record.leaving:
            await self._store.write(lambda txn: _note(txn, instance_id, leaving=False))
        if record.kind is VgpuKind.MDEV:
            await self._mdev.create(record.parent, record.type_id, record.uuid)
            return self._mdev.group(record.uuid)
        await self._set_type(record)
        return self._pci.group(record.parent)

    async def remove(self, instance_id: str) -> None:
        """Remove the instance's vGPU; the claim stays. A no-op if there is none."""
        record = self._store.read(lambda txn: txn.get(VGPUS, instance_id))
        if record is None or not record.made:
            return
        await self._store.write(lambda txn: _note(txn, instance_id, leaving=True))
        if record.kind is VgpuKind.MDEV:
            await self._mdev.remove(record.parent, record.uuid)
        elif await self._mdev.current_type(record.parent) == record.type_id:
            await self._mdev.set_type(record.parent, _NO_TYPE)
            await self._pci.reclaim_group(record.parent)
        await self._store.write(lambda txn: _settle(txn, instance_id))

    def path(self, record: VgpuRecord) -> str:
        """Where a VMM finds it."""
        return self._mdev.path(record.uuid) if record.kind is VgpuKind.MDEV else self._pci.path(record.parent)

    async def _set_type(self, record: VgpuRecord) -> None:
        current = await self._mdev.current_type(record.parent)
        if current == record.type_id:
            return  # made before a crash, or kept over a stop; the claim makes it ours
        if current != _NO_TYPE:
            raise HostError(f"virtual function {record.parent} has vGPU type {current}, which is not ours")
        await self._mdev.set_type(record.parent, record.type_id)
        current = await self._mdev.current_type(record.parent)
        if current != record.type_id:
            raise HostError(f"virtual function {record.parent} did not take vGPU type {record.type_id}")


def claims(txn: Txn) -> tuple[VgpuRecord, ...]:
    return tuple(record for _, record in txn.scan(VGPUS))


def release(txn: Txn, instance_id: str) -> None:
    """Drop the claim; while there may be a vGPU, it stays until that is removed."""
    record = txn.get(VGPUS, instance_id)
    if record is not None and record.made:
        txn.put(VGPUS, instance_id, msgspec.structs.replace(record, owned=False))
    elif record is not None:
        txn.delete(VGPUS, instance_id)


def unsettled(txn: Txn) -> tuple[str, ...]:
    """Instances whose vGPU is to be removed."""
    return tuple(record.instance_id for record in claims(txn) if record.leaving or not record.owned)


def _settle(txn: Txn, instance_id: str) -> None:
    """The vGPU is gone."""
    record = txn.get(VGPUS, instance_id)
    if record is not None and record.owned:
        txn.put(VGPUS, instance_id, msgspec.structs.replace(record, made=False, leaving=False))
    elif record is not None:
        txn.delete(VGPUS, instance_id)


def _note(txn: Txn, instance_id: str, *, leaving: bool) -> None:
    """From here on there may be a vGPU; ``leaving``: and it shall not be."""
    record = txn.get(VGPUS, instance_id)
    if record is not None:
        txn.put(VGPUS, instance_id, msgspec.structs.replace(record, made=True, leaving=leaving))
