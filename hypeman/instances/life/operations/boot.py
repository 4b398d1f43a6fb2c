"""Create and start: a VM that boots.

Both end in Initializing, once the VMM runs; Running follows from a guest event (../news.py). A failed
create leaves nothing; a failed start leaves the instance Stopped, as before. A create whose image is missing pulls it
first: the instance is recorded, in state Created and phase ``pulling``, and a server that is restarted continues.
"""

from __future__ import annotations

import logging
import secrets

import msgspec

from hypeman.errors import HypemanError, InvalidState
from hypeman.instances.ledger import Commit, PinImage
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.plan import plan_create, plan_start
from hypeman.instances.model.record import InstanceRecord, Intent, Operation
from hypeman.instances.model.steps import reversible
from hypeman.instances.model.types import InstanceState
from hypeman.telemetry import traces

log = logging.getLogger(__name__)

_NONCE_BYTES = 16


def new_nonce() -> bytes:
    """Nonce that authenticates the guest agent of one boot."""
    return secrets.token_bytes(_NONCE_BYTES)


async def create(owned: Owned) -> InstanceRecord:
    """First boot of a newly recorded instance, with PULL or CREATE as its intent."""
    if owned.intent.operation is Operation.PULL:
        await _pull(owned)
    steps = reversible(owned.intent.steps)
    async with owned.create_or_discard(steps) as attempt:
        attempt.result = _launched(owned)
    _watch(owned)
    return owned.record


async def _pull(owned: Owned) -> None:
    """Wait for the image, then replace the intent by CREATE. If that fails, the instance is removed."""
    record = owned.record
    image = None
    try:
        with owned.pulling, traces.span("pull"):
            image = await owned.images.wait_ready(record.spec.image, record.spec.platform)
        if image is not None:
            phases = record.phases.entered(record.state.value.lower(), owned.now())
            pulled = msgspec.structs.replace(record, digest=image.digest, phases=phases)
            intent = Intent(Operation.CREATE, plan_create(pulled))
            await owned.commit(Commit(pulled, intent, (PinImage(image.digest, record.id),)))
    except Exception as error:
        log.warning("instance %s is not created: its image cannot be had: %s", record.id, error)
        try:
            await owned.remove()
        except Exception as refused:
            await owned.lost(refused)
        raise
    if image is None:
        try:
            await owned.images.abandon(record.spec.image)
        except HypemanError as error:  # continue; the image stays until it is deleted
            log.warning("the pull for instance %s cannot be stopped: %s", record.id, error)
        raise InvalidState(f"instance {record.name!r} was deleted while its image was pulled")


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
    async with owned.attempt(
        Operation.START,
        plan_start(record),
        record,
        take=(owned.hold(record, running=True),),
        give_back=(owned.hold(before),),
    ) as attempt:
        attempt.result = _launched(owned)
    _watch(owned)
    return owned.record


def _launched(owned: Owned) -> Commit:
    handle = owned.living.vmm.handle
    record = msgspec.structs.replace(
        owned.record, handle=handle, started_at=owned.now(), stopped_at=None, stop_cause=None
    )
    return Commit(owned.entered(record, InstanceState.INITIALIZING), None)


def _watch(owned: Owned) -> None:
    owned.watch(owned.living)
    owned.journal("launched")
