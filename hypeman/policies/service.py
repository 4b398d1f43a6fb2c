"""The loop that has all policies of all instances looked at: when something changed, and when a time has come.

    records change ──┐
    checks end ──────┼─→ look(instance): each controller decides, and names the time to look again
    timers run out ──┘

One task and one heap serve all instances; only work in progress (a start, a check, a snapshot) has a task of its
own. Decisions are pure (restart.py, health.py, schedule.py, idle.py); controllers carry them out.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime

import trio

from hypeman.config import Config
from hypeman.errors import HypemanError
from hypeman.host.conntrack import Connections
from hypeman.instances.model.phases import utc_now
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.snapshot_types import SetSnapshotScheduleRequest, SnapshotSchedule
from hypeman.instances.model.types import AutoStandbyStatus
from hypeman.instances.service import Instances
from hypeman.instances.snapshots import Snapshots
from hypeman.network.service import Network
from hypeman.policies import rows
from hypeman.policies.activity import Activity
from hypeman.policies.checker import Checker
from hypeman.policies.controller import Context
from hypeman.policies.probes import Probes
from hypeman.policies.remover import Remover
from hypeman.policies.restarter import Restarter
from hypeman.policies.scheduler import Scheduler
from hypeman.policies.sleeper import Sleeper
from hypeman.policies.timers import Timers
from hypeman.policies.waker import Waker
from hypeman.store import Store, Txn

log = logging.getLogger(__name__)

LONGEST_SLEEP = 20.0
"""Seconds between looks at an instance whose next time is known: the host's clock may be set meanwhile."""


class Policies:
    """``run`` in a nursery after the instances have started."""

    def __init__(
        self,
        *,
        instances: Instances,
        store: Store,
        config: Config,
        snapshots: Snapshots,
        connections: Connections,
        network: Network,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._instances = instances
        self._store = store
        self._now = now
        self._timers: Timers[str] = Timers()
        self._changed: set[str] = set()
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None
        context = Context(instances, store, self._spawn, self.again, self._stir, now)
        self._connections = connections
        self._activity = Activity(connections, changed=self.again, now=now)
        self._network = network
        self._waker = Waker(context, network, self._activity)
        self._sleeper = Sleeper(
            context, self._activity, most=config.auto_standby.max_concurrent, missed=self._waker.wake_connected
        )
        self.checker = Checker(
            context, most=config.health_checks.max_concurrent, probes=Probes(), opening=self._activity.own
        )
        self._restarter = Restarter(context, most=config.restart.max_concurrent, health=self.checker.status)
        self._scheduler = Scheduler(context, snapshots)
        self._remover = Remover(context, sessions=self._activity.sessions)
        instances.details = self._details
        instances.board.listen(self.again)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the policies until cancelled."""
        await self._load()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for record in self._instances.board.records():
                self.again(record.id)
                self._instances.board.refresh(record.id)
            nursery.start_soon(self._activity.run)
            self._network.waking.listen(self._waker.arrived)
            task_status.started()
            try:
                await self._loop()
            finally:
                self._network.waking.listen(None)

    async def _loop(self) -> None:
        while True:
            self._wake = trio.Event()
            changed, self._changed = self._changed, set()
            for instance_id in changed.union(self._timers.pop_due(trio.current_time())):
                self._look(instance_id)
            self.checker.run_due()
            following = (self._timers.next(), self.checker.next())
            with trio.move_on_at(min((time for time in following if time is not None), default=float("inf"))):
                await self._wake.wait()

    def again(self, instance_id: str) -> None:
        """Look at an instance soon. Does not block; to be called in the server's thread."""
        self._changed.add(instance_id)
        self._wake.set()

    def _stir(self) -> None:
        self._wake.set()

    # The API

    async def standby_status(self, ref: str) -> AutoStandbyStatus:
        record = self._instances.board.find(ref)
        return self._sleeper.status(record, self._waker.last(record.id))

    async def hold(self, ref: str) -> AutoStandbyStatus:
        """Keep an instance from entering standby by itself for one idle timeout."""
        self._sleeper.hold(self._instances.board.find(ref))
        return await self.standby_status(ref)

    @asynccontextmanager
    async def using(self, ref: str, what: str) -> AsyncIterator[None]:
        """Within the block, a client uses the instance over the API: it does not enter standby by itself. One in
        standby is woken first, if its policy says so."""
        record = self._instances.board.find(ref)
        async with self._activity.session(record.id):
            await self._waker.wake(record, what)
            yield

    async def get_schedule(self, ref: str) -> SnapshotSchedule:
        """Raises NotFound if there is no such instance, or it has no schedule."""
        return self._scheduler.get(self._instances.board.find(ref))

    async def set_schedule(self, ref: str, request: SetSnapshotScheduleRequest) -> SnapshotSchedule:
        """Make the snapshot schedule of an instance, or change it; another interval restarts its cadence."""
        return await self._scheduler.set(self._instances.board.find(ref), request)

    async def delete_schedule(self, ref: str) -> None:
        """Delete the snapshot schedule of an instance; the snapshots that it made stay."""
        await self._scheduler.delete(self._instances.board.find(ref))

    # The loop

    def _look(self, instance_id: str) -> None:
        record = self._instances.board.get(instance_id)
        if record is None:
            self._forget(instance_id)
            return
        now = self._now()
        self.checker.look(record)
        if record.deleting:
            return
        self._waker.look(record)
        controllers = (self._restarter, self._scheduler, self._sleeper, self._remover)
        times = [controller.look(record, now) for controller in controllers]
        pauses = [max((time - now).total_seconds(), 0.0) for time in times if time is not None]
        if pauses:
            self._timers.set(instance_id, trio.current_time() + min(*pauses, LONGEST_SLEEP))
        else:
            self._timers.cancel(instance_id)

    def _forget(self, instance_id: str) -> None:
        self._timers.cancel(instance_id)
        self.checker.forget(instance_id)
        self._sleeper.forget(instance_id)
        self._waker.forget(instance_id)
        self._restarter.forget(instance_id)
        self._scheduler.forget(instance_id)
        self._spawn(self._forget_rows, instance_id)

    async def _forget_rows(self, instance_id: str) -> None:
        try:
            await self._store.write(lambda txn: rows.forget(txn, instance_id))
        except HypemanError as error:  # the next start removes them
            log.warning("policies of deleted instance %s: %s", instance_id, error)

    def _spawn(self, work: Callable[..., object], *arguments: object) -> None:
        assert self._nursery is not None, "the service runs"
        self._nursery.start_soon(work, *arguments)  # type: ignore[arg-type]  # an async function

    async def _load(self) -> None:
        """Read what is remembered, and remove what belongs to deleted instances."""
        known = {record.id for record in self._instances.board.records()}

        def read(txn: Txn) -> None:
            for instance_id in rows.remembered(txn) - known:
                rows.forget(txn, instance_id)
            self._waker.load(dict(txn.scan(rows.WAKES)))
            self._sleeper.load(dict(txn.scan(rows.IDLE)))
            self._restarter.load(dict(txn.scan(rows.RESTARTS)))
            self._scheduler.load(dict(txn.scan(rows.SCHEDULES)))

        await self._store.write(read)

    def _details(self, record: InstanceRecord) -> Mapping[str, object]:
        return {**self.checker.details(record), **self._restarter.details(record)}
