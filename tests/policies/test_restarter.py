"""Restart policies carried out on instances in memory, across servers."""

from __future__ import annotations

import pytest
import trio
from trio.abc import Clock

from hypeman.errors import InvalidState
from hypeman.guest.types import Exited
from hypeman.hypervisor.interface import ExitReason, LaunchFailed
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    InstanceState,
    NetworkRequest,
    RestartMode,
    RestartPolicy,
    RestartStatus,
    StandbyInstanceRequest,
    StartInstanceRequest,
    UpdateInstanceRequest,
)
from hypeman.network.addressing import Subnet
from hypeman.policies import rows
from tests.instances.fake_world import FakeNetwork, request
from tests.policies.keeping import ClockedLab, Kept, keeping
from tests.policies.test_waker import packet

ALWAYS = RestartPolicy(policy=RestartMode.ALWAYS, backoff="5s")
STOPPED, RUNNING, STANDBY = InstanceState.STOPPED, InstanceState.RUNNING, InstanceState.STANDBY


async def status(kept: Kept, name: str = "one") -> RestartStatus:
    shown = (await kept.instances.get(name)).restart_status
    assert isinstance(shown, RestartStatus)
    return shown


async def make(kept: Kept, policy: RestartPolicy = ALWAYS, name: str = "one") -> None:
    network = NetworkRequest(enabled=False)  # the lab has few addresses
    await kept.instances.create(request(name, restart_policy=policy, network=network))
    await kept.until_state(RUNNING, name)


async def test_it_is_started_again_after_its_end(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.end(7)
        await kept.until(lambda: kept.policies._restarter._memories != {})
        waiting = await status(kept)
        assert waiting.next_attempt_at is not None and waiting.attempts == 0
        ended = kept.record().stopped_at
        assert ended is not None and (waiting.next_attempt_at - ended).total_seconds() == 5
        await kept.until_state(RUNNING, boots=2)
        assert (await status(kept)).attempts == 1
        assert kept.events("restarting") == [("restarting", {"action": "start", "reason": "ended", "attempts": 1})]
        await kept.until(lambda: lab.now().timestamp() > ended.timestamp() + 700)
        assert (await status(kept)).attempts == 0, "it is stable"
        assert b'"restart_status"' in await kept.instances.list(None, {})


async def test_success_ends_on_failure(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept, RestartPolicy(policy=RestartMode.ON_FAILURE))
        await kept.end(0)
        await kept.sleep(400)
        assert kept.record().state is STOPPED
        await kept.instances.start("one", StartInstanceRequest())
        await kept.until_state(RUNNING)
        await kept.end(1)
        await kept.until_state(RUNNING, boots=3)


async def test_a_stop_is_final_also_while_it_waits(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.instances.stop("one")
        await kept.sleep(400)
        assert kept.record().state is STOPPED
        assert (await status(kept)).blocked_reason == "manual_stop"
        with pytest.raises(InvalidState):
            await kept.instances.stop("one")
        await kept.instances.start("one", StartInstanceRequest())
        await kept.until_state(RUNNING)
        assert (await status(kept)).blocked_reason is None
        await kept.end(1)
        await kept.instances.stop("one")  # it waits for its backoff
        await kept.sleep(400)
        assert kept.record().state is STOPPED and kept.record().boots == 2


async def test_a_start_by_hand_begins_anew(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept, RestartPolicy(policy=RestartMode.ALWAYS, max_attempts=1))
        await kept.end(1)
        await kept.until_state(RUNNING, boots=2)
        await kept.end(1)
        await kept.sleep(400)
        assert kept.record().state is STOPPED
        assert (await status(kept)).blocked_reason == "max_attempts_exceeded"
        await kept.instances.start("one", StartInstanceRequest())
        await kept.until_state(RUNNING, boots=3)
        await kept.end(1)
        await kept.until_state(RUNNING, boots=4)


async def test_a_policy_that_comes_later_applies(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await kept.instances.create(request("one"))
        await kept.until_state(RUNNING)
        await kept.end(1)
        await kept.sleep(100)
        assert kept.record().state is STOPPED
        await kept.instances.update("one", UpdateInstanceRequest(restart_policy=ALWAYS))
        await kept.until_state(RUNNING, boots=2)


async def test_a_start_that_fails_is_tried_again(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        lab.driver.fail("launch", error=LaunchFailed("not now"))
        await kept.end(1)
        await kept.until_state(RUNNING, boots=2)
        assert (await status(kept)).attempts == 2
        assert [action for action, _ in kept.events("restarting", "restart_failed")] == [
            "restarting", "restart_failed", "restarting",
        ]  # fmt: skip
        assert kept.events("restart_failed") == [("restart_failed", {"error": "not now"})]


async def test_the_backoff_survives_the_server(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept, RestartPolicy(policy=RestartMode.ALWAYS, backoff="1000s"))
        await kept.end(1)
        await kept.until(lambda: kept.policies._restarter._memories != {})
        due = (await status(kept)).next_attempt_at
        assert due is not None
    async with keeping(lab) as kept:
        assert (await status(kept)).next_attempt_at == due
        await kept.until_state(RUNNING, boots=2)
        assert lab.now() >= due


async def test_after_a_reboot_of_the_host(lab: ClockedLab, clock: Clock) -> None:
    """Those with a policy come back at once, a few at a time."""
    async with keeping(lab) as kept:
        for number in range(12):
            await make(kept, name=f"vm{number}")
    reboot(lab)
    begin = lab.now()
    async with keeping(lab) as kept:
        for number in range(12):
            await kept.until_state(RUNNING, f"vm{number}")
            assert (await status(kept, f"vm{number}")).attempts == 0
        assert (lab.now() - begin).total_seconds() < 5, "no backoff after a reboot"


def reboot(lab: ClockedLab) -> None:
    """The server has ended already."""
    lab.boot_id = "another boot"
    for process in list(lab.machine.alive()):
        process.end(ExitReason.KILLED)
    lab.network.taps.there.clear()
    lab.network.held.there.clear()


async def test_a_reboot_with_all_policies_and_states(
    lab: ClockedLab, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeNetwork, "subnet", Subnet.parse("10.0.0.0/24"))
    slow = RestartPolicy(policy=RestartMode.ON_FAILURE, backoff="1000s")
    once = RestartPolicy(policy=RestartMode.ALWAYS, backoff="1s", max_attempts=1)
    failures = RestartPolicy(policy=RestartMode.ON_FAILURE)
    policies = {
        "always": ALWAYS, "on-failure": failures, "never": RestartPolicy(), "none": None, "stopped": ALWAYS,
        "asleep": ALWAYS, "entering": ALWAYS, "waking": ALWAYS, "done": failures, "failed": slow, "ending": failures,
        "exhausted": once,
    }  # fmt: skip
    awake = AutoStandbyPolicy(enabled=True, idle_timeout="24h")
    async with keeping(lab) as kept, trio.open_nursery() as nursery:
        for name, policy in policies.items():
            await kept.instances.create(request(name, restart_policy=policy, auto_standby=awake))
            await kept.until_state(RUNNING, name)
        await kept.instances.stop("stopped")
        for name in ("asleep", "waking"):
            await kept.instances.standby(name, StandbyInstanceRequest())
        await kept.end(0, "done")
        await kept.end(1, "exhausted")
        await kept.until_state(RUNNING, "exhausted", boots=2)
        await kept.end(1, "exhausted")
        await kept.end(1, "failed")
        lab.guests[kept.record("ending").id].tell(Exited(0, 0))
        await kept.until_state(InstanceState.SHUTDOWN, "ending")
        lab.driver.hang("capture")
        nursery.start_soon(kept.instances.standby, "entering", StandbyInstanceRequest())
        lab.driver.hang("restore")
        nursery.start_soon(kept.instances.restore, "waking")
        await kept.quiet()
        nursery.cancel_scope.cancel()
    reboot(lab)
    async with keeping(lab) as kept:
        await kept.sleep(100)
        states = {name: kept.record(name).state for name in policies}
        assert {name for name, state in states.items() if state is RUNNING} == {"always", "on-failure", "entering"}
        assert {name for name, state in states.items() if state is STANDBY} == {"asleep", "waking"}
        assert {name for name, state in states.items() if state is STOPPED} == (
            {"never", "none", "stopped", "done", "failed", "ending", "exhausted"}
        )
        assert kept.record("never").exit_message == "the host rebooted while the VM ran"
        assert (await status(kept, "exhausted")).blocked_reason == "max_attempts_exceeded"
        assert (await status(kept, "stopped")).blocked_reason == "manual_stop"
        assert set(lab.network.held.there) == {kept.record(name).id for name in ("asleep", "waking")}
        for name in ("asleep", "waking"):
            lab.network.waking.on_arrival(kept.record(name).id, packet())
            await kept.until_state(RUNNING, name)
        await kept.until_state(RUNNING, "failed")
        assert (await status(kept, "failed")).attempts == 1


async def test_rows_go_with_the_instance(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.end(1)
        await kept.until_state(RUNNING, boots=2)
        assert lab.store.read(rows.remembered) == {kept.record().id}
        await kept.instances.delete("one")
        await kept.sleep(1)
        assert lab.store.read(rows.remembered) == set()
