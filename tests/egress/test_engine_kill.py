"""Kill matrix: the engine at every message, the server in the middle of every message, both.

After each: what was confirmed is in force, no older value is sent, nobody without a policy gets anywhere, and no
process, socket or descriptor is left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman.egress.link import Command, EngineFailed, end_engines, engine_command
from hypeman.egress.service import Egress, Settings
from tests.egress.conftest import HOST, Wire, World, credential
from tests.egress.test_engine import connect

ROOT = Path(__file__).parents[2]
A, B, NOBODY = "127.0.1.1", "127.0.1.2", "127.0.1.3"
REQUEST = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
BROKEN = (OSError, EOFError, trio.BrokenResourceError)
MESSAGES = 24
"""Received and sent by an engine in `life` and at its end; how many of them bring audit records depends on the time."""

pytestmark = pytest.mark.slow


@pytest.fixture
def engines() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hme") as directory:
        yield Path(directory)
        trio.run(end_engines, Path(directory))


@contextmanager
def nothing_left() -> Iterator[None]:
    """Of descriptors that lead to an engine, or listen; connections of the tests' own clients do not count."""
    before = held()
    yield
    assert held() == before


def held() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as each:
                    listens = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    target = "listener" if listens else each.family.name
            found.append(re.sub(r"\d+", "", target))
    return sorted(each for each in found if each not in ("AF_INET", "pipe:[]", f"/proc/{os.getpid()}/fd"))


def settings(world: World) -> Settings:
    return Settings(address="127.0.0.1", port=0, loops=1, allow=("127.0.0.0/8",),
                    trust_file=world.egress.settings.trust_file, assumed_tls_port=world.origin.port)  # fmt: skip


@asynccontextmanager
async def running(
    directory: Path, world: World, engines: Path | None, command: Command = engine_command
) -> AsyncGenerator[Egress]:
    async def resolve(name: str) -> list[str]:
        return ["127.0.0.1"]

    egress = Egress(settings(world), directory / "e", resolve=resolve, engines=engines, command=command)
    async with trio.open_nursery() as nursery:
        await nursery.start(egress.run)
        yield egress
        nursery.cancel_scope.cancel()


async def set_value(egress: Egress, source: str, value: str) -> None:
    await egress.set_policy(f"of-{source}", source, {"K": credential(HOST)}, {"REAL_KEY": value})


async def sent(egress: Egress, world: World, source: str) -> str | None:
    """The value that the host gets from a guest now; None if its connections are reset. Tries again while an engine is
    replaced under the request."""
    for _ in range(3):
        before = len(world.origin.requests)
        with suppress(*BROKEN):
            wire = await connect(egress, world, source)
            answer = await world.ask(wire, REQUEST)
            await close(wire)
            if answer[0] == 200:
                [value] = world.origin.requests[-1].all("authorization")
                return value.removeprefix("Bearer ")
        assert len(world.origin.requests) <= before + 1
    return None


async def close(wire: Wire) -> None:
    await trio.aclose_forcefully(wire.stream)


async def life(egress: Egress, world: World) -> None:
    """Two guests; one is given a new value, the other is removed."""
    await set_value(egress, A, "a1")
    await set_value(egress, B, "b1")
    await egress.accept()
    assert await sent(egress, world, A) == "a1"
    assert await sent(egress, world, B) == "b1"
    assert await sent(egress, world, NOBODY) is None
    await set_value(egress, A, "a2")
    assert await sent(egress, world, A) == "a2"
    await egress.remove(f"of-{B}")
    assert await sent(egress, world, B) is None
    await egress.statistics()
    assert await sent(egress, world, A) == "a2"


@pytest.mark.parametrize("number", range(1, MESSAGES + 1))
async def test_the_engine_is_killed_at_a_message(world: World, tmp_path: Path, number: int) -> None:
    """Of the first engine; the second lives."""
    pids: list[int] = []

    def command(fd: int) -> list[str]:
        pids.append(0)
        return [sys.executable, "-m", "tests.egress.killed", "engine", str(number if len(pids) == 1 else 0), str(fd)]

    with nothing_left():
        if number <= 2:
            with pytest.raises(EngineFailed):  # Start, Hello: the server does not start, and says why
                await Egress(settings(world), tmp_path / "e", command=command).run()
            return
        async with running(tmp_path, world, None, command) as egress:
            await life(egress, world)
            last = egress.engine_pid
        assert not Path(f"/proc/{last}").exists()
    assert len(pids) <= 2


def run_server(world: World, directory: Path, engines: Path, number: int) -> list[str]:
    """Runs a server in a process of its own until it ends itself; the lines that it printed."""
    credentials = msgspec.to_builtins({"K": credential(HOST)})
    told = {"settings": msgspec.to_builtins(settings(world)), "directory": str(directory / "e"),
            "engines": str(engines), "credentials": credentials, "first": {A: "a1", B: "b1"}, "then": {A: "a2"},
            "remove": [B]}  # fmt: skip
    argv = [sys.executable, "-m", "tests.egress.killed", "server", str(number), json.dumps(told)]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == (9 if number else 0), result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("both", [False, True], ids=["server", "both"])
@pytest.mark.parametrize("number", [*range(1, 7), 0])
async def test_the_server_is_killed_within_a_message(
    world: World, tmp_path: Path, engines: Path, number: int, both: bool
) -> None:
    """Messages: Start, three policies with Accept before the last, a removal. The next server knows what the first was
    about to do, as from its store, and carries it out; with `both`, the engine has ended as well."""
    lines = await trio.to_thread.run_sync(run_server, world, tmp_path, engines, number)
    confirmed = {A: "a2" if f"set {A} a2" in lines else "a1"}
    began = "accepts" in lines
    pid = int(lines[0].split(" ")[2]) if lines else 0
    if both and pid:
        ended = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        await trio.lowlevel.wait_readable(ended)
        os.close(ended)
    with nothing_left():
        async with running(tmp_path, world, engines) as egress:
            if began and not both:
                assert egress.engine_pid == pid
                assert await sent(egress, world, A) in (confirmed[A], "a2"), "before anything is set again"
                assert await sent(egress, world, NOBODY) is None
            await set_value(egress, A, "a2")
            await egress.accept()
            assert await sent(egress, world, A) == "a2"
            assert await sent(egress, world, B) is None, "removed, or not set again"
            await egress.remove(f"of-{A}")
            last = os.pidfd_open(egress.engine_pid)
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(last)  # without guests and server it has nothing to do
        os.close(last)
    values = [request.all("authorization") for request in world.origin.requests]
    assert all(value in (["Bearer a1"], ["Bearer a2"]) for value in values)
