"""Output of commands: a table for people, JSON or YAML for programs. Colours only on terminals."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

FORMATS = ("auto", "explore", "json", "jsonl", "pretty", "raw", "yaml")
Columns = Sequence[tuple[str, Callable[[Any], Any]]]
_STATE_COLOURS = {"Running": "green", "ready": "green", "ok": "green", "Standby": "cyan", "Initializing": "yellow",
                  "pulling": "yellow", "converting": "yellow", "warn": "yellow", "Unknown": "red", "failed": "red",
                  "fail": "red"}  # fmt: skip


def use_colour(stream: Any = None) -> bool:
    """Decided by FORCE_COLOR, then NO_COLOR, then whether the stream is a terminal."""
    forced = os.environ.get("FORCE_COLOR")
    if forced is not None:
        return forced not in ("", "0")
    return "NO_COLOR" not in os.environ and (stream or sys.stdout).isatty()


def render(value: Any, form: str) -> str:
    """``value`` in one of FORMATS except ``auto``, without the last newline."""
    if form == "jsonl":
        rows = value if isinstance(value, list) else [value]
        return "\n".join(msgspec.json.encode(row).decode() for row in rows)
    if form == "raw":
        return value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if form == "yaml":
        import yaml

        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)).rstrip("\n")
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def render_table(rows: Sequence[Any], columns: Columns, *, colour: bool = False) -> str:
    """One line per row; columns are as wide as their content."""
    cells = [[header for header, _ in columns]]
    cells += [[plain(get(row)) for _, get in columns] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    lines = []
    for number, line in enumerate(cells):
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        if colour:
            padded = [_coloured(text, number == 0) for text in padded]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def plain(value: Any) -> str:
    """On one line and without control characters, since a guest may have chosen the text; ``-`` if empty."""
    if value is None or value == "":
        return "-"
    return "".join(character if character.isprintable() else "�" for character in str(value))


def _coloured(text: str, is_header: bool) -> str:
    if is_header:
        return click.style(text, bold=True)
    colour = _STATE_COLOURS.get(text.strip())
    return click.style(text, fg=colour) if colour else text


def pick(value: Any, path: str) -> Any:
    """The part of ``value`` at a GJSON path: keys and indices separated by dots, ``#`` for every element
    (or, at the end, their number). None if there is no match."""
    if not path:
        return value
    head, _, rest = path.partition(".")
    if head == "#" and isinstance(value, list):
        return [pick(element, rest) for element in value] if rest else len(value)
    if isinstance(value, list) and head.isdigit():
        return pick(value[int(head)], rest) if int(head) < len(value) else None
    if isinstance(value, dict) and head in value:
        return pick(value[head], rest)
    return None


def size(number: float | None) -> str:
    """Human-readable bytes: 1.5GB."""
    if number is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1024:
            return f"{number:.0f}{unit}" if unit == "B" or number >= 100 else f"{number:.3g}{unit}"
        number /= 1024
    return f"{number:.3g}TB"


def age(timestamp: str | None, now: datetime | None = None) -> str:
    """Time since ``timestamp``, in one unit: 5m."""
    if not timestamp:
        return "-"
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(timestamp)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def until(timestamp: str, now: datetime | None = None) -> str:
    """Time left before ``timestamp``, in one unit: in 5m; "now" if it has passed."""
    now = now or datetime.now(UTC)
    left = datetime.fromisoformat(timestamp) - now
    return "now" if left.total_seconds() <= 0 else f"in {age(now.isoformat(), now + left)}"
