"""The application on fake capabilities, asked without a port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from hypeman.server.app import ApiApp, ServerSettings, build_app
from hypeman.server.serve import Server, bind_tcp, bind_unix
from hypeman.tokens import mint
from tests.fakes.services import FakeWorld

SECRET = "a secret that is long enough for HS256"


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    logs = tmp_path / "logs"
    logs.mkdir()
    return FakeWorld(logs)


@pytest.fixture
def app(world: FakeWorld) -> ApiApp:
    return build_app(world.services, ServerSettings(jwt_secret=SECRET))


@pytest.fixture
def headers() -> dict[str, str]:
    """Of somebody who may do everything."""
    return {"Authorization": f"Bearer {mint(SECRET, subject='tester')}"}


Ask = Callable[..., Any]


@pytest.fixture
def ask(app: ApiApp, headers: dict[str, str]) -> Ask:
    """``await ask("GET", "/instances", json=..., data=..., headers=...)``: the response, with a token."""

    async def request(method: str, path: str, **options: Any) -> Any:
        given = {**headers, **options.pop("headers", {})}
        return await app.test_client().open(path, method=method, headers=given, **options)

    return request


class Served:
    """The application on real sockets."""

    def __init__(self, port: int, socket_path: str, shutdown: trio.Event) -> None:
        self.port = port
        self.socket_path = socket_path
        self.shutdown = shutdown
        self.ended = trio.Event()


@pytest.fixture
async def served(app: ApiApp, tmp_path: Path) -> AsyncIterator[Served]:
    tcp = bind_tcp("127.0.0.1", 0)
    path = str(tmp_path / "hypeman.sock")
    served = Served(tcp[0].getsockname()[1], path, trio.Event())

    async def run(task_status: trio.TaskStatus[None]) -> None:
        server = Server(app, grace=2.0)
        await server.run(tcp, served.shutdown, trusted=[bind_unix(path, mode=0o600)], task_status=task_status)
        served.ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(run))
        yield served
        nursery.cancel_scope.cancel()
