"""Events that a VM reports: ready, workload started or ended, VMM exited.

Events come through the queue of the instance's task, so nothing changes a record while a command works on
it. Events of an earlier boot are ignored. No caller waits for an event, so failures go into the record.
"""

from __future__ import annotations

import logging

import msgspec

from hypeman.guest.types import Exited, Fatal, Ready, Started
from hypeman.hypervisor.interface import VmmBroken, VmmExit
from hypeman.instances.life.machine import LiveVm
from hypeman.instances.life.operations.stop import exit_of, vmm_ended
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.events import Unwatched, VmEvent
from hypeman.instances.model.types import InstanceState
from hypeman.telemetry import traces

log = logging.getLogger(__name__)


async def take_news(owned: Owned, live: LiveVm, event: VmEvent) -> None:
    """Handle ``event``; if that fails, the instance becomes Unknown."""
    try:
        await hear(owned, live, event)
    except Exception as error:
        log.exception("instance %s: an event of its VM cannot be handled", owned.record.id)
        await owned.lost(error)


async def hear(owned: Owned, live: LiveVm, event: VmEvent) -> None:
    """Update the record according to ``event``."""
    if owned.live is not live:
        return
    match event:
        case VmmExit():
            owned.ended = event
            await vmm_ended(owned, event)
        case Unwatched():
            owned.machine.unwatch(owned.record.id)
            await owned.lost(VmmBroken("the VMM can no longer be watched; the cause is in the server's log"))
        case Started() if owned.record.state is InstanceState.INITIALIZING:
            _trace_boot(owned)
            await owned.save(owned.entered(owned.record, InstanceState.RUNNING))
            owned.journal("running")
            if owned.record.spec.hotplug_bytes:
                owned.beside(_plug_memory, owned)
        case Exited() if owned.record.state in (InstanceState.INITIALIZING, InstanceState.RUNNING):
            code, message = exit_of(live, None)
            record = msgspec.structs.replace(owned.record, exit_code=code, exit_message=message)
            await owned.save(owned.entered(record, InstanceState.SHUTDOWN))
        case Fatal():
            owned.journal(f"guest: {event.message}")
        case Ready() | Started() | Exited():
            pass


def _trace_boot(owned: Owned) -> None:
    """The guest's boot, as a phase of the operation that started it."""
    if owned.span is not None and owned.record.started_at is not None:
        traces.add_span(owned.span, "guest boot", round(owned.record.started_at.timestamp() * 1e9))


async def _plug_memory(owned: Owned) -> None:
    """Runs concurrently with commands: it takes a second, and the guest works without it."""
    try:
        await owned.machine.plug_memory(owned.record.id)
    except Exception as error:
        owned.journal(f"hot-plugged memory is not there: {error}")
