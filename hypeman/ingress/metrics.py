"""Counters of ingresses."""

from __future__ import annotations

from hypeman.ingress.service import Ingresses
from hypeman.telemetry import metrics


def register(ingresses: Ingresses) -> None:
    metrics.register_counter(
        "hypeman_ingress_requests_total",
        "Requests by ingress (empty: no rule fits) and class of the response; passed: connections with tls_passthrough",
        ("ingress", "status"),
        lambda: dict(ingresses.requests),
    )
    metrics.register_counter(
        "hypeman_ingress_bytes_total",
        "Bytes of bodies, by ingress; received: from clients",
        ("ingress", "direction"),
        lambda: dict(ingresses.bytes),
    )
    metrics.register_counter(
        "hypeman_ingress_connections_refused_total",
        "Connections of clients refused by a limit",
        (),
        lambda: {(): ingresses.front.clients[1]},
    )
    metrics.register_gauge(
        "hypeman_ingress_connections",
        "Connections of clients that are open",
        (),
        lambda: {(): ingresses.front.clients[0]},
    )
    metrics.register_gauge(
        "hypeman_ingress_certificate_end_seconds",
        "When the certificate of a name ends, in seconds since 1970",
        ("name",),
        ingresses.certificates.ends,
    )
