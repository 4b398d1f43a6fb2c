"""Wakes of instances in memory: who wakes them, who does not, and what is reported."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import trio
from trio.abc import Clock

from hypeman.errors import HypemanError
from hypeman.guest.failures import GuestLost
from hypeman.hypervisor.interface import ExitReason, LaunchFailed
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    InstanceState,
    LastWake,
    RestartMode,
    RestartPolicy,
    StandbyInstanceRequest,
    UpdateInstanceRequest,
    WakeOn,
)
from hypeman.network.asleep import Arrival, parse
from hypeman.policies.waker import RETRY
from tests.instances.fake_world import FakeGuest, request
from tests.network import frames
from tests.network.frames import TCP
from tests.policies.keeping import ClockedLab, Kept, keeping

RUNNING, STANDBY, STOPPED = InstanceState.RUNNING, InstanceState.STANDBY, InstanceState.STOPPED
POLICY = AutoStandbyPolicy(
    enabled=True, idle_timeout="1h", ignore_destination_ports=(9100,), ignore_source_cidrs=("10.9.0.0/16",)
)


def packet(port: int = 80, *, source: str = "192.0.2.1", flags: int = 0x02) -> Arrival:
    head = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 5 << 4, flags, 1024, 0, 0)
    arrival = parse(frames.ipv4(source, "10.0.0.2", TCP, head))
    assert arrival is not None
    return arrival


async def asleep(kept: Kept, policy: AutoStandbyPolicy | None = POLICY, **changes: Any) -> None:
    await kept.instances.create(request("one", auto_standby=policy, **changes))
    await kept.until_state(RUNNING)
    await kept.instances.standby("one", StandbyInstanceRequest())
    await kept.quiet()


def arrive(kept: Kept, **changes: Any) -> bool:
    """Whether a packet is held."""
    return kept.lab.network.waking.on_arrival(kept.record().id, packet(**changes))


async def last(kept: Kept) -> LastWake | None:
    return (await kept.policies.standby_status("one")).last_wake


async def test_a_packet_wakes(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await asleep(kept)
        assert lab.network.waking.is_held(kept.record().id)
        assert arrive(kept) and arrive(kept)
        await kept.until_state(RUNNING)
        assert not lab.network.waking.is_held(kept.record().id), "released with the restore"
        await kept.quiet()
        wake = await last(kept)
        assert wake is not None and wake.by == "tcp from 192.0.2.1 to port 80"
        assert kept.record().boots == 2
    async with keeping(lab) as kept:
        assert await last(kept) == wake


@pytest.mark.parametrize(
    "changes", [{"port": 9100}, {"source": "10.9.1.1"}, {"flags": 0x04}], ids=["port", "source", "reset"]
)
async def test_what_does_not_wake(lab: ClockedLab, clock: Clock, changes: dict[str, Any]) -> None:
    async with keeping(lab) as kept:
        await asleep(kept)
        assert not arrive(kept, **changes)
        await kept.sleep(10)
        assert kept.record().state is STANDBY


async def test_without_the_policy_nothing_is_held(lab: ClockedLab, clock: Clock) -> None:
    """Until the policy has it wake; then also one that is in standby already."""
    async with keeping(lab) as kept:
        await asleep(kept, None)
        assert not lab.network.waking.is_held(kept.record().id) and not arrive(kept)
        wake = AutoStandbyPolicy(wake=WakeOn.TRAFFIC)
        await kept.instances.update("one", UpdateInstanceRequest(auto_standby=wake))
        await kept.sleep(1)
        assert lab.network.waking.is_held(kept.record().id)
        await kept.instances.update("one", UpdateInstanceRequest(auto_standby=AutoStandbyPolicy(wake=WakeOn.NONE)))
        await kept.sleep(1)
        assert not lab.network.waking.is_held(kept.record().id)


async def test_a_wake_that_fails_is_told_and_not_repeated_at_once(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await asleep(kept)
        lab.driver.fail("restore", LaunchFailed("no memory"))
        assert arrive(kept)
        await kept.quiet()
        assert kept.record().state is STANDBY and lab.network.waking.rejected == [kept.record().id]
        wake = await last(kept)
        assert wake is not None and wake.error == "no memory"
        assert not arrive(kept) and len(lab.network.waking.refused) == 1
        await kept.sleep(6)
        assert arrive(kept)
        await kept.until_state(RUNNING)


async def die(guest: FakeGuest, **identity: object) -> None:
    guest._process.end(ExitReason.KILLED)
    raise GuestLost("the connection to the guest has ended")


async def test_a_failure_is_forgotten_once_it_runs_again(
    lab: ClockedLab, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its VMM dies as it is woken; the restart policy brings it back within a second, and it is put in standby again:
    packets wake it from that, however short the time since."""
    async with keeping(lab) as kept:
        again = RestartPolicy(policy=RestartMode.ALWAYS, backoff="1s")
        await asleep(kept, restart_policy=again)
        with monkeypatch.context() as patch:
            patch.setattr(FakeGuest, "set_identity", die)
            assert arrive(kept)
            await kept.until_state(STOPPED)
        begin = clock.current_time()
        await kept.until_state(RUNNING)
        await kept.instances.standby("one", StandbyInstanceRequest())
        assert clock.current_time() - begin < RETRY
        assert arrive(kept) and not lab.network.waking.refused
        await kept.until_state(RUNNING)
        wake = await last(kept)
        assert wake is not None and not wake.error


@pytest.mark.parametrize(("wake", "wakes"), [(WakeOn.ALL, True), (WakeOn.TRAFFIC, False), (WakeOn.NONE, False)])
async def test_requests_wake_if_the_policy_says_so(lab: ClockedLab, clock: Clock, wake: WakeOn, wakes: bool) -> None:
    async with keeping(lab) as kept:
        await asleep(kept, AutoStandbyPolicy(enabled=True, wake=wake))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(use, kept)
        assert (kept.record().state is RUNNING) is wakes
        woken = await last(kept)
        assert (woken.by if woken is not None else None) == ("exec" if wakes else None)
        assert kept.record().boots == (2 if wakes else 1)


async def use(kept: Kept) -> None:
    async with kept.policies.using("one", "exec"):
        await trio.lowlevel.checkpoint()


async def test_a_request_gets_the_error(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await asleep(kept, AutoStandbyPolicy(enabled=True, wake=WakeOn.ALL))
        lab.driver.fail("restore", LaunchFailed("no memory"))
        with pytest.raises(HypemanError, match="no memory"):
            async with kept.policies.using("one", "exec"):
                raise AssertionError("it does not run")


async def test_a_packet_while_it_is_saved(lab: ClockedLab, clock: Clock) -> None:
    """It is held from before the capture on, and woken as soon as the capture is whole."""
    async with keeping(lab) as kept:
        await kept.instances.create(request("one", auto_standby=POLICY))
        await kept.until_state(RUNNING)
        guest = lab.guests[kept.record().id]
        guest.stuck.add("freeze")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(standby_or_not, kept)
            await guest.asked.wait()
            assert lab.network.waking.is_held(kept.record().id)
            assert arrive(kept)
            await kept.sleep(60)
        await kept.until_state(RUNNING)
        assert not lab.network.waking.is_held(kept.record().id)


async def standby_or_not(kept: Kept) -> None:
    try:
        await kept.instances.standby("one", StandbyInstanceRequest())
    except HypemanError:
        return


async def test_a_stop_or_delete_releases(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await asleep(kept)
        await kept.instances.delete("one")
        await kept.quiet()
        assert not lab.network.held.there and not lab.network.taps.there
