"""Gauges of the volumes."""

from __future__ import annotations

from hypeman.store import Store
from hypeman.telemetry import metrics
from hypeman.volumes.records import VOLUMES


def register(store: Store) -> None:
    metrics.register_gauge(
        "hypeman_volumes_total", "Volumes", (), lambda: {(): store.read(lambda txn: sum(1 for _ in txn.keys(VOLUMES)))}
    )
