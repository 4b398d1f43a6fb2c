"""Prometheus metrics, named as in the original so that its dashboards work (§3.7), and as Prometheus recommends. Where
these two differ, a metric has both names; the original's is untyped.

Events are counted where they happen. State (such as the number of instances in each state) is read at
scrape time through a callback: ``register_gauge``, or ``register_counter`` for what others count
(kernel, data plane). Labels are few and bounded: routes are templates, never paths.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, UntypedMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from hypeman import API_VERSION, __version__

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which has no use
REGISTRY = CollectorRegistry()
CONTENT_TYPE = CONTENT_TYPE_LATEST

_METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WS"])
"""Clients can invent methods, and each would become a permanent time series."""

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, registry=REGISTRY)


def _histogram(name: str, text: str, *labels: str, buckets: Sequence[float] = _SLOW) -> Histogram:
    return Histogram(name, text, labels, registry=REGISTRY, buckets=buckets)


_http_requests = _counter("hypeman_http_requests", "Requests answered", "method", "path", "status")
_http_seconds = _histogram(
    "hypeman_http_request_duration_seconds", "Time to the answer's head", "method", "path", "status", buckets=_FAST
)
InstanceVerb = Literal["create", "start", "stop", "standby", "restore"]
"""Operations whose duration is observed; a route names one as its ``measure``."""

instance_seconds: dict[InstanceVerb, Histogram] = {
    operation: _histogram(
        f"hypeman_instances_{operation}_duration_seconds", f"Time of {operation}, as its caller sees it", "status"
    )
    for operation in get_args(InstanceVerb)
}
volume_create_seconds = _histogram("hypeman_volumes_create_duration_seconds", "Time of making a volume")
state_transitions = _counter("hypeman_instances_state_transitions", "Changes of state", "from", "to")
image_pulls = _counter("hypeman_images_pulls", "Pulls that ended", "status")
image_build_seconds = _histogram("hypeman_images_build_duration_seconds", "Time from a pull's begin to its disk")
builds = _counter("hypeman_builds", "Builds from source that ended", "status")
build_seconds = _histogram(
    "hypeman_build_duration_seconds", "Time from a build's begin to its end", "status", buckets=(*_SLOW, 900.0, 3600.0)
)
tap_operations = _counter("hypeman_network_tap_operations", "TAP devices made and removed", "operation")
vmm_seconds = _histogram("hypeman_vmm_api_duration_seconds", "Calls to a VMM", "operation", "status", buckets=_FAST)
vmm_errors = _counter("hypeman_vmm_api_errors", "Calls to a VMM that failed", "operation")
exec_sessions = _counter("hypeman_exec_sessions", "Exec sessions that ended", "status", "exit_code")
exec_seconds = _histogram("hypeman_exec_duration_seconds", "Length of an exec session")
exec_bytes_sent = _counter("hypeman_exec_bytes_sent", "Bytes of output sent to clients")
exec_bytes_received = _counter("hypeman_exec_bytes_received", "Bytes of stdin received from clients")
cp_sessions = _counter("hypeman_cp_sessions", "Copy sessions that ended", "direction", "status")
cp_seconds = _histogram("hypeman_cp_duration_seconds", "Length of a copy session", "direction")
cp_bytes = _counter("hypeman_cp_bytes", "Bytes copied", "direction")
health_checks = _counter("hypeman_health_checks", "Health checks that ended", "type", "status")
health_check_seconds = _histogram(
    "hypeman_health_check_duration_seconds", "Length of a health check", "type", buckets=_FAST
)
scheduled_snapshots = _counter("hypeman_scheduled_snapshots", "Snapshots by schedules", "status")
auto_standbys = _counter("hypeman_auto_standbys", "Instances that were put in standby when idle", "status")
pool_yields = _counter("hypeman_pool_yields", "Pooled forks given up because an instance was short of it", "resource")
snapshot_forks = _counter("hypeman_snapshot_forks", "Forks of snapshots: from a pool or made anew", "source")
wakes = _counter("hypeman_wakes", "Instances that were brought back from standby by themselves", "by", "status")
wake_seconds = _histogram(
    "hypeman_wake_duration_seconds",
    "Time from the first packet or request until the guest ran",
    "status",
    buckets=_FAST,
)
restarts = _counter("hypeman_restarts", "Starts and stops by restart policies", "status")
webhook_deliveries = _counter(
    "hypeman_webhook_deliveries",
    "Attempts to deliver an event: delivered, failed, skipped (given up), gone (refused for good); or lost in the log",
    "hook",
    "outcome",
)
otlp_exports = _counter(
    "hypeman_otlp_exports", "Batches for the OpenTelemetry collector: success, rejected or error", "signal", "status"
)
otlp_spans_dropped = _counter("hypeman_otlp_spans_dropped", "Phases dropped because the collector was too slow")
log_lines_dropped = _counter("hypeman_log_lines_dropped", "Log lines dropped because the log's reader was too slow")

Info("hypeman", "What runs here", registry=REGISTRY).info({"version": __version__, "api_version": API_VERSION})
ProcessCollector(registry=REGISTRY)


_http: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
"""The series of each method, route and status seen so far: looking one up by its labels costs more than counting."""


def count_request(method: str, route: str, status: int, seconds: float) -> None:
    """Count one answered request to ``route`` (a template)."""
    if method not in _METHODS:
        method = "other"
    series = _http.get((method, route, status))
    if series is None:
        labels = (method, route, str(status))
        series = _http[method, route, status] = (_http_requests.labels(*labels), _http_seconds.labels(*labels))
    requests, duration = series
    requests.inc()
    duration.observe(seconds)


@contextmanager
def timed_vmm_call(operation: str) -> Iterator[None]:
    """Record the duration of one call to a VMM and whether it failed."""
    begin = time.perf_counter()
    status = "error"
    try:
        yield
        status = "success"
    finally:
        vmm_seconds.labels(operation, status).observe(time.perf_counter() - begin)
        if status == "error":
            vmm_errors.labels(operation).inc()


Ask = Callable[[], Mapping[tuple[str, ...], float]]
"""Label values → number. Must be fast and not block."""


_Family = CounterMetricFamily | GaugeMetricFamily | UntypedMetricFamily


class _Asked(Collector):
    """Metrics whose values are read at each scrape."""

    def __init__(self) -> None:
        self.questions: dict[str, tuple[type[_Family], str, Sequence[str], Ask]] = {}

    def collect(self) -> Iterable[Metric]:
        for name, (kind, text, labels, ask) in self.questions.items():
            family = kind(name, text, labels=labels)
            for values, number in ask().items():
                family.add_metric(values, number)
            yield family


_asked = _Asked()
REGISTRY.register(_asked)


def register_gauge(name: str, text: str, labels: Sequence[str], ask: Ask, *, original: str = "") -> None:
    """Register a gauge whose values ``ask`` returns at each scrape; also under its ``original`` name if it has one that
    is not a gauge's by convention."""
    _asked.questions[name] = (GaugeMetricFamily, text, labels, ask)
    if original:
        _asked.questions[original] = (UntypedMetricFamily, f"As {name}", labels, ask)


def register_counter(name: str, text: str, labels: Sequence[str], ask: Ask) -> None:
    """The same for a monotonic counter; ``name`` ends in ``_total``."""
    _asked.questions[name] = (CounterMetricFamily, text, labels, ask)


_refreshers: dict[str, Callable[[], Awaitable[object]]] = {}


def refresh_before_scrape(name: str, refresh: Callable[[], Awaitable[object]]) -> None:
    """Await ``refresh``, which is bounded and does not raise, before each scrape: for what another process counts."""
    _refreshers[name] = refresh


async def refresh() -> None:
    """Bring all values up to date; before ``render_metrics``."""
    for refresher in tuple(_refreshers.values()):
        await refresher()


_started = time.monotonic()
register_gauge("hypeman_uptime_seconds", "Since the server started", (), lambda: {(): time.monotonic() - _started})


def render_metrics() -> bytes:
    """All metrics in the Prometheus text format."""
    return generate_latest(REGISTRY)
