"""Copies an instance's disks and memory for forks and snapshots, and restores from a snapshot.

A running VM is paused while its disks are copied, so that memory and disks are consistent, then resumed.
A copy is valid once ``publish`` has recorded its holder, in the transaction that ends the work; until then
a failure undoes it. Memory is never copied: it is a capture with several holders (captures/records.py).
"""

from __future__ import annotations

from collections.abc import Callable

from hypeman.captures import records as captures
from hypeman.captures.records import CAPTURES, CaptureRow
from hypeman.ids import new_id
from hypeman.instances.life.owned import Also, Owned
from hypeman.instances.model.plan import plan_adopt_disks, plan_copy_out, plan_free, plan_stage, plan_swap
from hypeman.instances.model.record import InstanceRecord, Operation
from hypeman.instances.model.types import InstanceState
from hypeman.instances.model.validate import check_capturable
from hypeman.saga import carry_forward
from hypeman.store import Txn


async def copy_out(
    owned: Owned,
    target: str,
    *,
    with_memory: bool,
    holder: str,
    publish: Callable[[Txn, InstanceRecord, CaptureRow | None], object],
) -> InstanceRecord:
    """Copy the disks to ``target`` and, ``with_memory``, have the memory held by ``holder``."""
    before = owned.record
    running = before.state is InstanceState.RUNNING
    if running and with_memory:
        check_capturable(before.spec, owned.machine.capabilities(before), "captured")
    made = new_id() if running and with_memory else ""

    async def end() -> InstanceRecord:
        row: CaptureRow | None = None
        if made:
            row = await owned.machine.describe_capture(before.id, made, holder=holder)
        elif with_memory and before.capture is not None:
            held = before.capture
            row = owned.store.read(lambda txn: captures.get(txn, held))

        def record_it(txn: Txn) -> None:
            if row is not None and made:
                txn.put(CAPTURES, made, row)
            elif row is not None:
                captures.share(txn, row.id, holder)
            publish(txn, before, row)

        return await owned.end(owned.record, record_it)

    steps = plan_copy_out(before, target, capture=made or None, running=running)
    await owned.all_or_nothing(Operation.CAPTURE, steps, before, before, finish=end)
    return before


async def adopt_disks(owned: Owned, source: str, *, shared: bool) -> InstanceRecord:
    """Create the disks of a newly recorded fork, which ends Stopped or Standby."""
    steps = plan_adopt_disks(owned.record, source, shared=shared)
    return await owned.appear(steps, lambda: owned.end(owned.record))


async def revert(owned: Owned, source: str, record: InstanceRecord, also: Also) -> InstanceRecord:
    """Replace the instance's disks with those in directory ``source``, and its record with ``record``."""
    before = owned.record
    owned.journal("restore from snapshot")
    freed = before.capture
    steps = plan_swap(before)

    def exchange(txn: Txn) -> None:
        captures.let_go(txn, freed, captures.of_instance(before.id))
        also(txn)

    await owned.all_or_nothing(
        Operation.CAPTURE,
        plan_stage(before, source),
        before,
        before,
        finish=lambda: owned.begin(Operation.REVERT, steps, record, exchange),
    )
    try:
        await carry_forward(steps, owned.machine)
    except Exception as error:
        await owned.lost(error)
        raise
    await owned.end(owned.record)
    await carry_forward(plan_free(freed), owned.machine)
    return owned.record
