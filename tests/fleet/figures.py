"""Figures of one node: ``python -m tests.fleet.figures`` prints them (three minutes; as root, with the control plane).

pods      100 are created at once on a host whose VMMs are fakes that take no time; what is left is the scheduler's
          share, the node program's and the server's
claims    pods that are forks of a golden instance (``hypeman.dev/golden``): one at a time, then many at once

For each pod: from the API server's event that it exists to the one that it is ready.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from typing import Any

from tests.fleet.control import ControlPlane, eventually, resident
from tests.fleet.fleet import Fleet, pod
from tests.fleet.hosts import Host
from tests.real.appliance import short_directory

PODS = 100
CLAIMS = 50
GOLDEN = {"annotations": {"hypeman.dev/golden": "true"}}


def main() -> None:
    for directory in short_directory("fleet"):
        directory.chmod(0o755)
        control = ControlPlane(directory)
        host: Host | None = None
        try:
            control.start()
            host = Host(control, directory, 1)
            fleet = Fleet(control, [host])
            fleet.start()
            measure(fleet, host)
            measure_claims(fleet, host)
        finally:
            if host is not None:
                host.close()
            control.close()


def measure(fleet: Fleet, host: Host) -> None:
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    idle = resident(host.node.pid)
    with fleet.namespace() as namespace:
        with Watched(fleet, namespace) as watched:
            used, served = processor_seconds(host.node.pid), processor_seconds(host.server.pid)
            began = time.monotonic()
            fleet.control.apply(*(pod(f"p{number}", namespace, node=host.name) for number in range(PODS)))
            seconds = sorted(watched.until_ready(PODS))
        total = time.monotonic() - began
        used, served = processor_seconds(host.node.pid) - used, processor_seconds(host.server.pid) - served
        print(f"{PODS} pods, created in one request: all ready after {total:.1f} s")
        print(f"pod → ready: p50 {statistics.median(seconds):.2f} s, p95 {seconds[int(PODS * 0.95) - 1]:.2f} s")
        memory = resident(host.node.pid)
        print(f"node program: {used / PODS * 1000:.0f} ms of processor time for a pod, "
              f"{memory / 2**20:.0f} MB with {PODS} pods ({idle / 2**20:.0f} MB without); "
              f"server: {served / PODS * 1000:.0f} ms")  # fmt: skip
        before = processor_seconds(host.node.pid)
        time.sleep(30)
        at_rest = (processor_seconds(host.node.pid) - before) / 30
        print(f"at rest with {PODS} pods: {at_rest * 100:.1f} % of one processor")
        print(f"control plane: {fleet.control.memory() / 2**20:.0f} MB")
        began, used = time.monotonic(), processor_seconds(host.node.pid)
        fleet.control.kubectl("delete", "pods", "--all", "-n", namespace, "--wait=false")
        eventually(lambda: not fleet.pods(namespace) and not host.instances(), "all are gone", host.node)
        used = processor_seconds(host.node.pid) - used
        print(f"deleted after {time.monotonic() - began:.1f} s; node program: {used / PODS * 1000:.0f} ms for a pod")


def measure_claims(fleet: Fleet, host: Host) -> None:
    """A claim is a pod here: the controller of agent-sandbox adds its own writes."""

    def claim(name: str) -> dict[str, Any]:
        made = pod(name, namespace, node=host.name, automountServiceAccountToken=False)
        made["metadata"] |= GOLDEN
        return made

    with fleet.namespace() as namespace:
        fleet.control.apply(claim("first"))
        fleet.wait_running(namespace, 1)
        with Watched(fleet, namespace) as watched:
            watched.until_ready(1)
            alone = []
            for number in range(10):
                fleet.control.apply(claim(f"a{number}"))
                alone += watched.until_ready(1)
            began = time.monotonic()
            fleet.control.apply(*(claim(f"c{number}") for number in range(CLAIMS)))
            watched.until_ready(CLAIMS)
            took = time.monotonic() - began
        forks = [instance for instance in host.instances() if instance["name"].startswith(("a", "c"))]
        assert len(forks) == CLAIMS + 10
    print(
        f"claim → ready, one at a time: p50 {statistics.median(alone) * 1000:.0f} ms, most {max(alone) * 1000:.0f} ms"
    )
    print(f"{CLAIMS} claims, created in one request: {CLAIMS / took:.1f} a second")


class Watched:
    """Pods of a namespace as the API server reports them. It ends watches that are read slowly; they are continued."""

    def __init__(self, fleet: Fleet, namespace: str) -> None:
        self._fleet = fleet
        self._path = f"/api/v1/namespaces/{namespace}/pods?watch=1"
        self._began: dict[str, float] = {}
        self._ready: set[str] = set()
        self._process = self._open()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _open(self) -> subprocess.Popen[bytes]:
        """From the objects as they are now; those that are known already are told again."""
        return subprocess.Popen(self._fleet.control.command("get", "--raw", self._path), stdout=subprocess.PIPE)

    def until_ready(self, count: int) -> list[float]:
        """For each of the next ``count`` pods the seconds from its first event to the one in which it is ready."""
        took: list[float] = []
        while len(took) < count:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line.endswith(b"\n"):
                self._process.communicate()
                print("the watch ended, and is continued")
                self._process = self._open()
                continue
            found = json.loads(line)["object"]
            now, name = time.monotonic(), found["metadata"]["name"]
            self._began.setdefault(name, now)
            conditions = {each["type"]: each["status"] for each in found["status"].get("conditions", ())}
            if conditions.get("Ready") == "True" and name not in self._ready:
                self._ready.add(name)
                took.append(now - self._began[name])
        return took


def processor_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
