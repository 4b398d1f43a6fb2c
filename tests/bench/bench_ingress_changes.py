"""What a change of ingresses costs, server and engine together, when there are a thousand: the same as the first.

Each has a host name with TLS by the internal CA; once all share a port, once each has its own. CPU time of both
processes for one that is created and deleted again, the others present. In a network namespace of its own.

    python -m tests.bench.bench_ingress_changes [ingresses]
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman.egress.front import Place
from hypeman.egress.service import Egress, Settings
from hypeman.ingress.certificates.service import Certificates
from hypeman.ingress.certificates.service import Settings as CertificateSettings
from hypeman.ingress.service import Ingresses
from hypeman.ingress.types import CreateIngressRequest
from hypeman.store import Store
from tests.bench.bench_egress import cpu_ns
from tests.bench.harness import Result

_CLONE_NEWNET = 0x40000000
_CHANGES = 40
_FIRST_PORT = 10_000


def request(number: int, port: int) -> CreateIngressRequest:
    rule = {
        "match": {"hostname": f"h{number}.internal", "port": port},
        "target": {"instance": "web", "port": 80},
        "tls": True,
    }
    return msgspec.convert({"name": f"i{number}", "rules": [rule]}, CreateIngressRequest)


async def change(service: Ingresses, engine: int, port: int) -> float:
    """ms of CPU for one more and one less: the middle one of several."""
    costs = []
    for number in range(_CHANGES):
        before = time.process_time_ns() + cpu_ns(engine)
        await service.create(request(100_000 + number, port))
        await service.delete(f"i{100_000 + number}")
        costs.append((time.process_time_ns() + cpu_ns(engine) - before) / 1e6)
    return statistics.median(costs)


async def measure(count: int, own_ports: bool) -> tuple[float, float]:
    """With no other ingress, and with ``count`` of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store.open(folder / "store")
        async with store.serving(), trio.open_nursery() as nursery:
            egress = Egress(Settings(address="127.0.0.1", port=0, loops=1), folder / "egress")
            service = Ingresses(
                store,
                egress.front,
                find=str,
                place_of=lambda _: Place("127.0.0.1", exists=True),
                certificates=Certificates(CertificateSettings(), folder / "ingress", store),
            )
            await nursery.start(partial(egress.run, grace=0))
            await nursery.start(service.run)
            await egress.accept()
            pid = egress.engine_pid
            assert pid is not None
            extra = 9_999 if own_ports else _FIRST_PORT
            await service.create(request(99_999, _FIRST_PORT))  # the port that all share
            first = await change(service, pid, extra)
            for number in range(count):
                await service.create(request(number, _FIRST_PORT + 1 + number if own_ports else _FIRST_PORT))
            last = await change(service, pid, extra)
            nursery.cancel_scope.cancel()
        store.close()
    return first, last


def run(count: int = 1000) -> list[Result]:
    if os.geteuid() != 0:
        print("ingress_changes: requires root for a network namespace")
        return []
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    results = []
    for kind, own_ports in (("on one port", False), ("each on a port of its own", True)):
        first, last = trio.run(measure, count, own_ports)
        results.append(Result(f"ingress, a change with {count:,} {kind}", last, "ms CPU", "with none", first))
    return results


if __name__ == "__main__":
    for result in run(*(int(each) for each in sys.argv[1:])):
        print(f"{result.name:60} {result.value:8.2f} {result.unit}  {result.peer} {result.peer_value or 0:.2f}  "
              f"ratio {result.ratio or 0:.2f}")  # fmt: skip
