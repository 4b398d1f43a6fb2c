"""How long an instance was in each phase. ``now`` is always an argument; callers default to ``utc_now``.

A phase is a state in lower case. Durations are summed over the instance's lifetime and include the
current phase, so that a client sees the time spent so far.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

PULLING = "pulling"
"""The phase of an instance in state Created whose image is pulled; the other phases are states in lower case."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Phases(msgspec.Struct, frozen=True):
    current: str
    since: datetime
    ended_ms: dict[str, int] = {}
    """Phase → milliseconds spent in it before the current phase."""

    def entered(self, phase: str, now: datetime) -> Phases:
        """These phases after entering ``phase``; entering the current one changes nothing."""
        if phase == self.current:
            return self
        return Phases(phase, now, self.durations_ms(now))

    def durations_ms(self, now: datetime) -> dict[str, int]:
        """Phase → milliseconds, including the current one. If the clock was set back, that one counts 0."""
        stay = max(0, round((now - self.since).total_seconds() * 1000))
        return {**self.ended_ms, self.current: self.ended_ms.get(self.current, 0) + stay}
