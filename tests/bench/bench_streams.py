"""exec and cp through the server and a real agent, which runs beside it without a guest: what they cost the server.

Measured is the CPU time of the server's process alone, so the agent's, the program's and the client's own do not count.
The peer is the GET /health of the same minute, or masking in Python.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypeman.tokens import mint
from tests.bench.bench_http import SECRET, Peer, cpu_of, receive, request_bytes
from tests.bench.harness import Measure, Result, compare, median

COPIED_MIB = 24
EXECS = 150
CHUNK = bytes(32 * 1024)

SERVER = """
import socket, sys, trio
from pathlib import Path
from hypeman.guest.client import GuestClient
from hypeman.guest.sessions import open_copy_from, open_copy_to, open_exec
from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.serve import Server, bind_tcp
from hypeman.telemetry.logs import setup_logs
from tests.fakes.services import FakeWorld
from tests.guest.conftest import NONCE, Agent, serve
directory, secret = sys.argv[1:]
setup_logs()
world = FakeWorld(Path(directory))
world.instances.add("vm-0")
root = Path(directory, "root")
root.mkdir()
agent = Agent(root)
app = build_app(world.services, ServerSettings(jwt_secret=secret))
async def main():
    async with trio.open_nursery() as nursery:
        client = GuestClient(trio.SocketStream(trio.socket.from_stdlib_socket(agent.socket.dup())), nonce=NONCE)
        await nursery.start(serve, client)
        await client.wait_ready()
        async def exec(ref, request):
            return await open_exec(client, request)
        async def copy_to(ref, request):
            return await open_copy_to(client, request)
        async def copy_from(ref, request):
            return await open_copy_from(client, request)
        world.instances.exec, world.instances.copy_to, world.instances.copy_from = exec, copy_to, copy_from
        tcp = bind_tcp("127.0.0.1", 0)
        await nursery.start(lambda task_status: Server(app, plain=app.plain).run(
            tcp, trio.Event(), task_status=task_status))
        print(tcp[0].getsockname()[1], flush=True)
trio.run(main)
"""


@contextmanager
def server() -> Iterator[Peer]:
    with tempfile.TemporaryDirectory() as directory, Path(directory, "log").open("wb") as log:
        command = [sys.executable, "-c", SERVER, directory, SECRET]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
            assert process.stdout is not None
            try:
                yield Peer(process.pid, int(process.stdout.readline()))
            finally:
                process.kill()


def upgrade(path: str, token: str) -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()


def frame(kind: int, payload: bytes) -> bytes:
    """A WebSocket frame of a client, masked with zeros."""
    length = bytes([0x80 | len(payload)]) if len(payload) < 126 else bytes([0x80 | 126]) + len(payload).to_bytes(2)
    return bytes([0x80 | kind]) + length + bytes(4) + payload


@contextmanager
def stream(peer: Peer, path: str, token: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", peer.port), 60) as client:
        client.sendall(upgrade(path, token))
        receive(client)
        yield client


def exec_true(peer: Peer, token: str) -> None:
    with stream(peer, "/instances/vm-0/exec", token) as client:
        client.sendall(frame(1, b'{"command":["/bin/true"]}') + frame(2, b""))
        while b"exitCode" not in receive(client):
            pass


def exec_cost(peer: Peer, token: str) -> Measure:
    """Microseconds for one exec that ends at once, each on a connection of its own."""

    def measure() -> float:
        before = cpu_of(peer.pid)
        for _ in range(EXECS):
            exec_true(peer, token)
        return (cpu_of(peer.pid) - before) / EXECS * 1e6

    return measure


def exec_seconds(peer: Peer, token: str) -> float:
    times = []
    for _ in range(EXECS):
        begin = time.perf_counter()
        exec_true(peer, token)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_in(peer: Peer, token: str) -> None:
    data = frame(2, CHUNK)
    with stream(peer, "/instances/vm-0/cp", token) as client:
        client.sendall(frame(1, b'{"direction":"to","guest_path":"/x","mode":420}'))
        for _ in range(COPIED_MIB * 2**20 // len(CHUNK)):
            client.sendall(data)
        client.sendall(frame(1, b'{"type":"end"}'))
        while b"bytes_written" not in receive(client):
            pass


def copy_out(peer: Peer, token: str) -> None:
    with stream(peer, "/instances/vm-0/cp", token) as client:
        client.sendall(frame(1, b'{"direction":"from","guest_path":"/x"}'))
        last = b""
        while b'"final":true' not in last:
            last = last[-64:] + receive(client)


def copy_cost(peer: Peer, token: str, *, out: bool) -> Measure:
    """Microseconds for one MiB in messages of 32 KiB."""
    copy = copy_out if out else copy_in

    def measure() -> float:
        before = cpu_of(peer.pid)
        copy(peer, token)
        return (cpu_of(peer.pid) - before) / COPIED_MIB * 1e6

    return measure


def run() -> list[Result]:
    token = mint(SECRET, subject="bench")
    with server() as peer:
        health = peer.cost(request_bytes("GET", "/health", token), 1)
        costs = {
            "exec of true": exec_cost(peer, token),
            "cp into a guest, per MiB": copy_cost(peer, token, out=False),
            "cp out of a guest, per MiB": copy_cost(peer, token, out=True),
        }
        results = [compare(f"streams: {name}", "µs CPU", cost, "GET /health", health) for name, cost in costs.items()]
        wall = median(lambda: exec_seconds(peer, token), rounds=3)
        return [*results, Result("streams: exec of true, from connect to exit code", wall * 1000, "ms")]
