"""The tasks that own instances: one each, started with the instance or at its first command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TypeVar

import trio

from hypeman.instances.board import Board
from hypeman.instances.ledger import Ledger
from hypeman.instances.life.lifecycle import Job, Lifecycle, shutting_down
from hypeman.instances.life.machine import Machine
from hypeman.instances.life.operations.boot import create
from hypeman.instances.life.owned import ImagePulls, Owned, Shared
from hypeman.instances.model.record import InstanceRecord

R = TypeVar("R")


class Tasks:
    """They run in the nursery that ``run_in`` is given; without one, commands are refused."""

    def __init__(
        self,
        *,
        machine: Machine,
        ledger: Ledger,
        images: ImagePulls,
        board: Board,
        added: Callable[[], object],
        gone: Callable[[str], object],
        now: Callable[[], datetime],
    ) -> None:
        """``added`` is called when an instance is new, ``gone`` with the id of one that was deleted."""
        self.shared = Shared(
            machine=machine, ledger=ledger, images=images, changed=board.post, gone=self._forget, now=now
        )
        self._board = board
        self._added = added
        self._gone = gone
        self._tasks: dict[str, Lifecycle] = {}
        self._nursery: trio.Nursery | None = None

    @contextmanager
    def run_in(self, nursery: trio.Nursery) -> Iterator[None]:
        """Tasks can be started within the block; an ending server has others that still call."""
        self._nursery = nursery
        try:
            yield
        finally:
            self._nursery = None

    def of(self, ref: str) -> Lifecycle:
        """The task of an instance, by id, name or prefix; started on first use if the instance is not running."""
        record = self._board.find(ref)
        return self._tasks.get(record.id) or self._make(record, new=True)

    async def add(self, record: InstanceRecord, first: Callable[[Owned], Awaitable[InstanceRecord]]) -> Lifecycle:
        """Start the task of a newly recorded instance and return it when it has done ``first``."""
        task, job = self.begin(record, first)
        await job.wait()
        return task

    def begin(
        self, record: InstanceRecord, first: Callable[[Owned], Awaitable[InstanceRecord]]
    ) -> tuple[Lifecycle, Job[InstanceRecord]]:
        """Start the task of a newly recorded instance with ``first``, which runs before any command."""
        task = self._make(record, new=True)
        job = task.submit(None, first)
        self._board.post(record)
        self._added()
        return task, job

    async def settle(self, record: InstanceRecord) -> None:
        """Start the task of an instance that may have a VM or unfinished work; returns once it is settled."""
        await self._running.start(self._make(record, new=False).run)

    def continue_create(self, record: InstanceRecord) -> None:
        """Start the task of an instance whose image was being pulled; it continues the pull."""
        self._make(record, new=True).submit(None, create)

    async def run_detached(self, work: Callable[[], Awaitable[R]]) -> R:
        """Run ``work`` to completion, even if the caller is cancelled, and return its result."""
        job = Job(None, work)
        self._running.start_soon(job.run)
        return await job.wait()

    @property
    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise shutting_down()
        return self._nursery

    def _make(self, record: InstanceRecord, *, new: bool) -> Lifecycle:
        nursery = self._running
        task = self._tasks[record.id] = Lifecycle(self.shared, record, new=new)
        if new:
            nursery.start_soon(task.run)
        return task

    def _forget(self, record: InstanceRecord) -> None:
        self._tasks.pop(record.id, None)
        self._gone(record.id)
        self._board.remove(record)
