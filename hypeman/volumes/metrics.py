"""Gauges of the volumes."""

from __future__ import annotations

from hypeman.store import Store
from hypeman.telemetry import metrics
from hypeman.volumes.records import VOLUMES


def register(store: Store) -> None:
    def sizes() -> list[int]:
        return store.read(lambda txn: [volume.size_gb << 30 for _, volume in txn.scan(VOLUMES)])

    metrics.register_gauge(
        "hypeman_volumes", "Volumes", (), lambda: {(): float(len(sizes()))}, original="hypeman_volumes_total"
    )
    metrics.register_gauge(
        "hypeman_volumes_allocated_bytes", "Size of all volumes together", (), lambda: {(): float(sum(sizes()))}
    )
