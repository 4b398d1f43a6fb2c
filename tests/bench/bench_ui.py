"""The web UI with 1,000 instances whose states change fifty times a second, next to 40 that rest.

Frame times are those of Chromium (without a graphics card) while the list is scrolled. The server is the real one on
the fakes of tests/ui/world.py, which change the states: its CPU time with the page open is next to that without one.
Wants `make ui` and Chromium.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from tests.bench.harness import Result, process_cpu_time
from tests.real.appliance import Namespace
from tests.ui.browser import Fakes, check_built, fakes, run_node

_ROUNDS = 5
_SECONDS = 10


class Round(NamedTuple):
    frame_ms: float
    slow_frame_ms: float
    cpu_share: float


def run() -> list[Result]:
    check_built()
    namespace = Namespace()
    try:
        with (
            fakes(namespace, "--instances", "1000", "--events", "50") as many,
            fakes(namespace, "--instances", "40") as few,
        ):
            _round(namespace, many)  # a warm-up
            pairs = [(_round(namespace, many), _round(namespace, few), _idle(many)) for _ in range(_ROUNDS)]
    finally:
        namespace.remove()
    busy, calm, idle = [one for one, _, _ in pairs], [one for _, one, _ in pairs], [one for _, _, one in pairs]
    peer = "40 instances at rest"
    return [
        _paired("ui, time of a frame", "ms", [one.frame_ms for one in busy], peer, [one.frame_ms for one in calm]),
        _paired(
            "ui, 95th percentile of frames", "ms", [one.slow_frame_ms for one in busy], peer,
            [one.slow_frame_ms for one in calm],
        ),
        _paired(
            "ui, CPU of the server, page open", "% of a CPU", [one.cpu_share for one in busy], "no page open", idle
        ),
    ]  # fmt: skip


def _paired(name: str, unit: str, ours: Sequence[float], peer: str, theirs: Sequence[float]) -> Result:
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return Result(
        name,
        statistics.median(ours),
        unit,
        peer,
        statistics.median(theirs),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
    )


def _round(namespace: Namespace, server: Fakes) -> Round:
    """The CPU time is that of the whole round, with the login and the first list."""
    begin, used = time.monotonic(), process_cpu_time(server.pid)
    document = json.loads(run_node(namespace, "frames.mjs", server.base, SECONDS=str(_SECONDS)))
    share = 100 * (process_cpu_time(server.pid) - used) / (time.monotonic() - begin)
    return Round(document["median"], document["p95"], share)


def _idle(server: Fakes) -> float:
    """Percent of a CPU while no page is open: the fakes' own changes, and the events of them."""
    used = process_cpu_time(server.pid)
    time.sleep(_SECONDS)
    return 100 * (process_cpu_time(server.pid) - used) / _SECONDS
