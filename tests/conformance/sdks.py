"""The published SDKs against the server: every operation, strict validation on. ``make test-conformance`` runs it; the
Python SDK is in ``test_python_sdk.py``, which every run has.

Each SDK is installed into ``build/conformance``, apart from our environment: the Python one has our package's name.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hypeman.devices.types import AvailableDevice
from hypeman.volumes.types import CreateVolumeRequest
from tests.cli.conftest import Running
from tests.fakes.services import FakeWorld

ROOT = Path(__file__).parents[2]
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
def node() -> Path:
    """A directory with the TypeScript SDK."""
    home = ROOT / "build/conformance" / TYPESCRIPT_SDK.replace("/", "-")
    installed = home / "installed"
    if not installed.exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "package.json").write_text('{"private": true}')
        subprocess.run(["npm", "install", "--silent", TYPESCRIPT_SDK], check=True, timeout=900, cwd=home)
        installed.touch()
    return home


def test_every_method_of_the_typescript_sdk(server: Running, node: Path) -> None:
    script = Path(__file__).with_name("typescript_client.mjs")
    command: list[str | Path] = ["node", script, node, server.tcp_url, server.token]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"failed": {}, "unused": []}
