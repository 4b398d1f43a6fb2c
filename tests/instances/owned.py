"""Whether everything outside of the store belongs to a record inside of it, and is in the state that it claims."""

from __future__ import annotations

import trio

from hypeman.captures import records as captures
from hypeman.captures.records import CAPTURES
from hypeman.events.log import read_after
from hypeman.hypervisor.interface import VmmState
from hypeman.images.records import HOLDERS
from hypeman.instances.model.types import (
    InstanceState,
)
from hypeman.instances.rows import INSTANCES, INTENTS, MEMBERS, NUMBERS, SNAPSHOTS
from hypeman.network.leases import all_leases
from hypeman.resources.accounting import HOLDINGS, pool_holder
from hypeman.store import Store
from hypeman.volumes.records import ATTACHMENTS
from tests.instances.fake_world import Lab, policy_text, tap_text


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
    assert states_by_events(lab) == {i: row.state.value for i, row in records.items()}, where


def states_by_events(lab: Lab) -> dict[str, object]:
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
