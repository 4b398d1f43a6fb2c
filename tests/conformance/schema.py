"""Schemathesis against a whole server with live instances: the document and the answers agree. ``make
test-conformance`` runs it.

It is installed into ``build/conformance``, apart from our environment, and runs in the server's network namespace.
``schemathesis.toml`` has the reasons for what it leaves out.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from hypeman.tokens import mint
from tests.conformance.sdks import ROOT
from tests.real.appliance import IMAGE, Appliance, running_appliance
from tests.real.conftest import directory

pytestmark = [pytest.mark.real, pytest.mark.slow]

__all__ = ["directory"]  # fixture

SCHEMATHESIS = "schemathesis==4.32.5"
SECRET = secrets.token_hex(32)
PORT = "8080"
PHASES = "examples,coverage,fuzzing,stateful"


@pytest.fixture
async def appliance(directory: Path) -> AsyncIterator[Appliance]:
    """A server with the objects that ``schemathesis.toml`` names."""
    async with running_appliance(directory, PORT=PORT, JWT_SECRET=SECRET, CAPACITY__MEMORY="768MB") as started:
        await fill(started)
        yield started


async def fill(appliance: Appliance) -> None:
    """One running instance that nothing ends, one in standby and one stopped that anything may happen to."""
    await appliance.post("/volumes", {"name": "data", "id": "data", "size_gb": 1})
    await appliance.create("live", volumes=[{"volume_id": "data", "mount_path": "/data"}])
    await appliance.create("asleep")
    await appliance.post("/instances/asleep/standby")
    await appliance.create("ended", cmd=["true"], wait="Stopped")
    await appliance.post("/instances/ended/snapshots", {"kind": "Stopped", "name": "base"})


@pytest.fixture(scope="session")
def schemathesis() -> Path:
    home = ROOT / "build/conformance/schemathesis"
    if not (home / SCHEMATHESIS).exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True, timeout=120)
        subprocess.run([home / "bin/python", "-m", "pip", "install", "-q", SCHEMATHESIS], check=True, timeout=900)
        (home / SCHEMATHESIS).touch()
    return home / "bin/schemathesis"


async def test_schemathesis_finds_nothing(appliance: Appliance, schemathesis: Path, tmp_path: Path) -> None:
    settings = Path(__file__).with_name("schemathesis.toml")
    token = mint(SECRET, subject="schemathesis")
    command = appliance.namespace.command(
        str(schemathesis), "--config-file", str(settings), "run", f"http://127.0.0.1:{PORT}/spec.json",
        "-H", f"Authorization: Bearer {token}", "--phases", PHASES,
        "--max-examples", "5", "--seed", "1", "--request-timeout", "70",
    )  # fmt: skip
    live = await appliance.get("/instances/live")
    hooks = {
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "PYTHONPATH": str(settings.parent),
        "LIVE_INSTANCE": live["id"],
    }
    report = tmp_path / "schemathesis.log"
    with report.open("wb") as log:
        result = await trio.run_process(command, stdout=log, check=False, cwd=tmp_path, env=os.environ | hooks)
    assert result.returncode == 0, report.read_text()[-20_000:]
    live = await appliance.get("/instances/live")
    assert (live["state"], live["image"]) == ("Running", IMAGE)
