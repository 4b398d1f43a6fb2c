"""systemd's watchdog: a word from the event loop now and then, or systemd starts us anew.

The word comes from a task like any other, so a loop that hangs is a loop that falls silent. VMs live
in another unit and do not notice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import trio


def watchdog_interval(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float | None:
    """Seconds within which systemd wants a word (WATCHDOG_USEC); None if it does not wait for us."""
    wanted = environ.get("WATCHDOG_PID")
    if wanted is not None and wanted != str(os.getpid() if pid is None else pid):
        return None
    microseconds = environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None


async def feed_watchdog(notify: Callable[[str], object], interval: float | None) -> None:
    """Send ``WATCHDOG=1`` three times an interval, until cancelled. Returns at once without an interval."""
    if interval is None:
        return
    while True:
        notify("WATCHDOG=1")
        await trio.sleep(interval / 3)
