"""Every operation, failed and crashed at every effect: the old state or the new one, whole.

The host is in memory (fake_world.py), so all moments are visited in seconds. ``tests/real/test_kill.py``
does the same to a real server with real guests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from hypeman.actor import Actor, acting
from hypeman.errors import (
    HypemanError,
)
from hypeman.events.log import read_after
from hypeman.events.types import Kind
from hypeman.hypervisor.interface import VmmState
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import (
    InstanceState,
)
from hypeman.instances.rows import INSTANCES
from hypeman.server.idempotency import changed_by
from tests.instances.fake_world import HostFailed, Lab
from tests.instances.owned import check_owned, nothing_in_progress
from tests.instances.situations import (
    Act,
    attach,
    claim,
    clean_up,
    close_egress,
    create,
    create_with_ports,
    delete,
    delete_snapshot,
    detach,
    fork,
    fork_to_stopped,
    in_standby,
    in_standby_with_wake,
    lab,
    nothing,
    open_egress,
    pools_ready,
    publish,
    publish_and_start,
    restore,
    revert,
    rows,
    running,
    settled,
    snapshot,
    standby,
    start,
    stop,
    stopped,
    stopped_with_ports,
    with_attached,
    with_closed_egress,
    with_egress,
    with_pool,
    with_ports,
    with_snapshot,
    with_volume,
    with_wake,
    without_image,
)

__all__ = ["lab"]

CASES: dict[str, tuple[Act, Act, set[str]]] = {
    "create": (nothing, create, {"gone", "Running"}),
    "create with a pull": (without_image, create, {"gone", "Running"}),
    "start": (stopped, start, {"Stopped", "Running"}),
    "stop": (running, stop, {"Running", "Stopped"}),
    "stop with egress": (with_egress, stop, {"Running", "Stopped"}),
    "close egress": (with_egress, close_egress, {"Running"}),
    "open egress": (with_closed_egress, open_egress, {"Running"}),
    "fork of one with closed egress": (with_closed_egress, fork, {"Running"}),
    "delete": (running, delete, {"Running", "gone"}),
    "standby": (running, standby, {"Running", "Standby"}),
    "restore": (in_standby, restore, {"Standby", "Running", "Stopped"}),
    "standby of one that packets wake": (with_wake, standby, {"Running", "Standby"}),
    "restore of one that packets wake": (in_standby_with_wake, restore, {"Standby", "Running", "Stopped"}),
    "delete of one that packets wake": (in_standby_with_wake, delete, {"Standby", "gone"}),
    "fork running": (running, fork, {"Running"}),
    "fork running to stopped": (running, fork_to_stopped, {"Running"}),
    "fork standby": (in_standby, fork, {"Standby"}),
    "snapshot": (running, snapshot, {"Running"}),
    "revert": (with_snapshot, revert, {"Stopped", "Standby"}),
    "fork from a pool": (with_pool, claim, {"Stopped"}),
    "delete a snapshot with a pool": (with_pool, delete_snapshot, {"Stopped"}),
    "attach": (with_volume, attach, {"Running"}),
    "detach": (with_attached, detach, {"Running"}),
    "create with ports": (nothing, create_with_ports, {"gone", "Running"}),
    "publish": (with_ports, publish, {"Running"}),
    "publish and start": (stopped_with_ports, publish_and_start, {"Stopped", "Running"}),
    "fork of one with ports": (with_ports, fork, {"Running"}),
}
"""Stopped after a crash in a restore: the guest ran on and then lost its VM, as in a power cut."""

ROLLED_BACK = {
    "create",
    "create with a pull",
    "create with ports",
    "publish",
    "close egress",
    "open egress",
    "start",
    "standby",
    "standby of one that packets wake",
    "fork standby",
    "attach",
}
"""Operations after whose failure everything is as before; the others go on (stop, delete) or have a point of no
return (a restored guest has run)."""


@pytest.mark.parametrize("case", CASES)
async def test_failed_at_every_effect(lab: Lab, case: str) -> None:
    """An effect that fails once is reported to the caller, or tried again; never half a state."""
    prepare, act, allowed = CASES[case]
    async with lab.running() as instances:
        for moment in range(1000):
            lab.disarm()
            await prepare(lab, instances)
            before_world, before_rows = lab.world_as_text(), rows(lab.store)
            lab.fail_at(moment)
            failed = False
            try:
                await act(lab, instances)
            except (HostFailed, HypemanError):
                failed = True
            if lab.bomb.count <= moment:
                lab.disarm()
                await settled(instances, "one")
                await pools_ready(instances)
                check_owned(lab, f"{case} without a failure")
                break
            where = f"moment {moment}, {lab.bomb.where}, of {case}"
            lab.disarm()
            state = await settled(instances, "one")
            assert state in allowed, f"{state} after {where}"
            await pools_ready(instances)
            await nothing_in_progress(lab, where)  # otherwise the VM below would not be compared with the record
            if failed and case in ROLLED_BACK:
                assert lab.world_as_text() == before_world, where
                assert rows(lab.store) == before_rows, where
            check_owned(lab, where)
            await clean_up(lab, instances)
    assert moment > 1


@pytest.mark.parametrize("case", CASES)
async def test_crashed_at_every_effect(lab: Lab, case: str) -> None:
    """The server dies there; the next one finds the old state or the new one, and nothing without an owner."""
    prepare, act, allowed = CASES[case]
    moment = 0
    while True:
        async with lab.running() as instances:
            await prepare(lab, instances)
            lab.crash_at(moment)
            with contextlib.suppress(HypemanError):
                await act(lab, instances)
        if not lab.bomb.dead:
            break
        where = f"moment {moment}, {lab.bomb.where}, of {case}"
        async with lab.running() as instances:
            state = await settled(instances, "one")
            assert state in allowed, f"{state} after {where}"
            await nothing_in_progress(lab, where)
            await lab.snapshots(instances).start()
            await pools_ready(instances)
            check_owned(lab, where, crashed=True)
            await clean_up(lab, instances)
        moment += 1
    assert moment > 3
    print(f"\n{case}: crashed at {moment} moments")


ENDED = ("create", "start", "stop", "delete", "standby", "restore", "attach", "detach", "fork standby")


@pytest.mark.parametrize("case", ENDED)
async def test_ended_at_every_effect(lab: Lab, case: str) -> None:
    """The server is ended there, so its tasks are cancelled and undo what they can: nothing that was committed is
    undone, and what was not is not left."""
    prepare, act, allowed = CASES[case]
    moment, ended = 0, True
    while ended:
        async with lab.running() as instances:
            await prepare(lab, instances)
            lab.end_at(moment)
            with contextlib.suppress(HypemanError):
                await act(lab, instances)
            ended = lab.bomb.count > moment
        where = f"moment {moment}, {lab.bomb.where}, of {case}"
        async with lab.running() as instances:
            state = await settled(instances, "one")
            assert state in allowed, f"{state} after {where}"
            await nothing_in_progress(lab, where)
            check_owned(lab, where, crashed=True)
            await clean_up(lab, instances)
        moment += 1
    assert moment > 3


REPEATED = {
    "start": ("start_instance", {"Running"}),
    "stop": ("stop_instance", {"Stopped"}),
    "standby": ("standby_instance", {"Standby"}),
    "restore": ("restore_instance", {"Running"}),
    "attach": ("attach_volume", {"Running"}),
    "revert": ("restore_snapshot", {"Standby"}),
}
"""Operations without an object of their own: their names in the API, and the states that they end in."""


@pytest.mark.parametrize("case", REPEATED)
async def test_a_call_with_a_key_acts_once_though_the_server_dies_at_any_effect(lab: Lab, case: str) -> None:
    """After each crash, either the log says that the call was done, or it can be carried out now."""
    prepare, act, _ = CASES[case]
    operation, ends = REPEATED[case]
    moment, found = 0, set()
    while True:
        call = f"{case} {moment}"
        async with lab.running() as instances:
            await prepare(lab, instances)
            lab.crash_at(moment)
            with contextlib.suppress(HypemanError), acting(Actor("tester", call=call)):
                await act(lab, instances)
        if not lab.bomb.dead:
            break
        where = f"moment {moment}, {lab.bomb.where}, of {case}"
        async with lab.running() as instances:
            state = await settled(instances, "one")
            await nothing_in_progress(lab, where)
            logged = lab.store.read(lambda txn: read_after(txn, 0, 1_000_000))
            done = changed_by(operation, [one for one in logged if one.actor and one.actor.call == call])
            found.add(done is not None)
            if done is not None:
                assert done == (Kind.INSTANCE, instances.board.find("one").id), where
                assert state in ends, f"{state} after {where}"
            elif (case, state) != ("restore", "Stopped"):  # the guest ran and was lost, as in a power cut
                await act(lab, instances)
                assert await settled(instances, "one") in ends, where
            await clean_up(lab, instances)
        moment += 1
    assert found == {True, False}, "both happen, or it shows nothing"


Spoil = Callable[[Lab, InstanceRecord], Awaitable[object]]


async def record_says_paused(lab: Lab, record: InstanceRecord) -> None:
    """As a failed resume would leave it that forgot its record: the VM runs."""
    paused = msgspec.structs.replace(record, state=InstanceState.PAUSED)
    await lab.store.write(lambda txn: txn.put(INSTANCES, record.id, paused))


async def vm_is_paused(lab: Lab, record: InstanceRecord) -> None:
    lab.machine.of(record.id).state = VmmState.PAUSED


async def workload_is_frozen(lab: Lab, record: InstanceRecord) -> None:
    lab.machine.of(record.id).memory.frozen = True


async def link_is_down(lab: Lab, record: InstanceRecord) -> None:
    lab.machine.of(record.id).links["net0"] = False


@pytest.mark.parametrize("spoil", [record_says_paused, vm_is_paused, workload_is_frozen, link_is_down])
async def test_a_vm_that_is_not_as_recorded_is_noticed(lab: Lab, spoil: Spoil) -> None:
    """Otherwise an operation that undoes half of its work would pass the matrix."""
    async with lab.running() as instances:
        await running(lab, instances)
        check_owned(lab, "before")
        await spoil(lab, instances.board.find("one"))
        with pytest.raises(AssertionError, match="the record says"):
            check_owned(lab, "spoiled")


async def test_a_state_that_is_not_in_the_table_is_noticed(lab: Lab) -> None:
    """A resume that fails must not leave Paused in the record, for example."""
    with pytest.raises(ExceptionGroup) as caught:
        async with lab.running() as instances:
            await running(lab, instances)

            async def pause(owned: Owned) -> None:
                await owned.save(owned.entered(owned.record, InstanceState.PAUSED))

            await instances.tasks.of("one").perform(None, pause)
    assert caught.group_contains(AssertionError, match="Running to Paused")
