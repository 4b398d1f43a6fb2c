"""Forks of instances and of snapshots: copy, record, bring to the target state."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from hypeman.captures import records as captures
from hypeman.errors import Conflict, InvalidRequest, InvalidState, NotSupported
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.ids import check_name, new_id
from hypeman.instances import rows
from hypeman.instances.ledger import AddInstance, Ledger, RequireSnapshot, ShareCapture
from hypeman.instances.life.lifecycle import Lifecycle
from hypeman.instances.life.operations.boot import start
from hypeman.instances.life.operations.copies import adopt_disks, copied_out
from hypeman.instances.life.operations.standby import restore
from hypeman.instances.life.operations.stop import delete
from hypeman.instances.life.owned import Owned
from hypeman.instances.machine.machine import Machine
from hypeman.instances.model.admission import Command, check_legal
from hypeman.instances.model.plan import plan_adopt_disks
from hypeman.instances.model.record import InstanceRecord, Intent, Operation, SnapshotRow, forked
from hypeman.instances.model.types import ForkInstanceRequest, InstanceState, TargetState
from hypeman.instances.model.validate import check_instance_tags
from hypeman.instances.tasks import Tasks


class Forks:
    def __init__(self, *, tasks: Tasks, ledger: Ledger, machine: Machine, now: Callable[[], datetime]) -> None:
        self._tasks = tasks
        self._ledger = ledger
        self._machine = machine
        self._now = now

    async def of_instance(self, ref: str, request: ForkInstanceRequest) -> InstanceRecord:
        """Fork an instance; returns the fork's record."""
        check_name(request.name)
        if request.tags is not None:
            check_instance_tags(request.tags)
        self._ledger.store.read(lambda txn: rows.check_name_free(txn, request.name))  # early, before anything is copied
        task = self._tasks.of(ref)
        source = task.record
        check_legal(Command.FORK, source.state, name=source.name)

        async def make() -> InstanceRecord:
            return await finish(*await task.perform(Command.FORK, lambda owned: self._copy(owned, request)))

        return await self._tasks.run_detached(make)

    async def _copy(self, owned: Owned, request: ForkInstanceRequest) -> tuple[Lifecycle, TargetState]:
        """In the source's task: copy what the fork needs and record it. The fork is to be as its source is now."""
        source = owned.record
        target = request.target_state or TargetState(source.state.value)
        if source.state is InstanceState.RUNNING and not request.from_running:
            raise InvalidState(
                f"instance {source.name!r} is Running; give from_running to fork it while it pauses, or stop it"
            )
        if target is TargetState.STANDBY and source.state is InstanceState.STOPPED:
            raise InvalidRequest("a stopped instance has no memory; its fork can be Stopped or Running")
        check_forkable(source)
        fork_id = new_id()
        staged = self._machine.paths.tmp / f"fork-{new_id()}"
        with_memory = source.state is not InstanceState.STOPPED and target is not TargetState.STOPPED
        holder = captures.of_instance(fork_id)
        transient = target is TargetState.RUNNING
        try:
            async with copied_out(
                owned, str(staged), with_memory=with_memory, holder=holder, transient=transient
            ) as copy:
                capture = copy.capture.id if copy.capture is not None else None
                fork = forked(
                    source, instance_id=fork_id, name=request.name, now=self._now(), capture=capture, tags=request.tags
                )
                intent = Intent(Operation.CREATE, plan_adopt_disks(fork, str(staged), shared=False))
                copy.changes = (AddInstance(fork, intent, running=False, origin={"forked_from": source.id}),)
        except Exception:
            await self._machine.context.files.remove(staged)
            raise
        return await self._tasks.add(self._ledger.record(fork_id), adopt_disks), target

    async def of_snapshot(
        self, snapshot: SnapshotRow, name: str, *, target: TargetState, hypervisor: HypervisorKind
    ) -> InstanceRecord:
        """Create an instance from a copy of a snapshot's disks and, unless it is to be Stopped, its memory.

        Raises NotFound if the snapshot is deleted meanwhile.
        """
        capture = snapshot.capture if target is not TargetState.STOPPED else None
        fork = forked(
            snapshot.source, instance_id=new_id(), name=name, now=self._now(), capture=capture, hypervisor=hypervisor
        )
        disks = str(self._machine.paths.snapshot(snapshot.id))
        intent = Intent(Operation.CREATE, plan_adopt_disks(fork, disks, shared=True))
        shared = () if capture is None else (ShareCapture(capture, captures.of_instance(fork.id)),)
        origin = {"forked_from": snapshot.source.id, "snapshot": snapshot.id}
        new = AddInstance(fork, intent, running=False, origin=origin)
        written = await self._ledger.add(new, RequireSnapshot(snapshot.id), *shared)
        return await finish(await self._tasks.add(written, adopt_disks), target)


async def finish(fork: Lifecycle, target: TargetState) -> InstanceRecord:
    """Bring a fork to its target state; if that fails, the fork is deleted."""
    try:
        if target is TargetState.RUNNING:
            await run_again(fork)
    except Exception:
        await fork.perform(Command.DELETE, delete)
        raise
    return fork.record


async def run_again(task: Lifecycle) -> None:
    """Restore an instance that is in standby, start one that is stopped."""
    if task.record.state is InstanceState.STANDBY:
        await task.perform(Command.RESTORE, restore)
    else:
        await task.perform(Command.START, start)


def check_forkable(record: InstanceRecord) -> None:
    """Raise NotSupported or Conflict if the instance has something that cannot be duplicated."""
    if record.spec.devices or record.spec.gpu_profile:
        raise NotSupported("an instance with passed-through devices cannot be forked or captured")
    for mount in record.spec.volumes:
        if not mount.readonly:
            raise Conflict(f"volume {mount.volume_id!r} is attached read-write; detach it first")
