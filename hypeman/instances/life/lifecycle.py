"""The one task that owns an instance: it runs its commands in order and handles its VM's events.

A command is checked when it is dequeued, against the current state (model/admission.py); what it does is in
operations/, and how it is recorded in owned.py. Events of the VM come through the same queue (news.py).

A stop or delete does not queue behind an unresponsive guest: waits for the guest by the running command and by
those queued before it are abandoned (``overtakes``), which fails those commands with InvalidState. Nor does it queue
behind an unresponsive VMM for long: one for which the running command still waits after ``SECONDS_FOR_VMM`` is killed.

At server start, the leftovers of a crash are settled first (settle.py). Settling an Unknown instance is retried
with exponential backoff until it succeeds or the instance is stopped or deleted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import trio

from hypeman.actor import acting, current_actor
from hypeman.errors import HypemanError, InternalError, InvalidState, NotFound
from hypeman.instances.life.machine import LiveVm
from hypeman.instances.life.news import take_news
from hypeman.instances.life.owned import Owned, Shared
from hypeman.instances.life.settle import settle, settle_again
from hypeman.instances.model.admission import Command, check_legal
from hypeman.instances.model.events import VmEvent
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import InstanceState
from hypeman.telemetry import traces

log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_QUEUED_COMMANDS = 64
"""Queued commands per instance; more are refused, so that the queue is bounded."""

SECONDS_FOR_VMM = 60.0
"""From when a stop or delete is queued; saving a VM takes its time, and a user may want what is saved."""

RETRY_MIN, RETRY_MAX = 1.0, 60.0
"""Seconds between retries for an Unknown instance; each pause is twice the previous one."""


def overtakes(command: Command | None, other: Command | None) -> bool:
    """Whether ``other`` (None: anything else the task does) must not wait for the guest once ``command`` is queued.

    A delete overtakes everything except another delete; a second stop does not shorten the first one's grace period.
    """
    if command is Command.DELETE:
        return other is not Command.DELETE
    return command is Command.STOP and other not in (Command.STOP, Command.DELETE)


class Job(Generic[R]):
    """A queued command."""

    __slots__ = ("action", "actor", "command", "done", "error", "queued", "span", "value")

    def __init__(self, command: Command | None, action: Callable[[], Awaitable[R]]) -> None:
        self.command = command
        self.action = action
        self.actor = current_actor()
        self.span = traces.current()
        self.queued = time.time_ns()
        self.done = trio.Event()
        self.value: R | None = None
        self.error: BaseException | None = None

    async def run(self) -> None:
        """Run the action and hand its result or error to the waiter."""
        try:
            with acting(self.actor), traces.within(self.span):
                self.value = await self.action()
        except Exception as error:
            self.error = error
            if not isinstance(error, HypemanError):
                log.exception("%s failed", self.command or "work")
        except BaseException:
            self.error = shutting_down()
            raise
        finally:
            self.done.set()

    def refuse(self, error: HypemanError) -> None:
        self.error = error
        self.done.set()

    async def wait(self) -> R:
        """Return the action's result or raise its exception."""
        await self.done.wait()
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # set together with ``done``


class _Look:
    """Queue entry: retry settling an Unknown instance."""


class _News:
    __slots__ = ("event", "live")

    def __init__(self, live: LiveVm, event: VmEvent) -> None:
        self.live = live
        self.event = event


class Lifecycle:
    """The task that owns one instance. ``run`` in a nursery; it ends when the instance is deleted."""

    def __init__(self, shared: Shared, record: InstanceRecord, *, new: bool) -> None:
        self._owned = Owned(shared, record, tell=self._tell, later=self._later)
        self._new = new
        """Nothing to settle: either just created, with its first command doing the work, or not running."""
        self._queue: trio.MemorySendChannel[Job[Any] | _News | _Look]
        self._inbox: trio.MemoryReceiveChannel[Job[Any] | _News | _Look]
        self._queue, self._inbox = trio.open_memory_channel(
            float("inf")
        )  # bounded by MAX_QUEUED_COMMANDS and few events
        self._queued: list[Command | None] = []
        """The commands of the queued jobs, in order."""
        self._running: Command | None = None
        self._turn = 0
        """Number of queue entries that were begun."""
        self._overtaken = trio.Event()
        """Set while a queued command overtakes the running one."""
        self._over = False
        """No longer accepts commands."""
        self._looking = False

    # Called by others

    @property
    def record(self) -> InstanceRecord:
        """The current record; it may have changed by the time a command runs."""
        return self._owned.record

    async def perform(self, command: Command | None, action: Callable[[Owned], Awaitable[R]]) -> R:
        """Run ``action`` in the instance's task when it is dequeued, if ``command`` is legal then.

        The caller may be cancelled; the action is not.
        """
        return await self.submit(command, action).wait()

    def submit(self, command: Command | None, action: Callable[[Owned], Awaitable[R]]) -> Job[R]:
        """Like ``perform``, but only enqueues; the caller waits on the Job."""
        if self._over or self._owned.removed:
            raise self._refusal()
        if len(self._queued) >= MAX_QUEUED_COMMANDS:
            raise InvalidState(
                f"instance {self.record.name!r} has {MAX_QUEUED_COMMANDS} commands waiting already", retryable=True
            )
        job: Job[R] = Job(command, lambda: self._traced(job, action))
        self._queued.append(command)
        self._queue.send_nowait(job)
        self._let_overtake()
        return job

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the instance until it is deleted. Reports started once the leftovers of a crash are settled."""
        with acting(None), traces.within(None):  # the request that started this task does not cause what follows later
            await self._run(task_status)

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._owned.nursery = nursery
                nursery.start_soon(self._limit_vmms)
                if not self._new:
                    await settle(self._owned)
                task_status.started()
                while not self._owned.removed:
                    self._look_again_if_unknown()
                    item = await self._inbox.receive()
                    self._running = item.command if isinstance(item, Job) else None
                    if isinstance(item, Job):
                        self._queued.pop(0)
                    self._turn += 1
                    self._let_overtake()
                    match item:
                        case _News() as news:
                            await take_news(self._owned, news.live, news.event)
                        case _Look():
                            await settle_again(self._owned)
                        case job:
                            await self._do(job)
                nursery.cancel_scope.cancel()
        finally:
            self._over = True
            self._refuse_the_rest()
            self._owned.machine.give_up_guest(self.record.id, False)

    # The queue

    async def _do(self, job: Job[Any]) -> None:
        try:
            self._check_turn(job.command)
        except InvalidState as error:
            job.refuse(error)
        else:
            await job.run()

    async def _traced(self, job: Job[R], action: Callable[[Owned], Awaitable[R]]) -> R:
        """Run ``action`` as a phase of the operation that queued it; a command without one is an operation itself."""
        owned = self._owned
        if job.span is None and job.command is None:
            return await action(owned)
        name = job.command.value if job.command is not None else "work"
        about = {traces.INSTANCE: owned.record.id, traces.INSTANCE_NAME: owned.record.name}
        traces.add_span(job.span, "queued", job.queued)
        with traces.span(name, about) if job.span is not None else traces.operation(name, about=about):
            owned.span = traces.current()
            return await action(owned)

    def _let_overtake(self) -> None:
        """Abandon waits for the guest while a queued command overtakes the running one."""
        given_up = any(overtakes(command, self._running) for command in self._queued)
        self._owned.machine.give_up_guest(self.record.id, given_up)
        if Command.DELETE in self._queued:
            self._owned.pulling.cancel()
        if given_up:
            self._overtaken.set()
        elif self._overtaken.is_set():
            self._overtaken = trio.Event()

    async def _limit_vmms(self) -> None:
        """Kill a VMM for which an overtaken command waits too long: the wait then fails by itself."""
        while True:
            await self._overtaken.wait()
            turn = self._turn
            await trio.sleep(SECONDS_FOR_VMM)
            if turn != self._turn or not self._overtaken.is_set():
                continue
            log.warning("the VMM of instance %s is killed: a stop or delete has waited for it too long", self.record.id)
            try:
                await self._owned.machine.end_vmm(self.record.id)
            except HypemanError as error:
                log.warning("the VMM of instance %s could not be killed: %s", self.record.id, error.message)

    def _check_turn(self, command: Command | None) -> None:
        if self.record.deleting and command is not Command.DELETE:
            raise InvalidState(f"instance {self.record.name!r} is half deleted; delete it again")
        if command is not None:
            check_legal(command, self.record.state, name=self.record.name)

    def _refuse_the_rest(self) -> None:
        while True:
            try:
                item = self._inbox.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                return
            if isinstance(item, Job):
                item.refuse(self._refusal())

    def _refusal(self) -> HypemanError:
        return NotFound(f"instance {self.record.name!r} is gone") if self._owned.removed else shutting_down()

    def _tell(self, live: LiveVm, event: VmEvent) -> None:
        self._queue.send_nowait(_News(live, event))

    def _later(self, action: Callable[[Owned], Awaitable[object]]) -> None:
        self._queued.append(None)
        self._queue.send_nowait(Job(None, lambda: action(self._owned)))

    def _look_again_if_unknown(self) -> None:
        if self.record.state is InstanceState.UNKNOWN and not self._looking:
            self._looking = True
            self._owned.beside(self._keep_looking)

    async def _keep_looking(self) -> None:
        pause = RETRY_MIN
        while self.record.state is InstanceState.UNKNOWN:
            await trio.sleep(pause)
            pause = min(pause * 2, RETRY_MAX)
            self._queue.send_nowait(_Look())
        self._looking = False


def shutting_down() -> HypemanError:
    """What commands get that a server cannot finish any more."""
    return InternalError("the server is shutting down; the command was not finished")
