"""The document that ``make bench`` writes; what is measured is not tested."""

from __future__ import annotations

from pathlib import Path

from tests.bench.__main__ import TABLE, render_document
from tests.bench.harness import Result, compare


def test_an_area_replaces_its_own_table_only() -> None:
    both = render_document(render_document("", "streams", [Result("exec", 0.9, "ms")]), "http", [Result("a", 1, "µs")])
    values = iter([1.0, 1.0, 2.0, 1.0, 1.0, 3.0, 8.0, 2.0])
    compared = compare("b", "ms", lambda: next(values), "peer", lambda: next(values), rounds=3)
    again = render_document(both, "http", [compared])
    assert both.index("## http") < both.index("## streams")
    assert "| exec | 0.9 ms |  |  |" in again and "| a |" not in again
    assert "| b | 3 ms | peer | 3.00 (2.00–4.00) |" in again
    assert render_document(again, "http", [compared]) == again


def test_the_committed_tables_are_such_a_document() -> None:
    text = TABLE.read_text()
    areas = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert areas == sorted(areas) and areas
    for area in areas:
        assert (Path(__file__).parent / "bench" / f"bench_{area}.py").exists(), area
