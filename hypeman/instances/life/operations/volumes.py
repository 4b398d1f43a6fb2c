"""Attach and detach volumes, by hotplug if the VM is running.

The volume's attachment changes in the record's transaction. A failed attach is undone; a detach is
finished, unless a process in the guest holds the volume: then nothing changes. A disk is added to the
VM's handle before the VM, so that the next server looks for it there.
"""

from __future__ import annotations

import msgspec

from hypeman.errors import Conflict, NotFound, NotSupported
from hypeman.hypervisor.interface import Disk
from hypeman.instances.ledger import AttachVolume, Commit, DetachVolume
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.plan import plan_attach
from hypeman.instances.model.record import InstanceRecord, Operation
from hypeman.instances.model.steps import TakeBack
from hypeman.instances.model.types import InstanceState, VolumeMount
from hypeman.instances.model.validate import check_disks, check_volumes
from hypeman.instances.model.vm import free_port, volume_disk
from hypeman.volumes.records import Attachment


async def attach(owned: Owned, volume_id: str, path: str, *, readonly: bool) -> InstanceRecord:
    """Attach a volume, by hotplug if the instance is running."""
    before = owned.record
    if any(mount.volume_id == volume_id for mount in before.spec.volumes):
        raise Conflict(f"volume {volume_id!r} is attached to instance {before.name!r} already")
    port = free_port(before.ports)
    running = before.state is InstanceState.RUNNING
    if running and not owned.machine.capabilities(before).hotplug_disk:
        raise NotSupported(f"hypervisor {before.spec.hypervisor.value} takes no disks at run time; stop it first")
    if running and not port:
        raise NotSupported(f"instance {before.name!r} has no free port for another volume")
    mount = VolumeMount(volume_id=volume_id, mount_path=path, readonly=readonly)
    spec = msgspec.structs.replace(before.spec, volumes=(*before.spec.volumes, mount))
    check_volumes(spec.volumes)
    check_disks(spec, spec.hypervisor, owned.machine.capabilities(before))
    ports = {**before.ports, volume_id: port} if port else before.ports  # without a port it is fixed in the VM
    record = msgspec.structs.replace(before, spec=spec, ports=ports)

    attachment = Attachment(volume_id=volume_id, instance_id=record.id, mount_path=path, readonly=readonly)
    if not running:
        await owned.save(record, AttachVolume(attachment))
        return record
    disk = volume_disk(owned.machine.paths, volume_id, readonly=readonly, port=port)
    async with owned.attempt(
        Operation.ATTACH,
        (plan_attach(before, volume_id, path, readonly=readonly, port=port),),
        _expecting(record, disk),
        take=(AttachVolume(attachment),),
        give_back=(DetachVolume(volume_id, before.id),),
    ) as attempt:
        attempt.result = Commit(_with_current_handle(owned, owned.record), None)
    owned.journal(f"attached volume {volume_id} at {path}")
    return owned.record


async def detach(owned: Owned, volume_id: str) -> InstanceRecord:
    """Detach a volume. Raises InUse, with nothing changed, while a process in the guest holds it."""
    before = owned.record
    mount = next((mount for mount in before.spec.volumes if mount.volume_id == volume_id), None)
    if mount is None:
        raise NotFound(f"volume {volume_id!r} is not attached to instance {before.name!r}")
    if before.state is not InstanceState.RUNNING:
        return await end_without(owned, volume_id)
    port = before.ports.get(volume_id, 0)
    if mount.files:
        raise NotSupported(f"files of volume {volume_id!r} are mounted one by one; stop the instance first")
    if not port:
        raise NotSupported(f"volume {volume_id!r} is fixed in the running VM; stop the instance first")
    step = plan_attach(before, volume_id, mount.mount_path, readonly=mount.readonly, port=port)
    await owned.begin(Operation.DETACH, (TakeBack(step),), before)
    try:
        await owned.machine.undo(step)
    except Exception:  # not when cancelled: then the next start finishes it
        await owned.end(before)
        raise
    try:
        return await end_without(owned, volume_id)
    except Exception as error:  # the VM has released it, which is recorded as soon as possible
        await owned.lost(error)
        raise


async def end_without(owned: Owned, volume_id: str) -> InstanceRecord:
    """The final transaction, which removes the volume from the instance."""
    before = owned.record
    spec = msgspec.structs.replace(
        before.spec, volumes=tuple(mount for mount in before.spec.volumes if mount.volume_id != volume_id)
    )
    ports = {other: port for other, port in before.ports.items() if other != volume_id}
    record = _with_current_handle(owned, msgspec.structs.replace(before, spec=spec, ports=ports))
    await owned.end(record, DetachVolume(volume_id, before.id))
    return owned.record


def _expecting(record: InstanceRecord, disk: Disk) -> InstanceRecord:
    """Record the future handle: after a crash in between, the next server knows what may be plugged in."""
    assert record.handle is not None, "it runs"
    config = record.handle.config
    config = msgspec.structs.replace(config, disks=(*config.disks, disk))
    return msgspec.structs.replace(record, handle=msgspec.structs.replace(record.handle, config=config))


def _with_current_handle(owned: Owned, record: InstanceRecord) -> InstanceRecord:
    """Update the VM configuration in the handle after a disk was added or removed."""
    live = owned.live
    return msgspec.structs.replace(record, handle=live.vmm.handle) if live is not None else record
