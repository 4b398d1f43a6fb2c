"""How long ago the cluster last heard from this node.

Counted from the moment before the heartbeat was sent, by a clock that also runs while the host is suspended, and that
nobody sets. A program that has just started counts from its start.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseClock:
    def __init__(self, duration: float, clock: Callable[[], float] = boot_time) -> None:
        self._duration = duration
        self._clock = clock
        self._renewed = clock()
        self._ever = False

    def now(self) -> float:
        return self._clock()

    def renewed(self, sent: float) -> None:
        """A heartbeat sent at ``sent`` was accepted."""
        self._renewed = max(self._renewed, sent)
        self._ever = True

    @property
    def lost_for(self) -> float:
        """Seconds since the last heartbeat."""
        return self._clock() - self._renewed

    @property
    def is_valid(self) -> bool:
        """Whether the cluster still counts on this node, so that pods may be started here."""
        return self._ever and self.lost_for < self._duration
