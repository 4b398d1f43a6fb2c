"""Every method of the published Python SDK against the server, strict validation on.

The SDK comes from PyPI, into ``build/conformance``, apart from our environment: it has our package's name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Running
from tests.conformance.sdks import ROOT, server

__all__ = ["server"]  # fixture

PYTHON_SDK = "hypeman==0.28.0"


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of an environment with the Python SDK."""
    home = ROOT / "build/conformance" / PYTHON_SDK
    interpreter, installed = home / "bin/python", home / "installed"
    if not installed.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True, timeout=120)
        subprocess.run([interpreter, "-m", "pip", "install", "-q", PYTHON_SDK], check=True, timeout=900)
        installed.touch()
    return interpreter


def test_every_method_of_the_python_sdk(server: Running, python: Path) -> None:
    script = Path(__file__).with_name("python_client.py")
    command: list[str | Path] = [python, script, server.tcp_url, server.token]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found == {"failed": {}, "unused": []}
