"""An instance as its task sees it: its record, what it commits, and all-or-nothing operations.

    begin    one transaction: the intent (the plan), the reservation and related rows
    do       the steps, through the saga; on failure the started ones are undone
    end      one transaction: the new record replaces the intent

An operation says what is to be written as a Commit; ``ledger.py`` writes it. If steps can be neither finished nor
undone, the instance becomes Unknown (``lost``); its intent stays for a retry.
Nothing here queues: a caller gets an Owned from ``Lifecycle.perform``, which has already serialized it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import msgspec
import trio

from hypeman.errors import HypemanError, InternalError
from hypeman.hypervisor.interface import VmmExit, VmmGone
from hypeman.images.types import ReadyImage
from hypeman.instances.ledger import Change, Commit, Hold, Ledger, holding_of
from hypeman.instances.life.machine import LiveVm, Machine
from hypeman.instances.model.events import VmEvent
from hypeman.instances.model.plan import plan_free
from hypeman.instances.model.record import InstanceRecord, Intent, Operation
from hypeman.instances.model.states import NO_VMM
from hypeman.instances.model.steps import Reversible, Step
from hypeman.instances.model.types import InstanceState
from hypeman.saga import UndoFailed, carry_forward, carry_out, take_back
from hypeman.telemetry import metrics, traces

log = logging.getLogger(__name__)


class ImagePulls(Protocol):
    async def wait_ready(self, name: str, platform: str | None = None) -> ReadyImage:
        """The image of that name, pulled first if it is missing."""
        ...

    async def abandon(self, name: str) -> None:
        """Stop the pull that ``wait_ready`` began, unless others want the image, too."""
        ...


@dataclass
class Shared:
    """What the tasks of all instances share."""

    machine: Machine
    ledger: Ledger
    images: ImagePulls
    changed: Callable[[InstanceRecord], None]
    """Called with each new record."""
    gone: Callable[[InstanceRecord], None]
    now: Callable[[], datetime]


class Attempt:
    """Steps that were carried out and are undone unless their result is committed."""

    def __init__(self) -> None:
        self.result: Commit | None = None
        """To be set before the block ends."""


class Owned:
    """An instance's record and the operations on it. One per instance, created by its task."""

    def __init__(
        self,
        shared: Shared,
        record: InstanceRecord,
        *,
        tell: Callable[[LiveVm, VmEvent], None],
        later: Callable[[Callable[[Owned], Awaitable[object]]], None],
    ) -> None:
        self.machine = shared.machine
        self.ledger = shared.ledger
        self.images = shared.images
        self.now = shared.now
        self.record = record
        self.removed = False
        """The instance was deleted."""
        self.ended: VmmExit | None = None
        """How the VMM ended, once that is known."""
        self.nursery: trio.Nursery | None = None
        """Nursery for work that runs concurrently with commands, while the task runs."""
        self.pulling = trio.CancelScope()
        """Around the wait for the image; cancelled by a delete."""
        self.span: traces.Span | None = None
        """Of the last command: what the guest does after it belongs to it."""
        self._shared = shared
        self.tell = tell
        """Takes events of the VM."""
        self.later = later
        """Runs what need not be waited for, after the commands that are queued."""

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

    @property
    def intent(self) -> Intent:
        """The plan in progress, as stored. Raises InternalError if there is none."""
        intent = self.ledger.intent(self.record.id)
        if intent is None:
            raise InternalError(f"instance {self.record.id} has no work in progress")
        return intent

    def watch(self, live: LiveVm) -> None:
        """Route the VM's events into the queue."""
        self.ended = None
        self.beside(live.run, self.tell)

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

    def hold(self, record: InstanceRecord, *, running: bool | None = None) -> Hold:
        """The host resources that the instance holds in its state."""
        has_vmm = record.state not in NO_VMM if running is None else running
        return Hold(record.id, holding_of(record, running=has_vmm))

    async def begin(
        self, operation: Operation, steps: tuple[Step, ...], record: InstanceRecord, *changes: Change
    ) -> None:
        await self.commit(Commit(record, Intent(operation, steps), changes))

    async def end(self, record: InstanceRecord, *changes: Change) -> None:
        await self.commit(Commit(record, None, changes))

    async def save(self, record: InstanceRecord, *changes: Change) -> None:
        """Change the record outside of an operation; an intent stays as it is."""
        await self.commit(Commit(record, changes=changes))

    async def commit(self, commit: Commit) -> None:
        with traces.span("commit"):
            await self.ledger.commit(commit)
        self._know(commit.record)

    def _know(self, record: InstanceRecord) -> None:
        if record.state is not self.record.state:
            metrics.state_transitions.labels(self.record.state.value, record.state.value).inc()
        self.record = record
        self._shared.changed(record)

    async def remove(self) -> None:
        """Remove the record and all that it holds, after the instance's last effect was undone."""
        record = self.record
        await self.ledger.remove(record)
        self.removed = True
        self._shared.gone(record)

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
                log.error("instance %s is Unknown, which cannot be recorded: %s", record.id, refused)
                self._know(record)

    # All or nothing

    @asynccontextmanager
    async def attempt(
        self,
        operation: Operation,
        steps: tuple[Reversible, ...],
        record: InstanceRecord,
        *,
        take: tuple[Change, ...] = (),
        give_back: tuple[Change, ...] = (),
    ) -> AsyncIterator[Attempt]:
        """Carry out ``steps`` under an intent; the block then sets ``result``, which is committed at its end.

        ``record`` and the changes ``take`` are written with the intent. If anything fails, the steps are undone, and
        the record is as it was before, with the changes ``give_back``.
        """
        before = self.record
        await self.begin(operation, steps, record, *take)
        try:
            async with self._carried_out(steps) as attempt:
                yield attempt
        except BaseException as error:
            await self._put_back(before, give_back, error)
            self.journal(f"{operation.value} failed: {error}")
            raise

    @asynccontextmanager
    async def create_or_discard(self, steps: tuple[Reversible, ...]) -> AsyncIterator[Attempt]:
        """The same for what was just recorded, with CREATE as its intent; if it fails, nothing remains."""
        try:
            async with self._carried_out(steps) as attempt:
                yield attempt
        except UndoFailed as error:
            await self.lost(error)
            raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.remove()
                await carry_forward(plan_free(self.record.capture), self.machine)
            raise

    @asynccontextmanager
    async def _carried_out(self, steps: tuple[Reversible, ...]) -> AsyncIterator[Attempt]:
        attempt = Attempt()
        await carry_out(steps, self.machine)
        try:
            yield attempt
            assert attempt.result is not None, "the block says what is to be committed"
            with trio.CancelScope(shield=True):  # otherwise it would be unknown whether it was committed
                await self.commit(attempt.result)
        except (Exception, trio.Cancelled):
            await take_back(steps, self.machine)
            raise

    async def _put_back(self, before: InstanceRecord, changes: tuple[Change, ...], error: BaseException) -> None:
        """Restore the record after ``error``, once the steps were undone, if they could be."""
        with trio.CancelScope(shield=True):
            if isinstance(error, UndoFailed):
                await self.lost(error)
                return
            try:
                await self.end(before, *changes)
            except HypemanError as refused:
                await self.lost(refused)
