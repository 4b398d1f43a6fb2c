"""Resolves what a crash left, or what could be neither finished nor undone, into a stable state.

At server start each instance that had a VM or unfinished work is settled once, before any command;
Unknown ones are retried (lifecycle.py says when). Either way:

    the VM      adopted if it is running
    the intent  undone or finished, according to its Operation
    the rest    a dead VM is cleaned up; one that answers again gets its old state back
"""

from __future__ import annotations

import logging

import msgspec
import trio

from hypeman.actor import acting
from hypeman.errors import InUse
from hypeman.guest.types import Started
from hypeman.hypervisor.interface import ExitReason, VmmBroken, VmmExit, VmmGone
from hypeman.instances.life.machine import LiveVm
from hypeman.instances.life.news import hear
from hypeman.instances.life.operations.standby import awaken, park
from hypeman.instances.life.operations.stop import bring_down, vmm_ended
from hypeman.instances.life.operations.volumes import end_without
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.plan import plan_free, plan_take_down
from hypeman.instances.model.record import InstanceRecord, Intent, Operation
from hypeman.instances.model.states import NO_VMM
from hypeman.instances.model.steps import PlugVolume, SetEgress, TakeBack, reversible
from hypeman.instances.model.types import InstanceState
from hypeman.saga import carry_forward, take_back

log = logging.getLogger(__name__)

SECONDS_TO_LOOK = 2.0
"""Seconds for a VMM to answer on a retry, during which commands wait; it answers within a millisecond or is
stuck."""


async def settle(owned: Owned) -> None:
    """At server start: finish or undo work in progress, adopt a running VM, clean up after a dead one."""
    try:
        await _find_and_settle(owned)
    except Exception as error:  # on any error: one broken instance must not keep the others from being served
        log.exception("instance %s cannot be settled", owned.record.id)
        await owned.lost(error)


async def settle_again(owned: Owned) -> None:
    """The same for an instance that is still Unknown."""
    if owned.record.state is not InstanceState.UNKNOWN:
        return
    try:
        await _find_and_settle(owned, SECONDS_TO_LOOK)
    except Exception as error:
        if str(error) != owned.record.state_error:
            log.warning("instance %s is still Unknown: %s", owned.record.id, error, exc_info=True)
        await owned.lost(error)


async def _find_and_settle(owned: Owned, seconds: float = float("inf")) -> None:
    intent = owned.ledger.intent(owned.record.id)
    alive = await _find_vm(owned, seconds)
    if intent is not None:
        log.warning("instance %s: %s was not finished", owned.record.id, intent.operation.value)
        with acting(intent.actor):
            await _settle_intent(owned, intent, alive=alive)
    if owned.removed or owned.record.state in NO_VMM:
        return
    if not alive:
        await vmm_ended(owned, owned.ended or _ended_unseen(owned))
    elif owned.record.state is InstanceState.UNKNOWN:
        await owned.save(owned.entered(owned.record, owned.record.was or InstanceState.RUNNING))
        owned.journal(f"the VMM answers again: {owned.record.state.value}")
        await _hear_again(owned, owned.living)


def _ended_unseen(owned: Owned) -> VmmExit:
    """Exit status for a VMM that exited while no server was watching."""
    handle = owned.record.handle
    if handle is not None and handle.boot_id != owned.machine.boot_id:
        return VmmExit(ExitReason.KILLED, "the host rebooted while the VM ran")
    return VmmExit(ExitReason.FAILED, "the VMM ended while the server was away")


async def _find_vm(owned: Owned, seconds: float) -> bool:
    """Whether the VM is running; if so it is watched. Raises VmmBroken if it does not answer in time."""
    instance, live = owned.record.id, owned.live
    try:
        with trio.fail_after(seconds):
            if live is not None:
                await live.vmm.state()
                return True
            if not await owned.machine.reattach(instance):
                return False
    except VmmGone:
        return False
    except trio.TooSlowError:
        raise VmmBroken(f"the VMM did not answer within {seconds:g} s") from None
    owned.watch(owned.living)
    if owned.record.spec.egress:
        await owned.machine.do(SetEgress(instance))
    return True


async def _hear_again(owned: Owned, live: LiveVm) -> None:
    """Handle what the guest reported while its events could not be handled."""
    if live.started:
        await hear(owned, live, Started())
    if live.exited is not None:
        await hear(owned, live, live.exited)


async def _settle_intent(owned: Owned, intent: Intent, *, alive: bool) -> None:
    record, machine, steps = owned.record, owned.machine, intent.steps
    match intent.operation:
        case Operation.PULL:  # it failed, and the record could not be removed; a pull in progress is not settled
            await owned.remove()
        case Operation.CREATE:
            await take_back(reversible(steps), machine)
            await owned.remove()
        case Operation.START | Operation.RESTORE:
            await take_back(reversible(steps), machine)
            state = InstanceState.STOPPED if intent.operation is Operation.START else InstanceState.STANDBY
            record = owned.entered(msgspec.structs.replace(record, handle=None), state)
            await owned.end(record, owned.hold(record))
        case Operation.CAPTURE:
            await take_back(reversible(steps), machine)
            await owned.end(_found_again(owned, alive=alive))
        case Operation.ATTACH:
            step = steps[0]
            assert isinstance(step, PlugVolume)
            await machine.undo(step)
            await end_without(owned, step.volume)
        case Operation.DETACH:
            step = steps[0]
            assert isinstance(step, TakeBack) and isinstance(step.step, PlugVolume)
            try:
                await machine.do(step)
            except InUse:
                await owned.end(record)
            else:
                await end_without(owned, step.step.volume)
        case Operation.REVERT:
            await carry_forward(steps, machine)
            await owned.end(record)
        case Operation.RESUME if alive:
            try:
                await awaken(owned)
            except Exception:
                if owned.record.state is not InstanceState.STOPPED:
                    raise
                # The reason is in the journal, and the instance is in a stable state
        case Operation.RESUME | Operation.STOP:
            await bring_down(owned, plan_take_down(record), None)
        case Operation.PARK:
            await park(owned)
        case Operation.DELETE:
            await carry_forward(steps, machine)
            await owned.remove()
            await carry_forward(plan_free(record.capture, record.mapped), machine)


def _found_again(owned: Owned, *, alive: bool) -> InstanceRecord:
    """After a capture that could not be undone at first: it was read-only, so the old state applies."""
    record = owned.record
    if record.state is not InstanceState.UNKNOWN:
        return record
    if alive:
        return owned.entered(record, record.was or InstanceState.RUNNING)
    if record.handle is not None:
        return record  # its VMM has exited; cleanup follows
    return owned.entered(record, InstanceState.STANDBY if record.capture else InstanceState.STOPPED)
