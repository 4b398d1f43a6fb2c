"""BuildKit's progress, as ``buildctl --progress=rawjson`` prints it, and its rendering as lines. Pure.

A status update names vertexes (the steps: when they began and ended), their statuses (transfers), output and warnings.
Server and command line render with the same class; what a guest prints is escaped where it is shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime

import msgspec

MAX_LINE = 1 << 20
"""Bytes of one update; a longer one is dropped."""
_MAX_VERTEXES = 10_000
"""Steps that are known at once, and transfers; a build has some dozens."""
_MAX_LINES = 20_000
"""Of output in one update: a megabyte of empty lines would keep the server busy for seconds."""
_MAX_PENDING = 64 << 10
"""Bytes of a line of output that has not ended."""
_MAX_LATEST = 400
"""The latest lines of output, of all steps together, of which a step that fails shows its own."""
_FAILED_LINES = 20
_MAX_LATEST_LINE = 1000
_WORTH_A_LINE = 0.05
"""Seconds of a step that begins and ends again."""
_CANCELLED = "context canceled"
"""How the error of a step ends that ended because another one failed."""


class Vertex(msgspec.Struct, frozen=True):
    digest: str = ""
    name: str = ""
    started: datetime | None = None
    completed: datetime | None = None
    cached: bool = False
    error: str = ""


class VertexStatus(msgspec.Struct, frozen=True):
    id: str = ""
    vertex: str = ""
    name: str = ""
    total: int = 0
    current: int = 0
    timestamp: datetime | None = None
    started: datetime | None = None
    completed: datetime | None = None


class VertexLog(msgspec.Struct, frozen=True):
    vertex: str = ""
    stream: int = 0
    data: bytes = b""
    timestamp: datetime | None = None


class VertexWarning(msgspec.Struct, frozen=True):
    vertex: str = ""
    level: int = 0
    short: bytes = b""
    url: str = ""


class SolveStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One update."""

    vertexes: tuple[Vertex, ...] = ()
    statuses: tuple[VertexStatus, ...] = ()
    logs: tuple[VertexLog, ...] = ()
    warnings: tuple[VertexWarning, ...] = ()


_decoder = msgspec.json.Decoder(SolveStatus)


def parse_status(line: bytes) -> SolveStatus | None:
    """The update in a line; None if it is none, such as a line of another program."""
    if not line.startswith(b"{") or len(line) > MAX_LINE:
        return None
    try:
        found = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeError):
        return None
    return found if found.vertexes or found.statuses or found.logs or found.warnings else None


class LineSplitter:
    """Lines of a stream, without their ends; a line longer than ``limit`` bytes is dropped."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._dropping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        *whole, rest = data.split(b"\n")
        for part in whole:
            if not self._dropping and len(self._rest) + len(part) <= self._limit:
                yield bytes(self._rest) + part
            self._rest.clear()
            self._dropping = False
        if len(self._rest) + len(rest) > self._limit:
            self._rest.clear()
            self._dropping = True
        elif not self._dropping:
            self._rest += rest

    def flush(self) -> bytes:
        """What came after the last end of a line."""
        rest = bytes(self._rest)
        self._rest.clear()
        return rest


class Step:
    """One vertex, as far as it is known."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.started: datetime | None = None
        self.completed: datetime | None = None
        self.cached = False
        self.done = False
        """It has ended once: some steps begin again, such as those that fetch layers when they are needed."""
        self.error = ""
        self.pending = bytearray()
        self.transfers: dict[str, VertexStatus] = {}

    @property
    def seconds(self) -> float:
        """From its begin to its end; 0 if it has not ended."""
        if self.started is None or self.completed is None:
            return 0.0
        return max(0.0, (self.completed - self.started).total_seconds())


class PlainText:
    """Updates as the lines of ``docker build --progress=plain``. ``steps`` are all that have begun, in order."""

    def __init__(self, hide: Callable[[str], bool] = lambda name: False) -> None:
        """``hide``: steps without lines, by name."""
        self.steps: dict[str, Step] = {}
        self._transfers = 0
        """Known, of all steps."""
        self._latest: deque[tuple[int, str]] = deque(maxlen=_MAX_LATEST)
        """Numbers of steps, and lines that they printed."""
        self._hide = hide

    def feed(self, status: SolveStatus) -> list[str]:
        """The lines that ``status`` adds."""
        lines: list[str] = []
        for vertex in status.vertexes:
            self._vertex(vertex, lines)
        for transfer in status.statuses:
            step = self.steps.get(transfer.vertex)
            if step is not None:
                known = step.transfers.get(transfer.id)
                if known is None:
                    if self._transfers >= _MAX_VERTEXES:
                        continue
                    self._transfers += 1
                step.transfers[transfer.id] = transfer
                if transfer.completed is not None and (known is None or known.completed is None) and transfer.total:
                    lines.append(f"#{step.number} {transfer.name or transfer.id} {transfer.total} B done")
        for output in status.logs:
            step = self.steps.get(output.vertex)
            if step is not None:
                self._output(step, output, lines)
        for warning in status.warnings:
            lines.append(f"WARNING: {warning.short.decode(errors='replace')}")
        return lines

    def flush(self) -> list[str]:
        """Lines of output that have not ended, at the end of the build."""
        lines: list[str] = []
        for step in self.steps.values():
            self._flush(step, lines)
        return lines

    def failure(self, step: Step) -> list[str]:
        """What a step that failed has printed last, as docker shows it; nothing for one that others have ended."""
        if not step.error or step.error.endswith(_CANCELLED):
            return []
        latest = [text for number, text in self._latest if number == step.number]
        return ["------", f" > {step.name}:", *latest[-_FAILED_LINES:], "------"]

    def _shown(self, step: Step, data: bytes, at: datetime | None) -> str:
        text = _line(step, data, at)
        self._latest.append((step.number, text[:_MAX_LATEST_LINE]))
        return f"#{step.number} {text}"

    def _vertex(self, vertex: Vertex, lines: list[str]) -> None:
        step = self.steps.get(vertex.digest)
        if step is None:
            if vertex.started is None or len(self.steps) >= _MAX_VERTEXES or self._hide(vertex.name):
                return
            step = self.steps[vertex.digest] = Step(len(self.steps) + 1, vertex.name)
            lines.append(f"#{step.number} {vertex.name}")
        step.started = vertex.started or step.started
        ended = vertex.completed is not None and step.completed is None
        step.completed = vertex.completed
        step.cached = vertex.cached
        step.error = vertex.error
        if ended:
            self._flush(step, lines)
            if vertex.error:
                lines.append(f"#{step.number} ERROR: {vertex.error}")
                lines += self.failure(step)
            elif vertex.cached:
                lines.append(f"#{step.number} CACHED")
            elif not step.done or step.seconds >= _WORTH_A_LINE:
                lines.append(f"#{step.number} DONE {step.seconds:.1f}s")
            step.done = True

    def _output(self, step: Step, output: VertexLog, lines: list[str]) -> None:
        step.pending += output.data
        *whole, rest = bytes(step.pending).split(b"\n")
        step.pending = bytearray(rest)
        shown = whole[: max(0, _MAX_LINES - len(lines))]
        for line in shown:
            lines.append(self._shown(step, line, output.timestamp))
        if len(shown) < len(whole):
            lines.append(f"#{step.number} [{len(whole) - len(shown)} more lines at once: not shown]")
        if len(step.pending) > _MAX_PENDING:
            self._flush(step, lines)

    def _flush(self, step: Step, lines: list[str]) -> None:
        if step.pending:
            lines.append(self._shown(step, bytes(step.pending), None))
            step.pending.clear()


def _line(step: Step, data: bytes, at: datetime | None) -> str:
    since = ""
    if at is not None and step.started is not None:
        since = f"{max(0.0, (at - step.started).total_seconds()):.3f} "
    text = data.decode(errors="replace").rstrip("\r").rpartition("\r")[2]  # what a terminal would show in the end
    return f"{since}{text}"
