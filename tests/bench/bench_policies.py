"""Health checks of 1,000 instances: CPU of the server for a thousand checks of each kind, and per second with the
default interval. The instances are addresses of loopback, behind which another process answers.

The peer is the least that Python needs for the same connections: sockets of the standard library, one at a time.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import trio

from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.record import InstanceRecord, InstanceSpec
from hypeman.instances.model.types import (
    HealthCheck,
    HealthCheckType,
    HttpHealthCheck,
    InstanceState,
    TcpHealthCheck,
)
from hypeman.network.types import Lease
from hypeman.policies.checker import Checker
from hypeman.policies.controller import Context
from hypeman.policies.probes import Probes
from tests.bench.harness import Result, compare

INSTANCES = 1000
INTERVAL = 10.0
"""Seconds; the contract's default."""

PEER = """
import selectors, socket
listener = socket.create_server(("0.0.0.0", 0), backlog=4096)
print(listener.getsockname()[1], flush=True)
while True:
    connection, _ = listener.accept()
    with connection:
        if connection.recv(4096):
            connection.send(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
"""


@contextmanager
def answering() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", PEER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def address_of(number: int) -> str:
    return f"127.1.{number // 250}.{number % 250 + 1}"


def a_record(number: int, check: HealthCheck) -> InstanceRecord:
    now = datetime.now(UTC)
    spec = InstanceSpec(
        image="x", platform="linux/amd64", hypervisor=HypervisorKind.QEMU, vcpus=1, memory_bytes=1 << 30,
        hotplug_bytes=0, overlay_bytes=1 << 30, health_check=check,
    )  # fmt: skip
    return InstanceRecord(
        id=str(number), name=f"vm{number}", number=number, spec=spec, digest="sha256:0", created_at=now,
        state=InstanceState.RUNNING, phases=Phases("running", now),
    )  # fmt: skip


async def check_all(check: HealthCheck) -> float:
    """CPU seconds for one check of each instance, from the timer to the shown status."""
    leases: Iterator[Lease] = (
        Lease(instance_id=str(number), cid=number + 3, ipv4=address_of(number), tap="x") for number in range(INSTANCES)
    )
    refreshed: list[str] = []
    instances = SimpleNamespace(
        board=SimpleNamespace(refresh=refreshed.append),
        machine=SimpleNamespace(live=lambda _: None, journal=lambda *_: None),
    )
    store = SimpleNamespace(read=lambda _: next(leases))
    async with trio.open_nursery() as nursery:
        context = Context(
            cast(Any, instances), cast(Any, store), cast(Any, nursery.start_soon), again=lambda _: None,
            wake=lambda: None, now=lambda: datetime.now(UTC),
        )  # fmt: skip
        checker = Checker(context, most=64, probes=Probes())
        for number in range(INSTANCES):
            checker.look(a_record(number, check))
        await trio.sleep(1.1)  # the first checks are spread over a second
        refreshed.clear()
        begin = time.process_time()
        checker.run_due()
        while len(refreshed) < INSTANCES:
            await trio.sleep(0.01)
        spent = time.process_time() - begin
        nursery.cancel_scope.cancel()
    failed = sum(value for (status,), value in checker.counts().items() if status != "healthy")
    assert not failed, f"{failed} checks failed"
    return spent


def plain(port: int, *, http: bool) -> float:
    begin = time.process_time()
    for number in range(INSTANCES):
        with socket.create_connection((address_of(number), port)) as connection:
            if http:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    return time.process_time() - begin


def run() -> Iterator[Result]:
    with answering() as port:
        tcp = HealthCheck(type=HealthCheckType.TCP, tcp=TcpHealthCheck(port=port))
        http = HealthCheck(type=HealthCheckType.HTTP, http=HttpHealthCheck(port=port))
        for check in (tcp, http):
            kind = check.type
            assert kind is not None
            found = compare(
                f"1,000 health checks, {kind.value}", "ms CPU",
                lambda check=check: trio.run(check_all, check) * 1000,  # type: ignore[misc]
                "plain sockets",
                lambda kind=kind: plain(port, http=kind is HealthCheckType.HTTP) * 1000,  # type: ignore[misc]
                rounds=5,
            )  # fmt: skip
            yield found
            yield Result(f"1,000 instances checked every 10 s, {kind.value}", found.value / INTERVAL / 10, "% CPU")
