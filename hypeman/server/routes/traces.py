"""What operations did, phase by phase. Extension of the original's contract."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, UnsetType
from msgspec.structs import replace

from hypeman.server.api import Routes
from hypeman.server.services import Services
from hypeman.telemetry.trace_types import OperationTrace
from hypeman.text import without_host_paths
from hypeman.tokens import Scope

routes = Routes("traces")


class TraceQuery(Struct, frozen=True, kw_only=True):
    instance: Annotated[
        str,
        Meta(max_length=256, description="Id or name of an instance, which may have been deleted", examples=["web"]),
    ] = ""
    limit: Annotated[int, Meta(ge=1, le=100)] = 10


@routes.get("/traces", Scope.INSTANCE_READ)
async def list_traces(services: Services, query: TraceQuery) -> list[OperationTrace]:
    """Traces of the newest operations: what each phase took, and which one failed.

    Calls that may change something are traced, and what policies do by themselves. A traceparent header (W3C Trace
    Context) makes the operation part of the caller's trace.
    """
    return [_shown(trace) for trace in services.traces.list(instance=query.instance, limit=query.limit)]


def _shown(trace: OperationTrace) -> OperationTrace:
    """Without the host's paths, as in the failures themselves."""
    spans = tuple(replace(span, error=_shown_error(span.error)) for span in trace.spans)
    return replace(trace, error=_shown_error(trace.error), spans=spans)


def _shown_error(text: str | UnsetType) -> str | UnsetType:
    return text if isinstance(text, UnsetType) else without_host_paths(text)
