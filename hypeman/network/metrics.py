"""Gauges of the network. The traffic of each instance is with the other series of instances."""

from __future__ import annotations

from hypeman.network.leases import all_leases
from hypeman.store import Store
from hypeman.telemetry import metrics


def register(store: Store) -> None:
    metrics.register_gauge(
        "hypeman_network_allocations",
        "Addresses that instances hold",
        (),
        lambda: {(): float(sum(lease.enabled for lease in store.read(all_leases)))},
        original="hypeman_network_allocations_total",
    )
