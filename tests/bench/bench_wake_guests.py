"""As bench_wake.py, with real guests, and without kills. HYPEMAN_BENCH_REAL_WAKES sets the number of requests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import trio

from tests.bench.bench_wake import results_of, wake_all
from tests.bench.harness import Result
from tests.real.wakes import real

WAKES = int(os.environ.get("HYPEMAN_BENCH_REAL_WAKES", "34"))
GUESTS = 2


def run() -> Iterator[Result]:
    yield from results_of(trio.run(wake_all, real, GUESTS, WAKES, 0))
