"""Gauges of the image service."""

from __future__ import annotations

from hypeman.images.service import Images
from hypeman.telemetry import metrics


def register(images: Images) -> None:
    metrics.register_gauge(
        "hypeman_images", "Images by status", ("status",), images.by_status, original="hypeman_images_total"
    )
    metrics.register_gauge(
        "hypeman_images_build_queue_length", "Images waiting", (), lambda: {(): images.statistics()["queued"]}
    )
