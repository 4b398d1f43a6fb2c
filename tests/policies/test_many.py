"""Many instances in memory that enter standby and wake at random, with faults and new servers in between: in the end
their states, VMMs, links, captures, addresses and the resources that they hold agree."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import pytest
import trio
from trio.abc import Clock

from hypeman.errors import HypemanError
from hypeman.hypervisor.interface import ExitReason, LaunchFailed, VmmBroken
from hypeman.instances.ledger import holding_of
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    InstanceState,
    RestartMode,
    RestartPolicy,
    StandbyInstanceRequest,
    WakeOn,
)
from hypeman.network.addressing import Subnet
from hypeman.network.leases import all_leases
from hypeman.resources.accounting import HOLDINGS, TOTALS
from tests.instances.fake_world import FakeNetwork, request
from tests.policies.keeping import ClockedLab, Kept, keeping
from tests.policies.test_waker import packet

Deed = Callable[[Kept, str], Awaitable[None]]
RUNNING, STANDBY = InstanceState.RUNNING, InstanceState.STANDBY
POLICY = AutoStandbyPolicy(enabled=True, idle_timeout="20s", wake=WakeOn.ALL)
AGAIN = RestartPolicy(policy=RestartMode.ALWAYS, backoff="1s")


@pytest.mark.parametrize(
    ("count", "servers", "seed"),
    [
        (10, 3, 1),
        (10, 3, 2),
        pytest.param(100, 2, 3, marks=pytest.mark.slow),
    ],  # the last one: over ten minutes of theirs
)
async def test_all_agrees_in_the_end(
    lab: ClockedLab, clock: Clock, monkeypatch: pytest.MonkeyPatch, count: int, servers: int, seed: int
) -> None:
    monkeypatch.setattr(FakeNetwork, "subnet", Subnet.parse("10.0.0.0/24"))
    chance = random.Random(seed)
    async with keeping(lab) as kept:
        for number in range(count):
            await kept.instances.create(request(f"vm{number}", auto_standby=POLICY, restart_policy=AGAIN))
        for number in range(count):
            await kept.until_state(RUNNING, f"vm{number}")
    woken = 0
    for _ in range(servers):
        async with keeping(lab) as kept, trio.open_nursery() as nursery:
            for _ in range(3 * count):
                nursery.start_soon(do, kept, f"vm{chance.randrange(count)}", chance.choice(DEEDS))
                await kept.sleep(chance.choice((0, 0, 0.5, 6)))
            woken = len(kept.events("woken"))
            nursery.cancel_scope.cancel()  # the server ends in the middle of it
    lab.driver.faults._planned.clear()
    async with keeping(lab) as kept:
        await kept.sleep(400)
        check_agreement(kept, count)
        assert woken > count and {record.state for record in kept.instances.board.records()} == {STANDBY}
        for number in range(0, count, 2):
            arrive(kept, f"vm{number}")
        await kept.quiet()
        check_agreement(kept, count)
        assert sum(record.state is RUNNING for record in kept.instances.board.records()) == count // 2


def arrive(kept: Kept, name: str) -> None:
    kept.lab.network.waking.on_arrival(kept.record(name).id, packet())


async def enter_standby(kept: Kept, name: str) -> None:
    await kept.instances.standby(name, StandbyInstanceRequest())


async def receive(kept: Kept, name: str) -> None:
    arrive(kept, name)


async def use(kept: Kept, name: str) -> None:
    async with kept.policies.using(name, "exec"):
        await trio.sleep(3)


async def connect(kept: Kept, name: str) -> None:
    lease = next(each for each in kept.lab.store.read(all_leases) if each.instance_id == kept.record(name).id)
    opened = kept.lab.connections.open(lease.ipv4)
    try:
        await trio.sleep(7)
    finally:
        kept.lab.connections.close(opened)


async def die(kept: Kept, name: str) -> None:
    for process in kept.lab.machine.alive():
        if process.config.instance_id == kept.record(name).id:
            process.end(ExitReason.KILLED)


async def break_something(kept: Kept, name: str, operation: str) -> None:
    error = VmmBroken("no room") if operation == "capture" else LaunchFailed("no memory")
    kept.lab.driver.fail(operation, error)


async def do(kept: Kept, name: str, deed: Deed) -> None:
    with suppress(HypemanError):
        await deed(kept, name)


DEEDS: list[Deed] = [
    *[enter_standby] * 6,
    *[receive] * 6,
    *[use] * 2,
    connect,
    die,
    partial(break_something, operation="restore"),
    partial(break_something, operation="capture"),
]


def check_agreement(kept: Kept, count: int) -> None:
    lab, records = kept.lab, list(kept.instances.board.records())
    running = {record.id for record in records if record.state is RUNNING}
    asleep = {record.id for record in records if record.state is STANDBY}
    assert running | asleep == {record.id for record in records} and len(records) == count
    assert sorted(each.config.instance_id for each in lab.machine.alive()) == sorted(running)
    assert set(lab.network.taps.there) == running and set(lab.network.held.there) == asleep
    captures = {path.name for path in (lab.paths.data_dir / "captures").iterdir()}
    assert captures == {record.capture for record in records if record.capture is not None} and len(captures) == len(
        asleep
    )
    leases = lab.store.read(all_leases)
    assert len({lease.ipv4 for lease in leases}) == len({lease.cid for lease in leases}) == len(leases) == count
    holdings = dict(lab.store.read(lambda txn: list(txn.scan(HOLDINGS))))
    for record in records:
        assert holdings[record.id] == holding_of(record, running=record.id in running), record.name
    totals = dict(lab.store.read(lambda txn: list(txn.scan(TOTALS))))
    assert sum(total.memory for total in totals.values()) == sum(holding.memory for holding in holdings.values())
