"""Gauges of the policies."""

from __future__ import annotations

from hypeman.policies.service import Policies
from hypeman.telemetry import metrics


def register(policies: Policies) -> None:
    metrics.register_gauge(
        "hypeman_instances_health", "Instances with a health check, by status", ("status",), policies.checker.counts
    )
