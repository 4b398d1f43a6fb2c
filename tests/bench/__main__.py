"""``python -m tests.bench [area…]``: runs ``bench_<area>.py``, prints a table, writes ``build/bench.json``.

Each area runs in a process of its own, so that none measures what another left in memory. An area
that fails is reported and the others go on; the exit status is 1 then. Named areas replace only their
own figures in the file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

from tests.bench.harness import Result, run_area

HERE = Path(__file__).parent
OUTPUT = HERE.parents[1] / "build" / "bench.json"
TABLE = HERE.parents[1] / "docs" / "benchmarks.md"
_HEAD = """# Benchmarks

Written by `make bench`. Ratios are medians of rounds in which both were measured in turn, with the lowest and the
highest in brackets; they say more than the values, which depend on the machine and on its other load. What is
measured is described at the head of the area's file in `tests/bench`.
"""


def main(wanted: list[str]) -> int:
    areas = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    if unknown := set(wanted) - set(areas):
        print(f"bench: no such area: {', '.join(sorted(unknown))}; there are {', '.join(areas)}", file=sys.stderr)
        return 2
    figures = json.loads(OUTPUT.read_text()) if wanted and OUTPUT.exists() else {}
    failed = []
    for area in wanted or areas:
        begin = time.monotonic()
        try:
            results = _run_apart(area)
        except Exception:
            traceback.print_exc()
            failed.append(area)
            continue
        print(f"\n{area} ({time.monotonic() - begin:.0f} s)")
        print(render_table(results), flush=True)
        figures = {name: entry for name, entry in figures.items() if entry.get("area") != area}
        figures.update((result.name, _as_json(area, result)) for result in results)
        TABLE.write_text(render_document(TABLE.read_text(), area, results))
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    print(f"\nbench: {len(figures)} figures in {OUTPUT}, tables in {TABLE}")
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def render_table(results: list[Result]) -> str:
    rows = [
        (
            result.name,
            _number(result.value),
            result.unit,
            f"{result.peer}: {_number(result.peer_value)}" if result.peer and result.peer_value is not None else "",
            f"x {result.ratio:.2f}" if result.ratio is not None else "",
        )
        for result in results
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    aligns = "<><<>"
    return "\n".join(
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths, strict=True)).rstrip()
        for row in rows
    )


def render_document(before: str, area: str, results: list[Result]) -> str:
    """The document ``before`` with a new table for ``area``; tables are in the order of their names."""
    sections = dict(part.split("\n", 1) for part in before.split("\n## ")[1:])
    rows = [
        f"| {result.name} | {_number(result.value)} {result.unit} | {result.peer or ''} | {_ratio(result)} |"
        for result in results
    ]
    measured = f"Measured on {date.today():%Y-%m-%d} with {os.cpu_count()} CPUs, load {os.getloadavg()[1]:.0f}.\n"
    sections[area] = "\n".join(["", measured, "| what | | peer | ÷ peer |", "|---|---|---|---|", *rows]) + "\n"
    return _HEAD + "".join(f"\n## {name}\n{text}" for name, text in sorted(sections.items()))


def _ratio(result: Result) -> str:
    if result.ratio is None:
        return ""
    low_high = f" ({result.spread[0]:.2f}–{result.spread[1]:.2f})" if result.spread is not None else ""
    return f"{result.ratio:.2f}{low_high}"


def _run_apart(area: str) -> list[Result]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run_area, area).result()


def _number(value: float) -> str:
    """Three digits that matter, without an exponent."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _as_json(area: str, result: Result) -> dict[str, object]:
    entry: dict[str, object] = {"area": area, "value": result.value, "unit": result.unit}
    if result.peer is not None:
        entry |= {"peer": result.peer, "peer_value": result.peer_value, "ratio": result.ratio}
    return entry


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
