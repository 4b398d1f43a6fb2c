"""Create and start: a VM that boots.

Both end in Initializing, once the VMM runs; Running follows from a guest event (../news.py). A failed
create leaves nothing; a failed start leaves the instance Stopped, as before.
"""

from __future__ import annotations

import secrets

import msgspec

from hypeman.instances.life.owned import Owned
from hypeman.instances.model.plan import plan_create, plan_start
from hypeman.instances.model.record import InstanceRecord, Operation
from hypeman.instances.model.types import InstanceState

_NONCE_BYTES = 16


def new_nonce() -> bytes:
    """Nonce that authenticates the guest agent of one boot."""
    return secrets.token_bytes(_NONCE_BYTES)


async def create(owned: Owned) -> InstanceRecord:
    """First boot of a newly recorded instance, with CREATE as its intent."""
    return await owned.appear(plan_create(owned.record), lambda: _launched(owned))


async def start(
    owned: Owned, entrypoint: tuple[str, ...] | None = None, cmd: tuple[str, ...] | None = None
) -> InstanceRecord:
    """Boot a stopped instance; a given entry point or command is also kept for later starts."""
    before = owned.record
    spec = before.spec
    if entrypoint is not None:
        spec = msgspec.structs.replace(spec, entrypoint=entrypoint)
    if cmd is not None:
        spec = msgspec.structs.replace(spec, cmd=cmd)
    record = msgspec.structs.replace(
        before,
        spec=spec,
        nonce=new_nonce(),
        boots=before.boots + 1,
        exit_code=None,
        exit_message=None,
        fresh=False,
    )
    return await owned.all_or_nothing(
        Operation.START, plan_start(record), record, before, finish=lambda: _launched(owned), resources=True
    )


async def _launched(owned: Owned) -> InstanceRecord:
    live = owned.living
    record = msgspec.structs.replace(
        owned.record, handle=live.vmm.handle, started_at=owned.now(), stopped_at=None, stop_cause=None
    )
    record = await owned.end(owned.entered(record, InstanceState.INITIALIZING))
    owned.watch(live)
    owned.journal("launched")
    return record
