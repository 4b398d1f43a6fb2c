"""The wiring, where it decides something itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from hypeman import app
from hypeman.config import load_config

ROOT = Path(__file__).parents[1]


async def test_a_server_that_is_still_starting_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash left may take minutes to settle; a service manager that waits would kill us."""
    starting = trio.Event()

    async def never_ready(*_: object) -> None:
        starting.set()
        await trio.sleep_forever()

    monkeypatch.setattr(app, "_start", never_ready)
    config = load_config(environ={"DATA_DIR": f"{tmp_path}/data", "RUN_DIR": f"{tmp_path}/run", "PORT": "0"})
    shutdown = trio.Event()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app.run, config, shutdown)
            await starting.wait()
            shutdown.set()


def test_the_server_with_fake_vmms_replaces_parts_that_exist(tmp_path: Path) -> None:
    """The fleet's hosts, the benchmarks and the wakes are started with it; these suites run seldom."""
    program = (
        "from hypeman import app; app.main = lambda config: print('served')\n"
        "from tests.bench.fake_vmm_server import FakeDriver, serve; serve(FakeDriver())"
    )
    environ = {**os.environ, "FAKE_DEVICES": str(tmp_path), "FAKE_LOAD": "yes", "DATA_DIR": f"{tmp_path}/data"}
    argv = [sys.executable, "-c", program]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
    assert result.stdout == "served\n", result.stderr
