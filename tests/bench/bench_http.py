"""The HTTP shell: what a request costs the server, and what lists and log followers cost.

The server runs in a process of its own; measured is its CPU time for a number of requests over kept
connections, which a busy machine disturbs less than wall time does. Its peer is http_go.go, which does
the same with net/http; both write their log to a file.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import h2.connection
import h2.events

from hypeman.tokens import mint
from tests.bench.harness import Measure, Result, compare

REQUESTS = 1600
CONNECTIONS = (1, 16)
H2_REQUESTS = 400
FOLLOWERS = 24
LOG_BYTES = 20 * 2**20
SECRET = "a secret that is long enough for HS256"
HERE = Path(__file__).parent

SERVER = """
import dataclasses, sys, trio
import msgspec
from datetime import UTC, datetime, timedelta
from pathlib import Path
from hypeman.config import CapacityConfig, DevicesConfig, OversubscriptionConfig
from hypeman.devices.service import Devices
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances import rows, usage
from hypeman.instances.board import Board
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.record import InstanceRecord, InstanceSpec
from hypeman.instances.model.types import InstanceState
from hypeman.instances.model.view import render_instance
from hypeman.resources.accounting import Holding, Limits, hold
from hypeman.resources.service import Capacity, ResourceService
from hypeman.resources.types import DiskBreakdown
from hypeman.server.app import build_app
from hypeman.server.exchange import ServerSettings
from hypeman.server.serve import Server, bind_tcp, bind_unix
from hypeman.store import Store
from hypeman.telemetry.logs import setup_logs
from tests.fakes.services import FakeWorld
path, directory, secret = sys.argv[1:]
setup_logs()
world = FakeWorld(Path(directory))
world.instances.add("vm-0")
begin = datetime.now(UTC)
records = []
board = Board(lambda record, now: render_instance(record, None, mdev_uuid="", now=now))
for number in range(1000):
    spec = InstanceSpec(image="docker.io/library/nginx:latest", platform="linux/amd64", hypervisor=HypervisorKind.QEMU,
        vcpus=2, memory_bytes=1 << 30, hotplug_bytes=0, overlay_bytes=10 << 30, tags={"team": "x"}, env={"A": "1"})
    phases = Phases("running", begin, {"created": 12, "initializing": 800})
    records.append(InstanceRecord(id=f"id{number}", name=f"vm-{number}", number=number, spec=spec, digest="sha256:0",
        created_at=begin, state=InstanceState.RUNNING, phases=phases))
    board.post(records[-1])
store = Store.open(Path(directory, "store"))
devices = Devices(store, DevicesConfig())
resources = ResourceService(store=store, detected=Capacity(64, 1 << 40, 1 << 44, 10 ** 9, 0),
    configured=CapacityConfig(), oversubscription=OversubscriptionConfig(), names=usage.instance_names,
    disk_use=DiskBreakdown, gpu=devices.gpu_status)
services = dataclasses.replace(world.services, devices=devices, resources=resources)
def fill(txn):
    for record in records:
        rows.insert(txn, record)
        hold(txn, record.id, Holding(2, 1 << 30, 10 << 30, 10 ** 6, 10 ** 6, 0), Limits())
async def encoded(ref):
    return board.encoded(ref)
async def listed(state, tags):
    return board.encoded_list(state, tags)
world.instances.get_encoded, world.instances.list = encoded, listed
Path(directory, "instances.json").write_bytes(board.encoded_list(None, {}))
app = build_app(services, ServerSettings(jwt_secret=secret))
async def main():
    async with store.serving(), trio.open_nursery() as nursery:
        await store.write(fill)
        Path(directory, "resources.json").write_bytes(msgspec.json.encode(await resources.get()))
        Path(directory, "available.json").write_bytes(msgspec.json.encode(await devices.available()))
        tcp = bind_tcp("127.0.0.1", 0)
        await nursery.start(lambda task_status: Server(app, plain=app.plain).run(
            tcp, trio.Event(), trusted=[bind_unix(path, mode=0o600)], task_status=task_status))
        print(tcp[0].getsockname()[1], flush=True)
trio.run(main)
"""


@dataclass(frozen=True)
class Peer:
    """A server of its own process."""

    pid: int
    port: int

    def cost(self, request: bytes, connections: int, requests: int = REQUESTS) -> Measure:
        """Microseconds of the server's CPU for one ``request``, sent over ``connections`` at a time."""

        def measure() -> float:
            with ExitStack() as stack:
                clients = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", self.port), 60))
                    for _ in range(connections)
                ]
                exchange(clients, request)
                before = cpu_of(self.pid)
                for _ in range(requests // connections):
                    exchange(clients, request)
                return (cpu_of(self.pid) - before) / requests * 1e6

        return measure

    def cost_of_h2(self, path: str, token: str) -> Measure:
        """The same for a GET over HTTP/2, on one connection."""

        def measure() -> float:
            with socket.create_connection(("127.0.0.1", self.port), 60) as client:
                connection = h2.connection.H2Connection()
                connection.initiate_connection()
                exchange_h2(client, connection, path, token)
                before = cpu_of(self.pid)
                for _ in range(H2_REQUESTS):
                    exchange_h2(client, connection, path, token)
                return (cpu_of(self.pid) - before) / H2_REQUESTS * 1e6

        return measure


def exchange_h2(client: socket.socket, connection: h2.connection.H2Connection, path: str, token: str) -> None:
    number = connection.get_next_available_stream_id()
    head = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "localhost")]
    connection.send_headers(number, [*head, ("authorization", f"Bearer {token}")], end_stream=True)
    ended = False
    while not ended:
        client.sendall(connection.data_to_send())
        for event in connection.receive_data(receive(client)):
            if isinstance(event, h2.events.DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, number)
            ended = ended or isinstance(event, h2.events.StreamEnded)


def exchange(clients: list[socket.socket], request: bytes) -> None:
    """``request`` over each connection, and each response."""
    for client in clients:
        client.sendall(request)
    for client in clients:
        data = b""
        while not (end := data.find(b"\r\n\r\n") + 4) > 4:
            data += receive(client)
        head = data[:end].lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        received = len(data)
        while received < end + length:
            received += len(receive(client))


def receive(client: socket.socket) -> bytes:
    data = client.recv(1 << 20)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


def request_bytes(method: str, path: str, token: str, body: bytes = b"") -> bytes:
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept-Encoding: identity\r\n"
        f"Authorization: Bearer {token}\r\n{length}\r\n"
    )
    return head.encode() + body


@contextmanager
def server() -> Iterator[tuple[Peer, str, Path]]:
    """Our server with 1,000 instances, its socket and its log directory."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/s.sock"
        command = [sys.executable, "-c", SERVER, path, directory, SECRET]
        with (
            Path(directory, "log").open("wb") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process,
        ):
            assert process.stdout is not None
            port = int(process.stdout.readline())
            try:
                yield Peer(process.pid, port), path, Path(directory)
            finally:
                process.kill()


@contextmanager
def go_peer(directory: Path) -> Iterator[Peer]:
    """http_go.go with the same instances."""
    program = str(directory / "http-go")
    subprocess.run(["go", "build", "-o", program, HERE / "http_go.go"], check=True)
    port = free_port()
    with (
        (directory / "instances.json").open("rb") as instances,
        (directory / "go.log").open("wb") as log,
        subprocess.Popen(
            [program, f"127.0.0.1:{port}", SECRET, directory / "resources.json", directory / "available.json"],
            stdin=instances,
            stderr=log,
        ) as process,
    ):
        try:
            wait_port(port)
            yield Peer(process.pid, port)
        finally:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_port(port: int, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process's threads so far, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


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


def against_go(ours: Peer, directory: Path) -> list[Result]:
    if shutil.which("go") is None:
        print("http: no Go toolchain, so no peer")
        return []
    token = mint(SECRET, subject="bench")
    refused = b'{"name":"a","image":"b","vcpus":0,"env":{"A":"1"},"tags":{"team":"x"},"network":{"enabled":true}}'
    asked = {
        "GET /health": request_bytes("GET", "/health", token),
        "GET /instances/{id}": request_bytes("GET", "/instances/vm-7", token),
        "POST /instances, refused": request_bytes("POST", "/instances", token, refused),
        "GET /devices/available": request_bytes("GET", "/devices/available", token),
        "GET /resources, 1,000 instances": request_bytes("GET", "/resources", token),
    }
    with go_peer(directory) as peer:
        return [
            compare(
                f"http: {name}, {count} connection{'s' * (count > 1)}",
                "µs CPU",
                ours.cost(request, count),
                "Go net/http",
                peer.cost(request, count),
                rounds=9,
            )
            for name, request in asked.items()
            for count in CONNECTIONS
        ]


def run() -> list[Result]:
    with server() as (ours, path, logs):
        token = mint(SECRET, subject="bench")
        health = ours.cost(request_bytes("GET", "/health", token), 1)
        every = ours.cost(request_bytes("GET", "/instances", token), 1, 50)
        results = [
            *against_go(ours, logs),
            compare("http: GET /instances, 1,000 of them", "µs CPU", every, "GET /health", health),
            compare("http: GET /health over HTTP/2", "µs CPU", ours.cost_of_h2("/health", token), "HTTP/1.1", health),
        ]
        begin = time.perf_counter()
        spent = followers_cost(ours.pid, path, logs)
        total = FOLLOWERS * LOG_BYTES / 2**20
        results += [
            Result("http: logs to 24 followers", total / spent, "MB/s of CPU"),
            Result("http: logs to 24 followers", total / (time.perf_counter() - begin), "MB/s"),
            Result("http: resident after that", resident(ours.pid), "MB"),
        ]
    return results
