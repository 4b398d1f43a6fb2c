"""Whether an instance is healthy, from the results of its checks. Pure.

starting    its workload has started; failures within ``start_period`` do not count
healthy     ``success_threshold`` checks in a row succeeded
unhealthy   ``failure_threshold`` checks in a row failed
unknown     it has checks but does not run (standby, stopped, paused)
disabled    it has no checks
"""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

from hypeman.instances.model.policies import HealthRules
from hypeman.instances.model.types import HealthState, InstanceHealthStatus

MAX_ERROR = 256
"""Characters of the last error that are kept."""


class Result(msgspec.Struct, frozen=True):
    """One check that has ended."""

    at: datetime
    error: str | None = None
    """Why it failed; None: it succeeded."""


DISABLED = InstanceHealthStatus(status=HealthState.DISABLED)


def begin(before: InstanceHealthStatus | None = None) -> InstanceHealthStatus:
    """The health of an instance whose workload has just started; times of earlier checks are kept."""
    return msgspec.structs.replace(
        before or DISABLED, status=HealthState.STARTING, consecutive_successes=0, consecutive_failures=0
    )


def end(before: InstanceHealthStatus | None) -> InstanceHealthStatus:
    """The health of an instance that does not run."""
    return msgspec.structs.replace(begin(before), status=HealthState.UNKNOWN)


def after(
    rules: HealthRules, before: InstanceHealthStatus, started_at: datetime, result: Result
) -> InstanceHealthStatus:
    """The health after one more check of an instance that has run since ``started_at``."""
    if result.error is None:
        successes = before.consecutive_successes + 1
        return msgspec.structs.replace(
            before,
            status=HealthState.HEALTHY if successes >= rules.success_threshold else before.status,
            consecutive_successes=successes,
            consecutive_failures=0,
            last_checked_at=result.at,
            last_success_at=result.at,
            last_error=None,
        )
    starting = before.status is HealthState.STARTING
    pardoned = starting and result.at < started_at + timedelta(seconds=rules.start_period)
    failures = 0 if pardoned else before.consecutive_failures + 1
    return msgspec.structs.replace(
        before,
        status=HealthState.UNHEALTHY if failures >= rules.failure_threshold else before.status,
        consecutive_successes=0,
        consecutive_failures=failures,
        last_checked_at=result.at,
        last_failure_at=result.at,
        last_error=result.error[:MAX_ERROR],
    )
