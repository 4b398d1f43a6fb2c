"""Structured logs: one line per event, JSON or text, on stderr, without secrets.

Code logs as usual (``logging.getLogger(__name__).info("text", extra={...})``); ``extra`` becomes fields
of the line. Rules:

- Secrets are not logged. As a second line of defence, fields whose names suggest a secret, and anything that looks
  like a token, are redacted here.
- Control characters are escaped: guests, images and clients control parts of what is logged.
- Logging never blocks the server. Lines go through a bounded queue to a dedicated thread; if the reader stalls,
  they are dropped and counted. The thread collects lines for a few milliseconds and writes them together: waking it
  for each one would cost a request more than the line itself. Warnings and errors are written at once.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from hypeman.telemetry import metrics
from hypeman.text import lines, one_line

BLANK = "***"
QUEUE_BYTES = 8 * 2**20
"""Limit on queued lines."""
FLUSH_SECONDS = 2.0
"""How long exit waits for the log to be written."""
COLLECT_SECONDS = 0.005
"""How long lines below a warning may wait to be written together with later ones."""
_WRITE_BYTES = 64 * 1024
"""Bytes written with one system call, unless one line is longer."""
_SECRET_NAME = re.compile(r"secret|passw|token|authorization|api_?key|credential|(^|_)env$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"(?i:bearer|basic)\s+[\w.~+/=-]+|eyJ[\w-]+\.[\w-]+\.[\w-]*")
# Characters that JSON does not escape: DEL, C1, line separators, bidirectional controls, surrogates.
_JSON_CONTROL = re.compile(r"[\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_ROOT = logging.getLogger()
_encode = msgspec.json.Encoder().encode
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


_fast: QueuedHandler | None = None
"""The handler of ``setup_logs`` if it writes JSON."""


def setup_logs(level: str = "info", style: str = "json", stream: TextIO | None = None) -> None:
    """Log ``level`` (debug, info, warning, error) and above to ``stream`` (stderr), as json or text."""
    global _fast
    handler = QueuedHandler(stream or sys.stderr)
    _fast = handler if style == "json" else None
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
    # Their info lines describe their internals; every request already has a line of ours.
    for name in ("hypercorn", "quart", "httpx", "httpcore", "pyroute2"):
        logging.getLogger(name).setLevel(max(logging.WARNING, _LEVELS[level]))


def log_fields(log: logging.Logger, message: str, ours: dict[str, Any], theirs: Mapping[str, str]) -> None:
    """An info line with the fields ``ours`` and ``theirs``; a fifth of the cost of ``log.info(message, extra=…)``.

    Names of fields, ``message`` and the values in ``ours`` must be the program's own text and numbers: they are
    not searched for secrets and control characters. ``theirs`` is.
    """
    if not log.isEnabledFor(logging.INFO):
        return
    handler = _fast
    if handler is None or log.handlers or _ROOT.handlers != [handler]:
        log.info(message, extra={**ours, **theirs})
        return
    line = {"time": _utc(time.time()), "level": "info", "logger": log.name, "message": message, **ours}
    plain = True
    for name, value in theirs.items():
        plain = plain and value.isascii() and value.isprintable()
        # What looks like a secret has a dot (a token) or white space (a login).
        line[name] = value if plain and "." not in value and " " not in value else blank_text(value)
    handler.put(_encode(line) + b"\n" if plain else _json_text(line).encode() + b"\n")


class QueuedHandler(logging.Handler):
    """Writes to ``stream`` in a dedicated thread, which may block: a full pipe, a stuck disk.

    At most ``limit`` bytes are queued; lines beyond that are dropped. Their number is logged as soon as the stream
    accepts a line again, and counted by the metric ``hypeman_log_lines_dropped_total``.
    """

    def __init__(self, stream: TextIO, limit: int = QUEUE_BYTES) -> None:
        super().__init__()
        self._write = _writer(stream)
        self._limit = limit
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._busy = False
        self._idle = False
        """The thread waits for a line; otherwise it finds new lines without being notified."""
        self._urgent = False
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
        except Exception:
            self.handleError(record)
            return
        self.put(line, urgent=record.levelno >= logging.WARNING)

    def put(self, line: bytes, *, urgent: bool = False) -> None:
        """Queue ``line``, which ends in a line feed; drop it if the queue is full."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            if self._size + len(line) > self._limit:
                self._dropped += 1
                urgent = True
                metrics.log_lines_dropped.inc()
            else:
                self._waiting.append(line)
                self._size += len(line)
            if urgent:
                self._urgent = True
            if urgent or self._idle:
                self._changed.notify_all()

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        """Wait until everything is written, at most ``timeout`` seconds."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._waiting or self._busy or self._dropped), timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._dropped)
                self._busy, self._idle = True, False
                self._changed.wait_for(lambda: self._urgent, COLLECT_SECONDS)
                self._urgent = False
                batch, dropped = [*self._waiting], self._dropped
                self._waiting.clear()
                self._dropped = 0
            if dropped:
                batch.append(self._about_dropped(dropped))
            for lines_together in _chunks(batch):
                data = b"".join(lines_together)
                try:
                    self._write(data)
                except (OSError, ValueError):  # the reader is gone, the disk is full, or the stream was closed
                    metrics.log_lines_dropped.inc(len(lines_together))
                with self._changed:
                    self._size = max(0, self._size - len(data))

    def _about_dropped(self, count: int) -> bytes:
        record = logging.makeLogRecord(
            {
                "name": __name__,
                "levelno": logging.WARNING,
                "levelname": "WARNING",
                "msg": "log lines were dropped: the log was not read fast enough",
                "dropped": count,
            }
        )
        return (self.format(record) + "\n").encode()


def _chunks(batch: list[bytes]) -> Iterator[list[bytes]]:
    """``batch`` in order, in lists of at most _WRITE_BYTES or of one line."""
    chunk: list[bytes] = []
    size = 0
    for line in batch:
        if chunk and size + len(line) > _WRITE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(line)
        size += len(line)
    if chunk:
        yield chunk


def _writer(stream: TextIO) -> Callable[[bytes], object]:
    """A function that writes a whole line. It bypasses Python's buffer if there is a descriptor: a thread that blocks
    while holding the buffer's lock would block every other writer to stderr, and the interpreter's exit."""
    try:
        fd = stream.fileno()
    except (io.UnsupportedOperation, AttributeError):
        return lambda line: stream.write(line.decode())

    def write(line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[os.write(fd, view) :]

    return write


class JsonFormatter(logging.Formatter):
    """One JSON object per line, a traceback being one field."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": blank_text(record.getMessage()),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = blank_text(self.formatException(record.exc_info))
        return _json_text(line)


class TextFormatter(logging.Formatter):
    """Human-readable: time, level, message, then key=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {one_line(key)}={_quoted(value)}" for key, value in _fields(record).items())
        message = one_line(blank_text(record.getMessage()))
        line = f"{_time(record)} {record.levelname.lower():7} {record.name}: {message}{fields}"
        if record.exc_info:
            line += "\n" + lines(blank_text(self.formatException(record.exc_info)))
        return line


def blank_text(text: str) -> str:
    """``text`` with everything that looks like a token or a login redacted."""
    return _SECRET_TEXT.sub(BLANK, text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: _blank(key, value) for key, value in vars(record).items() if key not in _STANDARD}


def _blank(key: str, value: Any) -> Any:
    if _SECRET_NAME.search(key):
        return BLANK
    if isinstance(value, dict):
        return {inner: _blank(str(inner), content) for inner, content in value.items()}
    if isinstance(value, list | tuple):
        return [_blank("", content) for content in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return blank_text(str(value))


def _json_text(line: Mapping[str, Any]) -> str:
    try:
        text = _encode(line).decode()
    except (TypeError, ValueError, OverflowError):  # a surrogate, or an integer beyond 64 bits
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    return _JSON_CONTROL.sub(_json_escape, text)


def _quoted(value: Any) -> str:
    text = str(value)
    quoted = json.dumps(text, ensure_ascii=False) if not text or any(c in ' "=\n' for c in text) else text
    return one_line(quoted)


def _json_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _time(record: logging.LogRecord) -> str:
    return _utc(record.created)


_second = (0, "")
"""The last second whose text was made, and the text."""


def _utc(seconds: float) -> str:
    """``seconds`` since 1970 as 2026-01-02T03:04:05.678Z."""
    global _second
    whole = int(seconds)
    last, text = _second
    if whole != last:
        text = datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        _second = (whole, text)
    return f"{text}.{int((seconds - whole) * 1000):03d}Z"
