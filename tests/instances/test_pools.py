"""Pools of snapshots on a host in memory: what a member is, what a claim makes of it, and when it gives way.

That nothing is left after a failure or a crash at any moment is shown by test_lifecycle.py ("fork from a pool").
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import trio

from hypeman.errors import Conflict, InsufficientResources, InvalidRequest, NameConflict, NotFound, NotSupported
from hypeman.events.log import read_after
from hypeman.hypervisor.interface import ExitReason, VmmGone
from hypeman.instances import pools
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    SetSnapshotPoolRequest,
    SnapshotKind,
)
from hypeman.instances.model.types import InstanceState, StandbyInstanceRequest, TargetState
from hypeman.instances.rows import MEMBERS
from hypeman.instances.service import Instances
from hypeman.network.leases import all_leases
from hypeman.paths import Paths
from hypeman.resources.accounting import Limits, totals
from hypeman.saga import carry_out
from hypeman.store import Store
from tests.instances.fake_world import HostFailed, Lab, request
from tests.instances.owned import check_owned
from tests.instances.situations import MEMBER, clean_up, lab, pool_size, pools_ready, settled, with_snapshot

__all__ = ["lab"]
GUEST = 64 << 20


async def fork(lab: Lab, instances: Instances, snapshot: str, name: str) -> str:
    made = await lab.snapshots(instances).fork(snapshot, ForkSnapshotRequest(name=name))
    assert made.state is InstanceState.RUNNING
    return made.id


async def member_ready(lab: Lab, instances: Instances, size: int = 1) -> str:
    """With one stopped instance; returns the snapshot's id."""
    await with_snapshot(lab, instances)
    return await pool_size(lab, instances, size)


async def test_a_claim_makes_the_member_an_instance_of_its_own(lab: Lab) -> None:
    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances)
        (member,) = lab.store.read(lambda txn: list(txn.keys(MEMBERS)))
        warmed = lab.guests[member].identity
        assert len(warmed["machine_id"]) == 32
        assert {record.name for record in instances.board.records()} == {"one"}, "a member is no instance"
        restores = [line for line in lab.machine.journal if line.startswith("restore ")]

        made = await fork(lab, instances, snapshot, "two")
        assert made == member
        identity = lab.guests[member].identity
        assert identity["hostname"] == "two" and identity["network"] == warmed["network"]
        assert identity["entropy"] != warmed["entropy"] and identity["clock_ns"] > warmed["clock_ns"]
        assert restores == [f"restore {member}"], "the claim has restored nothing"
        await pools_ready(instances)
        check_owned(lab, "after a claim and its refill")
        assert lab.store.read(lambda txn: list(txn.keys(MEMBERS))) != [member]

        fresh = lab.guests[next(iter(lab.store.read(lambda txn: list(txn.keys(MEMBERS)))))].identity
        assert fresh["machine_id"] != warmed["machine_id"] and fresh["network"].address != warmed["network"].address
        created = [e for e in lab.store.read(lambda txn: read_after(txn, 0, 1000)) if e.object.id == made]
        assert [e.type for e in created] == ["instance.created"]
        assert created[0].data == {
            "image": "busybox", "state": "Running", "forked_from": instances.board.find("one").id,
            "snapshot": snapshot, "pool": "true",
        }  # fmt: skip
        await instances.standby("two", StandbyInstanceRequest())
        await instances.restore("two")
        await clean_up(lab, instances)


async def test_forks_without_a_ready_member_are_made_anew(lab: Lab) -> None:
    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances)
        async with trio.open_nursery() as nursery:
            for name in ("two", "three"):
                nursery.start_soon(fork, lab, instances, snapshot, name)
        stopped = ForkSnapshotRequest(name="four", target_state=TargetState.STANDBY)
        await lab.snapshots(instances).fork(snapshot, stopped)
        await pools_ready(instances)
        check_owned(lab, "after three forks")
        await clean_up(lab, instances)


async def test_a_taken_name_leaves_the_member(lab: Lab) -> None:
    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances)
        before = lab.world_as_text()
        with pytest.raises(NameConflict):
            await fork(lab, instances, snapshot, "one")
        await pools_ready(instances)
        assert lab.world_as_text() == before
        await fork(lab, instances, snapshot, "two")
        await clean_up(lab, instances)


async def test_a_member_whose_vmm_ends_is_replaced(lab: Lab) -> None:
    async with lab.running() as instances:
        await member_ready(lab, instances)
        (before,) = lab.store.read(lambda txn: list(txn.keys(MEMBERS)))
        lab.machine.of(before).end(ExitReason.KILLED)
        with trio.fail_after(10):
            while before in lab.store.read(lambda txn: list(txn.keys(MEMBERS))):
                await trio.sleep(0.001)
        await pools_ready(instances)
        check_owned(lab, "after the end of a member's VMM")
        await clean_up(lab, instances)


async def test_a_member_that_dies_while_it_is_claimed_leaves_nothing(lab: Lab) -> None:
    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances)
        (member,) = lab.store.read(lambda txn: list(txn.keys(MEMBERS)))
        lab.machine.of(member).end(ExitReason.KILLED)
        with pytest.raises(VmmGone):
            await fork(lab, instances, snapshot, "two")
        with pytest.raises(NotFound):
            instances.board.find("two")
        assert member not in lab.store.read(lambda txn: list(txn.keys(MEMBERS)))
        await pools_ready(instances)
        check_owned(lab, "after a claim that failed")
        await clean_up(lab, instances)


async def test_members_hold_what_they_use_and_give_way_to_instances(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances, 2)
        assert lab.store.read(totals).memory == 2 * MEMBER
        shown = await lab.snapshots(instances).get_pool(snapshot)
        assert (shown.size, shown.ready, shown.memory_bytes, shown.error) == (2, 2, 2 * MEMBER, None)

        monkeypatch.setattr(pools, "RETRY_FIRST", 1000.0)
        instances.pools._pools[snapshot]._pause = 1000.0
        lab.limits = Limits(memory=MEMBER + GUEST)
        await instances.create(request("small"))
        assert await settled(instances, "small") == "Running"
        assert lab.store.read(totals).memory == MEMBER + GUEST, "only as much as was needed"
        shown = await lab.snapshots(instances).get_pool(snapshot)
        assert shown.ready == 1 and shown.error == "an instance needed its memory"

        with pytest.raises(InsufficientResources, match="memory"):
            await instances.create(request("large", size="1GB"))
        assert (await lab.snapshots(instances).get_pool(snapshot)).ready == 1, "in vain, so it was not given up"
        check_owned(lab, "a pool that gave way")

        lab.limits = Limits(memory=2 * GUEST)
        await fork(lab, instances, snapshot, "two")
        assert lab.store.read(totals).memory == 2 * GUEST
        lab.limits = Limits()
        await clean_up(lab, instances)


async def test_a_member_that_is_being_weighed_counts_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    weighing, go_on = trio.Event(), threading.Event()

    def wait(pid: int) -> int:
        trio.from_thread.run_sync(weighing.set)
        assert go_on.wait(30)
        return 0

    async with lab.running() as instances:
        await with_snapshot(lab, instances)
        monkeypatch.setattr(pools, "read_pss", wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool_size, lab, instances, 1)
            with trio.fail_after(10):
                await weighing.wait()
            held = lab.store.read(totals).memory
            lab.limits = Limits(memory=held)
            try:
                with trio.fail_after(5), pytest.raises(InsufficientResources, match="memory"):
                    await instances.create(request("large", size=str(2 * held)))
                assert lab.machine.alive(), "in vain, so it was not given up"
            finally:
                go_on.set()
        lab.limits = Limits()
        await clean_up(lab, instances)


async def test_members_give_their_addresses_to_instances(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances, 4)
        assert len(lab.store.read(all_leases)) == 5, "all that the subnet has"
        instances.pools._pools[snapshot]._pause = 1000.0
        await instances.create(request("two"))
        assert (await lab.snapshots(instances).get_pool(snapshot)).error == "an instance needed its addresses"
        assert await settled(instances, "two") == "Running"
        check_owned(lab, "an address that a member had")
        await clean_up(lab, instances)


async def test_a_member_that_cannot_be_removed_is_tried_again_with_pauses(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[object] = []

    async def fail(*given: object) -> None:
        attempts.append(given)
        raise HostFailed("it does not go away")

    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances)
        with monkeypatch.context() as patch:
            patch.setattr(pools, "take_back", fail)
            patch.setattr(pools, "RETRY_FIRST", 1000.0)
            await lab.snapshots(instances).delete_pool(snapshot)
            with trio.fail_after(60):
                while not attempts:
                    await trio.sleep(0.001)
            for _ in range(1000):
                await trio.lowlevel.checkpoint()
            assert len(attempts) <= 3, "at once, when the deletion is reported, and then after a pause"
        instances.pools._work.set()
        with trio.fail_after(10):
            while lab.machine.alive():
                await trio.sleep(0.001)
        await clean_up(lab, instances)


async def test_a_member_whose_row_could_not_be_removed_is_not_forgotten(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [HostFailed("no restore"), HostFailed("no write")]

    def failing_once(work: Callable[..., Awaitable[None]], failure: HostFailed) -> Callable[..., Awaitable[None]]:
        async def carry(*given: object) -> None:
            if failure in failures:
                failures.remove(failure)
                raise failure
            await work(*given)

        return carry

    async with lab.running() as instances:
        monkeypatch.setattr(pools, "RETRY_FIRST", 0.001)
        monkeypatch.setattr(pools, "carry_out", failing_once(carry_out, failures[0]))
        ledger = instances.ledger
        monkeypatch.setattr(ledger, "remove_member", failing_once(ledger.remove_member, failures[1]))
        await member_ready(lab, instances)
        assert not failures and len(lab.store.read(lambda txn: list(txn.keys(MEMBERS)))) == 1
        check_owned(lab, "after a fill whose undo was not written down")
        await clean_up(lab, instances)


async def test_a_smaller_pool_and_none(lab: Lab) -> None:
    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances, 2)
        await pool_size(lab, instances, 1)
        with trio.fail_after(10):
            while len(lab.machine.alive()) > 1:
                await trio.sleep(0.001)
        snapshots = lab.snapshots(instances)
        await snapshots.delete_pool(snapshot)
        assert not lab.machine.alive(), "at once"
        assert (await snapshots.get_pool(snapshot)).size == 0
        sizes = [e.data for e in lab.store.read(lambda txn: read_after(txn, 0, 1000)) if e.type == "snapshot.pool_set"]
        assert sizes == [{"size": 2}, {"size": 1}, {"size": 0}]
        await clean_up(lab, instances)


async def test_a_snapshot_that_is_read_keeps_its_pool(lab: Lab) -> None:
    async with lab.running() as instances:
        snapshot = await member_ready(lab, instances)
        snapshots = lab.snapshots(instances)
        snapshots._readers[snapshot] = 1
        with pytest.raises(Conflict):
            await snapshots.delete(snapshot)
        await pools_ready(instances)
        assert (await snapshots.get_pool(snapshot)).ready == 1
        await clean_up(lab, instances)


async def test_the_next_server_fills_the_pool_anew(lab: Lab) -> None:
    async with lab.running() as instances:
        await member_ready(lab, instances)
        (before,) = lab.store.read(lambda txn: list(txn.keys(MEMBERS)))
    async with lab.running() as instances:
        await pools_ready(instances)
        (after,) = lab.store.read(lambda txn: list(txn.keys(MEMBERS)))
        assert after != before
        check_owned(lab, "the next server")
        await clean_up(lab, instances)


async def test_what_cannot_have_a_pool(store: Store, paths: Paths, lab: Lab) -> None:
    async with lab.running() as instances:
        await with_snapshot(lab, instances)
        snapshots = lab.snapshots(instances)
        stopped = await snapshots.create("one", CreateSnapshotRequest(kind=SnapshotKind.STOPPED, name="s"))
        (made,) = await snapshots.list(source_instance_id=None, kind=SnapshotKind.STANDBY, name=None, tags={})
        one = SetSnapshotPoolRequest(size=1)
        with pytest.raises(NotFound):
            await snapshots.set_pool("none", one)
        with pytest.raises(InvalidRequest, match="Standby"):
            await snapshots.set_pool(stopped.id, one)
        lab.driver.adopt_capabilities(msgspec.structs.replace(lab.driver.capabilities, pause=False))
        with pytest.raises(NotSupported):
            await snapshots.set_pool(made.id, one)
        assert not lab.store.read(lambda txn: list(txn.keys(MEMBERS)))
        await clean_up(lab, instances)
