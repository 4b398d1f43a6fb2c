"""From a record to the steps of an operation. Pure: the plans can be printed, compared and stored.

create   make disks · prepare run · network · egress · devices · launch
start                 prepare run · network · egress · devices · launch
restore               prepare run · network · egress · restore        then: awaken, free capture
stop     shut the guest down, then the reverse of a start (devices stay bound until delete)
delete   the reverse of create
"""

from __future__ import annotations

from hypeman.instances.records import InstanceRecord
from hypeman.instances.steps import (
    AttachNetwork,
    AwakenGuest,
    BindDevices,
    FreeCapture,
    GoOn,
    LaunchVmm,
    MakeDisks,
    PrepareRun,
    RestoreVmm,
    Reversible,
    SaveCapture,
    SetEgress,
    ShutdownGuest,
    Step,
    TakeBack,
)


def plan_create(record: InstanceRecord) -> tuple[Reversible, ...]:
    return (MakeDisks(record.id), *plan_start(record))


def plan_start(record: InstanceRecord) -> tuple[Reversible, ...]:
    return (*_surroundings(record), *_devices(record), LaunchVmm(record.id))


def plan_restore(record: InstanceRecord, capture: str, *, keep: bool) -> tuple[Reversible, ...]:
    return (*_surroundings(record), RestoreVmm(record.id, capture, keep))


def plan_awaken(record: InstanceRecord, capture: str, *, fresh: bool) -> tuple[Step, ...]:
    """What follows a restore once the record says that the VM lives."""
    return (AwakenGuest(record.id, fresh), FreeCapture(capture))


def plan_stop(record: InstanceRecord, *, grace: float) -> tuple[Step, ...]:
    return (ShutdownGuest(record.id, grace), *plan_park(record))


def plan_park(record: InstanceRecord) -> tuple[Step, ...]:
    """Take down what a running VM has around it; its disks, lease and devices stay."""
    return _reversed((*_surroundings(record), LaunchVmm(record.id)))


def plan_delete(record: InstanceRecord) -> tuple[Step, ...]:
    free = (FreeCapture(record.capture),) if record.capture else ()
    return (*_reversed(plan_create(record)), *free)


def plan_capture(record: InstanceRecord, capture: str, *, go_on: bool) -> tuple[Reversible, ...]:
    return (SaveCapture(record.id, capture, go_on),)


def plan_go_on(record: InstanceRecord) -> tuple[Step, ...]:
    return (GoOn(record.id),)


def _surroundings(record: InstanceRecord) -> tuple[Reversible, ...]:
    network: tuple[Reversible, ...] = (AttachNetwork(record.id),) if record.spec.network else ()
    egress: tuple[Reversible, ...] = (SetEgress(record.id),) if record.spec.egress else ()
    return (PrepareRun(record.id), *egress, *network)


def _devices(record: InstanceRecord) -> tuple[Reversible, ...]:
    return (BindDevices(record.id),) if record.spec.devices or record.spec.gpu_profile else ()


def _reversed(steps: tuple[Reversible, ...]) -> tuple[Step, ...]:
    return tuple(TakeBack(step) for step in reversed(steps))
