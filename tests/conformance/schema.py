"""Schemathesis against the server: the document and the answers agree. ``make test-conformance`` runs it.

It is installed into ``build/conformance``, apart from our environment. The server serves the fakes, filled by
``sdks.py``, with everything between them and the sockets real. Streams have no end and are left out. Which data are
accepted is not compared: the fakes check less than the services do.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.idempotency import Calls
from hypeman.server.serve import Server, bind_unix
from hypeman.store import Store
from tests.cli.conftest import SECRET, Running
from tests.conformance.sdks import ROOT, fill

SCHEMATHESIS = "schemathesis==4.32.5"
STREAMS = "/logs$|^/events$|/egress/requests$|/builds/.*/events$|^/v2/"


class WithCalls(Running):
    """As the real server, with a store for ``Idempotency-Key``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._store = Store.open(directory / "store")

    async def _run(self) -> None:
        self._shutdown = trio.Event()
        self._trio = trio.lowlevel.current_trio_token()
        async with self._store.serving(), trio.open_nursery() as nursery:
            calls = Calls(self._store, self.world.services)
            await nursery.start(calls.run)
            app = build_app(self.world.services, ServerSettings(jwt_secret=SECRET), calls)
            self._server = Server(app, plain=app.plain, grace=1.0)
            trusted = [bind_unix(self.socket, mode=0o600)]
            await nursery.start(partial(self._server.run, [self._tcp], self._shutdown, trusted=trusted))
            self._ready.set()
            await self._shutdown.wait()
            nursery.cancel_scope.cancel()
        self._store.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with WithCalls(tmp_path) as running:
        trio.from_thread.run(fill, running.world, trio_token=running._trio)
        yield running


@pytest.fixture(scope="session")
def schemathesis() -> Path:
    home = ROOT / "build/conformance/schemathesis"
    if not (home / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=120)
    subprocess.run([home / "bin/python", "-m", "pip", "install", "-q", SCHEMATHESIS], check=True, timeout=300)
    return home / "bin/schemathesis"


def test_schemathesis_finds_nothing(server: Running, schemathesis: Path, tmp_path: Path) -> None:
    settings = Path(__file__).with_name("schemathesis.toml")
    command: list[str | Path] = [
        schemathesis, "--config-file", settings, "run", f"{server.tcp_url}/spec.json",
        "-H", f"Authorization: Bearer {server.token}", "--exclude-path-regex", STREAMS,
        "--exclude-checks", "positive_data_acceptance,negative_data_rejection",
        "--phases", "examples,coverage,fuzzing", "--max-examples", "5", "--seed", "1", "--request-timeout", "10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-20_000:]
