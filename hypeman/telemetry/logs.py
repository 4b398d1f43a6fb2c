"""Structured logs: one line per event, JSON or text, on stderr, without secrets.

Code logs as usual (``logging.getLogger(__name__).info("text", extra={...})``); ``extra`` becomes fields
of the line. Rules:

- Secrets are not logged. As a second line of defence, fields whose names suggest a secret, and anything that looks
  like a token, are redacted here.
- Control characters are escaped: guests, images and clients control parts of what is logged.
- Logging never blocks the server. Lines go through a bounded queue to a dedicated thread; if the reader stalls,
  they are dropped and counted.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from hypeman.telemetry import metrics
from hypeman.text import lines, one_line

BLANK = "***"
QUEUE_BYTES = 8 * 2**20
"""Limit on queued lines."""
FLUSH_SECONDS = 2.0
"""How long exit waits for the log to be written."""
_SECRET_NAME = re.compile(r"secret|passw|token|authorization|api_?key|credential|(^|_)env$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"(?i:bearer|basic)\s+[\w.~+/=-]+|eyJ[\w-]+\.[\w-]+\.[\w-]*")
# Characters that JSON does not escape: DEL, C1, line separators, bidirectional controls, surrogates.
_JSON_CONTROL = re.compile(r"[\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def setup_logs(level: str = "info", style: str = "json", stream: TextIO | None = None) -> None:
    """Log ``level`` (debug, info, warning, error) and above to ``stream`` (stderr), as json or text."""
    handler = QueuedHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
    # Their info lines describe their internals; every request already has a line of ours.
    for name in ("hypercorn", "quart", "httpx", "httpcore", "pyroute2"):
        logging.getLogger(name).setLevel(max(logging.WARNING, _LEVELS[level]))


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
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
        except Exception:
            self.handleError(record)
            return
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            if self._size + len(line) > self._limit:
                self._dropped += 1
                metrics.log_lines_dropped.inc()
            else:
                self._waiting.append(line)
                self._size += len(line)
            self._changed.notify_all()

    def flush(self, timeout: float = FLUSH_SECONDS) -> None:
        """Wait until everything is written, at most ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._busy or self._dropped), timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._dropped)
                self._busy = True
                batch, dropped = [*self._waiting], self._dropped
                self._waiting.clear()
                self._dropped = 0
            if dropped:
                batch.append(self._about_dropped(dropped))
            for line in batch:
                try:
                    self._write(line)
                except (OSError, ValueError):  # the reader is gone, the disk is full, or the stream was closed
                    metrics.log_lines_dropped.inc()
                with self._changed:
                    self._size = max(0, self._size - len(line))

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
        return _JSON_CONTROL.sub(_json_escape, json.dumps(line, default=str, ensure_ascii=False))


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
    return blank_text(value) if isinstance(value, str) else value


def _quoted(value: Any) -> str:
    text = str(value)
    quoted = json.dumps(text, ensure_ascii=False) if not text or any(c in ' "=\n' for c in text) else text
    return one_line(quoted)


def _json_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
