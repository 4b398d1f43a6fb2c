"""The C library that a finished build promises to run with, and what its objects need."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

from tests.packaging.roots import dist


def check_bundle() -> ModuleType:
    """The build's own check."""
    file = Path(__file__).parents[2] / "packaging/appliance/check_bundle.py"
    spec = importlib.util.spec_from_file_location("check_bundle", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def promised() -> tuple[int, ...]:
    """As the Debian package says."""
    [package] = dist().glob("hypeman_*.deb")
    said = subprocess.run(["dpkg-deb", "-f", package, "Depends"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"libc6 \(>= ([0-9.]+)\)", said)
    assert match is not None, said
    return tuple(map(int, match[1].split(".")))
