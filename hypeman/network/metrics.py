"""Counters of the guests' traffic."""

from __future__ import annotations

from functools import partial

from hypeman.network.service import Network
from hypeman.telemetry import metrics


def register(network: Network) -> None:
    for column, (direction, verb) in enumerate((("receive", "received"), ("transmit", "sent"))):
        metrics.register_counter(
            f"hypeman_network_{direction}_bytes_total",
            f"Bytes {verb} by the guest",
            ("instance",),
            partial(_bytes, network, column),
        )


def _bytes(network: Network, column: int) -> dict[tuple[str, ...], float]:
    return {(instance,): counts[column] for instance, counts in network.counters().items()}
