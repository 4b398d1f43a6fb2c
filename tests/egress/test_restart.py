"""Between two processes of the server, guests that connect wait."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
import trio.testing

from hypeman.egress.service import Egress, Settings
from tests.egress.conftest import GUEST, HOST, SECRET, Wire, World, credential

REQUEST = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


@asynccontextmanager
async def process(directory: Path, origin: World, port: int = 0, **given: Any) -> AsyncGenerator[Egress]:
    """The data plane as one process of the server would run it; it accepts nothing yet."""
    settings = Settings(address="127.0.0.1", port=port, loops=2, allow=("127.0.0.0/8",),
                        trust_file=origin.egress.settings.trust_file, assumed_tls_port=origin.origin.port)  # fmt: skip

    async def resolve(name: str) -> list[str]:
        return ["127.0.0.1"]

    egress = Egress(settings, directory, resolve=resolve, **given)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(egress.run, grace=0))
        yield egress
        nursery.cancel_scope.cancel()


async def open_to_guest(egress: Egress) -> None:
    await egress.set_policy("inst-a", GUEST, {"API_KEY": credential(HOST)}, {"REAL_KEY": SECRET})
    await egress.accept()


async def test_guests_wait_for_the_next_process(world: World, tmp_path: Path) -> None:
    """Connections of the time between are made, wait, and are served under the rules that were set meanwhile."""
    kept: list[socket.socket] = []

    def keep(sockets: Sequence[socket.socket]) -> None:
        kept[:] = [each.dup() for each in sockets]

    async with process(tmp_path / "e", world, keep=keep) as first:
        await open_to_guest(first)
        port, ca = first.port, first.ca_pem
    trust = ssl.create_default_context(cadata=ca.decode())
    waiting = [Wire(await trio.open_tcp_stream("127.0.0.1", port, local_address=GUEST)) for _ in range(8)]
    world.streams.extend(wire.stream for wire in waiting)
    shaken = 0

    async def ask(wire: Wire) -> None:
        nonlocal shaken
        stream = trio.SSLStream(wire.stream, trust, server_hostname=HOST)
        await stream.do_handshake()
        shaken += 1
        assert (await world.ask(Wire(stream), REQUEST))[0] == 200

    async with process(tmp_path / "e", world, port, listeners=kept, keep=keep) as second, trio.open_nursery() as asking:
        for wire in waiting:
            asking.start_soon(ask, wire)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (shaken, (await second.statistics()).counters["accepted"]) == (0, 0)
        await open_to_guest(second)
    assert shaken == len(waiting)
    assert [request.all("authorization") for request in world.origin.requests] == [[f"Bearer {SECRET}"]] * len(waiting)
    for each in kept:
        each.close()


async def test_listeners_of_elsewhere_are_not_taken(world: World, tmp_path: Path) -> None:
    """The configured address is another one now."""
    with socket.create_server(("127.0.0.3", 0)) as old:
        async with process(tmp_path / "e", world, listeners=[old]) as egress:
            assert old.fileno() == -1
            await open_to_guest(egress)
            await (await trio.open_tcp_stream("127.0.0.1", egress.port, local_address=GUEST)).aclose()
