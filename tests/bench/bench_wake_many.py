"""As bench_wake.py, with 100 instances that wake and enter standby all the time, while the server and VMMs are killed.

For ten minutes, or HYPEMAN_BENCH_SECONDS. In the end states, VMMs, links, routes, addresses, memory and captures have
to agree, else this fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import trio

from tests.bench.bench_wake import KILLS, results_of, wake_all
from tests.bench.harness import Result
from tests.real.wakes import cabled

GUESTS = 100
SECONDS = float(os.environ.get("HYPEMAN_BENCH_SECONDS", "600"))


def run() -> Iterator[Result]:
    yield from results_of(trio.run(wake_all, cabled, GUESTS, sys.maxsize, KILLS, SECONDS))
