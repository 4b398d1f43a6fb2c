"""An instance as its task sees it: its record, how it is written, and all-or-nothing operations.

    begin    one transaction: the intent (the plan), the reservation and related rows
    do       the steps, through the saga; on failure the started ones are undone
    end      one transaction: the new record replaces the intent

If steps can be neither finished nor undone, the instance becomes Unknown (``lost``); its intent stays for a retry.
Nothing here queues: a caller gets an Owned from ``Lifecycle.perform``, which has already serialized it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import datetime

import msgspec
import trio

from hypeman.errors import HypemanError
from hypeman.hypervisor.interface import VmmExit, VmmGone
from hypeman.instances.life.machine import LiveVm, Machine
from hypeman.instances.model.events import VmEvent
from hypeman.instances.model.plan import plan_free
from hypeman.instances.model.record import InstanceRecord, Intent, Operation
from hypeman.instances.model.states import NO_VMM
from hypeman.instances.model.steps import Reversible, Step
from hypeman.instances.model.types import InstanceState
from hypeman.instances.rows import INSTANCES, INTENTS
from hypeman.resources.accounting import Holding, Limits, hold
from hypeman.saga import UndoFailed, carry_forward, carry_out, take_back
from hypeman.store import Store, Txn
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)

Also = Callable[[Txn], object]
"""Further changes in the transaction that writes a record."""

Finish = Callable[[], Awaitable[InstanceRecord]]
"""The transaction that commits completed steps."""


class Hooks:
    """What all instances share besides the machine: the store, change notification and resource holding."""

    def __init__(
        self,
        *,
        store: Store,
        limits: Callable[[], Limits],
        changed: Callable[[InstanceRecord], None],
        gone: Callable[[InstanceRecord], None],
        release: Callable[[Txn, InstanceRecord], None],
    ) -> None:
        self.store = store
        self.limits = limits
        self.changed = changed
        self.gone = gone
        self.release = release
        """Release what the capabilities hold for an instance, in the transaction that removes it."""


class Owned:
    """An instance's record and the operations on it. One per instance, created by its task."""

    def __init__(
        self,
        machine: Machine,
        hooks: Hooks,
        record: InstanceRecord,
        *,
        now: Callable[[], datetime],
        tell: Callable[[LiveVm, VmEvent], None],
    ) -> None:
        self.machine = machine
        self.record = record
        self.now = now
        self.removed = False
        """The instance was deleted."""
        self.ended: VmmExit | None = None
        """How the VMM ended, once that is known."""
        self.nursery: trio.Nursery | None = None
        """Nursery for work that runs concurrently with commands, while the task runs."""
        self._hooks = hooks
        self._tell = tell

    @property
    def store(self) -> Store:
        return self._hooks.store

    @property
    def live(self) -> LiveVm | None:
        return self.machine.live(self.record.id)

    @property
    def living(self) -> LiveVm:
        """The running VM. Raises VmmGone if there is none."""
        live = self.live
        if live is None:
            raise VmmGone(f"the VM of instance {self.record.id} is gone")
        return live

    def watch(self, live: LiveVm) -> None:
        """Route the VM's events into the queue."""
        self.ended = None
        self.beside(live.run, self._tell)

    def beside(self, work: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run ``work`` concurrently with commands, until the instance is deleted."""
        assert self.nursery is not None, "the task runs"
        self.nursery.start_soon(work, *arguments)

    def journal(self, text: str) -> None:
        """Append one line to the instance's own log, for its owner."""
        log.info("instance %s (%s): %s", self.record.id, self.record.name, text)
        self.machine.journal(self.record.id, f"{self.now():%Y-%m-%dT%H:%M:%S.%fZ} {text}")

    # The record

    def entered(self, record: InstanceRecord, state: InstanceState) -> InstanceRecord:
        """``record`` in ``state``, entered now."""
        phases = record.phases.entered(state.value.lower(), self.now())
        return msgspec.structs.replace(record, state=state, phases=phases, state_error=None, was=None)

    def holding(self, record: InstanceRecord, *, running: bool | None = None) -> Also:
        """Set the host resources that the instance holds to what its state requires."""
        holding = holding_of(record)
        if not (record.state not in NO_VMM if running is None else running):
            holding = holding.without_vmm()
        limits = self._hooks.limits()
        return lambda txn: hold(txn, record.id, holding, limits)

    async def begin(
        self, operation: Operation, steps: tuple[Step, ...], record: InstanceRecord, also: Also | None = None
    ) -> InstanceRecord:
        return await self.save(record, intent=Intent(operation, steps), also=also)

    async def end(self, record: InstanceRecord, also: Also | None = None) -> InstanceRecord:
        def clear(txn: Txn) -> None:
            txn.delete(INTENTS, record.id)
            if also is not None:
                also(txn)

        return await self.save(record, also=clear)

    async def save(
        self, record: InstanceRecord, *, intent: Intent | None = None, also: Also | None = None
    ) -> InstanceRecord:
        def write(txn: Txn) -> None:
            txn.put(INSTANCES, record.id, record)
            if intent is not None:
                txn.put(INTENTS, record.id, intent)
            if also is not None:
                also(txn)

        await self.store.write(write)
        return self._know(record)

    def _know(self, record: InstanceRecord) -> InstanceRecord:
        if record.state is not self.record.state:
            metrics.state_transitions.labels(self.record.state.value, record.state.value).inc()
        self.record = record
        self._hooks.changed(record)
        return record

    async def remove(self) -> None:
        """Remove the record and all that it holds, after the instance's last effect was undone."""
        record = self.record
        await self.store.write(lambda txn: self._hooks.release(txn, record))
        self.removed = True
        self._hooks.gone(record)

    async def lost(self, error: BaseException) -> None:
        """Steps could be neither done nor undone: mark as Unknown. The intent stays and is retried."""
        before = self.record
        was = before.was if before.state is InstanceState.UNKNOWN else before.state
        unknown = self.entered(before, InstanceState.UNKNOWN)
        record = msgspec.structs.replace(unknown, state_error=str(error), was=was)
        with trio.CancelScope(shield=True):
            try:
                await self.save(record)
            except HypemanError as refused:  # a full disk: the instance must not be shown in its old state even so
                log.error("instance %s is Unknown, which can not be written down: %s", record.id, refused)
                self._know(record)

    # All or nothing

    async def carry_out(self, steps: tuple[Reversible, ...], finish: Finish) -> InstanceRecord:
        """Run all ``steps`` and the final transaction (``finish``), or none of them."""
        await carry_out(steps, self.machine)
        try:
            with trio.CancelScope(shield=True):  # otherwise it would be unknown whether it was committed
                record = await finish()
        except Exception:
            await take_back(steps, self.machine)
            raise
        return record

    async def all_or_nothing(
        self,
        operation: Operation,
        steps: tuple[Reversible, ...],
        record: InstanceRecord,
        before: InstanceRecord,
        *,
        finish: Finish,
        resources: bool = False,
    ) -> InstanceRecord:
        """``carry_out`` under an intent; if that fails, the record is restored to ``before``.

        With ``resources`` (starts and restores) the instance holds those of a running VM from here on.
        """
        await self.begin(operation, steps, record, self.holding(record, running=True) if resources else None)
        try:
            return await self.carry_out(steps, finish)
        except BaseException as error:
            await self.put_back(before, self.holding(before) if resources else None, error)
            self.journal(f"{operation.value} failed: {error}")
            raise

    async def put_back(self, before: InstanceRecord, also: Also | None, error: BaseException) -> None:
        """Restore the record after ``error``, once the steps were undone, if they could be."""
        with trio.CancelScope(shield=True):
            if isinstance(error, UndoFailed):
                await self.lost(error)
                return
            try:
                await self.end(before, also)
            except HypemanError as refused:
                await self.lost(refused)

    async def appear(self, steps: tuple[Reversible, ...], finish: Finish) -> InstanceRecord:
        """Create what was just recorded, with CREATE as its intent; if that fails, nothing remains."""
        try:
            return await self.carry_out(steps, finish)
        except UndoFailed as error:
            await self.lost(error)
            raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.remove()
                await carry_forward(plan_free(self.record.capture), self.machine)
            raise


def holding_of(record: InstanceRecord) -> Holding:
    """What a running instance holds."""
    spec = record.spec
    return Holding(
        vcpus=spec.vcpus,
        memory=spec.memory_bytes + spec.hotplug_bytes,
        disk=spec.overlay_bytes,
        download=spec.download_bps,
        upload=spec.upload_bps,
        disk_io=spec.disk_io_bps,
    )
