"""Gauges of the host's capacity: what instances may hold, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from hypeman.errors import HypemanError
from hypeman.resources.service import ResourceService
from hypeman.resources.types import Resources, ResourceStatus
from hypeman.telemetry import metrics

_KINDS: tuple[tuple[str, str, Callable[[Resources], ResourceStatus]], ...] = (
    ("cpus", "Virtual processors", lambda found: found.cpu),
    ("memory_bytes", "Memory", lambda found: found.memory),
    ("disk_bytes", "Disk space", lambda found: found.disk),
)


def register(resources: ResourceService) -> None:
    gauges = _Gauges(resources)
    metrics.refresh_before_scrape("resources", gauges.refresh)
    for unit, text, of in _KINDS:
        for part, what in (("allocated", "that instances hold"), ("limit", "that they may hold")):
            metrics.register_gauge(f"hypeman_{part}_{unit}", f"{text} {what}", (), partial(gauges.value, of, part))
    metrics.register_gauge(
        "hypeman_disk_free_bytes", "Free space of the data directory's file system, or what is left of the limit",
        (), partial(gauges.value, _KINDS[2][2], "available"),
    )  # fmt: skip
    metrics.register_gauge("hypeman_mdevs", "Mediated devices that instances use", (), gauges.mdevs)


class _Gauges:
    def __init__(self, resources: ResourceService) -> None:
        self._resources = resources
        self._found: Resources | None = None

    async def refresh(self) -> None:
        with suppress(HypemanError):
            self._found = await self._resources.get()

    def value(self, of: Callable[[Resources], ResourceStatus], part: str) -> dict[tuple[str, ...], float]:
        if self._found is None:
            return {}
        status = of(self._found)
        parts = {"allocated": status.allocated, "limit": status.effective_limit, "available": status.available}
        return {(): float(parts[part])}

    def mdevs(self) -> dict[tuple[str, ...], float]:
        gpu = self._found.gpu if self._found is not None else None
        return {(): float(gpu.used_slots) if gpu is not None and gpu.mode == "vgpu" else 0.0}
