"""Structured logs: one line an event, JSON or text, on stderr, and never a secret.

Code logs as usual (``logging.getLogger(__name__).info("text", extra={...})``); what stands in
``extra`` becomes fields of the line. Nobody should log a secret; that nobody does by mistake is held
here: fields whose name speaks of secrets, and anything that looks like a token, are blanked.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

BLANK = "***"
_SECRET_NAME = re.compile(r"secret|passw|token|authorization|api_?key|credential|(^|_)env$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"(?i:bearer|basic)\s+[\w.~+/=-]+|eyJ[\w-]+\.[\w-]+\.[\w-]*")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def setup_logs(level: str = "info", style: str = "json", stream: TextIO | None = None) -> None:
    """Send what is at ``level`` (debug, info, warning, error) or above to ``stream`` (stderr), as json or text."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
    # Their information is about themselves; a request is already one line of ours.
    for name in ("hypercorn", "quart", "httpx", "httpcore", "pyroute2"):
        logging.getLogger(name).setLevel(max(logging.WARNING, _LEVELS[level]))


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a traceback is one field of it."""

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
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For people: time, level, message, then key=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_quoted(value)}" for key, value in _fields(record).items())
        message = blank_text(record.getMessage()).replace("\n", "\\n")
        line = f"{_time(record)} {record.levelname.lower():7} {record.name}: {message}{fields}"
        if record.exc_info:
            line += "\n" + blank_text(self.formatException(record.exc_info))
        return line


def blank_text(text: str) -> str:
    """``text`` with everything blanked that looks like a token or a login."""
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
    return json.dumps(text, ensure_ascii=False) if not text or any(c in ' "=\n' for c in text) else text


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
