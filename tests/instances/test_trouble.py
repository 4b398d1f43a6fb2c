"""What goes wrong around the instances' tasks: news that cannot be followed, starts of the server that
find broken VMs, transactions that are refused at the end, clients that hang up, expiry."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from hypeman.captures.records import CAPTURES
from hypeman.errors import HypemanError, InvalidState, NameConflict
from hypeman.guest.types import PathInfo
from hypeman.hypervisor.interface import ExitReason, VmmBroken
from hypeman.instances import expiry
from hypeman.instances.machine import logs
from hypeman.instances.model.types import (
    ForkInstanceRequest,
    InstanceState,
    StandbyInstanceRequest,
    StartInstanceRequest,
    TargetState,
    UpdateInstanceRequest,
)
from hypeman.instances.rows import INTENTS
from hypeman.instances.service import Instances
from hypeman.paths import Paths
from hypeman.store import Store, Txn
from tests.fakes.fake_vmm import FakeVmm
from tests.instances.fake_world import FakeGuest, HostFailed, Lab, request
from tests.instances.owned import check_owned
from tests.instances.situations import (
    Act,
    attach,
    clean_up,
    create,
    fork,
    in_standby,
    nothing,
    restore,
    rows,
    running,
    settled,
    standby,
    start,
    stopped,
    with_volume,
)


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


async def until(instances: Instances, ref: str, *states: InstanceState) -> None:
    record = instances.board.find(ref)
    with trio.fail_after(5):
        while record.state not in states:
            record = await instances.board.wait_change(record) or record


def jam_taps(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """No TAP can be removed until ``monkeypatch`` is undone."""

    async def refuse(name: str) -> None:
        raise HostFailed("/sys/class/net/hm1: the TAP is stuck")

    monkeypatch.setattr(lab.network.taps, "remove", refuse)


async def test_a_log_is_rotated_also_if_its_times_cannot_be(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the guest would print to the old file, which nobody looks at, until the disk is full."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with lab.running() as instances:
        await running(lab, instances)
        record = instances.board.find("one")
        app = lab.paths.instance(record.id).log("app")
        app.write_text("much")
        monkeypatch.setattr(logs, "move_times", refuse)
        await instances.machine.logs.rotate(record.id, 1)
        assert app.read_text() == "", "the VMM has opened it anew"
        assert app.with_suffix(".log.1").read_text() == "much"
        await clean_up(lab, instances)


async def test_a_log_is_rotated_also_if_the_vmm_cannot_be_told(lab: Lab) -> None:
    """It keeps writing to the same file, which is emptied."""
    async with lab.running() as instances:
        await running(lab, instances)
        record = instances.board.find("one")
        app = lab.paths.instance(record.id).log("app")
        for text in ("much", "more"):
            with app.open("a") as guest:
                guest.write(text)
                guest.flush()
                lab.driver.faults.plan("rotate_console", 1, VmmBroken("it does not answer"), after=False)
                await instances.machine.logs.rotate(record.id, 1)
                assert (app.read_text(), app.with_suffix(".log.1").read_text()) == ("", text)
                guest.write("on")
                guest.flush()
                assert app.read_text() == "on", "what is written to is what is looked at"
                app.write_text("")
        await clean_up(lab, instances)


async def test_a_log_that_was_renamed_by_a_server_that_was_killed_is_reopened(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        record = instances.board.find("one")
        app = lab.paths.instance(record.id).log("app")
        old = app.with_suffix(".log.1")
        app.write_text("much")
        app.rename(old)
        for text in ("", "", "more"):
            await instances.machine.logs.rotate(record.id, 3)
            assert not app.exists()
            with old.open("a") as guest:
                guest.write(text)
        await instances.machine.logs.rotate(record.id, 3)
        assert app.exists(), "the VMM was told once the guest had printed"
        assert old.read_text() == "muchmore"
        await clean_up(lab, instances)


async def test_a_clean_up_that_fails_leaves_the_server_alive(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM ended by itself and its TAP cannot be removed: Unknown, with the reason; stop tries again."""
    async with lab.running() as instances:
        await running(lab, instances)
        jam_taps(lab, monkeypatch)
        lab.machine.of(instances.board.find("one").id).end(ExitReason.KILLED)
        await until(instances, "one", InstanceState.UNKNOWN)
        shown = (await instances.get("one")).state_error
        assert shown is not None and "stuck" in shown and "/sys/" not in shown, "no paths of the host"
        waited = await instances.wait_state("one", InstanceState.RUNNING, 0.1)
        assert waited.state_error == shown
        monkeypatch.undo()
        await instances.create(request("two"))
        await instances.stop("one")
        await clean_up(lab, instances)


async def test_a_vmm_that_does_not_answer_does_not_keep_the_server_from_starting(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
    lab.driver.fail("reattach", VmmBroken("QEMU lives but its QMP socket is gone"))
    async with lab.running() as instances:
        broken = await instances.get("one")
        assert broken.state is InstanceState.UNKNOWN and "QMP" in str(broken.state_error)
        stopped = await instances.stop("one")
        assert stopped.state is InstanceState.STOPPED and stopped.state_error is None
        assert not lab.machine.alive()
        await clean_up(lab, instances)


async def test_an_unexpected_error_in_settling_is_the_instances_own(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
    lab.driver.fail("reattach", ValueError("nobody thought of this"))
    async with lab.running() as instances:
        assert (await instances.get("one")).state is InstanceState.UNKNOWN
        await clean_up(lab, instances)


async def test_a_name_taken_meanwhile_leaves_nothing_of_the_fork(lab: Lab) -> None:
    """Both forks see the name free and copy; the second finds it taken in the transaction."""
    async with lab.running() as instances:
        await running(lab, instances)
        refused: list[NameConflict] = []

        async def fork() -> None:
            try:
                await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))
            except NameConflict as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fork)
        assert len(refused) == 2
        known = lab.store.read(lambda txn: set(txn.keys(CAPTURES)))
        assert {path.name for path in lab.paths.captures.iterdir()} == known
        assert list(lab.paths.tmp.iterdir()) == []
        assert not lab.store.read(lambda txn: list(txn.keys(INTENTS)))
        assert not any(guest.frozen for guest in lab.guests.values())
        check_owned(lab, "fork")
        await clean_up(lab, instances)


class _Refuses:
    """A store that refuses the ``at``-th write from now on, as one on a full disk does."""

    def __init__(self, store: object, at: int) -> None:
        self._store = store
        self.left = at

    def read(self, fn: object) -> object:
        return self._store.read(fn)  # type: ignore[attr-defined]

    async def write(self, fn: object) -> object:
        self.left -= 1
        if self.left == -1:
            raise HostFailed("the disk is full")
        return await self._store.write(fn)  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", ["start", "standby", "restore"])
async def test_a_record_that_can_not_be_written_takes_the_work_back(lab: Lab, verb: str) -> None:
    """Each write of the verb refused in turn: no VM without a record that says so, and the verb works afterwards."""
    async with lab.running() as instances:
        await running(lab, instances)
        if verb == "start":
            await instances.stop("one")
        elif verb == "restore":
            await instances.standby("one", StandbyInstanceRequest())
        before_world, before_rows = lab.world_as_text(), rows(lab.store)
        whole = instances.ledger.store
        for at in range(2):  # intent; result
            instances.ledger.store = _Refuses(whole, at)  # type: ignore[assignment]
            with pytest.raises(HostFailed):
                await _do(instances, verb)
            instances.ledger.store = whole
            assert lab.world_as_text() == before_world
            assert rows(lab.store) == before_rows
        await _do(instances, verb)
        await settled(instances, "one")
        check_owned(lab, verb)
        await clean_up(lab, instances)


async def _do(instances: Instances, verb: str) -> None:
    if verb == "start":
        await instances.start("one", StartInstanceRequest())
    elif verb == "standby":
        await instances.standby("one", StandbyInstanceRequest())
    else:
        await instances.restore("one")


async def test_a_standby_that_can_not_be_finished_leaks_no_capture(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        jam_taps(lab, monkeypatch)
        with pytest.raises(HostFailed):
            await instances.standby("one", StandbyInstanceRequest())
        assert (await instances.get("one")).state is InstanceState.UNKNOWN
        monkeypatch.undo()
        await instances.stop("one")
        assert list(lab.paths.captures.iterdir()) == []
        await clean_up(lab, instances)


async def test_what_could_not_be_deleted_can_only_be_deleted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        jam_taps(lab, monkeypatch)
        with pytest.raises(HostFailed):
            await instances.delete("one")
        assert (await instances.get("one")).state is InstanceState.UNKNOWN
        with pytest.raises(InvalidState, match="delete it again"):
            await instances.stop("one")
        monkeypatch.undo()
        await instances.delete("one")
        assert lab.world_as_text() == ""


@pytest.mark.parametrize("fails", ["set_identity", "thaw", "resume"])
async def test_a_restored_guest_that_can_not_be_awakened_is_stopped(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """It has run, so there is no way back to standby; the record must not say that it runs on."""

    async def refuse(*_: object, **__: object) -> None:
        raise HostFailed("it does not wake up")

    async with lab.running() as instances:
        await running(lab, instances)
        await instances.standby("one", StandbyInstanceRequest())
        monkeypatch.setattr(FakeVmm if fails == "resume" else FakeGuest, fails, refuse)
        with pytest.raises(HostFailed):
            await instances.restore("one")
        monkeypatch.undo()
        ended = await instances.get("one")
        assert ended.state is InstanceState.STOPPED and "could not be awakened" in str(ended.exit_message)
        check_owned(lab, fails)
        assert rows(lab.store).count("intent") == 0 and list(lab.paths.captures.iterdir()) == []
        await instances.start("one", StartInstanceRequest())
        assert await settled(instances, "one") == "Running"
        await clean_up(lab, instances)


@pytest.mark.parametrize(
    ("before", "verb", "hangs"),
    [
        (nothing, create, "launch"),
        (stopped, start, "launch"),
        (in_standby, restore, "restore"),
        (running, standby, "capture"),
        (running, fork, "capture"),
        (with_volume, attach, "add_disk"),
    ],
)
async def test_a_server_that_ends_takes_back_what_it_has_begun(lab: Lab, before: Act, verb: Act, hangs: str) -> None:
    """Although everything is cancelled then: the next server should find nothing unfinished, or not for long."""

    async def begin() -> None:
        with contextlib.suppress(HypemanError):
            await verb(lab, instances)

    async with lab.running() as instances, trio.open_nursery() as nursery:
        await before(lab, instances)
        was, calls = rows(lab.store), lab.driver.faults.calls(hangs)
        lab.driver.hang(hangs)
        nursery.start_soon(begin)
        with trio.fail_after(60):
            while lab.driver.faults.calls(hangs) == calls:
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert rows(lab.store) == was
    check_owned(lab, hangs, crashed=True)
    async with lab.running() as instances:
        await clean_up(lab, instances)


async def test_disks_are_copied_only_while_nothing_writes(lab: Lab) -> None:
    """Also for a fork that wants no memory."""
    async with lab.running() as instances:
        await running(lab, instances)
        one = instances.board.find("one")
        process = lab.machine.of(one.id)
        seen: list[str] = []
        copy_all = instances.machine.context.files.copy_all

        async def watch(source: Path, target: Path, pattern: str, **owner: int) -> None:
            seen.append(process.state.value)
            await copy_all(source, target, pattern, **owner)

        instances.machine.context.files.copy_all = watch  # type: ignore[method-assign]
        fork = await instances.fork(
            "one", ForkInstanceRequest(name="two", from_running=True, target_state=TargetState.STOPPED)
        )
        assert fork.state is InstanceState.STOPPED
        assert seen and set(seen) == {"paused"}
        assert process.state.value == "running" and not lab.guests[one.id].frozen
        await clean_up(lab, instances)


class Interposed:
    """A store with something that happens around its writes."""

    def __init__(
        self,
        store: Any,
        *,
        before: Callable[[], Awaitable[object]] | None = None,
        after: Callable[[], object] | None = None,
    ) -> None:
        self._store = store
        self._before = before
        self._after = after

    def read(self, fn: Callable[[Txn], Any]) -> Any:
        return self._store.read(fn)

    async def write(self, fn: Callable[[Txn], Any]) -> Any:
        if self._before is not None:
            await self._before()
        result = await self._store.write(fn)
        if self._after is not None:
            self._after()
        return result


async def test_a_create_goes_on_when_its_caller_hangs_up(lab: Lab) -> None:
    """At the worst moment: written down, and nothing made. The caller can find it, to delete it."""
    async with lab.running() as instances:
        with trio.CancelScope() as caller:
            instances.ledger.store = Interposed(instances.ledger.store, after=caller.cancel)  # type: ignore[assignment]
            await instances.create(request("one"))
        assert caller.cancelled_caught and instances.board.find("one").name == "one"
        await until(instances, "one", InstanceState.RUNNING)
        await clean_up(lab, instances)


async def test_a_create_whose_caller_hangs_up_early_is_over_or_can_be_found(lab: Lab) -> None:
    """Its caller left before the record was written: an instance that appeared later would be nobody's."""
    async with lab.running() as instances:
        with trio.CancelScope() as caller:

            async def hang_up() -> None:
                caller.cancel()
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.05)

            instances.ledger.store = Interposed(instances.ledger.store, before=hang_up)  # type: ignore[assignment]
            await instances.create(request("one"))
        assert caller.cancelled_caught
        await instances.delete("one")
        assert lab.world_as_text() == ""


async def test_a_fork_goes_on_when_its_caller_hangs_up(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instances.fork, "one", ForkInstanceRequest(name="two", from_running=True))
            await appeared(instances, "two")
            nursery.cancel_scope.cancel()
        await until(instances, "two", InstanceState.RUNNING)
        check_owned(lab, "fork")
        await clean_up(lab, instances)


async def test_nobodys_command_comes_before_the_first(lab: Lab) -> None:
    async with lab.running() as instances:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instances.create, request("one"))
            await appeared(instances, "one")
            await instances.stop("one")
        assert instances.board.find("one").state is InstanceState.STOPPED
        check_owned(lab, "create and stop")
        await clean_up(lab, instances)


async def test_a_fork_is_as_its_source_is_when_it_is_forked(lab: Lab) -> None:
    """Not as it was when the fork was asked for."""
    async with lab.running() as instances:
        await running(lab, instances)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instances.standby, "one", StandbyInstanceRequest())
            await trio.testing.wait_all_tasks_blocked()
            assert instances.board.find("one").state is InstanceState.RUNNING
            nursery.start_soon(instances.fork, "one", ForkInstanceRequest(name="two"))
        assert instances.board.find("two").state is InstanceState.STANDBY
        check_owned(lab, "fork")
        await clean_up(lab, instances)


@pytest.mark.parametrize("verb", ["fork", "standby", "stop", "delete"])
async def test_a_look_into_a_guest_whose_connection_ends(lab: Lab, verb: str) -> None:
    """Of an instance that runs on it is repeated; one that does not refuses it, as it does at once afterwards."""
    async with lab.running() as instances:
        await running(lab, instances)
        guest = lab.guests[instances.board.find("one").id]
        guest.stuck.add("stat")
        outcome: list[object] = []

        async def look() -> None:
            try:
                outcome.append(await instances.stat("one", "/etc", follow_links=False))
            except HypemanError as error:
                outcome.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await guest.asked.wait()
            match verb:
                case "fork":
                    await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))
                    guest.hung_up.set()  # a capture closes the connection, and the agent reconnects
                case "standby":
                    await instances.standby("one", StandbyInstanceRequest())
                case "stop":
                    await instances.stop("one")
                case "delete":
                    await instances.delete("one")
        if verb == "fork":
            assert outcome == [PathInfo(exists=True)]
        else:
            assert isinstance(outcome[0], InvalidState), outcome
        await clean_up(lab, instances)


async def appeared(instances: Instances, name: str) -> None:
    with trio.fail_after(5):
        while not any(record.name == name for record in instances.board.records()):
            await trio.lowlevel.checkpoint()


async def test_the_reaper_tries_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "PAUSE", 0.05)
    async with lab.running() as instances:
        await running(lab, instances)
        failures: list[str] = []
        remove = lab.network.taps.remove

        async def refuse(name: str) -> None:
            failures.append(name)
            if len(failures) > 3:  # as often as a step is tried
                await remove(name)
            else:
                raise HostFailed("the TAP is stuck")

        monkeypatch.setattr(lab.network.taps, "remove", refuse)
        record = instances.board.find("one")
        await instances.update("one", UpdateInstanceRequest(ttl="10ms"))
        with trio.fail_after(5):
            while (changed := await instances.board.wait_change(record)) is not None:
                record = changed
        assert len(failures) > 3
        assert lab.world_as_text() == ""
