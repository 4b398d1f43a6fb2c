"""Traces in the API. Pure."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.fields import Timestamp


class TraceSpan(Struct, frozen=True, kw_only=True):
    """One phase of an operation."""

    id: Annotated[str, Meta(description="16 hexadecimal digits, as in W3C Trace Context")]
    parent: Annotated[str, Meta(description="Id of the phase that it is part of; of the first: the caller's, or empty")]
    name: Annotated[str, Meta(examples=["LaunchVmm"])]
    begin_ms: Annotated[float, Meta(description="After the operation's begin")]
    duration_ms: Annotated[float | None, Meta(description="null: not ended yet")]
    error: Annotated[str | UnsetType, Meta(description="Why it failed; absent if it did not")] = UNSET
    attributes: dict[str, str | int | float | bool] = {}


class OperationTrace(Struct, frozen=True, kw_only=True):
    """What an operation did, phase by phase. Kept in memory: the server forgets the oldest, and all when it ends."""

    id: Annotated[str, Meta(description="32 hexadecimal digits; of the caller's traceparent header if it sent one")]
    name: Annotated[str, Meta(examples=["POST /instances"])]
    started_at: Timestamp
    duration_ms: Annotated[float | None, Meta(description="Until the last phase ended; null: not ended yet")]
    error: Annotated[str | UnsetType, Meta(description="Why it failed; absent if it did not")] = UNSET
    spans: Annotated[tuple[TraceSpan, ...], Meta(description="In the order of their begins; the first is the whole")]
    dropped_spans: Annotated[int, Meta(description="Phases beyond the number that is kept")] = 0
