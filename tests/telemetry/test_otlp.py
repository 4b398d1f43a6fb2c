"""OTLP: the bodies by OpenTelemetry's own types, and an exporter that nothing waits for."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from google.protobuf.json_format import Parse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from hypeman.config import OtlpConfig
from hypeman.host.tls import client_context
from hypeman.telemetry import export, metrics, traces
from hypeman.telemetry.export import Exporter
from hypeman.telemetry.otlp import parse_rejected, render_metrics, render_spans
from hypeman.telemetry.traces import Recorder, Span, operation, span

IDS = ("traceId", "spanId", "parentSpanId")


def decoded(body: bytes, kind: Callable[[], Any]) -> Any:
    """``body`` as OpenTelemetry's types, which know no other fields. Ids are base64 in their JSON, hex in OTLP's."""

    def with_base64(value: Any) -> Any:
        if isinstance(value, list):
            return [with_base64(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {
            key: b64encode(bytes.fromhex(each)).decode() if key in IDS else with_base64(each)
            for key, each in value.items()
        }

    return Parse(json.dumps(with_base64(json.loads(body))), kind())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for module in (traces, export):
        monkeypatch.setattr(module, "RECORDER", made)
    return made


def test_spans(recorder: Recorder) -> None:
    ended: list[Span] = []
    recorder.on_end = ended.append
    about: dict[str, traces.Value] = {"http.route": "/instances", "n": 3, "x": 1.5, "yes": True}
    with operation("POST /instances", about=about), pytest.raises(ValueError), span("launch"):
        raise ValueError("no\nmemory")
    [found] = decoded(render_spans({"service.name": "hypeman"}, ended), ExportTraceServiceRequest).resource_spans
    assert [attribute.value.string_value for attribute in found.resource.attributes] == ["hypeman"]
    launch, whole = found.scope_spans[0].spans
    assert (whole.name, whole.kind, whole.status.code, whole.parent_span_id) == ("POST /instances", 2, 0, b"")
    assert (launch.kind, launch.status.code, launch.status.message) == (1, 2, "ValueError: no\\nmemory")
    assert launch.parent_span_id == whole.span_id and launch.trace_id == whole.trace_id
    assert whole.start_time_unix_nano <= launch.start_time_unix_nano <= launch.end_time_unix_nano
    values = {attribute.key: attribute.value for attribute in whole.attributes}
    assert (values["n"].int_value, values["x"].double_value, values["yes"].bool_value) == (3, 1.5, True)


def test_metrics() -> None:
    registry = CollectorRegistry()
    Counter("calls", "Calls", ["route"], registry=registry).labels("/a").inc(3)
    Counter("nothing_yet", "No series", ["route"], registry=registry)
    Gauge("open", "Open", registry=registry).set(-1.5)
    Info("build", "What", registry=registry).info({"version": "1"})
    took = Histogram("took_seconds", "Took", ["route"], registry=registry, buckets=(0.1, 1.0))
    for seconds in (0.05, 0.5, 0.6, 7.0):
        took.labels("/a").observe(seconds)
    body = render_metrics({}, registry.collect(), started=5, now=7)
    [scope] = decoded(body, ExportMetricsServiceRequest).resource_metrics[0].scope_metrics
    found = {metric.name: metric for metric in scope.metrics}
    assert set(found) == {"calls_total", "open", "build_info", "took_seconds"}
    calls = found["calls_total"].sum
    assert (calls.is_monotonic, calls.aggregation_temporality, calls.data_points[0].as_double) == (True, 2, 3)
    assert (calls.data_points[0].start_time_unix_nano, calls.data_points[0].time_unix_nano) == (5, 7)
    assert found["open"].gauge.data_points[0].as_double == -1.5
    [point] = found["took_seconds"].histogram.data_points
    assert (list(point.bucket_counts), list(point.explicit_bounds), point.count) == ([1, 2, 1], [0.1, 1.0], 4)
    assert point.sum == pytest.approx(8.15)


def test_all_our_metrics_can_be_sent() -> None:
    body = render_metrics({}, metrics.REGISTRY.collect(), started=5, now=7)
    [scope] = decoded(body, ExportMetricsServiceRequest).resource_metrics[0].scope_metrics
    assert "hypeman_info" in {metric.name for metric in scope.metrics}


@pytest.mark.parametrize(
    ("answer", "rejected"),
    [
        (b"", (0, "")),
        (b"{}", (0, "")),
        (b'{"partialSuccess":{"rejectedSpans":"2","errorMessage":"too old"}}', (2, "too old")),
        (b'{"partialSuccess":{"rejectedDataPoints":3}}', (3, "")),
        (b'{"partialSuccess":{"rejectedSpans":"x"}}', (0, "")),
        (b"\x0a\x00", (0, "")),
    ],
)
def test_what_a_collector_rejects(answer: bytes, rejected: tuple[int, str]) -> None:
    assert parse_rejected(answer) == rejected


class Collector:
    """Answers each request with the next status of ``plan``, then with 200; None is no answer at all."""

    def __init__(self, *plan: int | None) -> None:
        self.plan = list(plan)
        self.got: list[tuple[str, bytes]] = []
        self.asked = 0
        self.heads: list[bytes] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                piece = await stream.receive_some()
                if not piece:
                    return
                data += piece
            head, _, data = data.partition(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            while len(data) < length:
                data += await stream.receive_some()
            body, data = data[:length], data[length:]
            self.asked += 1
            self.heads.append(head)
            status = self.plan.pop(0) if self.plan else 200
            if status is None:
                await trio.sleep_forever()
            if status == 200:
                self.got.append((head.split()[1].decode(), gzip.decompress(body)))
            await stream.send_all(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status)


@asynccontextmanager
async def exporting(collector: Collector, **settings: Any) -> AsyncIterator[Exporter]:
    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, collector.serve, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        config = OtlpConfig(endpoint=f"http://127.0.0.1:{port}/otlp/", **settings)
        exporter = Exporter(config, client_context(""))
        with trio.fail_after(30):
            async with trio.open_nursery() as running:
                running.start_soon(exporter.run)
                await trio.testing.wait_all_tasks_blocked()
                yield exporter
                running.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    monkeypatch.setattr(export, "FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(export, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(export, "GIVE_UP_SECONDS", 0.2)


def names(collector: Collector) -> list[str]:
    bodies = [body for path, body in collector.got if path == "/otlp/v1/traces"]
    found = [decoded(body, ExportTraceServiceRequest) for body in bodies]
    return [each.name for one in found for each in one.resource_spans[0].scope_spans[0].spans]


async def until(true: Callable[[], object]) -> None:
    while not true():
        await trio.sleep(0.005)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("plan", [(), (503, 429), (None,)])
async def test_a_collector_that_is_away_for_a_moment_gets_everything(plan: tuple[int | None, ...]) -> None:
    collector = Collector(*plan)
    async with exporting(collector, metrics=False, timeout=0.1, headers={"authorization": "Bearer t"}):
        with operation("one"):
            pass
        await until(lambda: collector.got)
    assert names(collector) == ["one"]
    assert collector.asked == len(plan) + 1
    assert b"authorization: bearer t" in collector.heads[0].lower()


@pytest.mark.usefixtures("hasty")
async def test_the_log_does_not_have_a_header_that_cannot_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    before = counted("traces", "error")
    async with exporting(Collector(), metrics=False, headers={"authorization": "Bearer secret\n"}):
        with operation("one"):
            pass
        await until(lambda: counted("traces", "error") > before)
    assert "check the headers" in caplog.text and "secret" not in caplog.text


@pytest.mark.usefixtures("hasty")
async def test_what_is_refused_or_out_of_time_is_dropped_and_counted() -> None:
    before = {status: counted("traces", status) for status in ("success", "rejected", "error")}
    collector = Collector(400, *[503] * 400)
    async with exporting(collector, metrics=False):
        for name in ("refused", "out of time"):
            with operation(name):
                pass
            await until(lambda: counted("traces", "rejected") > before["rejected"])
        await until(lambda: counted("traces", "error") > before["error"])
        collector.plan.clear()
        with operation("later"):
            pass
        await until(lambda: collector.got)
    assert names(collector) == ["later"]
    assert counted("traces", "success") == before["success"] + 1


@pytest.mark.usefixtures("hasty")
async def test_the_queue_is_bounded_and_the_last_batch_is_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "FLUSH_SECONDS", 1000)
    collector = Collector()
    dropped = metrics.otlp_spans_dropped._value.get()
    async with exporting(collector, metrics=False, queue=3):
        for number in range(5):
            with operation(f"o{number}"):
                pass
    assert names(collector) == ["o2", "o3", "o4"]
    assert metrics.otlp_spans_dropped._value.get() == dropped + 2


@pytest.mark.usefixtures("hasty")
async def test_metrics_are_sent_at_their_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    config = {"traces": False, "metrics_interval": 0.02}
    async with exporting(collector, **config):
        await until(lambda: len(collector.got) > 1)
    assert {path for path, _ in collector.got} == {"/otlp/v1/metrics"}


def counted(signal: str, status: str) -> float:
    return float(metrics.otlp_exports.labels(signal, status)._value.get())
