"""Gauges of the instances."""

from __future__ import annotations

from collections import Counter
from functools import partial

from hypeman.instances.board import Board
from hypeman.instances.service import Instances
from hypeman.telemetry import metrics


def register(instances: Instances) -> None:
    metrics.register_gauge(
        "hypeman_instances_total", "Instances by state", ("state",), partial(_states, instances.board)
    )
    metrics.register_gauge(
        "hypeman_guests_silent", "Running guests that do not answer", (), lambda: {(): float(instances.silent_guests())}
    )
    metrics.register_gauge("hypeman_pool_members", "Pooled forks by state", ("state",), instances.pools.counts)


def _states(board: Board) -> dict[tuple[str, ...], float]:
    counts = Counter(record.state.value for record in board.records())
    return {(state,): count for state, count in counts.items()}
