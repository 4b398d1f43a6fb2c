"""Pools of snapshots: forks that are kept restored and paused, so that a fork is only claimed.

    fill     add member: a row with its plan, number, address, captures     a failure is undone, and tried again
             copy disks · run · egress · network · restore · warm           later; a crash is undone by the next server
    claim    one transaction: the member's row becomes an instance's,       a failure ends the member
             Running, to be awakened; meanwhile it learns its name
             awaken                                                         as after a restore

A member has its id, address and machine-id, but is not visible: it is no instance, its program is frozen, its
vCPUs stand still and its link is down. It holds the memory that it really uses (PSS), and gives way when an operation
on an instance is short of something that it holds. One task fills all pools, one member at a time.

A member belongs to its server: the next one undoes what is recorded of it, and fills the pools again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial

import msgspec
import trio

from hypeman.errors import Conflict, HypemanError, InsufficientResources, InvalidRequest, NotSupported
from hypeman.host.usage import read_pss
from hypeman.hypervisor.interface import VmmExit
from hypeman.ids import new_id
from hypeman.instances.ledger import Ledger
from hypeman.instances.life.machine import LiveVm
from hypeman.instances.life.operations.standby import awaken
from hypeman.instances.life.operations.stop import delete
from hypeman.instances.life.owned import Owned
from hypeman.instances.machine.machine import Machine
from hypeman.instances.model.admission import Command
from hypeman.instances.model.events import Unwatched, VmEvent
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.plan import plan_awaken, plan_fill, plan_free
from hypeman.instances.model.record import InstanceRecord, Intent, MemberRow, Operation, SnapshotRow, forked
from hypeman.instances.model.snapshot_types import SnapshotKind, SnapshotPool
from hypeman.instances.model.steps import RestoreVmm, Reversible, reversible
from hypeman.instances.model.types import InstanceState
from hypeman.instances.rows import MEMBERS, POOLS, SNAPSHOTS, check_name_free, find_snapshot
from hypeman.instances.tasks import Tasks
from hypeman.resources.accounting import Holding
from hypeman.saga import carry_forward, carry_out, take_back
from hypeman.store import Store
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)

RETRY_FIRST, RETRY_MOST = 1.0, 60.0
"""Seconds until a pool that failed or gave way is filled again; each pause is twice the previous one."""

QUIET = 0.25
"""Seconds after a claim in which its place is not filled, so that the claimed guest has the CPUs first."""


class Member:
    """A fork that is being made or kept."""

    def __init__(self, row: MemberRow) -> None:
        self.row = row
        self.filling = trio.CancelScope()
        self.filled = trio.Event()
        """It is ready, or nothing is left of it."""
        self.live: LiveVm | None = None
        self.memory = 0
        """Bytes that it holds of the host."""
        self.over = False
        """Its VMM has ended."""
        self._owner: Callable[[LiveVm, VmEvent], None] | None = None
        self._lost: Callable[[Member], None] | None = None

    def on_lost(self, lost: Callable[[Member], None]) -> None:
        self._lost = lost

    def belongs_to(self, owner: Callable[[LiveVm, VmEvent], None]) -> None:
        """Its VM's events go to the instance's task."""
        self._owner = owner

    def tell(self, live: LiveVm, event: VmEvent) -> None:
        if self._owner is not None:
            self._owner(live, event)
        elif isinstance(event, VmmExit | Unwatched):
            self.over = True
            if self._lost is not None:
                self._lost(self)


class _Pool:
    def __init__(self, size: int) -> None:
        self.size = size
        self.ready: deque[Member] = deque()
        self.filling: Member | None = None
        self.error: str | None = None
        """Why it has fewer members than requested."""
        self.not_before = 0.0
        self._pause = RETRY_FIRST

    def postpone(self, why: str) -> None:
        self.error = why
        self.not_before = trio.current_time() + self._pause
        self._pause = min(2 * self._pause, RETRY_MOST)

    def filled(self) -> None:
        self.error = None
        self._pause = RETRY_FIRST

    @property
    def lacks(self) -> int:
        return self.size - len(self.ready)

    @property
    def members(self) -> list[Member]:
        return [*self.ready, *([self.filling] if self.filling is not None else [])]


class Pools:
    """``run`` in a nursery."""

    def __init__(
        self, *, store: Store, tasks: Tasks, ledger: Ledger, machine: Machine, now: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._ledger = ledger
        self._machine = machine
        self._now = now
        self._pools: dict[str, _Pool] = {}
        """By the snapshot's id."""
        self._doomed: list[MemberRow] = []
        """To be undone; kept until that succeeds."""
        self._work = trio.Event()
        self._giving_way, self._ending = trio.Lock(), trio.Lock()
        self._nursery: trio.Nursery | None = None
        ledger.make_room = self._make_room

    async def start(self) -> None:
        """Undo the members of an earlier server."""
        self._doomed = [row for _, row in self._store.read(lambda txn: list(txn.scan(MEMBERS)))]
        await self._discard_doomed()
        self._pools = {key: _Pool(row.size) for key, row in self._store.read(lambda txn: list(txn.scan(POOLS)))}

    async def run(self) -> None:
        """Keep the pools filled until cancelled."""
        async with trio.open_nursery() as self._nursery:
            while True:
                self._work = trio.Event()
                seconds = await self._do_next()
                with trio.move_on_after(seconds):
                    await self._work.wait()

    # For clients

    def get(self, snapshot: str) -> SnapshotPool:
        row = self._store.read(lambda txn: find_snapshot(txn, snapshot))
        pool = self._pools.get(row.id) or _Pool(0)
        return SnapshotPool(
            snapshot_id=row.id,
            size=pool.size,
            ready=min(pool.size, len(pool.ready)),
            memory_bytes=sum(member.memory for member in pool.ready),
            error=pool.error,
        )

    async def set_size(self, snapshot: str, size: int) -> SnapshotPool:
        """Keep ``size`` forks of the snapshot; they are made in the background. Without any, all are gone on return."""
        row = self._store.read(lambda txn: find_snapshot(txn, snapshot))
        if size:
            self._check(row)
        await self._ledger.set_pool(row.id, size)
        if not size:
            await self._close(row.id)
        elif (pool := self._pools.get(row.id)) is not None:
            pool.size, pool.not_before = size, 0.0
        else:
            self._pools[row.id] = _Pool(size)
        self._work.set()
        return self.get(row.id)

    def counts(self) -> dict[tuple[str, ...], float]:
        """Members by state, for the metrics."""
        pools = self._pools.values()
        return {
            ("ready",): sum(len(pool.ready) for pool in pools),
            ("filling",): sum(pool.filling is not None for pool in pools),
            ("missing",): sum(max(0, pool.lacks) for pool in pools),
            ("ending",): len(self._doomed),
        }

    def _check(self, row: SnapshotRow) -> None:
        if row.kind is not SnapshotKind.STANDBY:
            raise InvalidRequest("a pool is for snapshots of kind Standby: a stopped one has no memory")
        if row.source.spec.volumes:
            raise Conflict("the snapshot's source has volumes, which a pool would keep in use", retryable=False)
        able = self._machine.capabilities(row.source)
        if not able.fork or not able.pause:
            raise NotSupported(f"{row.source.spec.hypervisor.value} cannot keep forks paused")

    # Claims

    async def claim(self, snapshot: SnapshotRow, name: str) -> InstanceRecord | None:
        """A member as an instance that runs; None if none is ready."""
        pool = self._pools.get(snapshot.id)
        if pool is None or not pool.ready:
            return None
        self._store.read(lambda txn: check_name_free(txn, name))
        member = pool.ready.popleft()
        pool.not_before = max(pool.not_before, trio.current_time() + QUIET)
        record = self._claimed(member, name)
        try:
            await self._write_claim(record, snapshot)
        except Exception:
            self._doomed.append(member.row)  # its guest may have received the name
            raise
        finally:
            self._work.set()
        try:
            return (await self._tasks.add(record, partial(_take_over, member))).record
        except Exception:
            await self._tasks.of(record.id).perform(Command.DELETE, delete)
            raise

    def _claimed(self, member: Member, name: str) -> InstanceRecord:
        assert member.live is not None, "it is ready"
        now = self._now()
        return msgspec.structs.replace(
            member.row.record,
            name=name,
            created_at=now,
            state=InstanceState.RUNNING,
            phases=Phases(InstanceState.RUNNING.value.lower(), now),
            handle=member.live.vmm.handle,
            capture=None,
            mapped=member.row.record.capture,
            stopped_at=None,
            fresh=False,  # it has its machine-id
        )

    async def _write_claim(self, record: InstanceRecord, snapshot: SnapshotRow) -> None:
        """The guest gets its name meanwhile: its program continues only when both are done."""
        intent = Intent(Operation.RESUME, plan_awaken(record, snapshot.capture or "", fresh=False))
        origin = {"forked_from": snapshot.source.id, "snapshot": snapshot.id, "pool": "true"}
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._introduce, record)
            try:
                await self._ledger.claim(record, intent, origin)
            except Exception as error:
                failure = error
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _introduce(self, record: InstanceRecord) -> None:
        try:
            await self._machine.introduce(record)
        except HypemanError as error:  # tried again when it is awakened, which reports it
            log.debug("the guest of %s did not receive its name: %s", record.id, error.message)

    # Filling

    async def _do_next(self) -> float:
        """Do the most urgent work; returns for how long there is none, in seconds."""
        await self._discard_doomed()
        for pool in self._pools.values():
            if pool.lacks < 0:
                await self._discard(pool.ready.pop())
                return 0
        now = trio.current_time()
        lacking = {key: pool for key, pool in self._pools.items() if pool.lacks > 0}
        due = {key: pool for key, pool in lacking.items() if pool.not_before <= now}
        if due:
            await self._fill(*min(due.items(), key=lambda item: len(item[1].ready)))
            return 0
        times = [pool.not_before - now for pool in lacking.values()]
        return min([*times, *([RETRY_FIRST] if self._doomed else [])], default=float("inf"))

    async def _fill(self, snapshot_id: str, pool: _Pool) -> None:
        snapshot = self._store.read(lambda txn: txn.get(SNAPSHOTS, snapshot_id))
        if snapshot is None or snapshot.capture is None:
            self._pools.pop(snapshot_id, None)
            return
        source = msgspec.structs.replace(snapshot.source, boots=snapshot.source.boots + 1)
        record = forked(source, instance_id=new_id(), name="", now=self._now(), capture=snapshot.capture)
        steps = plan_fill(record, str(self._machine.paths.snapshot(snapshot.id)), snapshot.capture)
        member = pool.filling = Member(MemberRow(snapshot=snapshot.id, record=record, steps=steps))
        try:
            with member.filling:
                await self._make(member, snapshot.capture, self._usual_memory(pool, record))
        except Exception as error:
            log.warning("the pool of snapshot %s could not be filled: %s", snapshot.id, error)
            pool.postpone(error.message if isinstance(error, HypemanError) else str(error))
        else:
            if member.live is not None and not member.filling.cancelled_caught:
                pool.filled()
                pool.filling = None
                pool.ready.append(member)
                member.on_lost(partial(self._lose, pool))
                if member.over:
                    self._lose(pool, member)
                await self._weigh(pool.ready)
        finally:
            pool.filling = None
            member.filled.set()

    async def _make(self, member: Member, capture: str, memory: int) -> None:
        """All or nothing; a crash is undone by the next server."""
        overlay = member.row.record.spec.overlay_bytes
        member.row = await self._ledger.add_member(member.row, Holding(memory=memory, disk=overlay))
        member.memory = memory
        try:
            async with self._machine.restorable(capture):
                await carry_out(reversible(member.row.steps), _Watched(self._machine, member, self._start_watching))
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._discard(member)
            raise

    def _start_watching(self, member: Member) -> None:
        assert self._nursery is not None, "only the running task fills"
        live = self._machine.live(member.row.record.id)
        assert live is not None, "it was just restored"
        member.live = live
        self._nursery.start_soon(live.run, member.tell)

    @staticmethod
    def _usual_memory(pool: _Pool, record: InstanceRecord) -> int:
        """What a member will use: as much as the others, or all that its guest may."""
        return max((member.memory for member in pool.ready), default=record.spec.memory_bytes)

    async def _weigh(self, members: Iterable[Member]) -> None:
        """Record what the members use: each new one shares pages with the others."""
        pids = {member: member.live.vmm.handle.pid for member in members if member.live is not None}
        found = await trio.to_thread.run_sync(lambda: {member: read_pss(pid) for member, pid in pids.items()})
        for member, memory in found.items():
            member.memory = memory or member.memory
        holdings = {
            member.row.record.id: Holding(memory=member.memory, disk=member.row.record.spec.overlay_bytes)
            for member in found
        }
        try:
            await self._ledger.hold_members(holdings)
        except HypemanError as error:  # what was reserved first stays
            log.warning("what the members of a pool use cannot be recorded: %s", error)

    def _lose(self, pool: _Pool, member: Member) -> None:
        """Its VMM has ended by itself."""
        if member in pool.ready:
            pool.ready.remove(member)
            pool.postpone("the VMM of a member has ended")
            self._doomed.append(member.row)
            self._work.set()

    # Ends

    @asynccontextmanager
    async def closed(self, snapshot_id: str) -> AsyncIterator[None]:
        """Within the block, the snapshot has no pool, and no members; afterwards it has again, if it is still there."""
        await self._close(snapshot_id)
        try:
            yield
        finally:
            row = self._store.read(lambda txn: txn.get(POOLS, snapshot_id))
            if row is not None and snapshot_id not in self._pools:
                self._pools[snapshot_id] = _Pool(row.size)
                self._work.set()

    async def _close(self, snapshot_id: str) -> None:
        pool = self._pools.pop(snapshot_id, None)
        if pool is None:
            return
        pool.size = 0
        with trio.CancelScope(shield=True):  # no other task knows these members
            if pool.filling is not None:
                await _give_up(pool.filling)
            while pool.ready:
                await self._discard(pool.ready.pop())

    async def _make_room(self, missing: InsufficientResources) -> bool:
        """Give up one member, if all of them have what is missing. Filling ones first, then of the largest pool."""
        async with self._giving_way:
            members = [member for pool in self._pools.values() for member in pool.members]
            free = {
                "memory": sum(member.memory for member in members),
                "disk": sum(member.row.record.spec.overlay_bytes for member in members),
                "addresses": len(members),
            }
            if not members or free.get(missing.resource, 0) < missing.amount:
                return False
            pool = max(self._pools.values(), key=lambda pool: (pool.filling is not None, len(pool.ready)))
            pool.postpone(f"an instance needed its {missing.resource}")
            metrics.pool_yields.labels(missing.resource).inc()
            with trio.CancelScope(shield=True):
                if pool.filling is not None:
                    await _give_up(pool.filling)
                else:
                    await self._discard(pool.ready.pop())
            return True

    async def _discard(self, member: Member) -> None:
        self._doomed.append(member.row)
        await self._discard_doomed()
        if member.row in self._doomed:
            self._work.set()

    async def _discard_doomed(self) -> None:
        async with self._ending, trio.open_nursery() as nursery:
            for row in list(self._doomed):
                nursery.start_soon(self._undo, row)

    async def _undo(self, row: MemberRow) -> None:
        try:
            await take_back(reversible(row.steps), self._machine)
            await self._forget(row)
            self._doomed.remove(row)
        except Exception as error:  # any error: retried; other members and the server continue
            log.warning("the member %s of a pool cannot be removed, trying again: %s", row.record.id, error)

    async def _forget(self, row: MemberRow) -> None:
        await self._ledger.remove_member(row)
        await carry_forward(plan_free(row.record.capture), self._machine)


class _Watched:
    """Carries out the steps of a member; its VM is watched as soon as it is there, since warming needs its agent."""

    def __init__(self, machine: Machine, member: Member, watch: Callable[[Member], None]) -> None:
        self._machine = machine
        self._member = member
        self._watch = watch

    async def do(self, step: Reversible) -> None:
        await self._machine.do(step)
        if isinstance(step, RestoreVmm):
            self._watch(self._member)

    async def undo(self, step: Reversible) -> None:
        await self._machine.undo(step)


async def _take_over(member: Member, owned: Owned) -> InstanceRecord:
    """In the new instance's task."""
    member.belongs_to(owned.tell)
    return await awaken(owned)


async def _give_up(filling: Member) -> None:
    """Returns when nothing is left of it."""
    filling.filling.cancel()
    await filling.filled.wait()
