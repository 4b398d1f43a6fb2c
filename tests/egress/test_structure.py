"""The parts of the data plane in C as the diagram at the head of egress.h has them.

Includes are read from the source; who calls whom from what the compiler makes of each file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "ext" / "egress"

ROWS = (
    "h1 query hello host addr bound site access policy verdict identity scrub sigv4 transform forward probe mint certs "
    "chain confine pgwire scram mywire scramble",
    "io",
    "tls",
    "accept front down1 down2 up1 up2 h2 pool xchg echo splice audit login pgdown pgup mydown myup",
    "loop",
    "engine",
)
"""From below."""

UPWARD = {
    ("accept", "conn_run"), ("front", "conn_run"), ("pool", "engine_ask"), ("xchg", "engine_ask_approval"),
}  # fmt: skip
"""What a side calls of the loop that runs it and of the engine: it is run once more, and asks for addresses."""


def includes(path: Path) -> set[str]:
    return set(re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE))


def test_includes_have_no_cycle() -> None:
    left = {path.name: includes(path) for path in SOURCES.glob("*.[ch]")}
    assert len(left) > 40, "else this test looks at nothing"
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"these include each other: {sorted(left)}"
        for name in free:
            del left[name]


def test_io_includes_nothing_above_it() -> None:
    found: set[str] = set()
    todo = includes(SOURCES / "io.c")
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo |= includes(SOURCES / name)
    assert not found & {"egress.h", "loop.h", "tls.h", "down.h", "h2.h"}


def test_every_file_is_in_a_row_and_in_the_diagram() -> None:
    files = {path.stem for path in SOURCES.glob("*.c")}
    assert sorted(" ".join(ROWS).split()) == sorted(files)
    head = (SOURCES / "egress.h").read_text().partition("#ifndef")[0]
    assert files - set(re.findall(r"(\w+)\.c\b", head)) <= {"confine", "probe"}


def symbols(path: Path) -> tuple[set[str], set[str]]:
    """What an object file defines for others, and what it takes from others."""
    lines = subprocess.run(["nm", str(path)], check=True, capture_output=True, text=True).stdout.splitlines()
    kinds = [line.split()[-2:] for line in lines]
    return {name for kind, name in kinds if kind in "TDBRC"}, {name for kind, name in kinds if kind == "U"}


def test_calls_point_down(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    names = " ".join(ROWS).split()
    subprocess.run(["gcc", "-c", "-w", "-O0", "-I", str(SOURCES), *(str(SOURCES / f"{name}.c") for name in names)],
                   check=True, cwd=tmp_path)  # fmt: skip
    found = {name: symbols(tmp_path / f"{name}.o") for name in names}
    owner = {symbol: name for name, (defined, _) in found.items() for symbol in defined}
    row = {name: number for number, names in enumerate(ROWS) for name in names.split()}
    upward = {
        (name, symbol)
        for name, (_, used) in found.items()
        for symbol in used
        if symbol in owner and row[owner[symbol]] > row[name]
    }
    assert upward == UPWARD
