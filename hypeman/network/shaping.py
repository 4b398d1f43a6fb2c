"""Converts rates to queue parameters. Pure; all rates in bytes per second.

Both directions are a token bucket (TBF): download on the TAP's own queue, upload on an ifb that the
TAP's ingress is redirected to. A bucket that delays is what TCP slows down for; a policer that cuts
overshot by half in trials (10 Mbit/s set, 14.8 seen).

``burst`` is what may pass at once; a guest hands over up to 64 KB as one segment, but TBF cuts that up
itself. ``queue`` is how long a packet may wait: longer only adds delay, and with less than two such
segments TCP loses its pace at low rates (5 Mbit/s in both directions at once: 3.7 with 64 KB).
"""

from __future__ import annotations

from hypeman.host.types import TokenBucket

_MIN_BURST = 16 * 1024
_BURST_SECONDS = 0.010
_MIN_QUEUE = 128 * 1024
_QUEUE_SECONDS = 0.1
_MAX_RATE = 2**32 - 1
"""TBF takes more in a 64-bit attribute; 34 Gbit/s is beyond what one TAP carries anyway."""


def token_bucket(rate: int) -> TokenBucket | None:
    """The queue that limits to ``rate``; None if there is no limit."""
    if rate <= 0 or rate > _MAX_RATE:
        return None
    return TokenBucket(
        rate=rate,
        burst=max(_MIN_BURST, int(rate * _BURST_SECONDS)),
        queue=max(_MIN_QUEUE, int(rate * _QUEUE_SECONDS)),
    )
