"""Gauges of builds."""

from __future__ import annotations

from hypeman.builds.service import Builds
from hypeman.telemetry import metrics


def register(builds: Builds) -> None:
    metrics.register_gauge("hypeman_builds_active", "Builds that run", (), lambda: {(): builds.statistics()["active"]})
    metrics.register_gauge(
        "hypeman_build_queue_length", "Builds waiting", (), lambda: {(): builds.statistics()["queued"]}
    )
