"""The one task that owns an instance: takes its commands in turn, carries out plans, tells watchers.

A command is judged when its turn comes, by the state of that moment (admission.py). Then:

    begin    one transaction: the intent (the plan), the reservation, whatever else goes along
    do       the steps, through the saga; on failure the begun ones are taken back
    end      one transaction: the new record instead of the intent

News of the VM (it is ready, the workload ended, the VMM is gone) comes through the same queue, so
nothing changes a record while a command works on it. News of an earlier boot is ignored.

What can go neither on nor back makes the instance Unknown. It is then looked at again as at a start of
the server, soon and then ever more seldom, until it can be settled or somebody stops or deletes it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import msgspec
import trio

from hypeman.errors import Conflict, HypemanError, InternalError, InUse, InvalidState, NotFound, NotSupported
from hypeman.guest.types import Exited, Fatal, Ready, Started
from hypeman.hypervisor.interface import Disk, ExitReason, VmmBroken, VmmExit, VmmGone
from hypeman.ids import new_id
from hypeman.instances import captures
from hypeman.instances.admission import Command, check_legal
from hypeman.instances.captures import CAPTURES, CaptureRow
from hypeman.instances.live import Live, LiveEvent, Unwatched
from hypeman.instances.plan import (
    plan_adopt_disks,
    plan_attach,
    plan_awaken,
    plan_copy_out,
    plan_create,
    plan_delete,
    plan_free,
    plan_park,
    plan_restore,
    plan_stage,
    plan_standby,
    plan_start,
    plan_stop,
    plan_swap,
)
from hypeman.instances.records import INSTANCES, INTENTS, InstanceRecord, Intent, Operation
from hypeman.instances.steps import FreeCapture, PlugVolume, Reversible, Step, TakeBack
from hypeman.instances.types import InstanceState, SnapshotCompressionConfig, VolumeMount
from hypeman.instances.validate import check_volumes
from hypeman.instances.view import describe_exit
from hypeman.instances.vm import free_port, volume_disk
from hypeman.instances.world import STOP_GRACE, World
from hypeman.resources.accounting import Holding, Limits, hold
from hypeman.saga import UndoFailed, carry_forward, carry_out, take_back
from hypeman.store import Txn
from hypeman.telemetry import metrics
from hypeman.volumes import records as volumes

log = logging.getLogger(__name__)

R = TypeVar("R")

DELETE_GRACE = 2.0
MOST_WAITING = 64
"""Commands that may wait for one instance; more are refused, so that a queue can not grow without bound."""

NONCE_BYTES = 16

LOOK_FIRST, LOOK_MOST = 1.0, 60.0
"""Seconds from one look at an Unknown instance to the next; each pause is twice the one before."""
SECONDS_TO_LOOK = 2.0
"""For a VMM to answer in such a look, during which commands wait; it answers in a millisecond or is stuck."""

NOT_STARTED = 127
"""Exit code of a workload that never ran, as of a shell."""

NO_VMM = frozenset({InstanceState.STOPPED, InstanceState.STANDBY})

Also = Callable[[Txn], object]
"""What else belongs into the transaction of a record."""


class Host:
    """What the task needs beside the World: who is told of changes, and what may be held."""

    def __init__(
        self,
        *,
        limits: Callable[[], Limits],
        changed: Callable[[InstanceRecord], None],
        gone: Callable[[InstanceRecord], None],
        release: Callable[[Txn, InstanceRecord], None],
    ) -> None:
        self.limits = limits
        self.changed = changed
        self.gone = gone
        self.release = release
        """Give back what the capabilities hold for an instance, in the transaction that removes it."""


class Job(Generic[R]):
    """A command that has its place in the queue."""

    __slots__ = ("action", "command", "done", "error", "value")

    def __init__(self, command: Command | None, action: Callable[[], Awaitable[R]]) -> None:
        self.command = command
        self.action = action
        self.done = trio.Event()
        self.value: R | None = None
        self.error: BaseException | None = None

    async def run(self) -> None:
        """Do it; whoever waits is told how it went."""
        try:
            self.value = await self.action()
        except Exception as error:
            self.error = error
            if not isinstance(error, HypemanError):
                log.exception("%s failed", self.command or "work")
        except BaseException:
            self.error = _shutting_down()
            raise
        finally:
            self.done.set()

    def refuse(self, error: HypemanError) -> None:
        self.error = error
        self.done.set()

    async def wait(self) -> R:
        """What the action returned, or raise what it raised."""
        await self.done.wait()
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # set together with ``done``


class _Look:
    """Turn to look at an Unknown instance again."""


class _News:
    __slots__ = ("event", "live")

    def __init__(self, live: Live, event: LiveEvent) -> None:
        self.live = live
        self.event = event


def utc_now() -> datetime:
    return datetime.now(UTC)


class Lifecycle:
    """See above. ``run`` in a nursery; it ends when the instance is gone."""

    def __init__(
        self,
        world: World,
        host: Host,
        record: InstanceRecord,
        *,
        new: bool,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.world = world
        self.host = host
        self.record = record
        self._new = new
        """Nothing to settle: just written and its first command does the work, or it slept all along."""
        self._now = now
        self._queue: trio.MemorySendChannel[Job[Any] | _News | _Look]
        self._inbox: trio.MemoryReceiveChannel[Job[Any] | _News | _Look]
        self._queue, self._inbox = trio.open_memory_channel(float("inf"))  # bounded by MOST_WAITING and few news
        self._waiting = 0
        self._gone = False
        self._removed = False
        self._nursery: trio.Nursery | None = None
        self._looking = False
        self._ended: VmmExit | None = None
        """How the VMM ended, from when that is heard."""

    # Called by others

    async def perform(self, command: Command | None, action: Callable[[], Awaitable[R]]) -> R:
        """Run ``action`` in the instance's task when its turn comes and ``command`` is legal then.

        The caller may be cancelled; the action is not.
        """
        return await self.submit(command, action).wait()

    def submit(self, command: Command | None, action: Callable[[], Awaitable[R]]) -> Job[R]:
        """As ``perform``, but only takes the place in the queue; the caller waits when it likes."""
        if self._gone:
            raise self._refusal()
        if self._waiting >= MOST_WAITING:
            raise InvalidState(f"instance {self.record.name!r} has {MOST_WAITING} commands waiting already")
        job: Job[R] = Job(command, action)
        self._waiting += 1
        self._queue.send_nowait(job)
        return job

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the instance until it is gone. Started when what a crash left unfinished is settled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if not self._new:
                    await self._settle()
                task_status.started()
                while not self._gone:
                    match await self._inbox.receive():
                        case _News() as news:
                            await self._take_news(news)
                        case _Look():
                            await self._settle_again()
                        case job:
                            await self._do(job)
                nursery.cancel_scope.cancel()
        finally:
            self._gone = True
            self._refuse_the_rest()

    # The queue

    async def _do(self, job: Job[Any]) -> None:
        self._waiting -= 1
        try:
            self._check_turn(job.command)
        except InvalidState as error:
            job.refuse(error)
        else:
            await job.run()

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
        return NotFound(f"instance {self.record.name!r} is gone") if self._removed else _shutting_down()

    def _tell(self, live: Live, event: LiveEvent) -> None:
        self._queue.send_nowait(_News(live, event))

    # Commands; run in the task

    async def create(self) -> InstanceRecord:
        """First boot of an instance whose record was just written, with CREATE as its intent."""
        return await self._appear(plan_create(self.record), self._launched)

    async def adopt_disks(self, source: str, *, shared: bool) -> InstanceRecord:
        """The disks of a fork whose record was just written; it ends Stopped or Standby."""
        steps = plan_adopt_disks(self.record, source, shared=shared)
        return await self._appear(steps, lambda: self._end(self.record))

    async def _appear(
        self, steps: tuple[Reversible, ...], finish: Callable[[], Awaitable[InstanceRecord]]
    ) -> InstanceRecord:
        """Make real what was just written down; if that fails, nothing stays of it."""
        try:
            return await self._carry_out(steps, finish)
        except UndoFailed as error:
            await self._lost(error)
            raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._remove()
                await carry_forward(plan_free(self.record.capture), self.world)
            raise

    async def _carry_out(
        self, steps: tuple[Reversible, ...], finish: Callable[[], Awaitable[InstanceRecord]]
    ) -> InstanceRecord:
        """All ``steps`` and the transaction that ends them (``finish``), or none of it."""
        await carry_out(steps, self.world)
        try:
            with trio.CancelScope(shield=True):  # else nobody knew whether it counts
                record = await finish()
        except Exception:
            await take_back(steps, self.world)
            raise
        return record

    async def start(self, entrypoint: tuple[str, ...] | None, cmd: tuple[str, ...] | None) -> InstanceRecord:
        spec = self.record.spec
        if entrypoint is not None:
            spec = msgspec.structs.replace(spec, entrypoint=entrypoint)
        if cmd is not None:
            spec = msgspec.structs.replace(spec, cmd=cmd)
        before = self.record
        record = self._changed(
            before,
            spec=spec,
            nonce=secrets.token_bytes(NONCE_BYTES),
            boots=before.boots + 1,
            exit_code=None,
            exit_message=None,
            fresh=False,
        )
        return await self._all_or_nothing(
            Operation.START, plan_start(record), record, before, finish=self._launched, resources=True
        )

    async def stop(self, grace: float = STOP_GRACE) -> InstanceRecord:
        self._journal("stop")
        return await self._stop(plan_stop(self.record, grace=grace), self.world.live.get(self.record.id), None)

    async def delete(self) -> None:
        self._journal("delete")
        freed = (self.record.capture, self.record.mapped)
        steps = plan_delete(self.record)
        if self.record.state not in NO_VMM:
            steps = (plan_stop(self.record, grace=DELETE_GRACE)[0], *steps)
        await self._begin(Operation.DELETE, steps, self._changed(self.record, deleting=True))
        try:
            await carry_forward(steps, self.world)
            await self._remove()
        except Exception as error:
            await self._lost(error)
            raise
        await carry_forward(plan_free(*freed), self.world)

    async def standby(self, compression: SnapshotCompressionConfig | None) -> InstanceRecord:
        """Memory and devices to disk, VMM gone."""
        self._check_capturable("put in standby")
        self._journal("standby")
        capture = new_id()
        before = self.record
        freed = before.mapped

        async def publish() -> InstanceRecord:
            row = await self._capture_row(capture, captures.of_instance(before.id), compression)
            record = self._changed(before, capture=capture, mapped=None)

            def exchange(txn: Txn) -> None:
                txn.put(CAPTURES, capture, row)
                captures.let_go(txn, freed, captures.of_instance(before.id))

            return await self._begin(Operation.PARK, plan_park(record), record, exchange)

        await self._all_or_nothing(Operation.CAPTURE, plan_standby(before, capture), before, before, finish=publish)
        return await self._park(freed)

    async def _park(self, freed: str | None = None) -> InstanceRecord:
        try:
            await carry_forward(plan_park(self.record), self.world)
            asleep = self._changed(self.record, handle=None, stopped_at=self._now())
            asleep = self._entered(asleep, InstanceState.STANDBY)
            await self._end(asleep, self._holding(asleep))
        except Exception as error:
            await self._lost(error)
            raise
        await carry_forward(plan_free(freed), self.world)
        return self.record

    async def restore(self) -> InstanceRecord:
        capture = self.record.capture
        if capture is None:
            raise InternalError(f"instance {self.record.id} is in standby without a capture")
        self._journal("restore")
        async with self.world.restorable(capture):
            return await self._restore_from(capture)

    async def _restore_from(self, capture: str) -> InstanceRecord:
        before = self.record
        keep = self.world.capture_is_shared(before.id, capture)
        record = self._changed(before, boots=before.boots + 1)
        steps = plan_awaken(record, capture, fresh=before.fresh)

        def consume(txn: Txn) -> None:
            if not keep:
                captures.let_go(txn, capture, captures.of_instance(before.id))

        async def note() -> InstanceRecord:
            handle = self.world.live[before.id].vmm.handle
            mapped = capture if keep else None
            restored = self._changed(self.record, handle=handle, capture=None, mapped=mapped, stopped_at=None)
            return await self._begin(Operation.RESUME, steps, self._entered(restored, InstanceState.RUNNING), consume)

        await self._all_or_nothing(
            Operation.RESTORE,
            plan_restore(record, capture, keep=keep),
            record,
            before,
            finish=note,
            resources=True,
        )
        self._watch(self.world.live[before.id])
        await self._forward_or_die(steps)
        return await self._end(self._changed(self.record, fresh=False))

    async def copy_out(
        self,
        target: str,
        *,
        with_memory: bool,
        holder: str,
        publish: Callable[[Txn, InstanceRecord, CaptureRow | None], object],
    ) -> InstanceRecord:
        """Copy the disks to ``target`` and, ``with_memory``, have the memory held by ``holder``.

        A running VM pauses only for that and goes on. ``publish`` records who has it, in the same
        transaction that ends the work.
        """
        before = self.record
        running = before.state is InstanceState.RUNNING
        if running and with_memory:
            self._check_capturable("captured")
        made = new_id() if running and with_memory else ""

        async def end() -> InstanceRecord:
            row: CaptureRow | None = None
            if made:
                row = await self._capture_row(made, holder, None)
            elif with_memory and before.capture is not None:
                row = self.world.capture_row(before.capture)

            def record_it(txn: Txn) -> None:
                if row is not None and made:
                    txn.put(CAPTURES, made, row)
                elif row is not None:
                    captures.share(txn, row.id, holder)
                publish(txn, before, row)

            return await self._end(self.record, record_it)

        steps = plan_copy_out(before, target, capture=made or None, running=running)
        await self._all_or_nothing(Operation.CAPTURE, steps, before, before, finish=end)
        return before

    async def attach(self, volume_id: str, path: str, *, readonly: bool) -> InstanceRecord:
        """Give the instance a volume, at once if it runs."""
        before = self.record
        if any(mount.volume_id == volume_id for mount in before.spec.volumes):
            raise Conflict(f"volume {volume_id!r} is attached to instance {before.name!r} already")
        port = free_port(before.ports)
        running = before.state is InstanceState.RUNNING
        if running and not self.world.driver(before).capabilities.hotplug_disk:
            raise NotSupported(f"hypervisor {before.spec.hypervisor.value} takes no disks at run time; stop it first")
        if running and not port:
            raise NotSupported(f"instance {before.name!r} has no free port for another volume")
        mount = VolumeMount(volume_id=volume_id, mount_path=path, readonly=readonly)
        spec = msgspec.structs.replace(before.spec, volumes=(*before.spec.volumes, mount))
        check_volumes(spec.volumes)
        ports = {**before.ports, volume_id: port} if port else before.ports  # without a port it is fixed in the VM
        record = self._changed(before, spec=spec, ports=ports)

        def take(txn: Txn) -> None:
            volumes.attach(
                txn,
                volumes.Attachment(volume_id=volume_id, instance_id=record.id, mount_path=path, readonly=readonly),
            )

        if not running:
            return await self._save(record, also=take)
        step = plan_attach(before, volume_id, path, readonly=readonly, port=port)
        disk = volume_disk(self.world.paths, volume_id, readonly=readonly, port=port)
        await self._begin(Operation.ATTACH, (step,), self._expecting(record, disk), take)
        try:
            record = await self._carry_out((step,), lambda: self._end(self._with_current_handle(self.record)))
        except BaseException as error:
            await self._put_back(before, lambda txn: volumes.detach(txn, volume_id, before.id), error)
            raise
        self._journal(f"attached volume {volume_id} at {path}")
        return record

    async def detach(self, volume_id: str) -> InstanceRecord:
        """Take a volume away. Raises InUse, with everything as it was, while a process in the guest holds it."""
        before = self.record
        mount = next((mount for mount in before.spec.volumes if mount.volume_id == volume_id), None)
        if mount is None:
            raise NotFound(f"volume {volume_id!r} is not attached to instance {before.name!r}")
        if before.state is not InstanceState.RUNNING:
            return await self._end(*self._without_volume(volume_id))
        port = before.ports.get(volume_id, 0)
        if not port:
            raise NotSupported(f"volume {volume_id!r} is fixed in the running VM; stop the instance first")
        step = plan_attach(before, volume_id, mount.mount_path, readonly=mount.readonly, port=port)
        await self._begin(Operation.DETACH, (TakeBack(step),), before)
        try:
            await step.undo(self.world)
        except Exception:  # not when cancelled: then the next start finishes it
            await self._end(before)
            raise
        try:
            return await self._end(*self._without_volume(volume_id))
        except Exception as error:  # the VM has let go of it, and that is written down as soon as it can be
            await self._lost(error)
            raise

    def _without_volume(self, volume_id: str) -> tuple[InstanceRecord, Also]:
        """The record without the volume, and what goes along with that."""
        before = self.record
        spec = msgspec.structs.replace(
            before.spec, volumes=tuple(mount for mount in before.spec.volumes if mount.volume_id != volume_id)
        )
        ports = {other: port for other, port in before.ports.items() if other != volume_id}
        record = self._with_current_handle(self._changed(before, spec=spec, ports=ports))
        return record, lambda txn: volumes.detach(txn, volume_id, record.id)

    def _expecting(self, record: InstanceRecord, disk: Disk) -> InstanceRecord:
        """The handle as it will be: after a crash in between, the next server knows what may be plugged in."""
        assert record.handle is not None, "it runs"
        config = record.handle.config
        config = msgspec.structs.replace(config, disks=(*config.disks, disk))
        return self._changed(record, handle=msgspec.structs.replace(record.handle, config=config))

    def _with_current_handle(self, record: InstanceRecord) -> InstanceRecord:
        """The handle has the VM's configuration, which a disk that came or went has changed."""
        live = self.world.live.get(record.id)
        return self._changed(record, handle=live.vmm.handle) if live is not None else record

    async def revert(self, source: str, record: InstanceRecord, also: Also) -> InstanceRecord:
        """Put the disks in directory ``source`` in place of the instance's own, and make it ``record``."""
        before = self.record
        self._journal("restore from snapshot")
        freed = before.capture
        steps = plan_swap(before)

        def exchange(txn: Txn) -> None:
            captures.let_go(txn, freed, captures.of_instance(before.id))
            also(txn)

        await self._all_or_nothing(
            Operation.CAPTURE,
            plan_stage(before, source),
            before,
            before,
            finish=lambda: self._begin(Operation.REVERT, steps, record, exchange),
        )
        try:
            await carry_forward(steps, self.world)
        except Exception as error:
            await self._lost(error)
            raise
        await self._end(self.record)
        await carry_forward(plan_free(freed), self.world)
        return self.record

    async def change(
        self, change: Callable[[InstanceRecord], InstanceRecord], also: Also | None = None
    ) -> InstanceRecord:
        """Replace the record by ``change(record)``; for what needs no steps."""
        return await self._save(change(self.record), also=also)

    # What a crash left

    async def _settle(self) -> None:
        """Finish or take back what was under way, adopt a living VM, clean up after a dead one."""
        try:
            await self._find_and_settle()
        except Exception as error:  # whatever it is: one broken instance must not keep the others from being served
            log.exception("instance %s can not be settled", self.record.id)
            await self._lost(error)

    async def _settle_again(self) -> None:
        """The same for an instance that is still Unknown."""
        if self.record.state is not InstanceState.UNKNOWN:
            return
        try:
            await self._find_and_settle(SECONDS_TO_LOOK)
        except Exception as error:
            if str(error) != self.record.state_error:
                log.warning("instance %s is still Unknown: %s", self.record.id, error, exc_info=True)
            await self._lost(error)

    async def _find_and_settle(self, seconds: float = float("inf")) -> None:
        intent = self.world.store.read(lambda txn: txn.get(INTENTS, self.record.id))
        alive = await self._find_vm(seconds)
        if intent is not None:
            log.warning("instance %s: %s was not finished", self.record.id, intent.operation.value)
            await self._settle_intent(intent, alive=alive)
        if self._gone or self.record.state in NO_VMM:
            return
        if not alive:
            ended = self._ended or VmmExit(ExitReason.FAILED, "the VMM ended while the server was away")
            await self._vmm_ended(self.world.live.get(self.record.id), ended)
        elif self.record.state is InstanceState.UNKNOWN:
            await self._save(self._entered(self.record, self.record.was or InstanceState.RUNNING))
            self._journal(f"the VMM answers again: {self.record.state.value}")
            await self._hear_again(self.world.live[self.record.id])

    async def _find_vm(self, seconds: float) -> bool:
        """Whether the VM lives; then it is watched. Raises VmmBroken if it does not answer in time."""
        live = self.world.live.get(self.record.id)
        try:
            with trio.fail_after(seconds):
                if live is not None:
                    await live.vmm.state()
                    return True
                if not await self.world.reattach_vmm(self.record.id):
                    return False
        except VmmGone:
            return False
        except trio.TooSlowError:
            raise VmmBroken(f"the VMM did not answer within {seconds:g} s") from None
        self._watch(self.world.live[self.record.id])
        if self.record.spec.egress:
            await self.world.set_egress(self.record.id)
        return True

    async def _hear_again(self, live: Live) -> None:
        """What the guest told while its news could not be followed."""
        if live.started:
            await self._hear(live, Started())
        if live.exited is not None:
            await self._hear(live, live.exited)

    async def _settle_intent(self, intent: Intent, *, alive: bool) -> None:
        record = self.record
        match intent.operation:
            case Operation.CREATE:
                await take_back(_reversible(intent.steps), self.world)
                await self._remove()
            case Operation.START | Operation.RESTORE:
                await take_back(_reversible(intent.steps), self.world)
                state = InstanceState.STOPPED if intent.operation is Operation.START else InstanceState.STANDBY
                record = self._entered(self._changed(record, handle=None), state)
                await self._end(record, self._holding(record))
            case Operation.CAPTURE:
                await take_back(_reversible(intent.steps), self.world)
                await self._end(self._found_again(alive))
            case Operation.ATTACH:
                step = intent.steps[0]
                assert isinstance(step, PlugVolume)
                await step.undo(self.world)
                await self._end(*self._without_volume(step.volume))
            case Operation.DETACH:
                step = intent.steps[0]
                assert isinstance(step, TakeBack) and isinstance(step.step, PlugVolume)
                try:
                    await step.do(self.world)
                except InUse:
                    await self._end(record)
                else:
                    await self._end(*self._without_volume(step.step.volume))
            case Operation.REVERT:
                await carry_forward(intent.steps, self.world)
                await self._end(record)
            case Operation.RESUME if alive:
                try:
                    await self._forward_or_die(intent.steps)
                except Exception:
                    if self.record.state is not InstanceState.STOPPED:
                        raise
                    return  # it told the journal why, and the instance has come to rest
                await self._end(self._changed(self.record, fresh=False))
            case Operation.RESUME | Operation.STOP:
                live = self.world.live.get(record.id)
                await self._stop((*plan_park(record), *plan_free(record.mapped)), live, None)
            case Operation.PARK:
                await self._park()
            case Operation.DELETE:
                await carry_forward(intent.steps, self.world)
                await self._remove()
                await carry_forward(plan_free(record.capture, record.mapped), self.world)

    def _found_again(self, alive: bool) -> InstanceRecord:
        """After a capture that could not be taken back at first: it only looked, so the state is what it was."""
        record = self.record
        if record.state is not InstanceState.UNKNOWN:
            return record
        if alive:
            return self._entered(record, record.was or InstanceState.RUNNING)
        if record.handle is not None:
            return record  # its VMM has gone, which is cleaned up after next
        return self._entered(record, InstanceState.STANDBY if record.capture else InstanceState.STOPPED)

    # News

    async def _take_news(self, news: _News) -> None:
        """Nobody waits for this and can be told of a failure: the record is."""
        try:
            await self._hear(news.live, news.event)
        except Exception as error:
            log.exception("instance %s: what its VM told can not be followed", self.record.id)
            await self._lost(error)

    async def _hear(self, live: Live, event: LiveEvent) -> None:
        if self.world.live.get(self.record.id) is not live:
            return
        match event:
            case VmmExit():
                self._ended = event
                await self._vmm_ended(live, event)
            case Unwatched():
                del self.world.live[self.record.id]
                await self._lost(VmmBroken("the VMM can not be watched any more; the server's log says why"))
            case Started() if self.record.state is InstanceState.INITIALIZING:
                await self._save(self._entered(self.record, InstanceState.RUNNING))
                self._journal("running")
                if self.record.spec.hotplug_bytes:
                    self._nursery_of_vm().start_soon(self._plug_memory)
            case Exited() if self.record.state in (InstanceState.INITIALIZING, InstanceState.RUNNING):
                code, message = _outcome(live, None)
                await self._save(
                    self._entered(
                        self._changed(self.record, exit_code=code, exit_message=message), InstanceState.SHUTDOWN
                    )
                )
            case Fatal():
                self._journal(f"guest: {event.message}")
            case Ready() | Started() | Exited():
                pass

    async def _plug_memory(self) -> None:
        """Beside the commands: it takes a second, and a guest without it works as well."""
        try:
            await self.world.plug_memory(self.record.id)
        except Exception as error:
            self._journal(f"hot-plugged memory is not there: {error}")

    async def _vmm_ended(self, live: Live | None, ended: VmmExit) -> None:
        await self._stop(plan_park(self.record), live, ended)

    # Pieces of commands

    async def _stop(self, steps: tuple[Step, ...], live: Live | None, ended: VmmExit | None) -> InstanceRecord:
        freed = (self.record.mapped, self.record.capture)  # the latter after a standby that could not be finished
        await self._begin(Operation.STOP, steps, self.record)
        try:
            record = await self._take_down(steps, live, ended)

            def settle(txn: Txn) -> None:
                for capture in freed:
                    captures.let_go(txn, capture, captures.of_instance(record.id))
                self._holding(record)(txn)

            await self._end(record, settle)
        except Exception as error:
            await self._lost(error)
            raise
        self._journal(f"stopped: {record.exit_message}")
        await carry_forward(plan_free(*freed), self.world)
        return self.record

    async def _take_down(self, steps: tuple[Step, ...], live: Live | None, ended: VmmExit | None) -> InstanceRecord:
        """The record that is true after ``steps``."""
        outcome = await self.world.read_outcome(self.record.id)
        await carry_forward(steps, self.world)
        if live is None or live.exited is None:
            outcome = await self.world.read_outcome(self.record.id) or outcome
        code, message = _outcome(live, ended, outcome)
        if self.record.exit_code is not None and code is None:
            code, message = self.record.exit_code, self.record.exit_message
        record = self._changed(
            self.record,
            handle=None,
            mapped=None,
            capture=None,
            stopped_at=self._now(),
            exit_code=code,
            exit_message=message,
        )
        return self._entered(record, InstanceState.STOPPED)

    async def _launched(self) -> InstanceRecord:
        live = self.world.live[self.record.id]
        now = self._now()
        record = self._entered(
            self._changed(self.record, handle=live.vmm.handle, started_at=now, stopped_at=None),
            InstanceState.INITIALIZING,
        )
        await self._end(record)
        self._watch(live)
        self._journal("launched")
        return record

    def _watch(self, live: Live) -> None:
        self._ended = None
        self._nursery_of_vm().start_soon(live.run, self._tell)

    def _nursery_of_vm(self) -> trio.Nursery:
        assert self._nursery is not None, "the task runs"
        return self._nursery

    async def _all_or_nothing(
        self,
        operation: Operation,
        steps: tuple[Reversible, ...],
        record: InstanceRecord,
        before: InstanceRecord,
        *,
        finish: Callable[[], Awaitable[InstanceRecord]],
        resources: bool = False,
    ) -> InstanceRecord:
        """Carry out ``steps`` under an intent, then ``finish``, the transaction that makes them count.

        When one of them fails, the steps are taken back and the record is again what it was. With
        ``resources`` (starts and restores) the instance holds those of a running VM from here on.
        """
        await self._begin(operation, steps, record, self._holding(record, running=True) if resources else None)
        try:
            return await self._carry_out(steps, finish)
        except BaseException as error:
            await self._put_back(before, self._holding(before) if resources else None, error)
            self._journal(f"{operation.value} failed: {error}")
            raise

    async def _put_back(self, before: InstanceRecord, also: Also | None, error: BaseException) -> None:
        """The record as it was, after ``error`` and after the steps were taken back, if they could be."""
        with trio.CancelScope(shield=True):
            if isinstance(error, UndoFailed):
                await self._lost(error)
                return
            try:
                await self._end(before, also)
            except HypemanError as refused:
                await self._lost(refused)

    async def _forward_or_die(self, steps: tuple[Step, ...]) -> None:
        """After a restore the VM has run: if it can not be awakened, it is stopped, not left half-way."""
        try:
            await carry_forward(steps, self.world)
        except Exception as error:
            self._journal(f"the restored guest could not be awakened: {error}")
            await self._stop(
                (*plan_park(self.record), *(step for step in steps if isinstance(step, FreeCapture))),
                self.world.live.get(self.record.id),
                VmmExit(ExitReason.FAILED, f"the restored guest could not be awakened: {error}"),
            )
            raise

    async def _lost(self, error: BaseException) -> None:
        """Something could be neither done nor undone. The intent stays, and is looked at again."""
        before = self.record
        was = before.was if before.state is InstanceState.UNKNOWN else before.state
        record = self._changed(self._entered(before, InstanceState.UNKNOWN), state_error=str(error), was=was)
        with trio.CancelScope(shield=True):
            try:
                await self._save(record)
            except HypemanError as refused:  # a full disk: nobody may take the instance for what it was all the same
                log.error("instance %s is Unknown, which can not be written down: %s", record.id, refused)
                self._know(record)
        if not self._looking:
            self._looking = True
            self._nursery_of_vm().start_soon(self._keep_looking)

    async def _keep_looking(self) -> None:
        pause = LOOK_FIRST
        while self.record.state is InstanceState.UNKNOWN:
            await trio.sleep(pause)
            pause = min(pause * 2, LOOK_MOST)
            self._queue.send_nowait(_Look())
        self._looking = False

    async def _capture_row(
        self, capture: str, holder: str, compression: SnapshotCompressionConfig | None
    ) -> CaptureRow:
        size = await self.world.files.allocated(self.world.paths.capture(capture))
        return CaptureRow(
            id=capture,
            holders=(holder,),
            size_bytes=size,
            memory_bytes=self.record.spec.memory_bytes,
            compression=compression,
        )

    def _check_capturable(self, what: str) -> None:
        spec = self.record.spec
        if not self.world.driver(self.record).capabilities.standby:
            raise NotSupported(f"hypervisor {spec.hypervisor.value} can not save a VM; it can not be {what}")
        if spec.devices or spec.gpu_profile:
            raise NotSupported(f"an instance with passed-through devices can not be {what}")
        if spec.skip_guest_agent:
            raise NotSupported(f"an instance without guest agent can not be {what}")

    def _holding(self, record: InstanceRecord, *, running: bool | None = None) -> Also:
        """Make what the instance holds of the host what its state wants."""
        holding = holding_of(record)
        if not (record.state not in NO_VMM if running is None else running):
            holding = holding.without_vmm()
        limits = self.host.limits()
        return lambda txn: hold(txn, record.id, holding, limits)

    # Records

    async def _begin(
        self, operation: Operation, steps: tuple[Step, ...], record: InstanceRecord, also: Also | None = None
    ) -> InstanceRecord:
        return await self._save(record, intent=Intent(operation, steps), also=also)

    async def _end(self, record: InstanceRecord, also: Also | None = None) -> InstanceRecord:
        def clear(txn: Txn) -> None:
            txn.delete(INTENTS, record.id)
            if also is not None:
                also(txn)

        return await self._save(record, also=clear)

    async def _save(
        self, record: InstanceRecord, *, intent: Intent | None = None, also: Also | None = None
    ) -> InstanceRecord:
        def write(txn: Txn) -> None:
            txn.put(INSTANCES, record.id, record)
            if intent is not None:
                txn.put(INTENTS, record.id, intent)
            if also is not None:
                also(txn)

        await self.world.store.write(write)
        return self._know(record)

    def _know(self, record: InstanceRecord) -> InstanceRecord:
        if record.state is not self.record.state:
            metrics.state_transitions.labels(self.record.state.value, record.state.value).inc()
        self.record = record
        self.host.changed(record)
        return record

    async def _remove(self) -> None:
        record = self.record
        await self.world.store.write(lambda txn: self.host.release(txn, record))
        self._gone = self._removed = True
        self.host.gone(record)

    def _changed(self, record: InstanceRecord, **changes: Any) -> InstanceRecord:
        return msgspec.structs.replace(record, **changes)

    def _entered(self, record: InstanceRecord, state: InstanceState) -> InstanceRecord:
        phases = record.phases.entered(state.value.lower(), self._now())
        return msgspec.structs.replace(record, state=state, phases=phases, state_error=None, was=None)

    def _journal(self, text: str) -> None:
        """One line into the instance's own log, for whoever owns the instance."""
        log.info("instance %s (%s): %s", self.record.id, self.record.name, text)
        self.world.journal(self.record.id, f"{self._now():%Y-%m-%dT%H:%M:%S.%fZ} {text}")


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


def _reversible(steps: tuple[Step, ...]) -> tuple[Reversible, ...]:
    return tuple(step for step in steps if isinstance(step, Reversible))


def _outcome(
    live: Live | None, ended: VmmExit | None, written: Exited | Fatal | None = None
) -> tuple[int | None, str | None]:
    """Exit code and why, from the best witness: the agent, what it wrote to the boot disk, the VMM."""
    fatal = live.fatal if live is not None else None
    exited = live.exited if live is not None else None
    if isinstance(written, Fatal):
        fatal = fatal or written
    elif written is not None:
        exited = exited or written
    if fatal is not None:
        return exited.exit_code if exited is not None else NOT_STARTED, fatal.message
    if exited is not None:
        return exited.exit_code, describe_exit(exited.exit_code, exited.signal, out_of_memory=exited.oom)
    if ended is None:
        return None, "stopped"
    match ended.reason:
        case ExitReason.POWEROFF:
            return None, "the guest powered off"
        case ExitReason.RESET:
            return None, "the guest rebooted or its kernel panicked"
        case ExitReason.KILLED:
            return None, "the VMM was killed"
        case ExitReason.FAILED:
            return None, ended.message or "the VMM failed"


def _shutting_down() -> HypemanError:
    return InternalError("the server is shutting down; the command was not finished")
