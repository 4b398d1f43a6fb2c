"""The published SDKs against the server: every operation, strict validation on. ``make test-conformance`` runs it.

Each SDK is installed into ``build/conformance``, apart from our environment: the Python one has our package's name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from hypeman.devices.types import AvailableDevice
from hypeman.volumes.types import CreateVolumeRequest
from tests.cli.conftest import Running
from tests.fakes.services import FakeWorld

ROOT = Path(__file__).parents[2]
PYTHON_SDK = "hypeman==0.28.0"
TYPESCRIPT_SDK = "@onkernel/hypeman@0.28.0"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path) as running:
        trio.from_thread.run(fill, running.world, trio_token=running._trio)
        yield running


async def fill(world: FakeWorld) -> None:
    web = world.instances.add("web")
    world.egress.allow(web)
    for source in ("app", "vmm", "hypeman"):
        (world.log_directory / f"web-{source}.log").write_text("one line\n")
    world.devices.add("gpu")
    world.devices.free.append(
        AvailableDevice(pci_address="0000:03:00.0", vendor_id="10de", device_id="2204", iommu_group=1)
    )
    await world.images.create_named("alpine")
    await world.volumes.create(CreateVolumeRequest(name="data", size_gb=1, id="data"))


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of an environment with the Python SDK."""
    home = ROOT / "build/conformance/python"
    interpreter = home / "bin/python"
    if not interpreter.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=120)
    subprocess.run([interpreter, "-m", "pip", "install", "-q", PYTHON_SDK], check=True, timeout=300)
    return interpreter


@pytest.fixture(scope="session")
def node() -> Path:
    """A directory with the TypeScript SDK."""
    home = ROOT / "build/conformance/node"
    home.mkdir(parents=True, exist_ok=True)
    (home / "package.json").write_text('{"private": true}')
    subprocess.run(["npm", "install", "--silent", TYPESCRIPT_SDK], check=True, timeout=300, cwd=home)
    return home


def test_every_method_of_the_typescript_sdk(server: Running, node: Path) -> None:
    script = Path(__file__).with_name("typescript_client.mjs")
    command: list[str | Path] = ["node", script, node, server.tcp_url, server.token]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"failed": {}, "unused": []}


def test_every_method_of_the_python_sdk(server: Running, python: Path) -> None:
    script = Path(__file__).with_name("python_client.py")
    command: list[str | Path] = [python, script, server.tcp_url, server.token]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == {"failed": {}, "unused": []}
