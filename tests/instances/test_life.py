"""Instances without failing effects: guests and VMMs that end, adoption by the next server, identities, refusals."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import trio
import trio.lowlevel

from hypeman.errors import (
    Conflict,
    InsufficientResources,
    InUse,
    InvalidRequest,
    InvalidState,
    NameConflict,
    NotFound,
)
from hypeman.guest.failures import GuestLost
from hypeman.guest.types import Exited
from hypeman.host.log_times import read_times
from hypeman.hypervisor.interface import ExitReason
from hypeman.ids import STACK_TAG
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    SnapshotKind,
)
from hypeman.instances.model.types import (
    ForkInstanceRequest,
    InstanceState,
    NetworkRequest,
    RestartMode,
    RestartPolicy,
    StandbyInstanceRequest,
    StartInstanceRequest,
    StopInstanceRequest,
    UpdateInstanceRequest,
)
from hypeman.resources.accounting import Limits
from tests.instances.fake_world import Crash, Lab, request
from tests.instances.situations import (
    RUNNING,
    clean_up,
    in_standby,
    lab,
    rows,
    running,
    settled,
    stopped,
    with_attached,
)

__all__ = ["lab"]


async def test_a_guest_that_ends_is_cleaned_up_after(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        record = instances.board.find("one")
        lab.guests[record.id].tell(Exited(7))
        process = lab.machine.of(record.id)
        while instances.board.find("one").state is RUNNING:
            await trio.lowlevel.checkpoint()
        process.end(ExitReason.POWEROFF)
        assert await settled(instances, "one") == "Stopped"
        ended = await instances.get("one")
        assert (ended.exit_code, ended.exit_message) == (7, "exited with code 7")
        assert not lab.network.taps.there


async def test_a_delete_shuts_the_guest_down_unless_it_is_forced(lab: Lab) -> None:
    async with lab.running() as instances:
        for name, graceful, shutdowns in (("one", True, 1), ("two", False, 0)):
            await instances.create(request(name))
            assert await settled(instances, name) == "Running"
            guest = lab.guests[instances.board.find(name).id]
            await instances.delete(name, graceful=graceful)
            assert guest.shutdowns == shutdowns, name
        assert not lab.machine.alive() and not lab.network.taps.there


async def test_a_vmm_that_is_killed_is_noticed(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        lab.machine.of(instances.board.find("one").id).end(ExitReason.KILLED)
        record = instances.board.find("one")
        while record.state is RUNNING:
            record = await instances.board.wait_change(record) or record
        ended = await instances.get("one")
        assert ended.state is InstanceState.STOPPED and ended.exit_message == "the VMM was killed"


async def test_the_next_server_adopts_what_lives(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
    before = lab.world_as_text()
    async with lab.running() as instances:
        assert (await instances.get("one")).state is RUNNING
        assert lab.world_as_text() == before
        await instances.stop("one")


@pytest.mark.parametrize(
    ("boot_id", "message"),
    [("boot", "the VMM ended while the server was away"), ("another", "the host rebooted while the VM ran")],
)
async def test_how_a_vm_ended_while_the_server_was_away(lab: Lab, boot_id: str, message: str) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
    for process in lab.machine.alive():
        process.end(ExitReason.KILLED)
    lab.boot_id = boot_id
    async with lab.running() as instances:
        ended = await instances.get("one")
        assert (ended.state, ended.exit_message) == (InstanceState.STOPPED, message)


async def test_a_wait_outlasts_the_stop_by_a_reboot_that_a_policy_undoes(lab: Lab) -> None:
    """Right after a reboot of the host the instance is Stopped, and its policy about to start it."""
    async with lab.running() as instances:
        await instances.create(request("one", restart_policy=RestartPolicy(policy=RestartMode.ALWAYS)))
        assert await settled(instances, "one") == "Running"
    for process in lab.machine.alive():
        process.end(ExitReason.KILLED)
    lab.boot_id = "another"
    async with lab.running() as instances:
        record = instances.board.find("one")
        assert record.state is InstanceState.STOPPED
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instances.start_again, record.id, record.boots)
            assert (await instances.wait_state("one", RUNNING, 60)).state is RUNNING
        await instances.stop("one")
        assert (await instances.wait_state("one", RUNNING, 60)).state is InstanceState.STOPPED


async def test_tags_are_replaced_and_a_fork_has_its_own(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        changed = await instances.update("one", UpdateInstanceRequest(tags={"role": "golden"}))
        assert changed.tags == {"role": "golden"}
        fork = await instances.fork("one", ForkInstanceRequest(name="two", from_running=True, tags={"role": "pod"}))
        same = await instances.fork("one", ForkInstanceRequest(name="three", from_running=True))
        assert (fork.tags, same.tags) == ({"role": "pod"}, {"role": "golden"})
        for tags in ({"hypeman.shm-size": "much"}, {"§": ""}):
            with pytest.raises(InvalidRequest):
                await instances.update("one", UpdateInstanceRequest(tags=tags))
            with pytest.raises(InvalidRequest):
                await instances.fork("one", ForkInstanceRequest(name="four", from_running=True, tags=tags))
    async with lab.running() as instances:
        assert (await instances.get("one")).tags == {"role": "golden"}


async def test_an_instance_with_groups_stays_in_its_stack_and_a_fork_may_leave(lab: Lab) -> None:
    """Groups are of a stack: a guest tagged into another one would be in the groups of the first."""
    one, other = {STACK_TAG: "one"}, {STACK_TAG: "other"}
    async with lab.running() as instances:
        await instances.create(request("one", tags=one, network=NetworkRequest(groups=("back",))))
        await settled(instances, "one")
        for tags in (other, {}):
            with pytest.raises(Conflict, match="stack"):
                await instances.update("one", UpdateInstanceRequest(tags=tags))
        changed = await instances.update("one", UpdateInstanceRequest(tags={**one, "role": "db"}))
        assert changed.tags == {**one, "role": "db"}
        fork = await instances.fork("one", ForkInstanceRequest(name="two", from_running=True, tags=other))
        assert fork.tags == other
        await instances.delete("two")
        await clean_up(lab, instances)


@pytest.mark.parametrize("grace", ["-1s", "61m", "soon"])
async def test_the_grace_of_a_stop_has_bounds(lab: Lab, grace: str) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        with pytest.raises(InvalidRequest, match=r"grace|duration"):
            await instances.stop("one", StopInstanceRequest(grace=grace))
        assert (await instances.get("one")).state is RUNNING


async def test_a_stop_gives_the_program_the_time_that_was_asked_for(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        guest = lab.guests[instances.board.find("one").id]
        await instances.stop("one", StopInstanceRequest(grace="35s"))
        assert guest.graces == [35.0]


async def test_runs_are_marked_in_the_log(lab: Lab) -> None:
    """Each boot begins one; standby and restore do not. And while the VM runs, the server notes how its log grows."""
    async with lab.running() as instances:
        await running(lab, instances)
        log = lab.paths.instance(instances.board.find("one").id).log("app")
        log.write_text("one\n")
        await instances.standby("one", StandbyInstanceRequest())
        await instances.restore("one")
        await instances.stop("one")
        await instances.start("one", StartInstanceRequest())
        assert read_times(log).runs() == (0, 4)
        log.write_text("one\ntwo\n")
        with trio.fail_after(60):
            while read_times(log).time_of(8) is None:
                await trio.sleep(0.01)


async def test_a_fork_has_its_own_identity(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))
        one, two = instances.board.find("one"), instances.board.find("two")
        assert one.state is two.state is RUNNING
        assert one.id != two.id and one.number != two.number
        identity = lab.guests[two.id].identity
        assert identity["hostname"] == "two" and len(identity["machine_id"]) == 32
        assert identity["network"].address != (await instances.get("one")).network.ip  # type: ignore[union-attr]
        assert not lab.guests[one.id].frozen and not lab.guests[two.id].frozen
        assert not lab.guests[one.id].identity


async def test_captures_live_as_long_as_they_have_a_holder(lab: Lab) -> None:
    async with lab.running() as instances:
        await in_standby(lab, instances)
        await instances.fork("one", ForkInstanceRequest(name="two"))
        assert len(list(lab.paths.captures.iterdir())) == 1
        await instances.restore("one")
        assert len(list(lab.paths.captures.iterdir())) == 1
        assert lab.machine.of(instances.board.find("one").id).private
        await instances.restore("two")
        assert len(list(lab.paths.captures.iterdir())) == 1, "the first still maps it"
        await instances.delete("one")
        await instances.delete("two")
        assert list(lab.paths.captures.iterdir()) == []


async def test_names_are_taken_once(lab: Lab) -> None:
    async with lab.running() as instances:
        outcomes: list[str] = []

        async def try_create() -> None:
            try:
                await instances.create(request("one"))
                outcomes.append("made")
            except NameConflict:
                outcomes.append("refused")

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(try_create)
        assert sorted(outcomes) == ["made", *["refused"] * 4]


async def test_addresses_run_out_with_a_clear_answer(lab: Lab) -> None:
    async with lab.running() as instances:
        for number in range(5):
            await instances.create(request(f"vm{number}"))
        before = rows(lab.store)
        with pytest.raises(InsufficientResources):
            await instances.create(request("more"))
        assert rows(lab.store).count("\n") == before.count("\n")
        await instances.delete("vm0")
        await instances.create(request("more"))


async def test_what_the_host_has_not_is_refused(lab: Lab) -> None:
    lab.limits = Limits(memory=128 << 20)
    async with lab.running() as instances:
        await instances.create(request("one"))
        await instances.create(request("two"))
        with pytest.raises(InsufficientResources, match="memory"):
            await instances.create(request("three"))
        await settled(instances, "one")
        await instances.stop("one")
        await instances.create(request("three"))
        with pytest.raises(InsufficientResources):
            await instances.start("one", StartInstanceRequest())
        assert (await instances.get("one")).state is InstanceState.STOPPED


async def test_illegal_verbs_name_the_state(lab: Lab) -> None:
    async with lab.running() as instances:
        await stopped(lab, instances)
        for verb in (instances.stop, instances.restore):
            with pytest.raises(InvalidState, match="Stopped"):
                await verb("one")
        with pytest.raises(InvalidState, match="Stopped"):
            await instances.standby("one", StandbyInstanceRequest())


async def test_a_fork_of_a_running_instance_must_be_asked_for(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        with pytest.raises(InvalidState, match="from_running"):
            await instances.fork("one", ForkInstanceRequest(name="two"))


async def test_a_volume_in_use_stays(lab: Lab) -> None:
    async with lab.running() as instances:
        await with_attached(lab, instances)
        record = instances.board.find("one")
        lab.guests[record.id].busy.add("/data")
        before = rows(lab.store)
        with pytest.raises(InUse, match="cat"):
            await instances.detach_volume("one", "vol")
        assert rows(lab.store) == before
        with pytest.raises(Conflict):
            await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))
        lab.guests[record.id].busy.clear()
        await instances.detach_volume("one", "vol")
        assert lab.guests[record.id].mounted == set()


async def test_concurrent_verbs_run_in_turn(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        outcomes: list[str] = []

        async def verb(name: str, fn: Callable[[], Awaitable[object]]) -> None:
            try:
                await fn()
                outcomes.append(name)
            except (InvalidState, NotFound) as error:
                outcomes.append(f"{name}: {error.code}")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(verb, "stop", lambda: instances.stop("one"))
            nursery.start_soon(verb, "delete", lambda: instances.delete("one"))
        assert sorted(outcomes)[:1] == ["delete"]
        assert lab.world_as_text() == ""


async def test_a_caller_that_hangs_up_changes_nothing(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        with trio.CancelScope() as scope:
            scope.cancel()
            await instances.stop("one")
        record = instances.board.find("one")
        while record.state is not InstanceState.STOPPED:
            record = await instances.board.wait_change(record) or record
        assert not lab.machine.alive()


async def test_the_list_is_what_get_says(lab: Lab) -> None:
    async with lab.running() as instances:
        for name in ("a", "b"):
            await instances.create(request(name, tags={"n": name}))
            await settled(instances, name)
        await instances.stop("a")
        listed = json.loads(await instances.list(None, {}))
        assert [i["name"] for i in listed] == ["a", "b"]
        assert [i["name"] for i in json.loads(await instances.list(RUNNING, {}))] == ["b"]
        assert [i["name"] for i in json.loads(await instances.list(None, {"n": "a"}))] == ["a"]
        one = await instances.get("a")
        assert listed[0]["phase_durations_ms"].keys() == one.phase_durations_ms.keys()  # type: ignore[union-attr]
        assert listed[0]["id"] == one.id


def test_a_crash_is_no_exception() -> None:
    """Else a handler for failures would hide it, and the tests above would prove nothing."""
    assert not issubclass(Crash, Exception)


async def test_a_guest_gets_what_its_vmm_lacks(lab: Lab) -> None:
    async with lab.running() as instances:
        for name, able in (("able", True), ("unable", False)):
            capabilities = msgspec.structs.replace(lab.driver.capabilities, disk_serials=able, power_off=able)
            lab.driver.adopt_capabilities(capabilities)
            instance = await instances.create(request(name))
            disk = lab.paths.instance(instance.id).boot_disk.read_bytes()
            assert (b"overlay" in disk) is not able


async def test_a_guest_whose_channel_a_capture_ended_is_thawed_on_the_next(lab: Lab) -> None:
    async with lab.running() as instances:
        instance = await instances.create(request("web"))
        assert await settled(instances, instance.id) == RUNNING
        first = lab.guests[instance.id]

        async def lost() -> None:
            first.hung_up.set()
            raise GuestLost("the connection to the guest has ended")

        first.thaw = lost  # type: ignore[method-assign]
        snapshots = lab.snapshots(instances)
        with trio.fail_after(20):
            await snapshots.create(instance.id, CreateSnapshotRequest(kind=SnapshotKind.STANDBY))
        second = lab.guests[instance.id]
        assert second is not first and not second.frozen
        assert await settled(instances, instance.id) == RUNNING
