"""Moves functions to vfio-pci and back: the journal is written first, then the plan runs step by step.

Invariants:

- A function that we have changed has a Binding in the store, from before the first change until
  after the last one was undone. After a crash in between, the next ``give_back`` continues.
- All endpoints of an IOMMU group are moved, or none.
- Only functions with a Binding are ever given back: drivers bound by others are left alone.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from hypeman.devices import registry
from hypeman.devices.facts import endpoints
from hypeman.devices.plan import Now, plan_bind, plan_return
from hypeman.devices.registry import BINDINGS
from hypeman.devices.types import Binding, DeviceRecord, PciFunction
from hypeman.devices.view import View
from hypeman.errors import Conflict, InternalError, InUse
from hypeman.host.pci import Pci
from hypeman.store import Store, Txn

log = logging.getLogger(__name__)


class Binder:
    """Takes functions for instances. Calls for one instance are serialised; others do not wait for them."""

    def __init__(self, store: Store, pci: Pci, *, proc_root: Path) -> None:
        self._store = store
        self._pci = pci
        self._proc_root = proc_root
        self.failures: dict[str, str] = {}
        """Address → the first reason why its driver could not get the function back. Later attempts only hit the change
        that is still in progress."""

    async def take(self, instance_id: str, records: tuple[DeviceRecord, ...], view: View) -> tuple[int, ...]:
        """Bind the groups of ``records`` to vfio-pci; returns them. ``give_back`` undoes partial failures.

        Raises Conflict, with the device's name, for one that is missing or cannot be passed through (any more),
        HostError if the kernel refused a change.
        """
        functions = [_present(record, view) for record in records]
        groups = tuple(dict.fromkeys(function.iommu_group for function in functions))
        for group in groups:
            strangers = await self._pci.strangers(group)
            if strangers:
                raise Conflict(f"IOMMU group {group} also holds {', '.join(strangers)}, which is not a PCI device")
        await self._pci.load_vfio()
        members = [function for group in groups for function in endpoints(view.functions, group)]
        for binding in await self._note(instance_id, members):
            for step in plan_bind(binding, await self._now(binding.address)):
                await step.do(self._pci)
        return groups

    async def give_back(self, instance_id: str) -> None:
        """Return every function of the instance to its previous driver. A no-op if there is none.

        Continues after failures and raises the first; functions not returned stay in the store.
        """
        if not self._store.read(lambda txn: registry.bindings_of(txn, instance_id)):
            return
        bindings = await self._store.write(lambda txn: _mark_leaving(txn, instance_id, self._boot_id()))
        failed: InternalError | None = None
        for binding in reversed(bindings):
            try:
                await self._give_one_back(binding)
            except InternalError as error:
                log.error("PCI function %s could not be returned to its driver: %s", binding.address, error.message)
                reason = self.failures.setdefault(binding.address, error.message)
                message = f"PCI function {binding.address} could not be returned to its driver: {reason}"
                failed = failed or type(error)(message, code=error.code)
        if failed is not None:
            raise failed

    async def _give_one_back(self, binding: Binding) -> None:
        if self._pci.exists(binding.address):
            for step in plan_return(binding, await self._now(binding.address)):
                await step.do(self._pci)
            await self._pci.reclaim_group(binding.address)
        await self._store.write(lambda txn: txn.delete(BINDINGS, binding.address))
        self.failures.pop(binding.address, None)

    async def _note(self, instance_id: str, members: list[PciFunction]) -> tuple[Binding, ...]:
        """Store each function's current state, unless it is already stored (and still valid)."""
        boot_id = self._boot_id()
        known = {b.address: b for b in self._store.read(lambda txn: registry.bindings_of(txn, instance_id))}
        bindings = []
        for function in members:
            before = known.get(function.address)
            if before is not None and before.boot_id == boot_id:
                bindings.append(msgspec.structs.replace(before, leaving=False))
                continue
            now = await self._now(function.address)
            persistence = now.driver == "nvidia" and await self._pci.persistence(function.address)
            bindings.append(
                Binding(
                    address=function.address,
                    instance_id=instance_id,
                    driver=now.driver,
                    override=now.override,
                    persistence=persistence,
                    boot_id=boot_id,
                )
            )
        await self._store.write(lambda txn: _put_all(txn, bindings))
        return tuple(bindings)

    async def _now(self, address: str) -> Now:
        return Now(self._pci.driver(address), await self._pci.override(address))

    def _boot_id(self) -> str:
        try:
            return (self._proc_root / "sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return ""


def unsettled(txn: Txn) -> tuple[str, ...]:
    """Instances whose functions must be given back: marked as leaving, or deleted."""
    owners = {record.attached_to for _, record in txn.scan(registry.DEVICES)}
    bindings = [binding for _, binding in txn.scan(BINDINGS)]
    return tuple(dict.fromkeys(b.instance_id for b in bindings if b.leaving or b.instance_id not in owners))


def _mark_leaving(txn: Txn, instance_id: str, boot_id: str) -> tuple[Binding, ...]:
    """Mark and return the bindings to undo; those of another boot need no undo."""
    leaving = []
    for binding in registry.bindings_of(txn, instance_id):
        if binding.boot_id != boot_id:
            txn.delete(BINDINGS, binding.address)
            continue
        leaving.append(msgspec.structs.replace(binding, leaving=True))
        txn.put(BINDINGS, binding.address, leaving[-1])
    return tuple(leaving)


def _put_all(txn: Txn, bindings: list[Binding]) -> None:
    for binding in bindings:
        there = txn.get(BINDINGS, binding.address)
        if there is not None and there.instance_id != binding.instance_id and there.boot_id == binding.boot_id:
            raise InUse(f"PCI function {binding.address} is held by instance {there.instance_id}")
        txn.put(BINDINGS, binding.address, binding)


def _present(record: DeviceRecord, view: View) -> PciFunction:
    """The function of a registered device, if it can currently be passed through."""
    function = view.functions.get(record.pci_address)
    if function is None:
        raise Conflict(f"device {record.name} ({record.pci_address}) is missing: this host has no such function now")
    ids = f"{function.vendor:04x}", f"{function.device:04x}"
    if ids != (record.vendor_id, record.device_id):
        raise Conflict(
            f"at {record.pci_address} there is now {':'.join(ids)}, and not {record.vendor_id}:{record.device_id}, "
            f"which was registered as {record.name}"
        )
    if record.pci_address in view.obstacles:
        raise Conflict(f"device {record.name} ({record.pci_address}) {view.obstacles[record.pci_address]}")
    return function
