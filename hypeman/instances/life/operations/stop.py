"""Stop, delete, and the unrequested end of a VM.

These go forward only: they are retried until they succeed, here or when settling (../settle.py). How
the workload ended comes from the best available source: the agent, its outcome on the boot disk, the
VMM.
"""

from __future__ import annotations

import msgspec

from hypeman.captures import records as captures
from hypeman.guest.types import Exited, Fatal
from hypeman.hypervisor.interface import HALTED, ExitReason, VmmExit
from hypeman.instances.ledger import ReleaseCapture
from hypeman.instances.life.machine import LiveVm
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.guest_boot import STOP_GRACE
from hypeman.instances.model.plan import plan_delete, plan_free, plan_stop, plan_take_down
from hypeman.instances.model.record import InstanceRecord, Operation, StopCause
from hypeman.instances.model.states import NO_VMM
from hypeman.instances.model.steps import Step
from hypeman.instances.model.types import InstanceState
from hypeman.instances.model.view import describe_exit
from hypeman.saga import carry_forward

DELETE_GRACE = 2.0

NOT_STARTED = 127
"""Exit code of a workload that never ran, as in a shell."""


async def stop(owned: Owned, grace: float = STOP_GRACE, *, cause: StopCause = StopCause.REQUESTED) -> InstanceRecord:
    """Shut the guest down and tear down its environment; after ``grace`` seconds it is killed."""
    owned.journal("stop")
    return await bring_down(owned, plan_stop(owned.record, grace=grace), None, cause)


async def vmm_ended(owned: Owned, ended: VmmExit) -> InstanceRecord:
    """Clean up after a VMM that ended without a command. A reboot of the host does not end a workload that had ended
    before."""
    record = owned.record
    rebooted = record.handle is not None and record.handle.boot_id != owned.machine.boot_id
    cause = StopCause.HOST if rebooted and record.state is not InstanceState.SHUTDOWN else StopCause.ENDED
    return await bring_down(owned, plan_take_down(record), ended, cause)


async def bring_down(
    owned: Owned, steps: tuple[Step, ...], ended: VmmExit | None, cause: StopCause = StopCause.ENDED
) -> InstanceRecord:
    """Carry out ``steps``, which end the VM, and record it as Stopped, with how it ``ended``.

    A cause that an earlier, unfinished stop has recorded is kept, unless this stop is a command.
    """
    live = owned.live  # the steps remove it from the World
    freed = (owned.record.mapped, owned.record.capture)  # the latter after an unfinished standby
    known = owned.record.stop_cause
    if known is None or cause is StopCause.REQUESTED:
        known = cause
    stopping = msgspec.structs.replace(owned.record, stop_cause=known)
    await owned.begin(Operation.STOP, steps, stopping)
    try:
        record = await _take_down(owned, steps, live, ended)
        holder = captures.of_instance(record.id)
        await owned.end(record, *(ReleaseCapture(capture, holder) for capture in freed), owned.hold(record))
    except Exception as error:
        await owned.lost(error)
        raise
    owned.journal(f"stopped: {record.exit_message}")
    await carry_forward(plan_free(*freed), owned.machine)
    return owned.record


async def _take_down(
    owned: Owned, steps: tuple[Step, ...], live: LiveVm | None, ended: VmmExit | None
) -> InstanceRecord:
    """The record after ``steps``."""
    written = await owned.machine.read_outcome(owned.record.id)
    await carry_forward(steps, owned.machine)
    if live is None or live.exited is None:
        written = await owned.machine.read_outcome(owned.record.id) or written
    before = owned.record
    code, message = exit_of(live, ended, written)
    if before.exit_code is not None and code is None:
        code, message = before.exit_code, before.exit_message
    record = msgspec.structs.replace(
        before,
        handle=None,
        mapped=None,
        capture=None,
        stopped_at=owned.now(),
        exit_code=code,
        exit_message=message,
    )
    return owned.entered(record, InstanceState.STOPPED)


async def delete(owned: Owned, *, graceful: bool = True) -> None:
    """Delete the instance in any state. Captures with other holders remain."""
    owned.journal("delete")
    record = owned.record
    freed = (record.capture, record.mapped)
    steps = plan_delete(record)
    if graceful and record.state not in NO_VMM:
        steps = (plan_stop(record, grace=DELETE_GRACE)[0], *steps)
    await owned.begin(Operation.DELETE, steps, msgspec.structs.replace(record, deleting=True))
    try:
        await carry_forward(steps, owned.machine)
        await owned.remove()
    except Exception as error:
        await owned.lost(error)
        raise
    await carry_forward(plan_free(*freed), owned.machine)


def exit_of(
    live: LiveVm | None, ended: VmmExit | None, written: Exited | Fatal | None = None
) -> tuple[int | None, str | None]:
    """Exit code and reason, from the best source: the agent, its outcome on the boot disk, the VMM."""
    fatal = live.fatal if live is not None else None
    exited = live.exited if live is not None else None
    if isinstance(written, Fatal):
        fatal = fatal or written
    elif written is not None:
        exited = exited or written
    if fatal is not None:
        if exited is None:
            return NOT_STARTED, fatal.message
        return exited.exit_code, f"{describe_exit(exited.exit_code, 0, out_of_memory=False)}: {fatal.message}"
    if exited is not None:
        return exited.exit_code, describe_exit(exited.exit_code, exited.signal, out_of_memory=exited.oom)
    if ended is None:
        return None, "stopped"
    match ended.reason:
        case ExitReason.POWEROFF:
            return None, HALTED if ended.message == HALTED else "the guest powered off"
        case ExitReason.RESET:
            return None, "the guest rebooted or its kernel panicked"
        case ExitReason.KILLED:
            return None, ended.message or "the VMM was killed"
        case ExitReason.FAILED:
            return None, ended.message or "the VMM failed"
