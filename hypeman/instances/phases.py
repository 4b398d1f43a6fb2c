"""How long an instance was in each phase. ``now`` is always an argument; by default callers take ``utc_now``.

A phase is a state in lower case. Durations add up over the whole life and include the phase under
way, so that a client sees where the time goes while it goes.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec


def utc_now() -> datetime:
    return datetime.now(UTC)


class Phases(msgspec.Struct, frozen=True):
    current: str
    since: datetime
    ended_ms: dict[str, int] = {}
    """Phase → milliseconds of its ended stays."""

    def entered(self, phase: str, now: datetime) -> Phases:
        """These phases after entering ``phase``; entering the current one changes nothing."""
        if phase == self.current:
            return self
        return Phases(phase, now, self.durations_ms(now))

    def durations_ms(self, now: datetime) -> dict[str, int]:
        """Phase → milliseconds, the current one included. A clock that went back counts as 0."""
        stay = max(0, round((now - self.since).total_seconds() * 1000))
        return {**self.ended_ms, self.current: self.ended_ms.get(self.current, 0) + stay}
