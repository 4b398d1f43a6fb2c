"""What goes wrong around the instances' tasks: news that can not be followed, starts of the server that
find broken VMs, transactions that are refused at the end, clients that hang up, expiry."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from hypeman.errors import InvalidState, NameConflict
from hypeman.hypervisor.interface import ExitReason, VmmBroken
from hypeman.instances.captures import CAPTURES
from hypeman.instances.records import INTENTS
from hypeman.instances.service import Instances
from hypeman.instances.types import (
    ForkInstanceRequest,
    InstanceState,
    StandbyInstanceRequest,
    StartInstanceRequest,
    TargetState,
)
from hypeman.paths import Paths
from hypeman.store import Store
from tests.instances.fake_world import HostFailed, Lab, request
from tests.instances.test_lifecycle import check_owned, clean_up, rows, running, settled


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


async def until(instances: Instances, ref: str, *states: InstanceState) -> None:
    record = instances.board.find(ref)
    with trio.fail_after(5):
        while record.state not in states:
            record = await instances.board.wait_change(record) or record


# ── A broken instance is its own trouble ─────────────────────────────────────────────────────────


async def test_a_clean_up_that_fails_leaves_the_server_alive(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM ended by itself and its TAP can not be removed: Unknown, with the reason; stop tries again."""
    async with lab.running() as instances:
        await running(lab, instances)

        async def refuse(name: str) -> None:
            raise HostFailed("the TAP is stuck")

        monkeypatch.setattr(lab.network.taps, "remove", refuse)
        lab.machine.of(instances.board.find("one").id).end(ExitReason.KILLED)
        await until(instances, "one", InstanceState.UNKNOWN)
        assert "stuck" in str((await instances.get("one")).state_error)
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


# ── A transaction that is refused at the end ─────────────────────────────────────────────────────


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
        whole = instances.world.store
        for at in range(2):  # intent; result
            instances.world.store = _Refuses(whole, at)  # type: ignore[assignment]
            with pytest.raises(HostFailed):
                await _do(instances, verb)
            instances.world.store = whole
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

        async def refuse(name: str) -> None:
            raise HostFailed("the TAP is stuck")

        monkeypatch.setattr(lab.network.taps, "remove", refuse)
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

        async def refuse(name: str) -> None:
            raise HostFailed("the TAP is stuck")

        monkeypatch.setattr(lab.network.taps, "remove", refuse)
        with pytest.raises(HostFailed):
            await instances.delete("one")
        assert (await instances.get("one")).state is InstanceState.UNKNOWN
        with pytest.raises(InvalidState, match="delete it again"):
            await instances.stop("one")
        monkeypatch.undo()
        await instances.delete("one")
        assert lab.world_as_text() == ""


# ── Forks ────────────────────────────────────────────────────────────────────────────────────────


async def test_disks_are_copied_only_while_nothing_writes(lab: Lab) -> None:
    """Also for a fork that wants no memory."""
    async with lab.running() as instances:
        await running(lab, instances)
        one = instances.board.find("one")
        process = lab.machine.of(one.id)
        seen: list[str] = []
        copy = instances.world.files.copy

        async def watch(source: Path, target: Path, **owner: int) -> None:
            seen.append(process.state.value)
            await copy(source, target, **owner)

        instances.world.files.copy = watch  # type: ignore[method-assign]
        fork = await instances.fork(
            "one", ForkInstanceRequest(name="two", from_running=True, target_state=TargetState.STOPPED)
        )
        assert fork.state is InstanceState.STOPPED
        assert seen and set(seen) == {"paused"}
        assert process.state.value == "running" and not lab.guests[one.id].frozen
        await clean_up(lab, instances)
