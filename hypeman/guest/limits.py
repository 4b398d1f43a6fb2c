"""How long anything waits for a guest: the one table, in seconds.

Two rules cover every wait of ``client.py``:

- a request ends when its row of LIMITS has passed, whether the agent lives or not;
- while any session is open, the agent must be heard from: after QUIET seconds without a byte it is sent a ping,
  and after ANSWER more it counts as silent. All open sessions then end with GuestTimeout, and new ones are
  refused until it is heard again.

An idle guest is pinged every HEARTBEAT seconds, so that one that hangs is seen although nobody asks it anything.
Monotonic time of the host counts; a VM that we have paused is not expected to answer (``GuestClient.hold``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from hypeman.guest.protocol import Op

QUIET = 2.0
"""A healthy agent answers in a millisecond, in 0.1 s on a host whose processors are 20 times overbooked."""
ANSWER = 8.0
"""For a host that swaps or emulates more processors than it has."""
HEARTBEAT = 30.0
"""Seconds between pings of an idle guest: it costs the host 0.1 ms and the guest one wake-up."""
OPEN = 10.0
"""To be greeted and to get one of the sessions, all of which may be taken."""
ABSENT = 60.0
"""Without a connection to the agent for so long, a guest that had started counts as silent, too."""

LIMITS: Mapping[Op, float] = {
    # Streams. A program may run and be quiet for years, so only the pings limit it; a copy must make progress.
    Op.EXEC: math.inf,
    Op.COPY_TO: 120.0,  # without progress: a guest's disk that is being throttled
    Op.COPY_FROM: 120.0,
    # Requests: from the first byte to the last of the reply.
    Op.STAT: 30.0,
    Op.SHUTDOWN: 5.0,  # only says that it begins; killing follows
    Op.CLOCK: 10.0,
    Op.IDENTITY: 60.0,  # a restored guest takes 0.1 s; a host that reads its memory from a slow disk far more
    Op.MOUNT: 60.0,  # the guest waits up to 10 s for the disk, then may replay a journal
    Op.UNMOUNT: 60.0,  # writes back what is cached
    Op.MEMORY: 60.0,
    Op.METRICS: 10.0,
    Op.FREEZE: 10.0,  # it ends by itself after 10 s of guest time
    Op.THAW: 10.0,
    Op.PING: ANSWER,
}
