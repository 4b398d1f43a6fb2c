"""As bench_wake.py, with 100 instances that wake and enter standby all the time, while the server and VMMs are killed.

In the end states, VMMs, links, routes, addresses, memory and captures have to agree, else this fails.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from tests.bench.bench_wake import KILLS, WAKES, results_of, wake_all
from tests.bench.harness import Result
from tests.real.wakes import cabled


def run() -> Iterator[Result]:
    yield from results_of(trio.run(wake_all, cabled, 100, WAKES, KILLS))
