"""The HTTP shell: what a request costs the server, and what lists and log followers cost.

The server runs in a process of its own; measured is its CPU time for a number of requests over one
kept connection, which a busy machine disturbs less than wall time does.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.harness import Measure, Result, compare, median

REQUESTS = 400
FOLLOWERS = 24
LOG_BYTES = 20 * 2**20

SERVER = """
import sys, trio, msgspec
from pathlib import Path
from hypeman.server.app import ServerSettings, build_app
from hypeman.server.serve import Server, bind_unix
from tests.fakes.services import FakeWorld
world = FakeWorld(Path(sys.argv[2]))
made = [world.instances.add(f"vm-{number}", tags={"team": "x"}) for number in range(1000)]
world.instances.encoded = msgspec.json.encode(made)
app = build_app(world.services, ServerSettings(jwt_secret="x"))
async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: Server(app).run(
            [], trio.Event(), trusted=[bind_unix(sys.argv[1], mode=0o600)], task_status=task_status))
        print("ready", flush=True)
trio.run(main)
"""


class Client(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        import socket

        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)

    def fetch(self, path: str) -> bytes:
        self.request("GET", path)
        return self.getresponse().read()


@contextmanager
def server() -> Iterator[tuple[int, str, Path]]:
    """Process id, socket and log directory of a server with 1,000 instances."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/s.sock"
        command = [sys.executable, "-c", SERVER, path, directory]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield process.pid, path, Path(directory)
            finally:
                process.kill()


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def request_cost(pid: int, socket_path: str, path: str) -> Measure:
    """Microseconds of the server's CPU for one request."""

    def measure() -> float:
        client = Client(socket_path)
        before = cpu_of(pid)
        for _ in range(REQUESTS):
            client.fetch(path)
        client.close()
        return (cpu_of(pid) - before) / REQUESTS * 1e6

    return measure


def followers_cost(pid: int, socket_path: str, logs: Path) -> float:
    """CPU seconds for FOLLOWERS clients that each get LOG_BYTES of 100-byte lines."""
    log = logs / "vm-0-app.log"
    log.write_bytes(b"")
    program = (
        "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n"
        "s.sendall(b'GET /instances/vm-0/logs?follow=true HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
        "d=s.recv(65536)\nprint('on',flush=True)\n"
        "while b'THE END' not in d[-300:]: d=d[-300:]+s.recv(1<<20)\n"
    )
    clients = [
        subprocess.Popen([sys.executable, "-c", program, socket_path], stdout=subprocess.PIPE) for _ in range(FOLLOWERS)
    ]
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
    before = cpu_of(pid)
    block = (b"x" * 99 + b"\n") * (2**20 // 100)
    with log.open("ab", buffering=0) as file:
        for _ in range(LOG_BYTES // 2**20):
            file.write(block)
        file.write(b"THE END\n")
    for client in clients:
        client.wait(300)
        assert client.stdout is not None
        client.stdout.close()
    return cpu_of(pid) - before


def resident(pid: int) -> float:
    """Megabytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def start_cost() -> float:
    """Milliseconds of CPU from the shell to the first byte of a client command's request."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "hypeman", "--base-url", "unix:///nowhere", "ps"], capture_output=True, check=False
    )
    after = os.times()
    return (after.children_user - before.children_user + after.children_system - before.children_system) * 1000


def run() -> list[Result]:
    with server() as (pid, path, logs):
        health = request_cost(pid, path, "/health")
        every, one = request_cost(pid, path, "/instances"), request_cost(pid, path, "/instances/vm-7")
        results = [
            compare("http: GET /instances, 1,000 of them", "µs CPU", every, "GET /health", health),
            compare("http: GET /instances/{id}", "µs CPU", one, "GET /health", health),
        ]
        begin = time.perf_counter()
        spent = followers_cost(pid, path, logs)
        total = FOLLOWERS * LOG_BYTES / 2**20
        results += [
            Result("http: logs to 24 followers", total / spent, "MB/s of CPU"),
            Result("http: logs to 24 followers", total / (time.perf_counter() - begin), "MB/s"),
            Result("http: resident after that", resident(pid), "MB"),
        ]
    return [*results, Result("cli: start of a client command", median(start_cost), "ms CPU")]
