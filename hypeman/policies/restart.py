"""When a stopped or unhealthy instance is started again. Pure: rules, memory and facts → decision.

    stopped by its own end     after the backoff: ``always``, or ``on_failure`` unless its exit code was 0
    stopped by a reboot        at once, not counted as an attempt
    unhealthy while it runs    stopped now, started after the backoff
    stopped by a command       never (blocked: manual_stop)

The backoff doubles with each attempt, up to MAX_BACKOFF. Attempts are forgotten once the instance has run for
``stable_after``. An attempt is counted, and stored, before it is made.
"""

from __future__ import annotations

import enum
from datetime import datetime, timedelta

import msgspec

from hypeman.instances.model.policies import RestartRules
from hypeman.instances.model.record import StopCause
from hypeman.instances.model.types import InstanceState, RestartMode, RestartStatus

MAX_BACKOFF = 300.0
"""Seconds; a longer ``backoff`` of a policy is used as it is."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of an instance's restarts."""

    attempts: int = 0
    """Since the instance was last started by someone else, or stable."""
    last_attempt_at: datetime | None = None
    next_attempt_at: datetime | None = None
    health_failed: bool = False
    """Whether the last restart was due to health checks."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    state: InstanceState
    stop_cause: StopCause | None
    exit_code: int | None
    started_at: datetime | None
    stopped_at: datetime | None
    unhealthy: bool = False


class Action(enum.Enum):
    NONE = "none"
    START = "start"
    STOP = "stop"
    """Stop it to start it again."""


class Decision(msgspec.Struct, frozen=True):
    memory: Memory
    """To be stored before ``action``."""
    action: Action = Action.NONE
    look_at: datetime | None = None
    """When to decide again if nothing changes before; None: not before a change."""


UP = frozenset({InstanceState.INITIALIZING, InstanceState.RUNNING})


def decide(rules: RestartRules, memory: Memory, facts: Facts, now: datetime) -> Decision:
    """What to do about an instance at ``now``."""
    if not rules.active:
        return Decision(Memory())
    if facts.state in UP:
        return _while_up(rules, memory, facts, now)
    if facts.state is not InstanceState.STOPPED or not wants_restart(rules, facts):
        return Decision(msgspec.structs.replace(memory, next_attempt_at=None))
    return _while_stopped(rules, memory, facts, now)


def wants_restart(rules: RestartRules, facts: Facts) -> bool:
    """Whether the policy starts a stopped instance again, attempts apart."""
    match facts.stop_cause:
        case None | StopCause.REQUESTED:
            return False
        case StopCause.HOST | StopCause.POLICY:
            return rules.active
        case StopCause.ENDED:
            return rules.mode is RestartMode.ALWAYS or (rules.mode is RestartMode.ON_FAILURE and facts.exit_code != 0)


def backoff(rules: RestartRules, attempts: int) -> float:
    """Seconds to wait before the attempt that follows ``attempts``."""
    most = max(MAX_BACKOFF, rules.backoff)
    return min(rules.backoff * 2.0 ** min(attempts, 60), most)


def restart_status(rules: RestartRules, memory: Memory, facts: Facts) -> RestartStatus:
    """As it is shown to clients."""
    blocked: str | None = None
    if facts.state is InstanceState.STOPPED and facts.stop_cause is StopCause.REQUESTED:
        blocked = "manual_stop"
    elif _is_exhausted(rules, memory) and (
        (facts.state is InstanceState.STOPPED and wants_restart(rules, facts))
        or (facts.state in UP and facts.unhealthy)
    ):
        blocked = "max_attempts_exceeded"
    return RestartStatus(
        attempts=memory.attempts,
        last_attempt_at=memory.last_attempt_at,
        next_attempt_at=memory.next_attempt_at,
        blocked_reason=blocked,  # type: ignore[arg-type]  # one of the two literals
        last_reason="health_check_failed" if memory.health_failed else None,
    )


def _is_exhausted(rules: RestartRules, memory: Memory) -> bool:
    return bool(rules.max_attempts) and memory.attempts >= rules.max_attempts


def _while_up(rules: RestartRules, memory: Memory, facts: Facts, now: datetime) -> Decision:
    memory = msgspec.structs.replace(memory, next_attempt_at=None)
    if facts.unhealthy and not _is_exhausted(rules, memory):
        return Decision(msgspec.structs.replace(memory, health_failed=True), Action.STOP)
    if not memory.attempts or facts.started_at is None:
        return Decision(memory)
    stable_at = facts.started_at + timedelta(seconds=rules.stable_after)
    if now < stable_at:
        return Decision(memory, look_at=stable_at)
    if facts.unhealthy:
        return Decision(memory)
    return Decision(msgspec.structs.replace(memory, attempts=0))


def _while_stopped(rules: RestartRules, memory: Memory, facts: Facts, now: datetime) -> Decision:
    if facts.stop_cause is not StopCause.POLICY:
        memory = msgspec.structs.replace(memory, health_failed=False)
    if _was_stable(rules, memory, facts):
        memory = msgspec.structs.replace(memory, attempts=0)
    retried = _tried_since(memory, facts.stopped_at)
    if facts.stop_cause is StopCause.HOST and not retried:
        # Counted as no attempt, but remembered as tried, so that a start that fails is retried with backoff.
        return Decision(msgspec.structs.replace(memory, last_attempt_at=now, next_attempt_at=None), Action.START)
    if _is_exhausted(rules, memory):
        return Decision(msgspec.structs.replace(memory, next_attempt_at=None))
    pause = timedelta(seconds=backoff(rules, memory.attempts))
    due = memory.next_attempt_at
    if due is None:
        since = memory.last_attempt_at if retried else facts.stopped_at
        due = (since or now) + pause
    due = min(due, now + pause)  # the clock may have been set back
    if now < due:
        return Decision(msgspec.structs.replace(memory, next_attempt_at=due), look_at=due)
    memory = msgspec.structs.replace(memory, attempts=memory.attempts + 1, last_attempt_at=now, next_attempt_at=None)
    return Decision(memory, Action.START)


def _tried_since(memory: Memory, moment: datetime | None) -> bool:
    return memory.last_attempt_at is not None and (moment is None or memory.last_attempt_at >= moment)


def _was_stable(rules: RestartRules, memory: Memory, facts: Facts) -> bool:
    """Whether it had run long enough, before it stopped, for earlier attempts not to count."""
    if facts.started_at is None or facts.stopped_at is None or _tried_since(memory, facts.stopped_at):
        return False
    return (facts.stopped_at - facts.started_at).total_seconds() >= rules.stable_after
