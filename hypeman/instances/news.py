"""What a VM tells by itself: it is ready, its workload began or ended, the VMM is gone.

News comes through the queue of the instance's task, so nothing changes a record while a command works on
it. News of an earlier boot is ignored. Nobody waits for news and could be told of a failure: the record is.
"""

from __future__ import annotations

import logging

import msgspec

from hypeman.guest.types import Exited, Fatal, Ready, Started
from hypeman.hypervisor.interface import VmmBroken, VmmExit
from hypeman.instances.live import Live, LiveEvent, Unwatched
from hypeman.instances.operations.stop import exit_of, vmm_ended
from hypeman.instances.owned import Owned
from hypeman.instances.types import InstanceState

log = logging.getLogger(__name__)


async def take_news(owned: Owned, live: Live, event: LiveEvent) -> None:
    """``hear`` it; what can not be followed makes the instance Unknown."""
    try:
        await hear(owned, live, event)
    except Exception as error:
        log.exception("instance %s: what its VM told can not be followed", owned.record.id)
        await owned.lost(error)


async def hear(owned: Owned, live: Live, event: LiveEvent) -> None:
    """Make of the record what ``event`` says."""
    if owned.live is not live:
        return
    match event:
        case VmmExit():
            owned.ended = event
            await vmm_ended(owned, event)
        case Unwatched():
            del owned.world.live[owned.record.id]
            await owned.lost(VmmBroken("the VMM can not be watched any more; the server's log says why"))
        case Started() if owned.record.state is InstanceState.INITIALIZING:
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


async def _plug_memory(owned: Owned) -> None:
    """Beside the commands: it takes a second, and a guest without it works as well."""
    try:
        await owned.world.plug_memory(owned.record.id)
    except Exception as error:
        owned.journal(f"hot-plugged memory is not there: {error}")
