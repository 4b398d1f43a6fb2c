"""Every operation, failed and crashed at every effect: the old state or the new one, whole.

The host is in memory (fake_world.py), so all moments are visited in seconds. ``tests/real/test_kill.py``
does the same to a real server with real guests.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import trio
import trio.lowlevel

from hypeman.actor import Actor, acting
from hypeman.captures import records as captures
from hypeman.captures.records import CAPTURES
from hypeman.egress.types import AccessDefault
from hypeman.errors import (
    Conflict,
    HypemanError,
    InsufficientResources,
    InUse,
    InvalidRequest,
    InvalidState,
    NameConflict,
    NotFound,
)
from hypeman.events.log import read_after
from hypeman.events.types import Kind
from hypeman.guest.failures import GuestLost
from hypeman.guest.types import Exited
from hypeman.host.log_times import read_times
from hypeman.hypervisor.interface import ExitReason, VmmState
from hypeman.ids import STACK_TAG
from hypeman.images.records import HOLDERS
from hypeman.instances import pools
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.snapshot_types import (
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    RestoreSnapshotRequest,
    SetSnapshotPoolRequest,
    SnapshotKind,
)
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    AutoStandbyPolicy,
    EgressUpdate,
    ForkInstanceRequest,
    InstanceState,
    NetworkRequest,
    NetworkUpdate,
    RestartMode,
    RestartPolicy,
    StandbyInstanceRequest,
    StartInstanceRequest,
    StopInstanceRequest,
    TargetState,
    UpdateInstanceRequest,
    WakeOn,
)
from hypeman.instances.rows import INSTANCES, INTENTS, MEMBERS, NAMES, NUMBERS, POOLS, SNAPSHOTS
from hypeman.instances.service import Instances
from hypeman.network.leases import LEASES, PORTS, all_leases
from hypeman.network.types import PortMapping
from hypeman.paths import Paths
from hypeman.resources.accounting import HOLDINGS, Limits, Totals, pool_holder, totals
from hypeman.server.idempotency import changed_by
from hypeman.store import Store, Table, Txn
from hypeman.volumes.records import ATTACHMENTS, VOLUMES, VolumeRecord
from tests.instances.fake_world import Crash, HostFailed, Lab, policy_text, request, tap_text

RUNNING = InstanceState.RUNNING
MEMBER = 30 << 20
"""Bytes that a member of a pool uses."""


@pytest.fixture
def lab(store: Store, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(pools, "RETRY_FIRST", 0.001)
    monkeypatch.setattr(pools, "read_pss", lambda pid: MEMBER)
    return Lab(store, paths)


async def settled(instances: Instances, ref: str) -> str:
    """The state that the instance comes to rest in; "gone" if it is not there."""
    try:
        record = instances.board.find(ref)
        while record.state in (InstanceState.CREATED, InstanceState.INITIALIZING, InstanceState.SHUTDOWN):
            changed = await instances.board.wait_change(record)
            if changed is None:
                return "gone"
            record = changed
    except NotFound:
        return "gone"
    return record.state.value


async def until_state(instances: Instances, state: InstanceState, ref: str = "one") -> InstanceRecord:
    """The record of ``ref`` once it is in ``state``."""
    with trio.fail_after(60):
        while (record := instances.board.find(ref)).state is not state:
            await instances.board.wait_change(record)
    return record


def rows(store: Store) -> str:
    """What the store says, times and counters apart."""

    def read(txn: Txn) -> list[str]:
        lines = [
            f"{key} {row.state.value} {row.capture} {row.mapped} {row.handle is not None}"
            for key, row in txn.scan(INSTANCES)
        ]
        lines += [f"intent {key}" for key in txn.keys(INTENTS)]
        tables: tuple[Table[Any], ...] = (NAMES, LEASES, ATTACHMENTS, PORTS)
        for table in tables:
            lines += [f"{table.name} {key}" for key in txn.keys(table)]
        lines += [f"holding {key} {row}" for key, row in txn.scan(HOLDINGS)]
        return [*lines, str(totals(txn))]

    return "\n".join(store.read(read))


# ── Cases: how to get there, what to do, where it may end ────────────────────────────────────────


async def nothing(lab: Lab, instances: Instances) -> None:
    pass


async def running(lab: Lab, instances: Instances) -> None:
    await instances.create(request("one"))
    assert await settled(instances, "one") == "Running"


async def with_egress(lab: Lab, instances: Instances) -> None:
    from hypeman.instances.model.types import EgressRequest, NetworkRequest

    await instances.create(request("one", network=NetworkRequest(egress=EgressRequest(enabled=True))))
    assert await settled(instances, "one") == "Running"


async def stopped(lab: Lab, instances: Instances) -> None:
    await running(lab, instances)
    await instances.stop("one")


async def in_standby(lab: Lab, instances: Instances) -> None:
    await running(lab, instances)
    await instances.standby("one", StandbyInstanceRequest())


async def with_wake(lab: Lab, instances: Instances) -> None:
    await instances.create(request("one", auto_standby=AutoStandbyPolicy(wake=WakeOn.TRAFFIC)))
    assert await settled(instances, "one") == "Running"


async def in_standby_with_wake(lab: Lab, instances: Instances) -> None:
    await with_wake(lab, instances)
    await instances.standby("one", StandbyInstanceRequest())


async def with_volume(lab: Lab, instances: Instances) -> None:
    await running(lab, instances)
    row = VolumeRecord(id="vol", name="vol", size_gb=1, created_at=datetime.now(UTC))
    await lab.store.write(lambda txn: txn.put(VOLUMES, "vol", row))
    lab.paths.volume_disk("vol").parent.mkdir(parents=True, exist_ok=True)
    lab.paths.volume_disk("vol").write_bytes(b"x")


async def with_attached(lab: Lab, instances: Instances) -> None:
    await with_volume(lab, instances)
    await instances.attach_volume("one", "vol", AttachVolumeRequest(mount_path="/data"))


async def with_snapshot(lab: Lab, instances: Instances) -> None:
    await running(lab, instances)
    await lab.snapshots(instances).create("one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY))
    await instances.stop("one")


async def with_ports(lab: Lab, instances: Instances) -> None:
    await instances.create(request("one", ports=OLD_PORTS))
    assert await settled(instances, "one") == "Running"


async def stopped_with_ports(lab: Lab, instances: Instances) -> None:
    await with_ports(lab, instances)
    await instances.stop("one")


async def publish(lab: Lab, instances: Instances) -> None:
    await instances.update("one", UpdateInstanceRequest(ports=NEW_PORTS))


async def close_egress(lab: Lab, instances: Instances) -> None:
    await instances.update("one", UpdateInstanceRequest(network=NetworkUpdate(egress=EgressUpdate(default=CLOSED))))


async def with_closed_egress(lab: Lab, instances: Instances) -> None:
    await with_egress(lab, instances)
    await close_egress(lab, instances)


async def open_egress(lab: Lab, instances: Instances) -> None:
    await instances.update(
        "one", UpdateInstanceRequest(network=NetworkUpdate(egress=EgressUpdate(default=AccessDefault.ALLOW)))
    )


async def publish_and_start(lab: Lab, instances: Instances) -> None:
    await publish(lab, instances)
    await start(lab, instances)


async def create_with_ports(lab: Lab, instances: Instances) -> None:
    await instances.create(request("one", ports=NEW_PORTS))
    await settled(instances, "one")


async def create(lab: Lab, instances: Instances) -> None:
    await instances.create(request("one"))
    await settled(instances, "one")


async def without_image(lab: Lab, instances: Instances) -> None:
    lab.images.missing = True


async def start(lab: Lab, instances: Instances) -> None:
    await instances.start("one", StartInstanceRequest())
    await settled(instances, "one")


async def stop(lab: Lab, instances: Instances) -> None:
    await instances.stop("one")


async def delete(lab: Lab, instances: Instances) -> None:
    await instances.delete("one")


async def standby(lab: Lab, instances: Instances) -> None:
    await instances.standby("one", StandbyInstanceRequest())


async def restore(lab: Lab, instances: Instances) -> None:
    await instances.restore("one")


async def fork(lab: Lab, instances: Instances) -> None:
    await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))


async def fork_to_stopped(lab: Lab, instances: Instances) -> None:
    wanted = ForkInstanceRequest(name="two", from_running=True, target_state=TargetState.STOPPED)
    await instances.fork("one", wanted)


async def snapshot(lab: Lab, instances: Instances) -> None:
    await lab.snapshots(instances).create("one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY))


async def revert(lab: Lab, instances: Instances) -> None:
    snapshots = lab.snapshots(instances)
    (made,) = await snapshots.list(source_instance_id=None, kind=None, name=None, tags={})
    await snapshots.restore("one", made.id, RestoreSnapshotRequest(target_state=TargetState.STANDBY))


async def pool_size(lab: Lab, instances: Instances, size: int) -> str:
    """Set it for the one snapshot there is; returns when that many are ready."""
    snapshots = lab.snapshots(instances)
    (made,) = await snapshots.list(source_instance_id=None, kind=None, name=None, tags={})
    await snapshots.set_pool(made.id, SetSnapshotPoolRequest(size=size))
    await pools_ready(instances)
    return made.id


async def pools_ready(instances: Instances) -> None:
    """In the lab a fill takes no time, and one that failed is soon repeated."""
    with trio.fail_after(20):
        while any(number for (state,), number in instances.pools.counts().items() if state != "ready"):
            await trio.sleep(0.001)


async def with_pool(lab: Lab, instances: Instances) -> None:
    await with_snapshot(lab, instances)
    await pool_size(lab, instances, 1)


async def claim(lab: Lab, instances: Instances) -> None:
    """With the fill that follows it."""
    snapshots = lab.snapshots(instances)
    (made,) = await snapshots.list(source_instance_id=None, kind=None, name=None, tags={})
    await snapshots.fork(made.id, ForkSnapshotRequest(name="two"))
    await pools_ready(instances)


async def delete_snapshot(lab: Lab, instances: Instances) -> None:
    snapshots = lab.snapshots(instances)
    (made,) = await snapshots.list(source_instance_id=None, kind=None, name=None, tags={})
    await snapshots.delete(made.id)


async def attach(lab: Lab, instances: Instances) -> None:
    await instances.attach_volume("one", "vol", AttachVolumeRequest(mount_path="/data"))


async def detach(lab: Lab, instances: Instances) -> None:
    await instances.detach_volume("one", "vol")


CLOSED = AccessDefault.DENY
OLD_PORTS = (PortMapping(host_port=8080, guest_port=80), PortMapping(host_port=8081, guest_port=81))
NEW_PORTS = (PortMapping(host_port=8080, guest_port=8), PortMapping(host_port=9090, guest_port=90))

Act = Callable[[Lab, Instances], Awaitable[None]]

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

TAKEN_BACK = {
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
            if failed and case in TAKEN_BACK:
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


async def nothing_in_progress(lab: Lab, where: str) -> None:
    with trio.move_on_after(5):
        while store_intents(lab.store):
            await trio.sleep(0.01)
    assert not store_intents(lab.store), where


def store_intents(store: Store) -> list[str]:
    return store.read(lambda txn: list(txn.keys(INTENTS)))


VM_STATES = {
    InstanceState.RUNNING: (VmmState.RUNNING, False, True),
    InstanceState.PAUSED: (VmmState.PAUSED, True, True),
}
"""What the record's state requires of the VM: its state, whether the workload is frozen, whether the link is up."""


def check_owned(lab: Lab, where: str, *, crashed: bool = False) -> None:
    """Everything outside of the store belongs to an instance, capture or snapshot inside of it, and every VM and its
    guest are in the state that the record claims, unless an operation on it is under way."""
    records = {row.id: row for row in lab.store.read(lambda txn: [row for _, row in txn.scan(INSTANCES)])}
    members = lab.store.read(lambda txn: dict(txn.scan(MEMBERS)))
    assert not members.keys() & records.keys(), where
    awake = {i for i, row in records.items() if row.state not in (InstanceState.STOPPED, InstanceState.STANDBY)}
    alive = awake | members.keys()
    text = lab.world_as_text()
    assert {p.config.instance_id for p in lab.machine.alive()} == alive, f"{text}\n{where}"
    assert set(lab.network.taps.there) == alive, f"{text}\n{where}"
    recorded = {lease.instance_id: lease for lease in lab.store.read(all_leases)}
    assert lab.network.taps.there == {i: tap_text(recorded[i]) for i in alive}, f"{text}\n{where}"
    assert lab.leases.held == {i: lease.ports for i, lease in recorded.items() if lease.ports}, where
    asleep = {i for i, row in records.items() if row.state is InstanceState.STANDBY and row.spec.auto_standby}
    assert set(lab.network.held.there) == asleep, f"{text}\n{where}"
    assert set(lab.egress.policies.there) <= alive, f"{text}\n{where}"
    for path in (lab.paths.instances).glob("*"):
        assert path.name in records or path.name in members, f"{text}\n{where}"
    busy = set(store_intents(lab.store))
    for process in lab.machine.alive():
        if process.config.instance_id in members:
            kept = (process.state, process.memory.frozen, any(process.links.values()))
            assert kept == (VmmState.PAUSED, True, False), f"a member is {kept}\n{where}"
            continue
        record = records[process.config.instance_id]
        if record.id not in busy and (wanted := VM_STATES.get(record.state)) is not None:
            frozen = process.memory.frozen and not crashed  # the agent ends a freeze of a dead server by itself
            vm = (process.state, frozen, all(process.links.values()))
            assert vm == wanted, f"the record says {record.state}, the VM {vm}\n{where}"
            if record.spec.egress:
                assert lab.egress.policies.there.get(record.id) == policy_text(record), f"{text}\n{where}"
    for record in records.values():
        if record.id not in busy and record.state is not InstanceState.UNKNOWN:
            assert (record.handle is not None) == (record.id in awake), f"{record.state} {record.handle}\n{where}"
            assert (record.capture is not None) == (record.state is InstanceState.STANDBY), where
            assert record.mapped is None or record.id in awake, where
            assert (record.stopped_at is None) == (record.id in awake), where
    attached = lab.store.read(lambda txn: {(row.volume_id, row.instance_id) for _, row in txn.scan(ATTACHMENTS)})
    assert attached == {(mount.volume_id, row.id) for row in records.values() for mount in row.spec.volumes}, where
    snapshots = lab.store.read(lambda txn: dict(txn.scan(SNAPSHOTS)))
    holders = {(captures.of_snapshot(key), row.capture) for key, row in snapshots.items() if row.capture}
    for row in records.values():
        holders |= {(captures.of_instance(row.id), capture) for capture in (row.capture, row.mapped) if capture}
    holders |= {(captures.of_instance(i), row.record.capture) for i, row in members.items() if row.record.capture}
    held = lab.store.read(lambda txn: {(holder, key) for key, row in txn.scan(CAPTURES) for holder in row.holders})
    assert held == holders, where
    pinned = {row.id for row in records.values() if row.digest} | {captures.of_snapshot(key) for key in snapshots}
    assert lab.store.read(lambda txn: set(txn.keys(HOLDERS))) == pinned | members.keys(), where
    holding = lab.store.read(lambda txn: dict(txn.scan(HOLDINGS)))
    assert set(holding) == records.keys() | {pool_holder(row.snapshot, i) for i, row in members.items()}, where
    assert {i for i, h in holding.items() if h.vcpus} == awake, where
    numbers = lab.store.read(lambda txn: {txn.get(NUMBERS, key) for key in txn.keys(NUMBERS)})
    assert numbers == records.keys() | members.keys(), where
    assert told_states(lab) == {i: row.state.value for i, row in records.items()}, where


def told_states(lab: Lab) -> dict[str, object]:
    """The state of every instance, from nothing but the events."""
    states: dict[str, object] = {}
    for event in lab.store.read(lambda txn: read_after(txn, 0, 100_000)):
        about, data = event.object.id, event.data or {}
        match event.type:
            case "instance.created":
                assert about not in states
                states[about] = data["state"]
            case "instance.state_changed":
                assert states[about] == data["from"]
                states[about] = data["to"]
            case "instance.deleted":
                del states[about]
    return states


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


async def clean_up(lab: Lab, instances: Instances) -> None:
    """Delete everything; then nothing is left, in the store or outside."""
    for record in list(instances.board.records()):
        await instances.delete(record.id)
    snapshots = lab.snapshots(instances)
    await snapshots.start()
    for one in await snapshots.list(source_instance_id=None, kind=None, name=None, tags={}):
        await snapshots.delete(one.id)
    await lab.store.write(lambda txn: txn.delete(VOLUMES, "vol"))
    for leftover in lab.paths.tmp.glob("*"):  # app.py empties it at start
        await instances.machine.context.files.remove(leftover)
    left = "\n".join(line for line in lab.world_as_text().splitlines() if not line.startswith("instances .new"))
    assert left == "", left
    assert lab.store.read(totals) == Totals()
    tables: tuple[Table[Any], ...] = (LEASES, PORTS, NAMES, NUMBERS, ATTACHMENTS, HOLDERS, CAPTURES, MEMBERS, POOLS)
    assert not lab.store.read(lambda txn: [f"{table.name} {key}" for table in tables for key in txn.keys(table)])


# ── What happens by itself ───────────────────────────────────────────────────────────────────────


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


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────


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
