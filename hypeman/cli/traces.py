"""What operations did, phase by phase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from hypeman.cli.complete import complete_instance
from hypeman.cli.output import plain
from hypeman.cli.session import Session, present, reports

_WIDTH = 32
"""Characters of the bar that is the whole operation."""
_NAME = 34


@click.group()
def trace() -> None:
    """What operations did, phase by phase, and how long each took."""


@trace.command()
@click.argument("instance", required=False, shell_complete=complete_instance)
@click.option("-n", "--number", type=click.IntRange(1, 100), default=1, show_default=True, help="Operations to show.")
@reports
def last(session: Session, instance: str | None, number: int) -> None:
    """Show the newest operation, of an instance (which may have been deleted) or of all.

    The server keeps the newest operations in memory: calls that may change something, and what policies did.
    """
    found = session.client.get("/traces", limit=number, **present(instance=instance))
    session.show(found, lambda: "\n\n".join("\n".join(_lines(each)) for each in found) or "no operation is remembered")


def _lines(trace: dict[str, Any]) -> Iterator[str]:
    """The operation, then its phases as a tree with bars to scale."""
    total = trace["duration_ms"] or max((_end(span) for span in trace["spans"]), default=0.0)
    names = {name for span in trace["spans"] if (name := span["attributes"].get("hypeman.instance.name"))}
    end = _time(trace["duration_ms"]) if trace["duration_ms"] is not None else "not ended yet"
    yield plain(
        "  ".join(filter(None, [trace["name"], ", ".join(sorted(names)), end, trace["started_at"], trace["id"]]))
    )
    depth = {trace["spans"][0]["id"]: 0}
    for span in trace["spans"][1:]:
        at = depth[span["id"]] = depth.get(span["parent"], 0) + 1
        name = "  " * at + span["name"]
        taken = _time(span["duration_ms"]) if span["duration_ms"] is not None else "…"
        line = f"{name[:_NAME]:{_NAME}} {taken:>9}  {_bar(span, total)}"
        yield plain(f"{line}  {span['error']}" if span.get("error") else line.rstrip())
    if trace["dropped_spans"]:
        yield f"  and {trace['dropped_spans']} more phases"


def _end(span: dict[str, Any]) -> float:
    return float(span["begin_ms"] + (span["duration_ms"] or 0))


def _bar(span: dict[str, Any], total: float) -> str:
    """Where in the operation the phase was."""
    scale = _WIDTH / total if total > 0 else 0.0
    begin = min(_WIDTH - 1, int(span["begin_ms"] * scale))
    length = max(1, round(min(_WIDTH - begin, (span["duration_ms"] or 0) * scale)))
    return " " * begin + "━" * length


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.1f} ms"
