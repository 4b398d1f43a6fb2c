"""The control plane: its own share of a create, fork and delete, looking at one and at a thousand
instances, start to first answer, and memory at rest.

A real server in a network namespace, asked through its unix socket by one client that keeps its
connection. VMMs are fakes that take no time (fake_vmm_server.py), except in ``create to running``.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import trio

from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances import rows
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.record import InstanceRecord, InstanceSpec
from hypeman.instances.model.types import InstanceState
from hypeman.store import Store, Txn
from tests.bench.harness import Result, compare, cpu_of_tasks
from tests.real.appliance import IMAGE, Namespace, busybox_archive, short_directory

CREATES = 30
MORE = 100
STORED = 1000
REQUESTS = 200


class Client(http.client.HTTPConnection):
    """One connection to a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("hypeman", timeout=120)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        self.request(method, path, data)
        answer = self.getresponse()
        content = answer.read()
        assert answer.status < 400, (method, path, answer.status, content)
        return json.loads(content) if content else None


@contextmanager
def server(directory: Path, namespace: Namespace, module: str, **environ: str) -> Iterator[tuple[Client, int, float]]:
    """A client, the server's pid, and the seconds from its start to its first answer."""
    settings = {
        "DATA_DIR": f"{directory}/data", "RUN_DIR": f"{directory}/run", "PORT": "0", "METRICS__ENABLED": "false",
        "HYPERVISOR__ACCELERATOR": "tcg", "OVERSUBSCRIPTION__CPU": "1000", "OVERSUBSCRIPTION__MEMORY": "1000",
        "OVERSUBSCRIPTION__DISK": "1000", "LOG__LEVEL": "warning", **environ,
    }  # fmt: skip
    path = directory / "run" / "hypeman.sock"
    begin = time.perf_counter()
    with open(directory / "server.log", "ab") as log:
        process = subprocess.Popen(
            namespace.command(sys.executable, "-m", *module.split()),
            env={**os.environ, **settings},
            stdout=log,
            stderr=log,
        )
    try:
        client = Client(path)
        while True:
            try:
                client.ask("GET", "/health")
                break
            except OSError:
                client.close()
                assert process.poll() is None, (directory / "server.log").read_text()
                time.sleep(0.005)
        yield client, process.pid, time.perf_counter() - begin
        client.close()
    finally:
        process.terminate()
        process.wait()


def run() -> list[Result]:
    results: list[Result] = []
    for directory in short_directory("bench"):
        directory.chmod(0o755)
        namespace = Namespace()
        try:
            results += _control_plane(directory, namespace)
            results += _thousand(directory, namespace)
            results += _real(directory, namespace)
        finally:
            namespace.remove()
    return results


def import_image(client: Client) -> None:
    client.ask("POST", f"/images/import?name={IMAGE}", busybox_archive())
    while client.ask("GET", "/images/localhost%2Fbusybox%3Atest")["status"] != "ready":
        time.sleep(0.02)


def _body(name: str) -> dict[str, Any]:
    return {"name": name, "image": IMAGE, "size": "128MB", "vcpus": 1, "overlay_size": "1GB"}


def _timed(client: Client, method: str, path: str, body: object = None) -> float:
    begin = time.perf_counter()
    client.ask(method, path, body)
    return (time.perf_counter() - begin) * 1000


def _control_plane(directory: Path, namespace: Namespace) -> list[Result]:
    times: dict[str, list[float]] = {"create to running": [], "fork of a running one": [], "delete": []}
    with server(directory, namespace, "tests.bench.fake_vmm_server") as (client, pid, _):
        import_image(client)
        client.ask("POST", "/instances", _body("warm"))
        for number in range(CREATES):
            begin = time.perf_counter()
            client.ask("POST", "/instances", _body(f"vm{number}"))
            client.ask("GET", f"/instances/vm{number}/wait?state=Running&timeout=60s")
            times["create to running"].append((time.perf_counter() - begin) * 1000)
        for number in range(CREATES // 3):
            body = {"name": f"fork{number}", "from_running": True}
            times["fork of a running one"].append(_timed(client, "POST", "/instances/vm0/fork", body))
        before = _resident(pid)
        for number in range(MORE):
            client.ask("POST", "/instances", _body(f"more{number}"))
        each = (_resident(pid) - before) / MORE
        for instance in client.ask("GET", "/instances"):
            times["delete"].append(_timed(client, "DELETE", f"/instances/{instance['id']}"))
        client.ask("DELETE", "/images/localhost%2Fbusybox%3Atest")
    shutil.rmtree(directory / "data")
    return [
        *(Result(f"control plane: {name}", statistics.median(values), "ms") for name, values in times.items()),
        Result("server memory for each running instance", each / 1024, "KB"),
    ]


def _resident(pid: int) -> int:
    """RSS of the server: ``ip netns exec`` has become it by exec."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _thousand(directory: Path, namespace: Namespace) -> list[Result]:
    trio.run(_store_instances, directory / "data" / "store")
    with server(directory, namespace, "hypeman serve") as (client, pid, start):

        def many(path: str) -> float:
            begin = cpu_of_tasks(pid)
            for _ in range(REQUESTS):
                client.request("GET", path)
                client.getresponse().read()
            return (cpu_of_tasks(pid) - begin) * 1e6 / REQUESTS

        return [
            Result("server start to first answer, 1,000 instances", start, "s"),
            compare(
                "GET /instances of 1,000", "µs CPU", lambda: many("/instances"), "GET /health", lambda: many("/health")
            ),
            compare(
                "GET /instances/{id}",
                "µs CPU",
                lambda: many("/instances/vm500"),
                "GET /health",
                lambda: many("/health"),
            ),
            Result("server memory with 1,000 stored instances", _resident(pid) / 2**20, "MB"),
        ]


async def _store_instances(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    store = Store.open(path)
    now = datetime.now(UTC)
    spec = InstanceSpec(
        image=IMAGE, platform="linux/amd64", hypervisor=HypervisorKind.QEMU, vcpus=1, memory_bytes=1 << 30,
        hotplug_bytes=0, overlay_bytes=10 << 30, env={"A": "b"}, tags={"team": "x"},
    )  # fmt: skip

    def fill(txn: Txn) -> None:
        for number in range(STORED):
            record = InstanceRecord(
                id=f"i{number:023}", name=f"vm{number}", number=number + 1, spec=spec, digest="sha256:0",
                created_at=now, state=InstanceState.STOPPED,
                phases=Phases("stopped", now, {"created": 12, "running": 4711}),
            )  # fmt: skip
            rows.insert(txn, record)

    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await store.write(fill)
        nursery.cancel_scope.cancel()
    store.close()
    assert msgspec.json.encode(spec)


def _real(directory: Path, namespace: Namespace) -> list[Result]:
    """Create to running with a real VMM and guest, and where the time goes."""
    shutil.rmtree(directory / "data", ignore_errors=True)
    phases: dict[str, list[float]] = {"created": [], "initializing": []}
    with server(directory, namespace, "hypeman serve") as (client, _, start):
        import_image(client)
        for number in range(5):
            name = f"vm{number}"
            client.ask("POST", "/instances", _body(name))
            client.ask("GET", f"/instances/{name}/wait?state=Running&timeout=120s")
            for phase, values in phases.items():
                values.append(client.ask("GET", f"/instances/{name}")["phase_durations_ms"][phase])
            client.ask("DELETE", f"/instances/{name}")
    return [
        Result("server start to first answer", start, "s"),
        *(Result(f"create: phase {phase}, real guest", statistics.median(v), "ms") for phase, v in phases.items()),
    ]
