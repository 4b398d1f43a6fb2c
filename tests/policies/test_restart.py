"""Restart decisions on a clock of their own, as stories and as properties."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypeman.instances.model.policies import RestartRules
from hypeman.instances.model.record import StopCause
from hypeman.instances.model.types import InstanceState, RestartMode
from hypeman.policies.restart import Action, Decision, Facts, Memory, backoff, decide, restart_status

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
ALWAYS = RestartRules(mode=RestartMode.ALWAYS)


def at(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


def stopped(
    cause: StopCause | None = StopCause.ENDED, code: int | None = 1, *, ran: float = 1.0, now: float = 0.0
) -> Facts:
    return Facts(
        state=InstanceState.STOPPED,
        stop_cause=cause,
        exit_code=code,
        started_at=at(now - ran),
        stopped_at=at(now),
    )


def running(*, unhealthy: bool = False, since: float = 0.0) -> Facts:
    return Facts(
        state=InstanceState.RUNNING,
        stop_cause=None,
        exit_code=None,
        started_at=at(since),
        stopped_at=None,
        unhealthy=unhealthy,
    )


@pytest.mark.parametrize(
    ("mode", "cause", "code", "restarts"),
    [
        (RestartMode.NEVER, StopCause.ENDED, 1, False),
        (RestartMode.NEVER, StopCause.HOST, None, False),
        (RestartMode.ALWAYS, StopCause.ENDED, 0, True),
        (RestartMode.ALWAYS, StopCause.ENDED, 1, True),
        (RestartMode.ALWAYS, StopCause.REQUESTED, 143, False),
        (RestartMode.ALWAYS, StopCause.HOST, None, True),
        (RestartMode.ALWAYS, StopCause.POLICY, 143, True),
        (RestartMode.ALWAYS, None, None, False),
        (RestartMode.ON_FAILURE, StopCause.ENDED, 0, False),
        (RestartMode.ON_FAILURE, StopCause.ENDED, 137, True),
        (RestartMode.ON_FAILURE, StopCause.ENDED, None, True),
        (RestartMode.ON_FAILURE, StopCause.HOST, None, True),
        (RestartMode.ON_FAILURE, StopCause.POLICY, 0, True),
        (RestartMode.ON_FAILURE, StopCause.REQUESTED, 1, False),
    ],
)
def test_which_stopped_instance_is_started_again(
    mode: RestartMode, cause: StopCause | None, code: int | None, restarts: bool
) -> None:
    """``None`` as exit code is an unknown one, as cause an instance that never ran."""
    decision = decide(RestartRules(mode=mode), Memory(), stopped(cause, code), at(1000))
    assert (decision.action is Action.START) is restarts


def test_each_attempt_waits_twice_as_long() -> None:
    memory, now, waits = Memory(), 0.0, []
    for _ in range(9):
        decision = decide(ALWAYS, memory, stopped(now=now), at(now))
        assert decision.action is Action.NONE and decision.look_at is not None
        assert decision.memory.next_attempt_at == decision.look_at
        waits.append((decision.look_at - at(now)).total_seconds())
        now += waits[-1]
        decision = decide(ALWAYS, decision.memory, stopped(now=now - waits[-1]), at(now))
        assert decision.action is Action.START
        memory = decision.memory
        now += 1  # it runs for a second
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert memory.attempts == 9


def test_after_the_last_attempt_it_stays_stopped() -> None:
    rules = RestartRules(mode=RestartMode.ALWAYS, max_attempts=2)
    tried = Memory(attempts=2, last_attempt_at=at(-5))
    decision = decide(rules, tried, stopped(), at(1000))
    assert decision == Decision(tried)
    assert restart_status(rules, tried, stopped()).blocked_reason == "max_attempts_exceeded"


def test_attempts_are_forgotten_once_it_is_stable() -> None:
    memory = Memory(attempts=3, last_attempt_at=at(0))
    assert decide(ALWAYS, memory, running(), at(599)) == Decision(memory, look_at=at(600))
    assert decide(ALWAYS, memory, running(), at(600)).memory.attempts == 0
    ended = decide(ALWAYS, memory, stopped(ran=700, now=701), at(701))  # not evaluated in between
    assert ended.memory.attempts == 0 and ended.look_at == at(706)


def test_a_reboot_starts_it_at_once_and_counts_no_attempt() -> None:
    decision = decide(ALWAYS, Memory(), stopped(StopCause.HOST, None), at(50))
    assert decision.action is Action.START and decision.memory.attempts == 0
    # The start failed: from now on it is an attempt with a backoff.
    again = decide(ALWAYS, decision.memory, stopped(StopCause.HOST, None), at(50))
    assert again.action is Action.NONE and again.look_at == at(55)
    assert decide(ALWAYS, again.memory, stopped(StopCause.HOST, None), at(55)).memory.attempts == 1


def test_an_unhealthy_instance_is_stopped_then_started() -> None:
    decision = decide(ALWAYS, Memory(), running(unhealthy=True), at(60))
    assert decision.action is Action.STOP
    waiting = decide(ALWAYS, decision.memory, stopped(StopCause.POLICY, 143, ran=60, now=61), at(61))
    assert waiting.look_at == at(66)
    assert restart_status(ALWAYS, waiting.memory, running()).last_reason == "health_check_failed"
    assert decide(ALWAYS, waiting.memory, stopped(StopCause.POLICY, 143, ran=60, now=61), at(66)).action is Action.START
    limited = RestartRules(mode=RestartMode.ALWAYS, max_attempts=1)
    last = decide(limited, Memory(attempts=1), running(unhealthy=True), at(60))
    assert last.action is Action.NONE, "it is not stopped if it would not be started again"
    assert restart_status(limited, Memory(attempts=1), running(unhealthy=True)).blocked_reason is not None


def test_a_manual_stop_is_said_to_be_one() -> None:
    shown = restart_status(ALWAYS, Memory(attempts=1), stopped(StopCause.REQUESTED))
    assert shown.blocked_reason == "manual_stop"


def test_a_clock_that_was_set_back_does_not_delay_a_restart() -> None:
    memory = Memory(attempts=1, last_attempt_at=at(86400), next_attempt_at=at(86410))
    decision = decide(ALWAYS, memory, stopped(now=86400), at(0))
    assert decision.look_at == at(10)


_facts = st.builds(
    Facts,
    state=st.sampled_from(InstanceState),
    stop_cause=st.none() | st.sampled_from(StopCause),
    exit_code=st.sampled_from((None, 0, 1)),
    started_at=st.none() | st.integers(-2000, 2000).map(at),
    stopped_at=st.none() | st.integers(-2000, 2000).map(at),
    unhealthy=st.booleans(),
)
_rules = st.builds(
    RestartRules,
    mode=st.sampled_from(RestartMode),
    backoff=st.floats(0.001, 10_000),
    max_attempts=st.integers(0, 3),
    stable_after=st.integers(0, 2000).map(float),
)
_memory = st.builds(
    Memory,
    attempts=st.integers(0, 2000),
    last_attempt_at=st.none() | st.integers(-2000, 2000).map(at),
    next_attempt_at=st.none() | st.integers(-2000, 200_000).map(at),
    health_failed=st.booleans(),
)


@given(_rules, _memory, _facts, st.integers(-2000, 2000).map(at))
def test_whatever_the_facts(rules: RestartRules, memory: Memory, facts: Facts, now: datetime) -> None:
    """Starts only what is stopped, not by a command, within the attempts; each look is later than now and at most one
    backoff away; a decision without an action changes nothing when it is repeated."""
    decision = decide(rules, memory, facts, now)
    if decision.action is Action.START:
        assert facts.state is InstanceState.STOPPED and facts.stop_cause not in (None, StopCause.REQUESTED)
        assert rules.active
        counted = decision.memory.attempts > memory.attempts
        assert not (counted and rules.max_attempts and decision.memory.attempts > rules.max_attempts)
    if decision.action is Action.STOP:
        assert facts.unhealthy and rules.active
    if decision.look_at is not None:
        assert decision.look_at > now
    if facts.state is InstanceState.STOPPED and decision.look_at is not None:
        assert decision.look_at - now <= timedelta(seconds=backoff(rules, memory.attempts))
    if decision.action is Action.NONE:
        again = decide(rules, decision.memory, facts, now)
        assert again == msgspec.structs.replace(decision, memory=again.memory) and again.memory == decision.memory
    restart_status(rules, memory, facts)


@given(st.lists(st.tuples(st.integers(1, 400), st.booleans()), max_size=60), st.integers(1, 4))
def test_a_crash_loop_never_exceeds_its_attempts(steps: list[tuple[int, bool]], most: int) -> None:
    """Time passes in any steps; whenever the policy starts it, it crashes after a second."""
    rules = RestartRules(mode=RestartMode.ON_FAILURE, max_attempts=most)
    memory, facts, now, starts = Memory(), stopped(), 0.0, 0
    for seconds, _ in steps:
        now += seconds
        decision = decide(rules, memory, facts, at(now))
        memory = decision.memory
        if decision.action is Action.START:
            starts += 1
            now += 1
            facts = stopped(now=now)
    assert starts <= most and memory.attempts == starts
