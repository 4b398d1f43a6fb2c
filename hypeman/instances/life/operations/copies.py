"""Copies of an instance: its disks and memory for forks and snapshots, and restores from a snapshot.

A running VM is paused while its disks are copied, so that memory and disks are consistent, then resumed.
A copy is valid once its holder is recorded, in the transaction that ends the work; until then a failure undoes it.
Memory is never copied: it is a capture with several holders (captures/records.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hypeman.captures import records as captures
from hypeman.captures.records import CaptureRow
from hypeman.ids import new_id
from hypeman.instances.ledger import AddCapture, Change, Commit, ReleaseCapture, ShareCapture
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.plan import plan_copy_out, plan_free, plan_stage, plan_swap
from hypeman.instances.model.record import InstanceRecord, Intent, Operation
from hypeman.instances.model.steps import reversible
from hypeman.instances.model.types import InstanceState
from hypeman.instances.model.validate import check_capturable
from hypeman.saga import carry_forward


@dataclass
class Copy:
    """Disks that were copied, and the memory that belongs to them."""

    capture: CaptureRow | None
    changes: tuple[Change, ...] = ()
    """To be set: what gives the copy its owner, recorded with the end of the work."""


@asynccontextmanager
async def copied_out(
    owned: Owned, target: str, *, with_memory: bool, holder: str, transient: bool = False
) -> AsyncIterator[Copy]:
    """Copy the disks to ``target`` and, ``with_memory``, have the memory held by ``holder``; the block then says what
    to record. If that fails, nothing remains. ``transient``: the memory is restored at once."""
    before = owned.record
    running = before.state is InstanceState.RUNNING
    if running and with_memory:
        check_capturable(before.spec, owned.machine.capabilities(before), "captured")
    made = new_id() if running and with_memory else None
    steps = plan_copy_out(before, target, capture=made, running=running, transient=transient)
    async with owned.attempt(Operation.CAPTURE, steps, before) as attempt:
        row: CaptureRow | None = None
        held: tuple[Change, ...] = ()
        if made is not None:
            row = await owned.machine.describe_capture(before.id, made, holder=holder)
            held = (AddCapture(row),)
        elif with_memory and before.capture is not None:
            row = owned.ledger.capture(before.capture)
            held = (ShareCapture(row.id, holder),)
        copy = Copy(row)
        yield copy
        attempt.result = Commit(before, None, (*held, *copy.changes))


async def adopt_disks(owned: Owned) -> InstanceRecord:
    """Create the disks of a newly recorded fork, which ends Stopped or Standby."""
    async with owned.create_or_discard(reversible(owned.intent.steps)) as attempt:
        attempt.result = Commit(owned.record, None)
    return owned.record


async def revert(owned: Owned, source: str, record: InstanceRecord, *changes: Change) -> InstanceRecord:
    """Replace the instance's disks with those in directory ``source``, and its record with ``record``."""
    before = owned.record
    owned.journal("restore from snapshot")
    freed = before.capture
    async with owned.attempt(Operation.CAPTURE, plan_stage(before, source), before) as attempt:
        attempt.result = Commit(
            record,
            Intent(Operation.REVERT, plan_swap(record)),
            (ReleaseCapture(freed, captures.of_instance(before.id)), *changes),
        )
    try:
        await carry_forward(owned.intent.steps, owned.machine)
    except Exception as error:
        await owned.lost(error)
        raise
    await owned.end(owned.record)
    await carry_forward(plan_free(freed), owned.machine)
    return owned.record
