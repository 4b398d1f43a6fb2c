"""Builds the steps of an operation from a record. Pure: plans can be printed, compared and stored.

create   make disks · prepare run · egress · network · devices · launch
start                 prepare run · egress · network · devices · launch
restore               prepare run · egress · network · restore        then: awaken, free capture
fill     copy disks · prepare run · egress · network · restore · warm   when it is claimed: awaken
stop     shut the guest down, then the reverse of a start (devices stay bound until delete)
delete   the reverse of create
"""

from __future__ import annotations

from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.steps import (
    AttachNetwork,
    AwakenGuest,
    BindDevices,
    CopyDisks,
    CopyDisksAway,
    FreeCapture,
    GoOn,
    HoldTraffic,
    LaunchVmm,
    MakeDisks,
    PauseVm,
    PlugVolume,
    PrepareRun,
    RestoreVmm,
    Reversible,
    SaveCapture,
    SetEgress,
    ShutdownGuest,
    StageDisks,
    Step,
    SwapDisks,
    TakeBack,
    TakeDisks,
    Together,
    WarmGuest,
)
from hypeman.instances.model.types import InstanceState


def plan_create(record: InstanceRecord) -> tuple[Reversible, ...]:
    return (MakeDisks(record.id), *plan_start(record))


def plan_start(record: InstanceRecord) -> tuple[Reversible, ...]:
    return (*_environment(record), *_devices(record), LaunchVmm(record.id))


def plan_restore(record: InstanceRecord, capture: str, *, keep: bool) -> tuple[Reversible, ...]:
    return (*_environment(record), RestoreVmm(record.id, capture, keep))


def plan_fill(record: InstanceRecord, disks: str, capture: str) -> tuple[Reversible, ...]:
    """A fork that is kept for a pool; ``disks``: the snapshot's directory."""
    return (
        *plan_adopt_disks(record, disks, shared=True),
        *plan_restore(record, capture, keep=True),
        WarmGuest(record.id),
    )


def plan_awaken(record: InstanceRecord, capture: str, *, fresh: bool) -> tuple[Step, ...]:
    """What follows a restore once the record says that the VM is running."""
    return (AwakenGuest(record.id, fresh), *plan_free(capture))


def plan_stop(record: InstanceRecord, *, grace: float) -> tuple[Step, ...]:
    return (ShutdownGuest(record.id, grace), *plan_take_down(record))


def plan_park(record: InstanceRecord) -> tuple[Step, ...]:
    """Tear down what surrounds a VM that enters standby; its disks, lease and devices stay, its packets are held.

    The kernel waits for all CPUs while it removes a TAP, which is as long as a VMM takes to end."""
    *others, network = _environment(record)
    ends = TakeBack(LaunchVmm(record.id))
    if not isinstance(network, AttachNetwork):
        return (ends, *_reversed((*others, network)))
    return (Together((ends, TakeBack(network))), *_reversed(tuple(others)))


def plan_take_down(record: InstanceRecord) -> tuple[Step, ...]:
    """Tear down what surrounds a VM that stops."""
    return (*plan_park(record), *_reversed(_held(record)))


def plan_delete(record: InstanceRecord) -> tuple[Step, ...]:
    """Requires a record that no longer holds captures; the code that releases them frees them."""
    return (*_reversed(_held(record)), *_reversed(plan_create(record)))


def plan_free(*captures: str | None) -> tuple[Step, ...]:
    return tuple(FreeCapture(capture) for capture in captures if capture)


def plan_standby(record: InstanceRecord, capture: str) -> tuple[Reversible, ...]:
    return (*_held(record), SaveCapture(record.id, capture))


def plan_copy_out(
    record: InstanceRecord, target: str, *, capture: str | None, running: bool, transient: bool = False
) -> tuple[Reversible, ...]:
    """Copy the disks to ``target``; a running VM is paused for that, and for its ``capture`` if requested."""
    copy = CopyDisksAway(record.id, target)
    if not running:
        return (copy,)
    pause = SaveCapture(record.id, capture, transient) if capture else PauseVm(record.id)
    return (pause, copy, GoOn(record.id))


def plan_adopt_disks(record: InstanceRecord, source: str, *, shared: bool) -> tuple[Reversible, ...]:
    """Disks for a fork: copied from a ``shared`` source (a snapshot), otherwise moved."""
    return (CopyDisks(record.id, source),) if shared else (TakeDisks(record.id, source),)


def plan_attach(record: InstanceRecord, volume: str, path: str, *, readonly: bool, port: int) -> PlugVolume:
    """One step; a detach is its reverse."""
    return PlugVolume(record.id, volume, path, readonly, port)


def plan_stage(record: InstanceRecord, source: str) -> tuple[Reversible, ...]:
    return (StageDisks(record.id, source),)


def plan_swap(record: InstanceRecord) -> tuple[Step, ...]:
    """``record``: as it will be."""
    awake = _reversed(_held(record)) if record.state is not InstanceState.STANDBY else ()
    return (SwapDisks(record.id), *awake)


def _environment(record: InstanceRecord) -> tuple[Reversible, ...]:
    network: tuple[Reversible, ...] = (AttachNetwork(record.id),) if record.spec.network else ()
    egress: tuple[Reversible, ...] = (SetEgress(record.id),) if record.spec.egress else ()
    return (PrepareRun(record.id), *egress, *network)


def _held(record: InstanceRecord) -> tuple[Reversible, ...]:
    return (HoldTraffic(record.id),) if record.spec.network else ()


def _devices(record: InstanceRecord) -> tuple[Reversible, ...]:
    return (BindDevices(record.id),) if record.spec.devices or record.spec.gpu_profile else ()


def _reversed(steps: tuple[Reversible, ...]) -> tuple[Step, ...]:
    return tuple(TakeBack(step) for step in reversed(steps))
