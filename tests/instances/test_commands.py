"""What commands leave in the record, the VM and the instance's log where nothing fails, and what they refuse."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from hypeman.actor import Actor, acting
from hypeman.errors import InternalError, InvalidState, NotFound, NotSupported
from hypeman.events.log import read_after
from hypeman.guest.types import Exited, Fatal
from hypeman.hypervisor.interface import ExitReason
from hypeman.instances.life import lifecycle
from hypeman.instances.life.lifecycle import MAX_QUEUED_COMMANDS
from hypeman.instances.life.operations.standby import restore, standby
from hypeman.instances.life.operations.stop import stop
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.admission import Command
from hypeman.instances.model.record import Operation
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    ForkInstanceRequest,
    InstanceState,
    StandbyInstanceRequest,
    StartInstanceRequest,
    TargetState,
    VolumeMount,
)
from hypeman.instances.model.vm import DISK_PORTS, volume_disk_id
from hypeman.instances.service import Instances
from hypeman.paths import Paths
from hypeman.store import Store
from hypeman.volumes.records import ATTACHMENTS
from tests.instances.fake_world import FakeGuest, HostFailed, Lab, request
from tests.instances.situations import clean_up, in_standby, running, settled, until_state, with_volume
from tests.instances.test_storage_trouble import make_volume, remove_volumes
from tests.instances.test_trouble import jam_taps

AT_DATA = AttachVolumeRequest(mount_path="/data", readonly=True)


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


def journal(lab: Lab, instances: Instances) -> str:
    return lab.paths.instance(instances.board.find("one").id).log("hypeman").read_text()


async def until_journal(lab: Lab, instances: Instances, text: str) -> None:
    with trio.fail_after(60):
        while text not in journal(lab, instances):
            await trio.sleep(0.001)


# ── Volumes ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_volume_of_a_stopped_instance_is_in_its_next_vm(lab: Lab) -> None:
    async with lab.running() as instances:
        await with_volume(lab, instances)
        await instances.stop("one")
        attached = await instances.attach_volume("one", "vol", AT_DATA)
        assert attached.volumes == (VolumeMount(volume_id="vol", mount_path="/data", readonly=True),)
        assert len(lab.store.read(lambda txn: list(txn.keys(ATTACHMENTS)))) == 1
        await instances.start("one", StartInstanceRequest())
        await settled(instances, "one")
        (disk,) = (disk for disk in lab.machine.alive()[0].config.disks if disk.id == volume_disk_id("vol"))
        assert disk.port == 1 and disk.readonly
        await instances.stop("one")
        detached = await instances.detach_volume("one", "vol")
        assert not detached.volumes and not instances.board.find("one").ports
        assert not lab.store.read(lambda txn: list(txn.keys(ATTACHMENTS)))
        with pytest.raises(NotFound, match="not attached"):
            await instances.detach_volume("one", "vol")
        await clean_up(lab, instances)


async def test_a_vmm_without_hotplug_takes_volumes_only_while_it_is_stopped(lab: Lab) -> None:
    async with lab.running() as instances:
        lab.driver.adopt_capabilities(replace(lab.driver.capabilities, hotplug_disk=False))
        await with_volume(lab, instances)
        with pytest.raises(NotSupported, match="stop it first"):
            await instances.attach_volume("one", "vol", AT_DATA)
        await instances.stop("one")
        await instances.attach_volume("one", "vol", AT_DATA)
        await clean_up(lab, instances)


async def test_a_stopped_instance_takes_no_more_disks_than_its_next_vm(lab: Lab) -> None:
    async with lab.running() as instances:
        lab.driver.adopt_capabilities(replace(lab.driver.capabilities, max_disks=4))
        await with_volume(lab, instances)
        await instances.stop("one")
        await instances.attach_volume("one", "vol", AT_DATA)
        await make_volume(lab, "more")
        with pytest.raises(NotSupported, match="takes 4 disks"):
            await instances.attach_volume("one", "more", AttachVolumeRequest(mount_path="/more"))
        assert len(lab.store.read(lambda txn: list(txn.keys(ATTACHMENTS)))) == 1
        await instances.start("one", StartInstanceRequest())
        await settled(instances, "one")
        await clean_up(lab, instances)


async def test_a_volume_beyond_the_ports_is_fixed(lab: Lab) -> None:
    """A running VM has a port for each disk that can be plugged in; what is attached to a stopped one needs none."""
    async with lab.running() as instances:
        await running(lab, instances)
        names = [f"v{number}" for number in range(DISK_PORTS + 1)]
        for name in names:
            await make_volume(lab, name)
        *first, last = names
        for name in first:
            await instances.attach_volume("one", name, AttachVolumeRequest(mount_path=f"/{name}"))
        with pytest.raises(NotSupported, match="no free port"):
            await instances.attach_volume("one", last, AttachVolumeRequest(mount_path="/last"))
        await instances.stop("one")
        await instances.attach_volume("one", last, AttachVolumeRequest(mount_path="/last"))
        await instances.start("one", StartInstanceRequest())
        await settled(instances, "one")
        with pytest.raises(NotSupported, match="fixed"):
            await instances.detach_volume("one", last)
        await instances.detach_volume("one", first[3])
        assert set(instances.board.find("one").ports.values()) == set(range(1, DISK_PORTS + 1)) - {4}
        await clean_up(lab, instances)
        await remove_volumes(lab)


# ── Captures ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_standby_frees_the_memory_that_its_vm_had_mapped(lab: Lab) -> None:
    async with lab.running() as instances:
        await in_standby(lab, instances)
        await instances.fork("one", ForkInstanceRequest(name="two"))
        await instances.restore("one")
        await instances.delete("two")
        mapped = instances.board.find("one").mapped
        assert mapped is not None and [path.name for path in lab.paths.captures.iterdir()] == [mapped]
        await instances.standby("one", StandbyInstanceRequest())
        record = instances.board.find("one")
        assert record.mapped is None and record.capture != mapped
        assert [path.name for path in lab.paths.captures.iterdir()] == [record.capture]
        await clean_up(lab, instances)


# ── Start and stop ───────────────────────────────────────────────────────────────────────────────


async def test_a_start_begins_a_new_boot(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        lab.guests[instances.board.find("one").id].tell(Exited(7))
        lab.machine.alive()[0].end(ExitReason.POWEROFF)
        before = await until_state(instances, InstanceState.STOPPED)
        assert (before.exit_code, before.started_at is None, before.stopped_at is None) == (7, False, False)
        assert (before.handle, before.mapped, before.capture) == (None, None, None)
        await instances.start("one", StartInstanceRequest(cmd=("-c", "true")))
        after = instances.board.find("one")
        assert after.spec.cmd == ("-c", "true") and after.spec.entrypoint == before.spec.entrypoint
        assert (after.boots, after.exit_code, after.exit_message) == (before.boots + 1, None, None)
        assert (after.stopped_at, after.stop_cause) == (None, None) and after.nonce != before.nonce
        await settled(instances, "one")
        text = journal(lab, instances)
        steps = ["launched", "running", "stopped: exited with code 7", "launched", "running"]
        assert [line.split("Z ", 1)[1] for line in text.splitlines()] == steps
        await clean_up(lab, instances)


async def test_a_fork_is_new_until_it_has_run(lab: Lab) -> None:
    """Its guest gets a new identity once; after that it keeps it, whatever is done with it."""
    async with lab.running() as instances:
        await running(lab, instances)
        wanted = ForkInstanceRequest(name="two", from_running=True, target_state=TargetState.STOPPED)
        await instances.fork("one", wanted)
        assert instances.board.find("two").fresh
        await instances.start("two", StartInstanceRequest())
        await settled(instances, "two")
        assert not instances.board.find("two").fresh
        await instances.standby("two", StandbyInstanceRequest())
        await instances.restore("two")
        assert lab.guests[instances.board.find("two").id].identity["machine_id"] == "", "it keeps the one it has"
        await clean_up(lab, instances)


async def test_how_a_workload_ended_is_kept_though_the_vmm_ended_unseen(lab: Lab) -> None:
    """The guest said it once, to the server before."""
    async with lab.running() as instances:
        await running(lab, instances)
        lab.guests[instances.board.find("one").id].tell(Exited(3))
        await until_state(instances, InstanceState.SHUTDOWN)
    lab.machine.alive()[0].end(ExitReason.POWEROFF)
    async with lab.running() as instances:
        ended = await instances.get("one")
        assert ended.state is InstanceState.STOPPED
        assert (ended.exit_code, ended.exit_message) == (3, "exited with code 3")
        await clean_up(lab, instances)


async def test_an_outcome_that_the_guest_writes_at_its_end_counts(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent was not heard of any more: the boot disk is read once more when the VM is down."""
    async with lab.running() as instances:
        await running(lab, instances)

        async def outcome(instance_id: str) -> Exited | None:
            return None if lab.network.taps.there else Exited(5)

        monkeypatch.setattr(instances.machine, "read_outcome", outcome)
        lab.machine.alive()[0].end(ExitReason.KILLED)
        record = await until_state(instances, InstanceState.STOPPED)
        assert (record.exit_code, record.exit_message) == (5, "exited with code 5")
        await clean_up(lab, instances)


async def test_a_guest_that_cannot_be_set_up_says_why(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        lab.guests[instances.board.find("one").id].tell(Fatal("cannot mount /data"))
        await until_journal(lab, instances, "guest: cannot mount /data")
        lab.machine.alive()[0].end(ExitReason.POWEROFF)
        record = await until_state(instances, InstanceState.STOPPED)
        assert (record.exit_code, record.exit_message) == (127, "cannot mount /data")
        await clean_up(lab, instances)


async def test_a_command_that_fails_says_why_in_the_instances_log(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.stop("one")
        lab.driver.fail("launch", HostFailed("no memory"))
        with pytest.raises(HostFailed):
            await instances.start("one", StartInstanceRequest())
        assert "Z start failed: no memory\n" in journal(lab, instances)
        await clean_up(lab, instances)


async def test_changes_are_attributed_only_to_who_caused_them(lab: Lab) -> None:
    """Also by the instance's own task, which began in the request of the one who created it."""
    async with lab.running() as instances:
        with acting(Actor("ann")):
            await running(lab, instances)
        with acting(Actor("bob")):
            await instances.stop("one")
            await instances.start("one", StartInstanceRequest())
        await settled(instances, "one")
        lab.machine.alive()[0].end(ExitReason.KILLED)
        await until_state(instances, InstanceState.STOPPED)
        reported = lab.store.read(lambda txn: read_after(txn, 0, 100))
        assert [event.actor.subject if event.actor else None for event in reported] == [
            "ann", "ann", None, "bob", "bob", None, None
        ], "created, launched; running; stopped, started; running, ended"  # fmt: skip
        await clean_up(lab, instances)


# ── Memory that is plugged in ────────────────────────────────────────────────────────────────────


async def test_memory_is_plugged_in_once_the_workload_runs(lab: Lab) -> None:
    async with lab.running() as instances:
        await instances.create(request("one", hotplug_size="32MB"))
        await settled(instances, "one")
        with trio.fail_after(60):
            while not lab.guests[instances.board.find("one").id].onlined:
                await trio.sleep(0.001)
        assert lab.machine.alive()[0].memory.plugged == 32 << 20
        await instances.create(request("two"))
        await settled(instances, "two")
        assert not lab.guests[instances.board.find("two").id].onlined
        await clean_up(lab, instances)


async def test_an_instance_runs_without_the_memory_that_could_not_be_plugged_in(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(guest: FakeGuest) -> int:
        raise HostFailed("no room")

    monkeypatch.setattr(FakeGuest, "online_memory", refuse)
    async with lab.running() as instances:
        await instances.create(request("one", hotplug_size="32MB"))
        await settled(instances, "one")
        await until_journal(lab, instances, "hot-plugged memory is not there: no room")
        assert (await instances.get("one")).state is InstanceState.RUNNING
        await clean_up(lab, instances)


# ── The queue ────────────────────────────────────────────────────────────────────────────────────


async def test_the_queue_of_an_instance_is_bounded(lab: Lab) -> None:
    """What is refused can be tried again; what was queued is done in its order."""
    done: list[int] = []
    async with lab.running() as instances:
        await running(lab, instances)
        task = instances.tasks.of("one")
        go_on = trio.Event()

        async def wait(owned: Owned) -> None:
            await go_on.wait()

        first = task.submit(None, wait)
        with trio.fail_after(60):
            while task._queued:
                await trio.lowlevel.checkpoint()

        def note(number: int) -> Any:
            async def action(owned: Owned) -> None:
                done.append(number)

            return action

        jobs = [task.submit(None, note(number)) for number in range(MAX_QUEUED_COMMANDS)]
        with pytest.raises(InvalidState, match="waiting already") as refused:
            task.submit(None, note(-1))
        assert refused.value.retryable
        go_on.set()
        for job in (first, *jobs):
            await job.wait()
        assert done == list(range(MAX_QUEUED_COMMANDS))
        await clean_up(lab, instances)


async def test_the_rest_of_a_restore_leaves_the_command_alone_that_came_first(
    lab: Lab, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs behind the commands that are queued: after a standby, or one that could not be finished."""

    async def nothing(owned: Owned) -> None:
        pass

    async with lab.running() as instances:
        for fails in (False, True):
            await running(lab, instances)
            await instances.standby("one", StandbyInstanceRequest())
            task = instances.tasks.of("one")
            restored = task.submit(Command.RESTORE, restore)
            again = task.submit(Command.STANDBY, lambda owned: standby(owned, None))
            await restored.wait()
            if fails:
                jam_taps(lab, monkeypatch)
            with pytest.raises(HostFailed) if fails else nullcontext():
                await again.wait()
            caplog.clear()
            await task.perform(None, nothing)
            intent = instances.ledger.intent(task.record.id)
            assert (intent is not None and intent.operation is Operation.PARK) is fails
            assert not [record for record in caplog.records if record.levelname == "ERROR"]
            monkeypatch.undo()
            await clean_up(lab, instances)


async def test_a_vmm_is_killed_only_for_a_stop_that_waits(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """That an earlier stop had to wait is no reason to end a long command later."""
    monkeypatch.setattr(lifecycle, "SECONDS_FOR_VMM", 0.02)

    async def wait(owned: Owned) -> None:
        await go_on.wait()

    async def take_long(owned: Owned) -> None:
        await trio.sleep(0.2)

    async with lab.running() as instances:
        await running(lab, instances)
        task = instances.tasks.of("one")
        go_on = trio.Event()
        job = task.submit(None, wait)
        with trio.fail_after(60):
            while task._queued:
                await trio.lowlevel.checkpoint()
            stopping = task.submit(Command.STOP, stop)
            go_on.set()
            await job.wait()
            await stopping.wait()
        await instances.start("one", StartInstanceRequest())
        await settled(instances, "one")
        await task.perform(None, take_long)
        assert len(lab.machine.alive()) == 1
        await clean_up(lab, instances)


async def test_a_second_stop_does_not_shorten_the_first_but_a_delete_does(lab: Lab) -> None:
    async with lab.running() as instances, trio.open_nursery() as nursery:
        await running(lab, instances)
        record = instances.board.find("one")
        guest, live = lab.guests[record.id], instances.machine.context.live[record.id]
        guest.stuck.add("shutdown")
        task = instances.tasks.of("one")
        first = task.submit(Command.STOP, stop)
        with trio.fail_after(60):
            await guest.asked.wait()
            second = task.submit(Command.STOP, stop)
            assert not live._given_up
            nursery.start_soon(instances.delete, "one")
            await first.wait()
            with pytest.raises(InvalidState):
                await second.wait()
    assert lab.world_as_text() == ""


async def test_nothing_is_queued_for_an_instance_that_is_gone(lab: Lab) -> None:
    async def nothing(owned: Owned) -> None:
        raise AssertionError("it is not run")

    async with lab.running() as instances:
        await running(lab, instances)
        deleted = instances.tasks.of("one")
        await instances.delete("one")
        with pytest.raises(NotFound, match="is gone"):
            deleted.submit(None, nothing)
        await running(lab, instances)
        ended = instances.tasks.of("one")
    with pytest.raises(InternalError, match="shutting down"):
        ended.submit(None, nothing)
