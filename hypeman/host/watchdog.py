"""systemd's watchdog: the event loop sends keep-alives, otherwise systemd restarts us.

An ordinary task sends them, so they stop when the event loop hangs. VMs run in another unit and are not
affected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import trio


def watchdog_interval(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float | None:
    """Keep-alive interval that systemd expects, in seconds (WATCHDOG_USEC); None if there is no watchdog."""
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
