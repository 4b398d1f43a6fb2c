"""Metrics of the instances: all together by state, and the running ones each, at most ``per_instance`` of them.

Which ones have series of their own changes only when one of them ends: they are the oldest. ``instance`` would be a
label that Prometheus gives to every series itself, so these are ``instance_id`` and ``instance_name``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from hypeman.errors import HypemanError
from hypeman.instances.board import Board
from hypeman.instances.model.types import InstanceUsage
from hypeman.instances.service import Instances
from hypeman.telemetry import metrics

_LABELS = ("instance_id", "instance_name")
_EACH: tuple[tuple[str, str, Callable[[InstanceUsage], float]], ...] = (
    ("cpu_seconds_total", "CPU time of the VMM and its guest", lambda used: used.cpu_seconds),
    ("memory_resident_bytes", "Memory of the VMM and its guest in RAM", lambda used: used.memory_rss_bytes),
    ("network_receive_bytes_total", "Bytes received by the guest", lambda used: used.network_rx_bytes),
    ("network_transmit_bytes_total", "Bytes sent by the guest", lambda used: used.network_tx_bytes),
)


def register(instances: Instances, per_instance: int) -> None:
    metrics.register_gauge(
        "hypeman_instances", "Instances by state", ("state",), partial(_states, instances.board),
        original="hypeman_instances_total",
    )  # fmt: skip
    metrics.register_gauge(
        "hypeman_guests_silent", "Running guests that do not answer", (), lambda: {(): float(instances.silent_guests())}
    )
    metrics.register_gauge("hypeman_pool_members", "Pooled forks by state", ("state",), instances.pools.counts)
    each = _Each(instances, per_instance)
    metrics.refresh_before_scrape("instances", each.refresh)
    for name, text, value in _EACH:
        add = metrics.register_counter if name.endswith("_total") else metrics.register_gauge
        add(f"hypeman_instance_{name}", text, _LABELS, partial(each.values, value))
    metrics.register_gauge(
        "hypeman_instances_without_series", "Running instances beyond metrics.per_instance", (), each.left_out
    )


class _Each:
    """The newest sample of the instances that have series of their own."""

    def __init__(self, instances: Instances, limit: int) -> None:
        self._instances = instances
        self._limit = limit
        self._shown: dict[tuple[str, ...], InstanceUsage] = {}
        self._left_out = 0

    async def refresh(self) -> None:
        with suppress(HypemanError):
            used = {instance.instance_id: instance for instance in (await self._instances.usage()).instances}
            running = [record for record in self._instances.board.records() if record.id in used]
            running.sort(key=lambda record: (record.created_at, record.id))
            self._shown = {(record.id, record.name): used[record.id] for record in running[: self._limit]}
            self._left_out = len(running) - len(self._shown)

    def values(self, value: Callable[[InstanceUsage], float]) -> dict[tuple[str, ...], float]:
        return {labels: float(value(used)) for labels, used in self._shown.items()}

    def left_out(self) -> dict[tuple[str, ...], float]:
        return {(): float(self._left_out)}


def _states(board: Board) -> dict[tuple[str, ...], float]:
    counts = Counter(record.state.value for record in board.records())
    return {(state,): count for state, count in counts.items()}
