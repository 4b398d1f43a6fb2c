"""Clients who begin and do not end: the whole server, in a process of its own, keeps its size and answers others."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from hypeman.server.app import MAX_JSON_BODIES
from tests.real.appliance import Appliance, check_host, short_directory

pytestmark = [pytest.mark.real, pytest.mark.slow]

CLIENTS = 500
BODY = 2_000_000
HEAD = f"POST /instances HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {BODY}\r\n\r\n"
ROOM = 128 << 20
"""Bytes for 500 connections, with their tasks and buffers; 500 whole bodies would be a GB."""


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("clients")


def resident(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


async def test_500_clients_with_an_unfinished_body(directory: Path) -> None:
    appliance = Appliance(directory)
    try:
        await appliance.start()
        before = highest = resident(appliance.pid)
        with ExitStack() as opened:
            clients = [opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(CLIENTS)]
            for client in clients:
                client.connect(str(appliance.socket))
                client.setblocking(False)
                client.send(HEAD.encode() + b'{"name": "')
            for _ in range(40):
                for client in clients:
                    for _ in range(4):
                        try:
                            client.send(bytes([120]) * (1 << 16))
                        except OSError:  # it takes no more, or has hung up
                            break
                with trio.fail_after(60):
                    assert (await appliance.ask("GET", "/health")).status_code == 200
                highest = max(highest, resident(appliance.pid))
                await trio.sleep(0.05)
        print(f"{before >> 20} MB became {highest >> 20} MB")
        assert highest - before < 2 * MAX_JSON_BODIES + ROOM
        assert (await appliance.ask("GET", "/instances")).status_code == 200
    finally:
        appliance.close()
