"""Timeouts of all waits for a guest, in seconds.

Two rules cover every wait of ``client.py``:

- a request fails after its timeout in LIMITS, whether the agent is alive or not;
- while any session is open, the agent must send something: after QUIET seconds without a byte it is pinged, and
  after ANSWER more it counts as silent. All open sessions then end with GuestTimeout, and new ones are refused
  until it sends again.

An idle guest is pinged every HEARTBEAT seconds, so that a hang is detected without any requests. Times are the
host's monotonic time; a VM that we have paused is not expected to answer (``GuestClient.hold``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from hypeman.guest.protocol import Op

QUIET = 2.0
"""A healthy agent answers in 1 ms, or 0.1 s on a host with CPUs overcommitted 20 times."""
ANSWER = 8.0
"""Allows for a host that swaps or emulates more CPUs than it has."""
HEARTBEAT = 30.0
"""Seconds between pings of an idle guest: it costs the host 0.1 ms and the guest one wake-up."""
OPEN = 10.0
"""To be greeted and to get a session, which may all be in use."""
ABSENT = 60.0
"""A started guest without a connection to its agent for this long also counts as silent."""

LIMITS: Mapping[Op, float] = {
    # Streams. A program may run without output for years, so only pings limit it; a copy must make progress.
    Op.EXEC: math.inf,
    Op.RESUME: math.inf,
    Op.COPY_TO: 120.0,  # without progress: the guest's disk may be throttled
    Op.COPY_FROM: 120.0,
    # Requests: from the first byte to the last of the reply.
    Op.STAT: 30.0,
    Op.SHUTDOWN: 5.0,  # only acknowledges the start; killing follows
    Op.CLOCK: 10.0,
    Op.IDENTITY: 60.0,  # 0.1 s for a restored guest, far more if its memory is read from a slow disk
    Op.MOUNT: 60.0,  # the guest waits up to 10 s for the disk, then may replay a journal
    Op.UNMOUNT: 60.0,  # writes back the cache
    Op.MEMORY: 60.0,
    Op.METRICS: 10.0,
    Op.FREEZE: 10.0,  # it ends by itself after 10 s of guest time
    Op.THAW: 10.0,
    Op.PING: ANSWER,
    Op.WARM: 10.0,
}
