"""Auto-standby carried out on instances in memory, with a kernel's list of connections that tests fill."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.abc import Clock

from hypeman.errors import Conflict
from hypeman.hypervisor.interface import VmmBroken
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    AutoStandbyStatus,
    InstanceState,
    UpdateInstanceRequest,
)
from tests.instances.fake_world import request
from tests.policies.keeping import ClockedLab, Kept, keeping

RUNNING, STANDBY = InstanceState.RUNNING, InstanceState.STANDBY
POLICY = AutoStandbyPolicy(
    enabled=True, idle_timeout="1m", ignore_destination_ports=(9100,), ignore_source_cidrs=("10.9.0.0/16",)
)


async def make(kept: Kept, policy: AutoStandbyPolicy | None = POLICY, **changes: Any) -> str:
    """The instance's address, once it runs."""
    made = await kept.instances.create(request("one", auto_standby=policy, **changes))
    await kept.until_state(RUNNING)
    network = made.network
    return str(network.ip) if network else ""


async def status(kept: Kept) -> AutoStandbyStatus:
    return await kept.policies.standby_status("one")


async def test_an_idle_instance_enters_standby(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.sleep(20)
        shown = await status(kept)
        assert (shown.status.value, shown.reason.value) == ("idle_countdown", "idle_timeout_not_elapsed")
        assert (shown.countdown_remaining, shown.idle_timeout) == ("40s", "1m0s")
        await kept.sleep(41)
        assert kept.record().state is STANDBY
        shown = await status(kept)
        assert (shown.status.value, shown.reason.value) == ("ineligible", "instance_not_running")
        await kept.instances.restore("one")
        await kept.sleep(50)
        assert kept.record().state is RUNNING, "the countdown begins anew"
        await kept.sleep(15)
        assert kept.record().state is STANDBY


async def test_connections_keep_it_awake(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        address = await make(kept)
        opened = lab.connections.open(address)
        await kept.sleep(300)
        shown = await status(kept)
        assert shown.active_inbound_connections == 1 and shown.status.value == "active"
        assert shown.idle_since is None and kept.record().state is RUNNING
        lab.connections.close(opened)
        await kept.sleep(50)
        assert (await status(kept)).last_inbound_activity_at is not None
        assert kept.record().state is RUNNING
        await kept.sleep(15)
        assert kept.record().state is STANDBY


@pytest.mark.parametrize(
    ("port", "source"), [(9100, "192.0.2.1"), (80, "10.9.8.7")], ids=["ignored port", "ignored source"]
)
async def test_what_is_ignored_does_not(lab: ClockedLab, clock: Clock, port: int, source: str) -> None:
    async with keeping(lab) as kept:
        address = await make(kept)
        lab.connections.open(address, port, source=source)
        await kept.sleep(65)
        assert kept.record().state is STANDBY


async def test_its_own_connections_keep_it_awake(lab: ClockedLab, clock: Clock) -> None:
    """Through the egress proxy as well, which answers them at the gateway; but not those to ignored ports."""
    async with keeping(lab) as kept:
        address = await make(kept)
        ignored = lab.connections.open("203.0.113.9", 18080, source=address, wanted=9100)
        opened = lab.connections.open("10.0.0.1", 18080, source=address, source_port=40001, wanted=443)
        await kept.sleep(100)
        shown = await status(kept)
        assert (shown.active_inbound_connections, shown.active_outbound_connections) == (0, 1)
        assert shown.reason.value == "active_outbound_connections" and kept.record().state is RUNNING
        lab.connections.close(opened)
        await kept.sleep(50)
        assert kept.record().state is RUNNING
        await kept.sleep(15)
        assert kept.record().state is STANDBY and ignored in lab.connections.known


async def test_its_own_connection_without_an_event_is_found_before_it_sleeps(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        address = await make(kept)
        lab.connections.open("203.0.113.9", 443, source=address)
        lab.connections._events.clear()
        await kept.sleep(90)
        assert kept.record().state is RUNNING


async def test_a_connection_between_two_guests_keeps_both_awake(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        address = await make(kept)
        other = await kept.instances.create(request("two", auto_standby=POLICY))
        await kept.until_state(RUNNING, "two")
        assert other.network
        lab.connections.open(str(other.network.ip), 5432, source=address)
        await kept.sleep(100)
        assert [kept.record(name).state for name in ("one", "two")] == [RUNNING, RUNNING]


async def test_connections_of_health_checks_do_not(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        address = await make(kept)
        kept.policies._activity.own(address, 40000)
        lab.connections.close(lab.connections.open(address, source_port=40000))
        await kept.sleep(65)
        assert kept.record().state is STANDBY


async def test_a_connection_without_an_event_is_found_before_it_sleeps(lab: ClockedLab, clock: Clock) -> None:
    """As when it was opened before anyone listened."""
    async with keeping(lab) as kept:
        address = await make(kept)
        lab.connections.open(address)
        lab.connections._events.clear()
        await kept.sleep(90)
        assert kept.record().state is RUNNING
        lab.connections.known.clear()
        lab.connections.drop_events()
        await kept.sleep(80)
        assert kept.record().state is STANDBY


async def test_udp_counts_if_the_policy_says_so(lab: ClockedLab, clock: Clock) -> None:
    """And what is ignored of TCP is ignored of UDP. A TCP connection between the same ports is another one."""
    async with keeping(lab) as kept:
        counting = msgspec.structs.replace(POLICY, count_udp=True)
        address = await make(kept, counting)
        lab.connections.open(address, 9100, udp=True)
        lab.connections.open(address, source="10.9.8.7", udp=True)
        lab.connections.open("203.0.113.9", 9100, source=address, udp=True)
        opened = [lab.connections.open(address, udp=udp) for udp in (False, True)]
        asked = lab.connections.open("203.0.113.9", 123, source=address, udp=True)
        await kept.sleep(70)
        shown = await status(kept)
        assert (shown.active_inbound_connections, shown.active_outbound_connections) == (2, 1)
        assert shown.tracking_mode == "conntrack_events_v4_tcp_udp"
        for each in (opened[0], asked):
            lab.connections.close(each)
        await kept.sleep(70)
        assert (await status(kept)).active_inbound_connections == 1 and kept.record().state is RUNNING
        await kept.instances.update("one", UpdateInstanceRequest(auto_standby=POLICY))
        await kept.sleep(70)
        shown = await status(kept)
        assert kept.record().state is STANDBY and shown.tracking_mode == "conntrack_events_v4_tcp"


async def test_what_was_open_during_a_standby_is_shown_at_once(lab: ClockedLab, clock: Clock) -> None:
    """No event tells of it."""
    async with keeping(lab) as kept:
        address = await make(kept)
        await kept.sleep(65)
        assert kept.record().state is STANDBY
        opened = lab.connections.open(address)
        await kept.sleep(1)
        await kept.instances.restore("one")
        await kept.sleep(1)
        shown = await status(kept)
        assert shown.active_inbound_connections == 1 and shown.status.value == "active"
        lab.connections.close(opened)
        await kept.sleep(1)
        assert (await status(kept)).active_inbound_connections == 0


@pytest.mark.parametrize("opens", [True, False], ids=["opened", "closed"])
async def test_an_event_while_connections_are_listed(lab: ClockedLab, clock: Clock, opens: bool) -> None:
    """It is newer than the list that is being read."""
    async with keeping(lab) as kept:
        address = await make(kept)
        made = lab.connections.open(address)
        lab.connections.known.clear()
        lab.connections._events.clear()
        if not opens:
            lab.connections.known.add(made)
        lists = 0

        async def then_it_changes() -> None:
            nonlocal lists
            lists += 1
            if lists == 1:
                lab.connections.open(address) if opens else lab.connections.close(made)
                await trio.testing.wait_all_tasks_blocked()

        lab.connections.listed = then_it_changes
        await kept.sleep(65)
        assert lists
        assert (await status(kept)).active_inbound_connections == opens
        await kept.sleep(65)
        assert (kept.record().state is RUNNING) is opens


async def test_sessions_keep_it_awake(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        async with kept.policies.using("one", "exec"):
            await kept.sleep(100)
            assert (await status(kept)).active_sessions == 1 and kept.record().state is RUNNING
        await kept.sleep(50)
        assert kept.record().state is RUNNING
        await kept.sleep(15)
        assert kept.record().state is STANDBY


async def test_the_countdown_survives_the_server(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.sleep(40)
        due = (await status(kept)).next_standby_at
    async with keeping(lab) as kept:
        await kept.quiet()
        assert (await status(kept)).next_standby_at == due
        await kept.sleep(21)
        assert kept.record().state is STANDBY


async def test_a_hold_lasts_one_idle_timeout(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        await kept.sleep(50)
        held = await kept.policies.hold("one")
        assert held.hold_until is not None and held.next_standby_at == held.hold_until
        await kept.sleep(40)
    async with keeping(lab) as kept:  # another server
        await kept.sleep(10)
        assert kept.record().state is RUNNING
        await kept.sleep(15)
        assert kept.record().state is STANDBY
        with pytest.raises(Conflict) as refused:
            await kept.policies.hold("one")
        assert refused.value.code == "instance_in_standby"


async def test_without_a_policy(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept, None)
        assert (await kept.policies.hold("one")).status.value == "disabled"
        await kept.sleep(1000)
        assert kept.record().state is RUNNING
        await kept.instances.update("one", UpdateInstanceRequest(auto_standby=POLICY))
        await kept.sleep(5)
        assert kept.record().state is STANDBY, "it has been idle for long"


async def test_not_eligible(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept, devices=("gpu",))
        await kept.sleep(100)
        shown = await status(kept)
        assert (shown.eligible, shown.reason.value) == (False, "has_devices")
        assert kept.record().state is RUNNING


async def test_connections_that_cannot_be_observed(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        lab.connections.fails = OSError("not permitted")
        await make(kept)
        await kept.sleep(100)
        assert (await status(kept)).reason.value == "observer_error" and kept.record().state is RUNNING
        lab.connections.fails = None
        await kept.sleep(100)
        assert kept.record().state is STANDBY


async def test_a_standby_that_fails_is_tried_again(lab: ClockedLab, clock: Clock) -> None:
    async with keeping(lab) as kept:
        await make(kept)
        lab.driver.fail("capture", VmmBroken("no room"))
        await kept.sleep(65)
        assert kept.record().state is RUNNING
        assert (await status(kept)).status.value == "idle_countdown"
        await kept.sleep(65)
        assert kept.record().state is STANDBY


async def test_a_connection_opened_while_it_is_saved_wakes_it(
    lab: ClockedLab, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest owes it an answer, and its client may send nothing more."""
    async with keeping(lab) as kept:
        address = await make(kept)
        standby = kept.instances.standby

        async def saved_under_a_connection(*arguments: Any) -> Any:
            answer = await standby(*arguments)
            if not lab.connections.known:
                lab.connections.open(address)
            return answer

        monkeypatch.setattr(kept.instances, "standby", saved_under_a_connection)
        await kept.sleep(65)
        await kept.until_state(RUNNING)
        shown = await status(kept)
        assert shown.last_wake is not None and shown.last_wake.by == "an open connection"
        await kept.sleep(120)
        assert kept.record().state is RUNNING, "the connection is activity"
