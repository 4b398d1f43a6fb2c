"""Registered devices and their owners: plain functions on a transaction."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hypeman import events
from hypeman.devices.types import Binding, DeviceRecord, PciFunction, VgpuRecord
from hypeman.errors import Conflict, InUse, InvalidRequest, NotFound
from hypeman.store import Table, Txn

DEVICES: Table[DeviceRecord] = Table("devices", DeviceRecord)
BINDINGS: Table[Binding] = Table("device_bindings", Binding)
"""By address: one function is taken by one instance."""
VGPUS: Table[VgpuRecord] = Table("vgpus", VgpuRecord)
"""By instance."""


def find(txn: Txn, ref: str) -> DeviceRecord:
    """By exact id, then by exact name; NotFound otherwise."""
    record = txn.get(DEVICES, ref)
    if record is not None:
        return record
    for _, record in txn.scan(DEVICES):
        if record.name == ref:
            return record
    raise NotFound(f"no device has the id or name {ref!r}")


def insert(txn: Txn, record: DeviceRecord) -> None:
    """Raises Conflict if the address or the name is taken."""
    for _, other in txn.scan(DEVICES):
        if other.pci_address == record.pci_address:
            raise Conflict(f"PCI device {record.pci_address} is registered already, as {other.name}")
        if other.name == record.name:
            raise Conflict(f"a device named {record.name} is registered already")
    txn.put(DEVICES, record.id, record)
    _note(txn, record, "registered")


def remove(txn: Txn, ref: str, failures: Mapping[str, str] = {}) -> None:
    """Raises NotFound, or InUse: attached to an instance, or still being given back by one. ``failures`` has the
    reason by address, where that failed."""
    record = find(txn, ref)
    reason = failures.get(record.pci_address)
    why = f": {record.pci_address} could not be returned to its driver: {reason}" if reason else ""
    if record.attached_to is not None:
        raise InUse(f"device {record.name} is attached to instance {record.attached_to}{why}")
    binding = txn.get(BINDINGS, record.pci_address)
    if binding is not None:
        raise InUse(
            f"device {record.name} is still being given back by instance {binding.instance_id}{why}", retryable=True
        )
    txn.delete(DEVICES, record.id)
    _note(txn, record, "deleted")


def attached(txn: Txn, instance_id: str) -> tuple[DeviceRecord, ...]:
    """The devices of an instance, in the requested order."""
    mine = [record for _, record in txn.scan(DEVICES) if record.attached_to == instance_id]
    return tuple(sorted(mine, key=lambda record: record.position))


def attach(txn: Txn, instance_id: str, refs: tuple[str, ...], functions: Mapping[str, PciFunction]) -> tuple[str, ...]:
    """Give the devices to an instance; their ids. A group goes to one instance or to none.

    Raises NotFound ``device_not_found``, InvalidRequest for one named twice, InUse.
    """
    everyone = [record for _, record in txn.scan(DEVICES)]
    bindings = [binding for _, binding in txn.scan(BINDINGS)]
    ids: list[str] = []
    for position, ref in enumerate(refs):
        try:
            record = find(txn, ref)
        except NotFound as error:
            raise NotFound(error.message, code="device_not_found") from None
        if record.id in ids:
            raise InvalidRequest(f"device {record.name} is named twice")
        if record.attached_to not in (None, instance_id):
            raise InUse(f"device {record.name} is attached to instance {record.attached_to}")
        group = _group(record, functions)
        for other in everyone:
            if _group(other, functions) == group and other.attached_to not in (None, instance_id):
                raise InUse(
                    f"device {record.name} shares IOMMU group {group} with {other.name}, "
                    f"which is attached to instance {other.attached_to}"
                )
        for binding in bindings:
            function = functions.get(binding.address)
            near = binding.address == record.pci_address or (function is not None and function.iommu_group == group)
            if near and binding.instance_id != instance_id:
                raise InUse(
                    f"device {record.name} is still being given back by instance {binding.instance_id}", retryable=True
                )
        txn.put(DEVICES, record.id, msgspec.structs.replace(record, attached_to=instance_id, position=position))
        if record.attached_to is None:
            _note(txn, record, "attached", instance_id)
        ids.append(record.id)
    return tuple(ids)


def detach(txn: Txn, instance_id: str) -> None:
    for record in attached(txn, instance_id):
        txn.put(DEVICES, record.id, msgspec.structs.replace(record, attached_to=None, position=0))
        _note(txn, record, "detached", instance_id)


def note_vanished(txn: Txn, binding: Binding) -> None:
    """Record that a function disappeared from the host, if it is a registered device: those that only share its
    group are not."""
    for _, record in txn.scan(DEVICES):
        if record.pci_address == binding.address:
            _note(txn, record, "vanished", binding.instance_id)


def binding_rows(txn: Txn) -> tuple[Binding, ...]:
    """All of them."""
    return tuple(binding for _, binding in txn.scan(BINDINGS))


def bindings_of(txn: Txn, instance_id: str) -> tuple[Binding, ...]:
    return tuple(binding for _, binding in txn.scan(BINDINGS) if binding.instance_id == instance_id)


def _note(txn: Txn, record: DeviceRecord, action: str, instance_id: str = "") -> None:
    events.record(
        txn,
        events.Kind.DEVICE,
        action,
        record.id,
        name=record.name,
        instance_id=instance_id,
        tags=record.tags,
        data={"pci_address": record.pci_address},
    )


def _group(record: DeviceRecord, functions: Mapping[str, PciFunction]) -> int:
    """As of now where the function is known: numbers change from boot to boot."""
    function = functions.get(record.pci_address)
    return record.iommu_group if function is None else function.iommu_group
