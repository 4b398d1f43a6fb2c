"""When an instance is idle: as stories, and as properties of any facts and clock."""

from __future__ import annotations

from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.instances.model.policies import StandbyRules
from hypeman.instances.model.types import AutoStandbyReason, AutoStandbyState, InstanceState
from hypeman.policies.idle import Facts, Memory, decide
from tests.policies.keeping import BEGIN

RULES = StandbyRules(enabled=True, idle_timeout=300)
RUNNING = Facts(state=InstanceState.RUNNING, running_since=BEGIN, configured=True)


def at(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


def facts(**changes: Any) -> Facts:
    return msgspec.structs.replace(RUNNING, **changes)


@pytest.mark.parametrize(
    ("changes", "enabled", "state", "reason"),
    [
        ({"configured": False}, False, "disabled", "policy_missing"),
        ({}, False, "disabled", "policy_disabled"),
        ({"supported": False}, True, "unsupported", "unsupported_platform"),
        ({"network": False}, True, "ineligible", "network_disabled"),
        ({"vgpu": True}, True, "ineligible", "has_vgpu"),
        ({"devices": True}, True, "ineligible", "has_devices"),
        ({"state": InstanceState.STANDBY}, True, "ineligible", "instance_not_running"),
        ({"state": InstanceState.INITIALIZING}, True, "ineligible", "instance_not_running"),
        ({"address": False}, True, "ineligible", "missing_ip"),
        ({"observed": False}, True, "error", "observer_error"),
        ({"connections": 1}, True, "active", "active_inbound_connections"),
        ({"sessions": 1}, True, "active", "active_inbound_connections"),
        ({"outbound": 1}, True, "active", "active_outbound_connections"),
        ({"connections": 1, "outbound": 1}, True, "active", "active_inbound_connections"),
    ],
)
def test_why_not(changes: dict[str, Any], enabled: bool, state: str, reason: str) -> None:
    verdict = decide(StandbyRules(enabled=enabled), Memory(idle_since=BEGIN), facts(**changes), at(9999))
    assert (verdict.state.value, verdict.reason.value) == (state, reason)
    assert not verdict.ready and verdict.due is None
    assert verdict.eligible is (state in ("active", "error"))


def test_the_countdown() -> None:
    first = decide(RULES, Memory(), facts(), at(10))
    assert first.state is AutoStandbyState.IDLE_COUNTDOWN and first.due == at(300)
    assert first.memory.idle_since == BEGIN
    active = decide(RULES, first.memory, facts(connections=1), at(200))
    assert active.memory.idle_since is None
    closed = decide(RULES, active.memory, facts(last_activity_at=at(250)), at(251))
    assert closed.due == at(550)
    assert decide(RULES, closed.memory, facts(last_activity_at=at(250)), at(550)).ready
    requested = decide(RULES, closed.memory, facts(last_activity_at=at(250), requested=True), at(551))
    assert requested.state is AutoStandbyState.STANDBY_REQUESTED
    assert requested.reason is AutoStandbyReason.READY_FOR_STANDBY


def test_it_continues_where_the_previous_server_left_it() -> None:
    assert decide(RULES, Memory(idle_since=at(250)), facts(), at(400)).due == at(550)


def test_a_hold() -> None:
    held = Memory(idle_since=BEGIN, hold_until=at(590))
    assert decide(RULES, held, facts(), at(299)).due == at(590)
    assert decide(RULES, held, facts(), at(590)).ready


def test_what_is_ignored() -> None:
    rules = StandbyRules(ignored_sources=(IPv4Network("10.0.0.0/8"),), ignored_ports=frozenset({22}))
    outside, inside = IPv4Address("192.0.2.1"), IPv4Address("10.1.2.3")
    assert rules.ignores(inside, 80) and rules.ignores(outside, 22)
    assert not rules.ignores(outside, 80)


_times = st.floats(-2000, 2000).map(at)
_facts = st.builds(
    Facts,
    state=st.sampled_from(InstanceState),
    running_since=_times,
    configured=st.booleans(),
    supported=st.booleans(),
    devices=st.booleans(),
    connections=st.integers(0, 2),
    sessions=st.integers(0, 2),
    outbound=st.integers(0, 2),
    last_activity_at=st.none() | _times,
    observed=st.booleans(),
    requested=st.booleans(),
)


@given(
    st.booleans(),
    st.floats(0.001, 2000),
    st.none() | _times,
    st.none() | st.floats(-2000, 1e6).map(at),
    _facts,
    _times,
)
def test_whatever_the_facts(
    enabled: bool, timeout: float, idle: datetime | None, hold: datetime | None, given: Facts, now: datetime
) -> None:
    """Only what runs, is enabled and is not used is ever ready, and no wait is longer than one timeout."""
    rules = StandbyRules(enabled=enabled, idle_timeout=timeout)
    verdict = decide(rules, Memory(idle_since=idle, hold_until=hold), given, now)
    if verdict.ready or verdict.state is AutoStandbyState.STANDBY_REQUESTED:
        assert enabled and given.state is InstanceState.RUNNING and not given.devices and given.observed
        assert not given.connections and not given.sessions and not given.outbound
        assert verdict.memory.idle_since is not None
        assert now - verdict.memory.idle_since >= timedelta(seconds=timeout) - timedelta(milliseconds=1)
    if verdict.due is not None:
        assert verdict.due <= now + timedelta(seconds=timeout)
    again = decide(rules, verdict.memory, given, now)
    assert (again.memory, again.state, again.due) == (verdict.memory, verdict.state, verdict.due)
