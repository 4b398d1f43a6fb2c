"""When an instance has been idle for long enough to enter standby. Pure: rules, memory, facts and time → verdict.

active           it has open connections, inbound or outbound, exec or copy sessions, or a log that is followed
idle countdown   it has none; ``idle_since`` is stored, so that the countdown survives the server
ready            ``idle_timeout`` has passed since the last activity, and no hold is in force
"""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

from hypeman.instances.model.policies import StandbyRules
from hypeman.instances.model.types import AutoStandbyReason, AutoStandbyState, InstanceState

State, Reason = AutoStandbyState, AutoStandbyReason


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of an instance's activity."""

    idle_since: datetime | None = None
    """None while it is active, or does not run."""
    hold_until: datetime | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    state: InstanceState
    running_since: datetime
    """When it entered its state."""
    configured: bool
    supported: bool = True
    """Whether its VMM and its guest can be saved."""
    network: bool = True
    address: bool = True
    vgpu: bool = False
    devices: bool = False
    connections: int = 0
    """Open inbound connections that count."""
    outbound: int = 0
    """Open connections that it has begun, and that count."""
    sessions: int = 0
    """Exec and copy sessions, and logs that are followed."""
    last_activity_at: datetime | None = None
    observed: bool = True
    """Whether connections can be observed."""
    requested: bool = False
    """Whether standby is in progress."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    memory: Memory
    state: AutoStandbyState
    reason: AutoStandbyReason
    eligible: bool = False
    due: datetime | None = None
    """When it enters standby if nothing happens before."""

    @property
    def ready(self) -> bool:
        return self.state is State.READY_FOR_STANDBY


def decide(rules: StandbyRules, memory: Memory, facts: Facts, now: datetime) -> Verdict:
    """What applies to an instance at ``now``."""
    refused = _refusal(rules, facts)
    if refused is not None:
        state, reason = refused
        return Verdict(memory=Memory(), state=state, reason=reason)
    memory = msgspec.structs.replace(memory, hold_until=_hold(rules, memory, now))
    if not facts.observed:
        memory = msgspec.structs.replace(memory, idle_since=None)
        return Verdict(memory=memory, state=State.ERROR, reason=Reason.OBSERVER_ERROR, eligible=True)
    if facts.connections or facts.sessions or facts.outbound:
        inbound = facts.connections or facts.sessions
        reason = Reason.ACTIVE_INBOUND_CONNECTIONS if inbound else Reason.ACTIVE_OUTBOUND_CONNECTIONS
        memory = msgspec.structs.replace(memory, idle_since=None)
        return Verdict(memory=memory, state=State.ACTIVE, reason=reason, eligible=True)
    since = _idle_since(memory, facts, now)
    memory = msgspec.structs.replace(memory, idle_since=since)
    due = since + timedelta(seconds=rules.idle_timeout)
    if memory.hold_until is not None:
        due = max(due, memory.hold_until)
    if now < due:
        state, reason = State.IDLE_COUNTDOWN, Reason.IDLE_TIMEOUT_NOT_ELAPSED
    elif facts.requested:
        state, reason = State.STANDBY_REQUESTED, Reason.READY_FOR_STANDBY
    else:
        state, reason = State.READY_FOR_STANDBY, Reason.READY_FOR_STANDBY
    return Verdict(memory=memory, state=state, reason=reason, eligible=True, due=due)


def _refusal(rules: StandbyRules, facts: Facts) -> tuple[AutoStandbyState, AutoStandbyReason] | None:
    """Why the policy does not apply now."""
    if not facts.configured:
        return State.DISABLED, Reason.POLICY_MISSING
    if not rules.enabled:
        return State.DISABLED, Reason.POLICY_DISABLED
    if not facts.supported:
        return State.UNSUPPORTED, Reason.UNSUPPORTED_PLATFORM
    if not facts.network:
        return State.INELIGIBLE, Reason.NETWORK_DISABLED
    if facts.vgpu:
        return State.INELIGIBLE, Reason.HAS_VGPU
    if facts.devices:
        return State.INELIGIBLE, Reason.HAS_DEVICES
    if facts.state is not InstanceState.RUNNING:
        return State.INELIGIBLE, Reason.INSTANCE_NOT_RUNNING
    if not facts.address:
        return State.INELIGIBLE, Reason.MISSING_IP
    return None


def _hold(rules: StandbyRules, memory: Memory, now: datetime) -> datetime | None:
    """The hold that is in force; one never lasts longer than the idle timeout, also if the clock was set back."""
    if memory.hold_until is None or memory.hold_until <= now:
        return None
    return min(memory.hold_until, now + timedelta(seconds=rules.idle_timeout))


def _idle_since(memory: Memory, facts: Facts, now: datetime) -> datetime:
    known = [facts.running_since, facts.last_activity_at, memory.idle_since]
    return min(max(time for time in known if time is not None), now)  # the clock may have been set back
