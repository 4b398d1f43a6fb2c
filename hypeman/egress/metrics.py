"""The counters of the egress data plane as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from msgspec import Struct

from hypeman.egress.service import Egress, Statistics
from hypeman.egress.usage import Usage
from hypeman.errors import InternalError
from hypeman.telemetry import metrics


class Family(Struct, frozen=True):
    """One metric: several counters distinguished by ``label``, or a single counter without a label."""

    text: str
    label: str
    counters: dict[str, str]
    """Name in the data plane → value of the label."""


def _single(counter: str, text: str) -> Family:
    return Family(text, "", {counter: ""})


FAMILIES: dict[str, Family] = {
    "hypeman_egress_connections": _single("connections", "Open connections of the engine, those of ingresses included"),
    "hypeman_egress_accepted_total": Family(
        "Connections from guests by outcome",
        "outcome",
        {"accepted": "accepted", "unregistered": "unregistered", "too_many": "too_many"},
    ),
    "hypeman_egress_requests_total": _single("requests", "Requests of guests"),
    "hypeman_egress_injected_total": _single("injected", "Requests into which a credential was injected"),
    "hypeman_egress_scrubbed_total": _single("scrubbed", "Responses in which a credential was replaced"),
    "hypeman_egress_passed_through_total": _single("passed_through", "Connections passed through without decryption"),
    "hypeman_egress_tunnels_total": _single("tunnels", "Exchanges upgraded to another protocol, such as WebSocket"),
    "hypeman_egress_responses_total": Family(
        "Responses by status class", "status", {f"status_{n}xx": f"{n}xx" for n in range(2, 6)}
    ),
    "hypeman_egress_handshakes_total": Family(
        "TLS handshakes with guests", "status", {"handshakes": "success", "handshakes_failed": "error"}
    ),
    "hypeman_egress_minted_total": _single("minted", "Leaf certificates issued for names that guests asked for"),
    "hypeman_egress_upstream_total": Family(
        "Upstream connections by outcome",
        "outcome",
        {"upstream_opened": "opened", "upstream_reused": "reused", "upstream_failed": "failed"},
    ),
    "hypeman_egress_verify_failed_total": _single(
        "verify_failed", "Upstream connections whose certificate was rejected"
    ),
    "hypeman_egress_bytes_total": Family(
        "Bytes of requests and responses", "direction", {"bytes_up": "up", "bytes_down": "down"}
    ),
    "hypeman_egress_audit_lost_total": _single(
        "audit_lost", "Audit records dropped because they were not read in time"
    ),
}
LEFT_OUT = frozenset(["denied", "clients", "clients_refused"])
"""Counters not exported: another metric has the same count by reason, and those of clients are of ingresses."""


def register(egress: Egress) -> None:
    metrics.refresh_before_scrape("egress", partial(_refresh, egress))
    for name, family in FAMILIES.items():
        add = metrics.register_counter if name.endswith("_total") else metrics.register_gauge
        add(name, family.text, _labels(family.label), partial(_of_family, egress, family))
    metrics.register_counter(
        "hypeman_egress_denied_total",
        "Requests and connections that were denied or failed, by reason",
        ("reason",),
        partial(_denied, egress),
    )
    metrics.register_gauge(
        "hypeman_egress_in_use",
        "What all instances hold: connections, upstreams, streams, handshakes, descriptors, bytes in buffers",
        ("bound",),
        partial(_of_bounds, egress, False),
    )
    metrics.register_gauge(
        "hypeman_egress_largest_in_use",
        "What the instance that holds the most of it holds",
        ("bound", "instance_id"),
        partial(_of_largest, egress),
    )
    metrics.register_counter(
        "hypeman_egress_limited_total",
        "What was refused because an instance, or all together, held too much",
        ("bound",),
        partial(_of_bounds, egress, True),
    )

    usage = Usage()
    egress.on_audit(usage.add)
    metrics.register_counter(
        "hypeman_egress_credential_requests_total",
        "Requests into which a credential was injected, by outcome: ok, rejected (401, 403) or failed",
        ("instance_id", "credential", "outcome"),
        usage.requests,
    )
    metrics.register_counter(
        "hypeman_egress_credential_bytes_total",
        "Bytes of requests into which a credential was injected, and of their responses",
        ("instance_id", "credential", "direction"),
        usage.bytes,
    )


async def _refresh(egress: Egress) -> None:
    with suppress(InternalError):
        await egress.statistics()


def _of_bounds(egress: Egress, limited: bool) -> Mapping[tuple[str, ...], float]:
    statistics = _statistics(egress)
    if statistics is None:
        return {}
    counts = statistics.limited if limited else statistics.in_use
    return {(bound,): count for bound, count in counts.items()}


def _of_largest(egress: Egress) -> Mapping[tuple[str, ...], float]:
    statistics = _statistics(egress)
    if statistics is None:
        return {}
    return {(bound, instance): held for bound, (instance, held) in statistics.largest.items()}


def _labels(label: str) -> tuple[str, ...]:
    return (label,) if label else ()


def _of_family(egress: Egress, family: Family) -> Mapping[tuple[str, ...], float]:
    statistics = _statistics(egress)
    if statistics is None:
        return {}
    return {_labels(value): statistics.counters.get(name, 0) for name, value in family.counters.items()}


def _denied(egress: Egress) -> Mapping[tuple[str, ...], float]:
    statistics = _statistics(egress)
    return {} if statistics is None else {(reason,): count for reason, count in statistics.denied.items()}


def _statistics(egress: Egress) -> Statistics | None:
    """None while the data plane is not running; the other metrics are still exported."""
    try:
        return egress.counted()
    except InternalError:
        return None
