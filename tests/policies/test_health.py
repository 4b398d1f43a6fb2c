"""Health from results of checks: stories, and properties of any sequence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from hypeman.instances.model.policies import HealthRules
from hypeman.instances.model.types import HealthCheckType, HealthState, InstanceHealthStatus
from hypeman.policies.health import MAX_ERROR, Result, after, begin, end

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
RULES = HealthRules(type=HealthCheckType.TCP, port=80, failure_threshold=3, success_threshold=2)


def follow(rules: HealthRules, results: str, *, start: float = 100.0) -> InstanceHealthStatus:
    """The health after results, ``+`` or ``-``, one a second from ``start`` seconds after its begin on."""
    status = begin()
    for number, result in enumerate(results):
        at = BEGIN + timedelta(seconds=start + number)
        status = after(rules, status, BEGIN, Result(at, None if result == "+" else f"error {number}"))
    return status


def test_thresholds() -> None:
    states = [follow(RULES, "++--+---+++"[:count]).status.value for count in range(12)]
    assert states == [
        "starting", "starting", "healthy", "healthy", "healthy", "healthy", "healthy", "healthy", "unhealthy",
        "unhealthy", "healthy", "healthy",
    ]  # fmt: skip


def test_failures_while_it_starts_do_not_count() -> None:
    status = follow(RULES, "-" * 20, start=5)
    assert (status.status, status.consecutive_failures) == (HealthState.STARTING, 0)
    assert status.last_error == "error 19" and status.last_failure_at == BEGIN + timedelta(seconds=24)
    assert follow(RULES, "-" * 28, start=5).status is HealthState.UNHEALTHY, "the last three are after the period"
    assert follow(RULES, "++---", start=0).status is HealthState.UNHEALTHY, "its first success ends the period"


def test_an_instance_that_does_not_run() -> None:
    healthy = follow(RULES, "++")
    assert end(healthy).status is HealthState.UNKNOWN and end(healthy).last_success_at == healthy.last_success_at
    assert begin(healthy).status is HealthState.STARTING and begin(healthy).consecutive_successes == 0


def test_an_error_is_cut() -> None:
    status = after(RULES, begin(), BEGIN, Result(BEGIN, "x" * 5000))
    assert status.last_error == "x" * MAX_ERROR


@given(st.text("+-", max_size=60), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40))
def test_any_sequence(results: str, failures: int, successes: int, period: int) -> None:
    """The state is that of the last run of equal results that was long enough; counters exclude each other."""
    rules = HealthRules(
        type=HealthCheckType.TCP, failure_threshold=failures, success_threshold=successes, start_period=float(period)
    )
    status = follow(rules, results, start=0)
    model, good, bad = "starting", 0, 0
    for number, result in enumerate(results):
        good, bad = (good + 1, 0) if result == "+" else (0, bad + 1)
        if result == "-" and model == "starting" and number < period:
            bad = 0
        model = "healthy" if good >= successes else "unhealthy" if bad >= failures else model
    assert status.status.value == model
    assert (status.consecutive_successes, status.consecutive_failures) == (good, bad)
    assert not (good and bad)
