"""The difference between a guest's clock and the host's, as NTP computes it. Pure, except for ``host_step``.

The host asks for the guest's time and notes when it asked and when the answer came. The guest read its clock somewhere
in between, so the difference is known to half of that time, and the guest receives the difference to apply: that stays
right however late it arrives. Compared with ptp_kvm and a daemon in the guest: this works with and without KVM and for
each kind of VMM, adds nothing to the guest, and the host decides when (after a restore before programs run again).
"""

from __future__ import annotations

import time

import msgspec

MILLISECOND = 1_000_000
GOOD = 2 * MILLISECOND
"""A sample this certain needs no other."""
QUICK = 10 * MILLISECOND
"""A sample this certain does while programs wait for it; a better one follows soon."""
TOLERANCE = 2 * MILLISECOND
"""Smaller differences are left alone."""
SAMPLES = 4
"""At most so many are taken for a correction; the most certain one counts."""
INTERVAL = 30.0
"""Seconds between corrections of a guest whose clock keeps time: it drifts 3 ms if it is off by 100 ppm."""
INTERVAL_LEAST = 1.0
STEP = 5 * MILLISECOND
"""A host's clock that moved so far against its monotonic one was set, or the host was suspended."""
STEP_CHECK = 5.0
"""Seconds between looks at that."""


class Sample(msgspec.Struct, frozen=True):
    """One question and answer, in nanoseconds since 1970."""

    asked: int
    answered: int
    guest: int
    """The guest's clock at some time in between."""

    @property
    def behind(self) -> int:
        """How far the guest is behind the host; negative if it is ahead."""
        return (self.asked + self.answered) // 2 - self.guest

    @property
    def uncertainty(self) -> int:
        """Maximum error of ``behind``."""
        return max(0, self.answered - self.asked) // 2

    @property
    def correction(self) -> int:
        """What to move the guest's clock by; 0 if that could make it worse."""
        return self.behind if abs(self.behind) > max(self.uncertainty, TOLERANCE) else 0


def most_certain(samples: list[Sample]) -> Sample:
    return min(samples, key=lambda sample: sample.uncertainty)


def next_after(sample: Sample | None) -> float:
    """Seconds until the next correction: soon if the last one was large or uncertain. None: there was no answer."""
    if sample is None:
        return INTERVAL
    error = max(abs(sample.behind), sample.uncertainty, 1)
    return min(INTERVAL, max(INTERVAL_LEAST, INTERVAL * 5 * MILLISECOND / error))


def host_step() -> int:
    """A number of nanoseconds that only changes when the host's clock is set or the host was suspended."""
    return time.time_ns() - time.monotonic_ns()
