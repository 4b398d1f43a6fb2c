"""A guest that stops answering in the middle of an operation: stop and delete do not wait for it.

The guest is a fake that is stuck at one request, for longer than any test runs; so what ends here does so only
because a stop or delete overtook it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import trio

from hypeman.errors import HypemanError, InvalidState, NotFound
from hypeman.guest.failures import GuestBroken, GuestError, GuestLost, GuestTimeout
from hypeman.guest.limits import LIMITS
from hypeman.guest.protocol import Op
from hypeman.hypervisor.interface import VmmGone
from hypeman.instances.life import lifecycle
from hypeman.instances.life.lifecycle import overtakes
from hypeman.instances.machine import live
from hypeman.instances.machine.logs import MAX_OLD
from hypeman.instances.model.admission import Command
from hypeman.instances.model.snapshot_types import CreateSnapshotRequest, SnapshotKind
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    ForkInstanceRequest,
    Instance,
    InstanceState,
    StandbyInstanceRequest,
)
from hypeman.instances.service import Instances
from hypeman.paths import Paths
from hypeman.store import Store
from tests.fakes.fake_vmm import FakeDriver
from tests.instances.fake_world import FakeGuest, Lab, request
from tests.instances.owned import check_owned
from tests.instances.situations import clean_up, running, settled, with_attached, with_volume

Act = Callable[[Lab, Instances], Awaitable[object]]


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


def make_stuck(guest: FakeGuest, *where: str) -> None:
    """The guest does not answer these requests: all indefinitely but the shutdown, whose limit comes at once."""
    guest.stuck = set(where)
    guest.limits = {op: 0.01 if op is Op.SHUTDOWN else math.inf for op in LIMITS}


async def standby(lab: Lab, instances: Instances) -> None:
    await instances.standby("one", StandbyInstanceRequest())


async def fork(lab: Lab, instances: Instances) -> None:
    await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))


async def snapshot(lab: Lab, instances: Instances) -> None:
    await lab.snapshots(instances).create("one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY))


async def attach(lab: Lab, instances: Instances) -> None:
    await instances.attach_volume("one", "vol", AttachVolumeRequest(mount_path="/data"))


async def detach(lab: Lab, instances: Instances) -> None:
    await instances.detach_volume("one", "vol")


CASES: dict[str, tuple[Act, Act, tuple[str, ...]]] = {
    "standby": (running, standby, ("freeze", "thaw", "shutdown")),
    "fork": (running, fork, ("freeze", "thaw", "shutdown")),
    "snapshot": (running, snapshot, ("freeze", "thaw", "shutdown")),
    "thaw after fork": (running, fork, ("thaw", "shutdown")),
    "attach": (with_volume, attach, ("mount", "unmount", "shutdown")),
    "attach, silent": (with_volume, attach, ("ping", "mount", "unmount", "shutdown")),
    "detach": (with_attached, detach, ("unmount", "shutdown")),
}
"""What leads there, what runs, and which requests the guest does not answer."""


@pytest.mark.parametrize("verb", ["stop", "delete"])
@pytest.mark.parametrize("case", CASES)
async def test_stop_and_delete_overtake_what_waits_for_the_guest(lab: Lab, case: str, verb: str) -> None:
    prepare, act, stuck = CASES[case]
    async with lab.running() as instances:
        await prepare(lab, instances)
        instance = instances.board.find("one").id
        guest = lab.guests[instance]
        make_stuck(guest, *stuck)

        async def operation() -> None:
            try:
                await act(lab, instances)
            except HypemanError:
                return  # it was given up; which of the errors it ends with depends on how far it was

        async with trio.open_nursery() as nursery:
            nursery.start_soon(operation)
            with trio.fail_after(20):
                await guest.asked.wait()
                if verb == "stop":
                    assert (await instances.stop("one")).state is InstanceState.STOPPED
                else:
                    await instances.delete("one")
                    with pytest.raises(NotFound):
                        instances.board.find("one")
                if "two" in (record.name for record in instances.board.records()):
                    await settled(instances, "two")
        assert instance not in {process.config.instance_id for process in lab.machine.alive()}
        check_owned(lab, case)
        await clean_up(lab, instances)


async def test_commands_queued_before_a_delete_do_not_wait_for_the_guest_either(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        guest = lab.guests[instances.board.find("one").id]
        make_stuck(guest, "freeze", "thaw", "shutdown")
        ended: list[HypemanError] = []

        async def put_to_sleep() -> None:
            with pytest.raises(HypemanError) as error:
                await standby(lab, instances)
            ended.append(error.value)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(put_to_sleep)
            with trio.fail_after(20):
                await guest.asked.wait()
                await instances.delete("one")
        assert len(ended) == 3 and all(isinstance(error, InvalidState) for error in ended)
        await clean_up(lab, instances)


async def test_a_delete_overtakes_a_stop(lab: Lab) -> None:
    """The guest has taken the request to shut down and uses its grace; a delete does not wait for that."""
    async with lab.running() as instances:
        await running(lab, instances)
        guest = lab.guests[instances.board.find("one").id]
        guest.stuck, guest.limits = {"shutdown"}, dict.fromkeys(LIMITS, math.inf)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instances.stop, "one")
            with trio.fail_after(5):  # the stop alone would take its grace of 10 s, and 5 more
                await guest.asked.wait()
                make_stuck(guest, "shutdown")
                await instances.delete("one")
        await clean_up(lab, instances)


@pytest.mark.parametrize("verb", ["stop", "delete"])
async def test_a_restored_guest_that_does_not_wake_up_can_be_stopped(
    lab: Lab, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        await standby(lab, instances)
        asked = trio.Event()

        async def never(guest: FakeGuest, **identity: object) -> None:
            make_stuck(guest, "shutdown")
            asked.set()
            await trio.sleep_forever()

        monkeypatch.setattr(FakeGuest, "set_identity", never)

        async def restore() -> None:
            with pytest.raises(HypemanError):
                await instances.restore("one")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(restore)
            with trio.fail_after(20):
                await asked.wait()
                if verb == "delete":
                    await instances.delete("one")
                else:
                    with pytest.raises(InvalidState):  # the restore has ended with a stop
                        await instances.stop("one")
                    assert instances.board.find("one").state is InstanceState.STOPPED
        check_owned(lab, verb)
        await clean_up(lab, instances)


async def test_a_freeze_that_is_not_answered_leaves_the_instance_running(lab: Lab) -> None:
    """The undo does not wait for a thaw: the guest ends its freeze by itself."""
    async with lab.running() as instances:
        await running(lab, instances)
        guest = lab.guests[instances.board.find("one").id]
        guest.stuck, guest.limits = {"freeze", "thaw"}, dict.fromkeys(LIMITS, 0.01)
        with trio.fail_after(20), pytest.raises(GuestTimeout):
            await standby(lab, instances)
        assert instances.board.find("one").state is InstanceState.RUNNING
        guest.stuck = set()
        await standby(lab, instances)
        await clean_up(lab, instances)


@pytest.mark.parametrize("error", [GuestBroken("nonsense"), GuestError("no", errno=5), GuestLost("hung up")])
async def test_a_guest_that_answers_a_thaw_badly_does_not_spoil_the_undo(
    lab: Lab, error: HypemanError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest must not be able to make its instance Unknown by what it answers."""
    async with lab.running() as instances:
        await running(lab, instances)
        instance = instances.board.find("one").id
        guest = lab.guests[instance]

        async def answer_badly() -> None:
            guest.hung_up.set()  # the server closes such a channel, and the agent dials again
            lab.machine.of(instance).memory.frozen = False  # by itself, as every freeze ends
            raise error

        monkeypatch.setattr(guest, "thaw", answer_badly)
        with trio.fail_after(20):
            await fork(lab, instances)
        assert instances.board.find("one").state is InstanceState.RUNNING
        await settled(instances, "two")
        check_owned(lab, type(error).__name__)
        await clean_up(lab, instances)


@pytest.mark.parametrize("where", ["capture", "restore"])
async def test_a_vmm_that_never_answers_does_not_keep_its_instance(
    lab: Lab, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was requested to save or load its VM and does neither: the delete waits for a while, and kills it."""
    monkeypatch.setattr(lifecycle, "SECONDS_FOR_VMM", 0.1)
    async with lab.running() as instances:
        await running(lab, instances)
        killed = lab.machine.alive()[0].ended
        if where == "restore":
            await standby(lab, instances)
            killed = trio.Event()
        asked = trio.Event()

        async def never(*arguments: object, **more: object) -> None:
            asked.set()
            await killed.wait()
            raise VmmGone("QEMU closed its QMP socket")

        async def kill_marked(driver: FakeDriver, run_dir: str) -> bool:
            killed.set()
            return True

        if where == "capture":
            live = instances.machine.live(instances.board.find("one").id)
            assert live is not None
            monkeypatch.setattr(live.vmm, "capture", never)
        else:
            monkeypatch.setattr(lab.driver, "restore", never)
            monkeypatch.setattr(lab.driver, "kill_stray", kill_marked.__get__(lab.driver))

        async def operation() -> None:
            with pytest.raises(HypemanError):
                await (standby(lab, instances) if where == "capture" else instances.restore("one"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(operation)
            with trio.fail_after(20):
                await asked.wait()
                await instances.delete("one")
        check_owned(lab, where)
        await clean_up(lab, instances)


def test_what_overtakes_what() -> None:
    everything = [*Command, None]
    assert [c for c in everything if not overtakes(Command.DELETE, c)] == [Command.DELETE]
    assert [c for c in everything if not overtakes(Command.STOP, c)] == [Command.STOP, Command.DELETE]
    assert not any(overtakes(c, other) for c in everything for other in everything if c not in ("stop", "delete"))


async def test_a_guest_that_halted_is_ended(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vCPUs sleep, and it is silent; one of the two is not enough, and a VM that is paused is left alone."""
    monkeypatch.setattr(live, "_HALT_LOOK", 0.02)
    async with lab.running() as instances:
        await running(lab, instances)
        process, guest = lab.machine.alive()[0], lab.guests[instances.board.find("one").id]
        process.turns = 7
        await trio.sleep(0.3)
        assert instances.board.find("one").state is InstanceState.RUNNING, "idle"
        vm = instances.machine.live(instances.board.find("one").id)
        assert vm is not None
        await vm.vmm.pause()
        guest.silent_since = (await instances.get("one")).created_at
        await trio.sleep(0.3)
        assert instances.board.find("one").state is InstanceState.RUNNING, "paused"
        await vm.vmm.resume()
        with trio.fail_after(20):
            while instances.board.find("one").state is not InstanceState.STOPPED:
                await trio.sleep(0.01)
        assert (await instances.get("one")).exit_message == "the guest halted"
        await clean_up(lab, instances)


async def test_a_silent_guest_refuses_an_attach_and_keeps_no_disk(lab: Lab) -> None:
    """The disk cannot be taken back from it, so it must not be plugged in: its instance would be Unknown."""
    async with lab.running() as instances:
        await with_volume(lab, instances)
        guest = lab.guests[instances.board.find("one").id]
        guest.stuck, guest.limits = {"ping", "mount", "unmount"}, dict.fromkeys(LIMITS, 0.01)
        with trio.fail_after(20), pytest.raises(GuestTimeout):
            await attach(lab, instances)
        assert instances.board.find("one").state is InstanceState.RUNNING
        guest.stuck = set()
        await attach(lab, instances)
        await clean_up(lab, instances)


async def test_a_silent_guest_is_shown(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        shown = await instances.get("one")
        assert shown.guest_silent_since is msgspec.UNSET
        guest = lab.guests[instances.board.find("one").id]
        guest.silent_since = shown.created_at
        assert (await instances.get("one")).guest_silent_since == shown.created_at
        encoded = await instances.get_encoded("one")
        assert isinstance(encoded, Instance) and encoded.guest_silent_since == shown.created_at, "what the API shows"
        assert instances.silent_guests() == 1
        await instances.stop("one")
        assert (await instances.get("one")).guest_silent_since is msgspec.UNSET
        assert instances.silent_guests() == 0
        await instances.create(request("two"))
        await clean_up(lab, instances)


async def test_a_guest_that_prints_without_end_does_not_fill_the_disk(lab: Lab) -> None:
    """After each look at the logs they have no more than the old log may have and the new one its limit."""
    limit, rng = 1000, random.Random(7)
    async with lab.running() as instances:
        await running(lab, instances)
        logs, instance = instances.machine.logs, instances.board.find("one").id
        directory = lab.paths.instance(instance).log("app").parent
        kept = 0
        for _ in range(60):
            with lab.paths.instance(instance).log("app").open("ab") as guest:
                guest.write(b"x" * rng.choice([0, limit // 3, limit, 2 * limit, 50 * limit]))
            for large in await logs.note_times(limit):
                await logs.rotate(large, limit)
            sizes = {file.name: file.stat().st_size for file in directory.glob("app.log*") if file.suffix != ".times"}
            assert sizes["app.log"] <= limit and sizes.get("app.log.1", 0) <= MAX_OLD * limit
            kept = max(kept, *sizes.values())
        assert kept > limit, "an old log is kept unless it is far too large"
        assert "which were discarded" in lab.paths.instance(instance).log("hypeman").read_text()
        await clean_up(lab, instances)
