"""Gauges of the volumes."""

from __future__ import annotations

from hypeman.telemetry import metrics
from hypeman.volumes.service import Volumes


def register(volumes: Volumes) -> None:
    metrics.register_gauge(
        "hypeman_volumes",
        "Volumes",
        (),
        lambda: {(): float(len(volumes.sizes()))},
        original="hypeman_volumes_total",
    )
    metrics.register_gauge(
        "hypeman_volumes_allocated_bytes",
        "Size of all volumes together",
        (),
        lambda: {(): float(sum(volumes.sizes()))},
    )
    used = _Used(volumes)
    metrics.register_gauge(
        "hypeman_volumes_used_bytes", "What all volumes together occupy on the disk", (), lambda: {(): used.total}
    )
    metrics.refresh_before_scrape("volumes", used.refresh)


class _Used:
    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self.total = 0.0

    async def refresh(self) -> None:
        self.total = float(await self._volumes.used_bytes())
