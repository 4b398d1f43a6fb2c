"""Output of commands: a table for people, JSON or YAML for programs. Colours only on terminals."""

from __future__ import annotations

import fnmatch
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

FORMATS = ("auto", "table", "explore", "json", "jsonl", "pretty", "raw", "yaml")
_GAP = "  "
_NARROWEST = 8
Columns = Sequence[tuple[str, Callable[[Any], Any]]]
_STATE_COLOURS = {"Running": "green", "ready": "green", "ok": "green", "Standby": "cyan", "Initializing": "yellow",
                  "pulling": "yellow", "converting": "yellow", "warn": "yellow", "Unknown": "red", "failed": "red",
                  "fail": "red"}  # fmt: skip


def use_colour(stream: Any = None) -> bool:
    """Decided by FORCE_COLOR, then NO_COLOR unless it is empty, then whether the stream is a terminal."""
    forced = os.environ.get("FORCE_COLOR")
    if forced is not None:
        return forced not in ("", "0")
    return not os.environ.get("NO_COLOR") and (stream or sys.stdout).isatty()


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


def render_table(rows: Sequence[Any], columns: Columns, *, colour: bool = False, width: int | None = None) -> str:
    """One line per row; columns are as wide as their content, or narrower so that a line has at most ``width``."""
    cells = [[header for header, _ in columns]]
    cells += [[plain(get(row)) for _, get in columns] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    if width is not None:
        widths = narrowed(widths, width - len(_GAP) * (len(columns) - 1))
    lines = []
    for number, line in enumerate(cells):
        padded = [_cut(text, most).ljust(most) for text, most in zip(line, widths, strict=True)]
        if colour:
            padded = [_coloured(text, number == 0) for text in padded]
        lines.append(_GAP.join(padded).rstrip())
    return "\n".join(lines)


def narrowed(widths: Sequence[int], total: int) -> list[int]:
    """``widths`` with the widest columns made narrower until they fit in ``total``, none below _NARROWEST. Pure."""
    result = list(widths)
    while sum(result) > total and max(result, default=0) > _NARROWEST:
        result[result.index(max(result))] -= 1
    return result


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def terminal_width() -> int | None:
    """Columns of the terminal on standard output; None for a file or pipe, where tables are not cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def matching(rows: Iterable[Any], filters: Sequence[str]) -> list[Any]:
    """The rows that satisfy every filter ``PATH=PATTERN``: PATH as in ``pick``, PATTERN with ``*`` and ``?``.
    Raises click.BadParameter. Pure."""
    wanted = []
    for text in filters:
        path, equals, pattern = text.partition("=")
        if not equals or not path:
            raise click.BadParameter(f"{text!r} must be FIELD=VALUE, as in state=Running", param_hint="--filter")
        wanted.append((path, pattern))
    return [row for row in rows if all(_matches(pick(row, path), pattern) for path, pattern in wanted)]


def unknown_fields(rows: Sequence[Any], filters: Sequence[str]) -> list[str]:
    """First parts of the paths of ``filters`` that no row has: a filter by one of them finds nothing. Pure."""
    heads = [text.partition("=")[0].partition(".")[0] for text in filters]
    return [head for head in dict.fromkeys(heads) if rows and not any(head in row for row in rows)]


def _matches(value: Any, pattern: str) -> bool:
    if isinstance(value, list | tuple):
        return any(_matches(element, pattern) for element in value)
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return fnmatch.fnmatchcase(text, pattern)


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


def port_rows(mapping: dict[str, Any]) -> Iterator[dict[str, str]]:
    """One row for each port: ``80/tcp`` of the guest, ``0.0.0.0:8080`` of the host."""
    address = mapping.get("host_address") or ""
    for where in (address,) if address else ("0.0.0.0", "::"):  # noqa: S104 - shown, not bound
        shown = f"[{where}]" if ":" in where else where
        for i in range(mapping.get("count", 1)):
            yield {
                "guest": f"{mapping['guest_port'] + i}/{mapping['protocol']}",
                "host": f"{shown}:{mapping['host_port'] + i}",
            }
