"""Situations of instances that tests begin with, operations on them, and waits: used by all suites that have a Lab."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import trio

from hypeman.captures.records import CAPTURES
from hypeman.egress.types import AccessDefault
from hypeman.errors import (
    NotFound,
)
from hypeman.images.records import HOLDERS
from hypeman.instances import pools
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
    StandbyInstanceRequest,
    StartInstanceRequest,
    TargetState,
    UpdateInstanceRequest,
    WakeOn,
)
from hypeman.instances.rows import INSTANCES, INTENTS, MEMBERS, NAMES, NUMBERS, POOLS
from hypeman.instances.service import Instances
from hypeman.network.leases import LEASES, PORTS
from hypeman.network.types import PortMapping
from hypeman.paths import Paths
from hypeman.resources.accounting import HOLDINGS, Totals, totals
from hypeman.store import Store, Table, Txn
from hypeman.volumes.records import ATTACHMENTS, VOLUMES, VolumeRecord
from tests.instances.fake_world import Lab, request

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


async def nothing(lab: Lab, instances: Instances) -> None:
    pass


async def running(lab: Lab, instances: Instances) -> None:
    await instances.create(request("one"))
    assert await settled(instances, "one") == "Running"


async def with_egress(lab: Lab, instances: Instances) -> None:
    from hypeman.instances.model.types import EgressRequest

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
