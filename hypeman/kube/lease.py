"""How long ago the cluster last heard from this node.

Counted from the moment before the heartbeat was sent, by a clock that also runs while the host is suspended, and that
nobody sets. The moment is also kept in a file, so that a program that was killed while the host was cut off goes on
counting; after a reboot there is nothing to fence.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


def boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class LeaseClock:
    """``file`` keeps the last heartbeat over a restart of the program; None: nothing is kept."""

    def __init__(self, duration: float, clock: Callable[[], float] = boot_time, file: Path | None = None) -> None:
        self._duration = duration
        self._clock = clock
        self._file = file
        now = clock()
        kept = self._read() if file is not None else None
        self._renewed = now if kept is None else min(kept, now)
        self._ever = False

    def now(self) -> float:
        return self._clock()

    def renewed(self, sent: float) -> None:
        """A heartbeat sent at ``sent`` was accepted."""
        self._renewed = max(self._renewed, sent)
        self._ever = True
        if self._file is not None:
            self._write(self._file)

    def _read(self) -> float | None:
        assert self._file is not None, "called only with a file"
        try:
            boot, _, moment = self._file.read_text().partition(" ")
            return float(moment) if boot == boot_id() else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("the last heartbeat is not known: %s", error)
            return None

    def _write(self, file: Path) -> None:
        """Replaced by rename: a reader finds the one or the other. If it is lost, a restart only counts from 0."""
        new = file.with_suffix(".new")
        try:
            new.write_text(f"{boot_id()} {self._renewed}")
            os.replace(new, file)
        except OSError as error:
            log.warning("the heartbeat cannot be kept: %s", error)

    @property
    def lost_for(self) -> float:
        """Seconds since the last heartbeat."""
        return self._clock() - self._renewed

    @property
    def is_valid(self) -> bool:
        """Whether the cluster still counts on this node, so that pods may be started here."""
        return self._ever and self.lost_for < self._duration
