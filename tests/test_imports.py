"""The direction of imports: who may know whom, read from the source without running it.

Rows of LAYERS look down, never up, and never at a neighbour. Everybody may use what lies on the
GROUND; modules there, and modules with a PURE name wherever they are, know nothing of the world: no
event loop, no server, no database, no machine. Each library that touches the world has one HOME.

An import inside ``if TYPE_CHECKING:`` counts too: to know somebody's types is to know them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hypeman"

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(row.split())
    for row in (
        "__main__",
        "cli",
        "app backup doctor removal",
        "server",
        "builds autostandby ingress snapshots",
        "instances",
        "images volumes network devices egress guest hypervisor resources",
        "saga store host telemetry",
    )
)

GROUND = frozenset(
    ["errors", "ids", "units", "fields", "paths", "config", "assets", "version", "tokens", "text", "_native"]
)
"""Words, numbers, settings and the hot paths: anybody may use them, they use each other at most."""

PURE_NAMES = frozenset(["types", "states", "plan", "steps", "admission", "protocol"])
"""A module of this name decides and describes, wherever it lies. Others may know it, whatever their row."""

UNPURE_LIBRARIES = frozenset(["trio", "quart", "quart_trio", "hypercorn", "lmdb", "pyroute2", "subprocess", "httpx"])

HOMES = {
    "quart": "server",
    "quart_trio": "server",
    "hypercorn": "server",
    "lmdb": "store",
    "pyroute2": "host",
}
"""The one folder that knows a library."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that the module imports, at whatever depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write imports out in full"
            assert node.module is not None
            yield node.lineno, node.module
            if node.module.startswith("hypeman"):  # `from hypeman.instances import types` names a module
                yield from (
                    (node.lineno, f"{node.module}.{alias.name}")
                    for alias in node.names
                    if _exists(node.module, alias.name)
                )


def _exists(package: str, name: str) -> bool:
    base = PACKAGE.parent.joinpath(*package.split("."), name)
    return base.with_suffix(".py").exists() or base.is_dir()


def part_of(module: str) -> str:
    """``instances`` for ``hypeman.instances.plan``; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def row_of(part: str) -> int | None:
    return next((number for number, row in enumerate(LAYERS) if part in row), None)


def is_pure(module: str) -> bool:
    return module.rsplit(".", 1)[-1] in PURE_NAMES or part_of(module) in GROUND


def verdict(importer: str, imported: str) -> str | None:
    """Why ``importer`` must not import ``imported``; None if it may."""
    library = imported.split(".")[0]
    if library != "hypeman":
        if is_pure(importer) and library in UNPURE_LIBRARIES:
            return f"{library} in a pure module"
        home = HOMES.get(library)
        return f"only {home} knows {library}" if home not in (None, part_of(importer)) else None
    mine, theirs = part_of(importer), part_of(imported)
    if mine == theirs or theirs == "" or theirs in GROUND:
        return None
    if is_pure(imported):
        return None
    if mine in GROUND:
        return f"{mine} lies on the ground and can not look up to {theirs}"
    my_row, their_row = row_of(mine), row_of(theirs)
    if my_row is None or their_row is None:
        return f"{mine if my_row is None else theirs} has no place in LAYERS yet: give it one"
    if my_row == their_row:
        return f"{mine} and {theirs} are neighbours: they meet in the row above"
    return f"{theirs} lies above {mine}" if their_row < my_row else None


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    importer = name_of(path)
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {imported}: {reason}"
        for line, imported in imports_of(path)
        if (reason := verdict(importer, imported)) is not None
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_module_can_be_imported() -> None:
    """In a fresh interpreter; types that msgspec refuses show only when a decoder is made."""
    names = [name for path in modules() if (name := name_of(path)) != "hypeman.__main__"]
    program = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("hypeman.server.routes.images", "hypeman.images.service", True),
        ("hypeman.images.service", "hypeman.server.app", False),
        ("hypeman.images.service", "hypeman.network.service", False),
        ("hypeman.images.service", "hypeman.network.types", True),
        ("hypeman.instances.plan", "trio", False),
        ("hypeman.instances.service", "trio", True),
        ("hypeman.instances.service", "lmdb", False),
        ("hypeman.store.store", "lmdb", True),
        ("hypeman.units", "hypeman.host.files", False),
        ("hypeman.units", "hypeman.errors", True),
        ("hypeman.novelty.service", "hypeman.images.service", False),
    ],
)
def test_the_rules_themselves(importer: str, imported: str, allowed: bool) -> None:
    assert (verdict(importer, imported) is None) is allowed
