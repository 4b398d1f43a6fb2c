"""The arithmetic of benchmarks, in which an error would go unnoticed."""

from __future__ import annotations

import itertools
import os

import pytest

from tests.bench.__main__ import render_table
from tests.bench.harness import Result, compare, per_call, process_cpu_time, process_memory


def test_a_slow_phase_of_the_machine_does_not_move_the_ratio() -> None:
    """Both get three times slower in the middle; the ratio of each round stays one half."""
    speed = itertools.chain([1, 1], [1, 1] * 2, [3, 3] * 3, [1, 1] * 2)
    result = compare("x", "s", lambda: 1.0 * next(speed), "peer", lambda: 2.0 * next(speed), rounds=7)
    assert result.ratio == 0.5


def test_the_order_changes_from_round_to_round() -> None:
    order: list[str] = []

    def cost(name: str) -> float:
        order.append(name)
        return 1.0

    compare("x", "s", lambda: cost("ours"), "peer", lambda: cost("theirs"), rounds=2)
    assert order == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]


def test_ratio_without_rounds_and_without_a_peer() -> None:
    assert Result("x", 3.0, "s", "peer", 2.0).ratio == 1.5
    assert Result("x", 3.0, "s").ratio is None


def test_per_call_counts_calls() -> None:
    now = itertools.count()
    calls = []
    seconds = per_call(lambda: calls.append(next(now)), at_least=50, clock=lambda: float(next(now)))
    assert seconds == pytest.approx(1.0, rel=0.1), "the clock ticks once a call, and once for being read"


def test_this_process_has_used_time_and_memory() -> None:
    assert process_cpu_time(os.getpid()) > 0
    assert process_memory(os.getpid()) > 10**6


def test_the_table_lines_up() -> None:
    lines = render_table([Result("a", 1234.5, "µs", "b", 0.001), Result("longer", 2.0, "MB")]).splitlines()
    assert lines == ["a       1,234  µs  b: 0.001  x 1234500.00", "longer      2  MB"]
