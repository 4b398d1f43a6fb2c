"""Standby and restore: save memory and device state to disk and end the VMM, and the reverse.

    standby   CAPTURE   hold packets, save the memory         a failure is undone: the VM is resumed
              PARK      the capture is published:             forward only: it is in standby from
                        end the VMM                           here on

    restore   RESTORE   a paused VM from the memory           a failure is undone: it stays in standby
              RESUME    recorded as Running, the capture      forward only: a guest that cannot be
                        released: wake the guest              woken is stopped

A capture without other holders is consumed once its VM resumes. A shared one stays and is mapped
privately (``mapped``) while the VM runs.
"""

from __future__ import annotations

from functools import partial

import msgspec

from hypeman.captures import records as captures
from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.errors import InternalError
from hypeman.hypervisor.interface import ExitReason, VmmExit
from hypeman.ids import new_id
from hypeman.instances.ledger import AddCapture, Commit, ReleaseCapture
from hypeman.instances.life.operations.stop import bring_down
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.plan import plan_awaken, plan_free, plan_park, plan_restore, plan_standby, plan_take_down
from hypeman.instances.model.record import InstanceRecord, Intent, Operation
from hypeman.instances.model.steps import FreeCapture
from hypeman.instances.model.types import InstanceState
from hypeman.instances.model.validate import check_capturable
from hypeman.saga import carry_forward


async def standby(owned: Owned, compression: SnapshotCompressionConfig | None) -> InstanceRecord:
    """Save memory and device state to disk, then end the VMM."""
    before = owned.record
    check_capturable(before.spec, owned.machine.capabilities(before), "put in standby")
    owned.journal("standby")
    capture = new_id()
    holder = captures.of_instance(before.id)
    async with owned.attempt(Operation.CAPTURE, plan_standby(before, capture), before) as attempt:
        row = await owned.machine.describe_capture(before.id, capture, holder=holder, compression=compression)
        record = msgspec.structs.replace(before, capture=capture, mapped=None)
        attempt.result = Commit(
            record,
            Intent(Operation.PARK, plan_park(record)),
            (AddCapture(row), ReleaseCapture(before.mapped, holder)),
        )
    return await park(owned, before.mapped)


async def park(owned: Owned, freed: str | None = None) -> InstanceRecord:
    """The rest of a standby once its capture is published; ``freed``: the capture it had mapped."""
    try:
        await carry_forward(owned.intent.steps, owned.machine)
        asleep = msgspec.structs.replace(owned.record, handle=None, stopped_at=owned.now())
        asleep = owned.entered(asleep, InstanceState.STANDBY)
        await owned.end(asleep, owned.hold(asleep))
    except Exception as error:
        await owned.lost(error)
        raise
    await carry_forward(plan_free(freed), owned.machine)
    return owned.record


async def restore(owned: Owned) -> InstanceRecord:
    """Restore the instance from standby."""
    capture = owned.record.capture
    if capture is None:
        raise InternalError(f"instance {owned.record.id} is in standby without a capture")
    owned.journal("restore")
    async with owned.machine.restorable(capture):
        return await _restore_from(owned, capture)


async def _restore_from(owned: Owned, capture: str) -> InstanceRecord:
    before = owned.record
    holder = captures.of_instance(before.id)
    keep = owned.ledger.is_shared(capture, holder)
    record = msgspec.structs.replace(before, boots=before.boots + 1)
    async with owned.attempt(
        Operation.RESTORE,
        plan_restore(record, capture, keep=keep),
        record,
        take=(owned.hold(record, running=True),),
        give_back=(owned.hold(before),),
    ) as attempt:
        restored = msgspec.structs.replace(
            record,
            handle=owned.living.vmm.handle,
            capture=None,
            mapped=capture if keep else None,
            stopped_at=None,
            stop_cause=None,
            fresh=False,  # from here on the plan says whether its guest gets a new identity
        )
        attempt.result = Commit(
            owned.entered(restored, InstanceState.RUNNING),
            Intent(Operation.RESUME, plan_awaken(record, capture, fresh=before.fresh)),
            () if keep else (ReleaseCapture(capture, holder),),
        )
    owned.watch(owned.living)
    return await awaken(owned)


async def awaken(owned: Owned) -> InstanceRecord:
    """The rest of a restore once the record says that the VM is running.

    The VM has run since: if it cannot be woken, it is stopped and the error is raised. Once its program continues, the
    record of the work and the capture are removed behind the caller's back.
    """
    steps = owned.intent.steps
    free = tuple(step for step in steps if isinstance(step, FreeCapture))
    try:
        await carry_forward(tuple(step for step in steps if step not in free), owned.machine)
    except Exception as error:
        message = f"the restored guest could not be awakened: {error}"
        owned.journal(message)
        await bring_down(owned, (*plan_take_down(owned.record), *free), VmmExit(ExitReason.FAILED, message))
        raise
    owned.later(partial(_finish, free))
    return owned.record


async def _finish(free: tuple[FreeCapture, ...], owned: Owned) -> None:
    """After a restore. If that fails, the next server does it; another command may have come first."""
    await carry_forward(free, owned.machine)
    intent = owned.ledger.intent(owned.record.id)
    if intent is not None and intent.operation is Operation.RESUME:
        await owned.end(owned.record)
