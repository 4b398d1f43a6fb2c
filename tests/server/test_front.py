"""Quart is loaded by the first request that needs it, and only then."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from hypeman.server import app as quart_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.front import Front
from hypeman.server.idempotency import Calls
from hypeman.server.sessions import Sessions
from hypeman.store import Store
from tests.fakes.services import FakeWorld
from tests.server.test_plain import SECRET, Reader, serving, status


async def test_the_first_requests_that_need_quart_load_it_once(
    tmp_path: Path, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    build = quart_app.build_app

    def counted(*parameters: Any) -> Any:
        built.append(parameters)
        return build(*parameters)

    monkeypatch.setattr(quart_app, "build_app", counted)
    with closing(Store.open(tmp_path / "store")) as store:
        async with store.serving():
            calls, sessions = Calls(store, world.services), Sessions(store, SECRET)
            front = Front(world.services, ServerSettings(SECRET), calls, sessions, None)
            async with serving(front, front.plain) as (_, connect, _):
                async with await connect() as stream:
                    await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert await status(Reader(stream)) == 200
                assert not built

                async def ask() -> None:
                    async with await connect() as stream:
                        await stream.send_all(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
                        assert await status(Reader(stream)) == 404

                async with trio.open_nursery() as nursery:
                    for _ in range(5):
                        nursery.start_soon(ask)
                assert len(built) == 1


def test_a_server_starts_without_it() -> None:
    program = (
        "import hypeman.app, sys; print([name for name in ('quart', 'werkzeug', 'jinja2') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"
