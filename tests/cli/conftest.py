"""The command line against a real server on fake capabilities, in a thread of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from hypeman.cli.main import hypeman
from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.serve import Server, bind_tcp, bind_unix
from hypeman.server.sessions import Sessions
from hypeman.store import Store
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld

SECRET = "a secret that is long enough for HS256"


class Running:
    """A server; ``world`` is what it serves. ``do`` runs a function in its thread."""

    def __init__(self, directory: Path) -> None:
        logs = directory / "logs"
        logs.mkdir(exist_ok=True)
        self.world = FakeWorld(logs)
        self.socket = str(directory / "hypeman.sock")
        self.url = f"unix://{self.socket}"
        [tcp] = bind_tcp("127.0.0.1", 0)
        self.tcp_url = f"http://127.0.0.1:{tcp.getsockname()[1]}"
        self.token = mint(SECRET, subject="tester")
        self._tcp = tcp
        self._ready = threading.Event()
        self._shutdown: trio.Event | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._run,))

    def __enter__(self) -> Running:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.do(lambda: self._shutdown.set() if self._shutdown is not None else None)
        self._thread.join(20)

    def do(self, function: Callable[[], Any]) -> Any:
        return trio.from_thread.run_sync(function, trio_token=self._trio)

    def cut(self) -> None:
        """Break every connection, as a network does."""
        for connection in list(self._server._open.values()):
            connection.abort()

    async def _run(self) -> None:
        self._shutdown = trio.Event()
        self._trio = trio.lowlevel.current_trio_token()
        store = Store.open(Path(self.socket).with_name("store"))
        settings = ServerSettings(SECRET, url="http://localhost:8080")
        app = build_app(self.world.services, settings, sessions=Sessions(store, SECRET))
        async with store.serving(), trio.open_nursery() as nursery:
            trusted = [bind_unix(self.socket, mode=0o600)]
            self._server = Server(app, plain=app.plain, grace=1.0)
            await nursery.start(partial(self._server.run, [self._tcp], self._shutdown, trusted=trusted))
            self._ready.set()
        store.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the user who runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HYPEMAN_BASE_URL", "HYPEMAN_API_KEY", "JWT_SECRET", "FORCE_COLOR", "NO_COLOR", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)


Cli = Callable[..., Result]


@pytest.fixture
def cli(server: Running) -> Cli:
    """``cli("ps", "-q")``: the command's result, asked over the socket."""

    def call(*arguments: str, **options: Any) -> Result:
        result = CliRunner().invoke(hypeman, ["--base-url", server.url, *arguments], **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def shell(server: Running) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """The same as a separate process, for what needs real descriptors."""

    def call(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "hypeman", "--base-url", server.url, *arguments]
        options.setdefault("stdin", subprocess.DEVNULL) if "input" not in options else None
        environ = {**os.environ, **options.pop("env", {})}
        return subprocess.run(command, capture_output=True, timeout=30, env=environ, **options)

    return call
