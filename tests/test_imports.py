"""The direction of imports: who may know whom, read from the source without running it.

Rows of LAYERS look down, never up, and never at a neighbour; types are no exception. Every module may use
what lies on the GROUND. Each library that touches the world has one HOME. Modules import each other in no
cycle. An import inside ``if TYPE_CHECKING:`` or a function counts, too.

Pure modules decide and describe: importing one, in a fresh interpreter, loads no event loop, database, TLS
or processes.
"""

from __future__ import annotations

import ast
import re
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
        "app backup bundle kube removal",
        "wiring",
        "doctor wiring_settings",
        "server",
        "policies metering",
        "builds ingress",
        "instances",
        "captures registry",
        "images volumes network devices egress guest hypervisor",
        "resources",
        "events",
        "saga store host telemetry",
    )
)

GROUND = frozenset(
    [
        *("actor", "architecture", "errors", "ids", "units", "fields", "paths", "config", "assets", "version"),
        *("tokens", "text", "urls", "logins", "_native"),
    ]
)
"""Words, numbers, settings and the hot paths: any package may use them; they use only each other."""

PURE_MODULES = tuple(
    f"hypeman.{name}"
    for name in (
        "actor",
        "architecture",
        "assets",
        "builds.command",
        "builds.progress",
        "builds.types",
        "captures.types",
        "config",
        "devices.plan",
        "devices.types",
        "devices.vgpu",
        "egress.guest_env",
        "egress.policy",
        "egress.protocol",
        "egress.records",
        "egress.transforms",
        "egress.types",
        "errors",
        "fields",
        "guest.boot",
        "guest.clock",
        "guest.fields",
        "guest.initrd",
        "guest.limits",
        "guest.protocol",
        "guest.settings",
        "guest.session_types",
        "guest.types",
        "host.types",
        "hypervisor.interface",
        "hypervisor.kinds",
        "hypervisor.qmp",
        "ids",
        "images.erofs",
        "images.ext4",
        "images.manifest",
        "images.nodes",
        "images.reference",
        "images.tar",
        "images.types",
        "ingress.certificates.acme_types",
        "ingress.certificates.names",
        "ingress.certificates.types",
        "ingress.hostnames",
        "ingress.routing",
        "ingress.types",
        "kube.capacity",
        "kube.decide",
        "kube.devices",
        "kube.names",
        "kube.podspec",
        "kube.quantity",
        "kube.references",
        "kube.status",
        "kube.translate",
        "kube.types",
        "logins",
        "metering.chain",
        "metering.types",
        "network.addressing",
        "network.asleep",
        "network.ruleset",
        "network.shaping",
        "network.types",
        "paths",
        "policies.timers",
        "resources.types",
        "server.types",
        "telemetry.findings",
        "telemetry.trace_types",
        "text",
        "units",
        "urls",
        "volumes.types",
    )
)
PURE_PACKAGES = ("instances/model",)
"""Every module in them is pure."""

IMPURE_LIBRARIES = ("trio", "lmdb", "ssl", "subprocess", "pyroute2", "quart", "hypercorn")

INSTANCES_LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(row.split())
    for row in (
        "service snapshots forks pools tasks board expiry reclaim sampler usage metrics adapters",
        "life machine",
        "ledger",
        "changes rows",
        "model",
    )
)
"""Inside of instances: the life cycle knows the machine through a Protocol only. The first row is one layer, whose
modules use each other."""

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


def pure_modules() -> list[str]:
    packaged = (name_of(path) for package in PURE_PACKAGES for path in sorted((PACKAGE / package).rglob("*.py")))
    return [*PURE_MODULES, *packaged]


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


def verdict(importer: str, imported: str) -> str | None:
    """Why ``importer`` must not import ``imported``; None if it may."""
    library = imported.split(".")[0]
    if library != "hypeman":
        home = HOMES.get(library)
        return f"only {home} knows {library}" if home not in (None, part_of(importer)) else None
    mine, theirs = part_of(importer), part_of(imported)
    if mine == theirs or theirs == "" or theirs in GROUND:
        return None
    if mine in GROUND:
        return f"{mine} lies on the ground and cannot look up to {theirs}"
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


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "instances").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE / "instances"))
)
def test_inside_of_instances_imports_point_down(path: Path) -> None:
    rows = {part: number for number, row in enumerate(INSTANCES_LAYERS) for part in row}
    mine = name_of(path).split(".")[2:3]
    for line, imported in imports_of(path):
        theirs = imported.split(".")[2:3] if imported.startswith("hypeman.instances.") else []
        if not mine or not theirs or mine == theirs:
            continue
        allowed = rows[mine[0]] < rows[theirs[0]] or rows[mine[0]] == rows[theirs[0]] == 0
        assert allowed, f"{path}:{line}: {mine[0]} must not use {theirs[0]}"


def test_pure_modules_load_nothing_of_the_world() -> None:
    """Each is imported in a process that has imported nothing else: a fork of an empty interpreter."""
    program = """
import os, sys
libraries, names = sys.argv[1].split(), sys.argv[2:]
for name in names:
    if (child := os.fork()) == 0:
        __import__(name)
        loaded = [library for library in libraries if library in sys.modules]
        os.write(1, f"{name} {' '.join(loaded)}\\n".encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    command = [sys.executable, "-c", program, " ".join(IMPURE_LIBRARIES), *pure_modules(), "hypeman.app"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    *pure, control = result.stdout.splitlines()
    assert [line.strip() for line in pure] == pure_modules()
    assert "trio" in control and "lmdb" in control, "the test does not see what is loaded"


def test_no_import_cycle() -> None:
    """Strongly connected parts of the graph of imports, found by who can reach whom."""
    known = {name_of(path) for path in modules()}
    graph = {name_of(path): {name for _, name in imports_of(path)} & known - {name_of(path)} for path in modules()}
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set[str](), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting.extend(new)
        reach[start] = seen
    cycles = {
        " ".join(sorted(other.removeprefix("hypeman.") for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    assert not cycles


def test_every_module_can_be_imported() -> None:
    """In a fresh interpreter; types that msgspec refuses show only when a decoder is made."""
    names = [name for path in modules() if (name := name_of(path)) != "hypeman.__main__"]
    program = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_no_private_name_is_imported() -> None:
    """A name with a leading underscore belongs to its module; what others use, tests included, is public."""
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {alias.name}"
        for folder in (PACKAGE, PACKAGE.parent / "tests")
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("hypeman", "tests"))
        for alias in node.names
        if re.match(r"_(?!_|native$)", alias.name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("hypeman.server.routes.images", "hypeman.images.service", True),
        ("hypeman.images.service", "hypeman.server.app", False),
        ("hypeman.images.service", "hypeman.network.service", False),
        ("hypeman.images.service", "hypeman.network.types", False),
        ("hypeman.host.links", "hypeman.network.types", False),
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
