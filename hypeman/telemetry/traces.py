"""Traces of operations: which phase of a create, standby or fork took how long, and which one failed.

    with operation("POST /instances", parent=traceparent):       # where a call is accepted
        with span("LaunchVmm", about={...}):                     # around each phase
            ...

The current span travels in a context variable; a queued command carries it to the task that runs it (``within``). A
span whose parent has ended is not recorded, so that a long-lived task started by an operation does not add to it
forever. Outside of an operation ``span`` does nothing: reading is not traced and costs nothing.

The newest traces are kept in memory for ``hypeman trace``; ``on_end`` gets each span that ended, for the export. Times
are nanoseconds since 1970, taken from the monotonic clock within a trace. Attributes are ids, names and codes, never
the content of a request.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import islice

from msgspec import UNSET

from hypeman.telemetry.logs import blank_text
from hypeman.telemetry.trace_types import OperationTrace, TraceSpan
from hypeman.text import one_line

MAX_SPANS = 256
"""Of one trace; further ones are counted."""
MAX_ERROR = 300
"""Characters of a failure's text."""
INSTANCE = "hypeman.instance.id"
"""Attribute by which an instance's traces are found."""
INSTANCE_NAME = "hypeman.instance.name"

Value = str | int | float | bool

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
"""W3C Trace Context, any version but ff."""


class Trace:
    """One operation: its spans in the order of their beginnings, the first being the whole."""

    __slots__ = ("dropped", "id", "offset", "sampled", "spans")

    def __init__(self, trace_id: str, *, sampled: bool) -> None:
        self.id = trace_id
        self.sampled = sampled
        """Whether the caller asked to export it."""
        self.spans: list[Span] = []
        self.dropped = 0
        self.offset = time.time_ns() - time.perf_counter_ns()

    def now(self) -> int:
        return self.offset + time.perf_counter_ns()

    def concerns(self, instance: str) -> bool:
        """Whether ``instance`` is the id or name of an instance in it."""
        return any(
            instance in (span.attributes.get(INSTANCE), span.attributes.get(INSTANCE_NAME)) for span in self.spans
        )


class Span:
    """One phase."""

    __slots__ = ("attributes", "ended", "error", "id", "name", "parent", "started", "trace")

    def __init__(self, trace: Trace, name: str, parent: str, attributes: dict[str, Value], started: int) -> None:
        self.trace = trace
        self.name = name
        self.id = os.urandom(8).hex()
        self.parent = parent
        """Id of the span that it is part of; of the first span: the caller's, or empty."""
        self.attributes = attributes
        self.started = started
        self.ended = 0
        """0: not yet."""
        self.error = ""
        """Why it failed; empty if it did not."""


class Recorder:
    """The newest traces. One per process: ``RECORDER``."""

    def __init__(self, keep: int = 256) -> None:
        self._kept: deque[Trace] = deque(maxlen=keep)
        self.on_end: Callable[[Span], object] | None = None
        """Gets each span that ended; must not block or raise."""

    def keep(self, count: int) -> None:
        """From now on keep ``count`` traces; 0: none."""
        self._kept = deque(self._kept, maxlen=count)

    def list(self, *, instance: str = "", limit: int = 1) -> Sequence[OperationTrace]:
        """The newest first; those that concern ``instance``, an id or name, if one is given."""
        found = (trace for trace in reversed(self._kept) if not instance or trace.concerns(instance))
        return [_shown(trace) for trace in islice(found, limit)]

    def begin(self, name: str, parent: str, attributes: dict[str, Value]) -> Span:
        """The first span of a new trace, which continues the ``traceparent`` header ``parent`` if that is valid."""
        trace_id, parent_id, sampled = _parsed(parent)
        trace = Trace(trace_id or os.urandom(16).hex(), sampled=sampled)
        self._kept.append(trace)
        return self.add(trace, name, parent_id, attributes)

    def add(self, trace: Trace, name: str, parent: str, attributes: dict[str, Value], started: int = 0) -> Span:
        span = Span(trace, name, parent, attributes, started or trace.now())
        if len(trace.spans) < MAX_SPANS:
            trace.spans.append(span)
        else:
            trace.dropped += 1
        return span

    def end(self, span: Span, error: BaseException | None = None) -> None:
        span.ended = span.trace.now()
        if error is not None:
            span.error = one_line(blank_text(f"{type(error).__name__}: {error}"))[:MAX_ERROR]
        if self.on_end is not None and span.trace.sampled:
            self.on_end(span)


def _shown(trace: Trace) -> OperationTrace:
    whole = trace.spans[0]
    ended = [span.ended for span in trace.spans]
    return OperationTrace(
        id=trace.id,
        name=whole.name,
        started_at=datetime.fromtimestamp(whole.started / 1e9, UTC),
        duration_ms=_ms(max(ended) - whole.started) if all(ended) else None,
        error=whole.error or UNSET,
        spans=tuple(_shown_span(span, whole.started) for span in trace.spans),
        dropped_spans=trace.dropped,
    )


def _shown_span(span: Span, begin: int) -> TraceSpan:
    return TraceSpan(
        id=span.id,
        parent=span.parent,
        name=span.name,
        begin_ms=_ms(span.started - begin),
        duration_ms=_ms(span.ended - span.started) if span.ended else None,
        error=span.error or UNSET,
        attributes=span.attributes,
    )


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


RECORDER = Recorder()
_current: ContextVar[Span | None] = ContextVar("span", default=None)


def current() -> Span | None:
    """The span of the running task, for ``within`` in another one."""
    return _current.get()


@contextmanager
def within(span: Span | None) -> Iterator[None]:
    """Within the block, phases belong to ``span``; with None they are not recorded."""
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def operation(name: str, *, parent: str = "", about: Mapping[str, Value] = {}) -> Iterator[Span]:
    """A trace of its own around the block."""
    with _around(RECORDER.begin(name, parent, dict(about))) as span:
        yield span


@contextmanager
def span(name: str, about: Mapping[str, Value] = {}) -> Iterator[Span | None]:
    """A phase of the current span; None outside of one."""
    parent = _current.get()
    if parent is None or parent.ended:
        yield None
        return
    with _around(RECORDER.add(parent.trace, name, parent.id, dict(about))) as made:
        yield made


def add_span(parent: Span | None, name: str, started: int, about: Mapping[str, Value] = {}) -> None:
    """A phase that ends now and began at ``started`` (nanoseconds since 1970), of an operation that may have ended."""
    if parent is not None:
        RECORDER.end(RECORDER.add(parent.trace, name, parent.id, dict(about), started))


@contextmanager
def _around(span: Span) -> Iterator[Span]:
    token = _current.set(span)
    try:
        yield span
    except BaseException as error:
        RECORDER.end(span, error)
        raise
    else:
        RECORDER.end(span)
    finally:
        _current.reset(token)


def _parsed(traceparent: str) -> tuple[str, str, bool]:
    """Trace id, span id and whether the caller records it; empty if ``traceparent`` is none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or traceparent.startswith("ff") or not found[1].strip("0") or not found[2].strip("0"):
        return "", "", True
    return found[1], found[2], bool(int(found[3], 16) & 1)
