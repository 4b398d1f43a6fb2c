"""OpenTelemetry's OTLP, as JSON: spans and metrics → bodies of POST /v1/traces and /v1/metrics, and what is answered.

https://opentelemetry.io/docs/specs/otlp/: ids are hexadecimal, 64-bit integers are strings, enumerations are numbers.
Metrics are cumulative since the server's start, with the names and labels that Prometheus scrapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import msgspec
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from hypeman import __version__
from hypeman.telemetry.traces import Span, Value

Json: TypeAlias = dict[str, Any]

_SERVER, _INTERNAL = 2, 1
"""Kinds of spans: a call that was accepted, and a phase of it."""
_ERROR = 2
_CUMULATIVE = 2
_SCOPE = {"name": "hypeman", "version": __version__}

_encode = msgspec.json.Encoder().encode


class _PartialSuccess(msgspec.Struct, rename="camel"):
    rejected_spans: int | str = 0
    rejected_data_points: int | str = 0
    error_message: str = ""


class _Answer(msgspec.Struct, rename="camel"):
    partial_success: _PartialSuccess | None = None


def render_spans(resource: Mapping[str, Value], spans: Iterable[Span]) -> bytes:
    """The body of an ExportTraceServiceRequest."""
    scope = {"scope": _SCOPE, "spans": [_span(span) for span in spans]}
    return _encode({"resourceSpans": [{"resource": _resource(resource), "scopeSpans": [scope]}]})


def render_metrics(resource: Mapping[str, Value], families: Iterable[Metric], *, started: int, now: int) -> bytes:
    """The body of an ExportMetricsServiceRequest. ``started``, when counting began, and ``now`` are nanoseconds since
    1970."""
    times = {"startTimeUnixNano": str(started), "timeUnixNano": str(now)}
    found = [metric for family in families if (metric := _metric(family, times)) is not None]
    scope = {"scope": _SCOPE, "metrics": found}
    return _encode({"resourceMetrics": [{"resource": _resource(resource), "scopeMetrics": [scope]}]})


def parse_rejected(answer: bytes) -> tuple[int, str]:
    """How many spans or data points the receiver did not take though it answered 200, and why. 0 if it says nothing."""
    try:
        part = msgspec.json.decode(answer or b"{}", type=_Answer).partial_success
        rejected = int(part.rejected_spans) + int(part.rejected_data_points) if part is not None else 0
    except (msgspec.DecodeError, ValueError):  # not JSON: some answer in protobuf all the same
        return 0, ""
    return rejected, part.error_message if part is not None else ""


def _resource(attributes: Mapping[str, Value]) -> Json:
    return {"attributes": _attributes(attributes)}


def _attributes(attributes: Mapping[str, Value]) -> list[Json]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Value) -> Json:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case str():
            return {"stringValue": value}


def _span(span: Span) -> Json:
    first = span is span.trace.spans[0]
    made: Json = {
        "traceId": span.trace.id,
        "spanId": span.id,
        "name": span.name,
        "kind": _SERVER if first and "http.route" in span.attributes else _INTERNAL,
        "startTimeUnixNano": str(span.started),
        "endTimeUnixNano": str(span.ended),
        "attributes": _attributes(span.attributes),
    }
    if span.parent:
        made["parentSpanId"] = span.parent
    if span.error:
        made["status"] = {"code": _ERROR, "message": span.error}
    return made


def _metric(family: Metric, times: Json) -> Json | None:
    """None if there is nothing to send."""
    about = {"description": family.documentation}
    if family.type == "histogram":
        points = _histogram_points(family.samples, times)
        return {"name": family.name, **about, "histogram": _of_type(points)} if points else None
    samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    if not samples:
        return None
    name, points = samples[0].name, [_number_point(sample, times) for sample in samples]
    if family.type == "counter":
        return {"name": name, **about, "sum": {**_of_type(points), "isMonotonic": True}}
    return {"name": name, **about, "gauge": {"dataPoints": points}}


def _of_type(points: list[Json]) -> Json:
    return {"aggregationTemporality": _CUMULATIVE, "dataPoints": points}


def _number_point(sample: Sample, times: Json) -> Json:
    return {**times, "attributes": _attributes(sample.labels), "asDouble": float(sample.value)}


def _histogram_points(samples: Iterable[Sample], times: Json) -> list[Json]:
    """One point for each set of labels: Prometheus counts up to each bound, OTLP between them."""
    found: dict[tuple[tuple[str, str], ...], Json] = {}
    for sample in samples:
        labels = {key: value for key, value in sample.labels.items() if key != "le"}
        point = found.setdefault(tuple(labels.items()), {"attributes": _attributes(labels), "upTo": []})
        if sample.name.endswith("_bucket"):
            point["upTo"].append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            point["sum"] = float(sample.value)
        elif sample.name.endswith("_count"):
            point["count"] = str(int(sample.value))
    return [times | _between(point) for point in found.values()]


def _between(point: Json) -> Json:
    up_to = sorted(point.pop("upTo"))
    counts = [int(count) for _, count in up_to]
    each = [count - before for count, before in zip(counts, [0, *counts], strict=False)]
    return {**point, "explicitBounds": [bound for bound, _ in up_to[:-1]], "bucketCounts": [str(one) for one in each]}
