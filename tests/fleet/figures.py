"""Figures of one node: ``python -m tests.fleet.figures`` prints them (two minutes; wants root and the control plane).

100 pods are created at once on a host whose VMMs are fakes that take no time; what is left is the scheduler's share,
the node program's and the server's. For each pod: from the API server's event that it exists to the one that it is
ready.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time

from tests.fleet.control import ControlPlane, eventually, resident
from tests.fleet.fleet import Fleet, pod
from tests.fleet.hosts import Host
from tests.real.appliance import short_directory

PODS = 100


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
        finally:
            if host is not None:
                host.close()
            control.close()


def measure(fleet: Fleet, host: Host) -> None:
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    idle = resident(host.node.pid)
    with fleet.namespace() as namespace:
        watch = fleet.control.command("get", "--raw", f"/api/v1/namespaces/{namespace}/pods?watch=1")
        with subprocess.Popen(watch, stdout=subprocess.PIPE) as events:
            used = processor_seconds(host.node.pid)
            began = time.monotonic()
            fleet.control.apply(*(pod(f"p{number}", namespace, node=host.name) for number in range(PODS)))
            seconds = sorted(until_ready(events))
            events.kill()
        total = time.monotonic() - began
        used = processor_seconds(host.node.pid) - used
        print(f"{PODS} pods, created in one request: all ready after {total:.1f} s")
        print(f"pod → ready: p50 {statistics.median(seconds):.2f} s, p95 {seconds[int(PODS * 0.95) - 1]:.2f} s")
        memory = resident(host.node.pid)
        print(f"node program: {used / PODS * 1000:.0f} ms of processor time for a pod, "
              f"{memory / 2**20:.0f} MB with {PODS} pods ({idle / 2**20:.0f} MB without)")  # fmt: skip
        before = processor_seconds(host.node.pid)
        time.sleep(30)
        at_rest = (processor_seconds(host.node.pid) - before) / 30
        print(f"at rest with {PODS} pods: {at_rest * 100:.1f} % of one processor")
        print(f"control plane: {fleet.control.memory() / 2**20:.0f} MB")
        began = time.monotonic()
        fleet.control.kubectl("delete", "pods", "--all", "-n", namespace, "--wait=false")
        eventually(lambda: not fleet.pods(namespace) and not host.instances(), "all are gone", host.node)
        print(f"deleted after {time.monotonic() - began:.1f} s")


def until_ready(events: subprocess.Popen[bytes]) -> list[float]:
    """For each pod the seconds from its first event to the one in which it is ready."""
    began: dict[str, float] = {}
    took: dict[str, float] = {}
    assert events.stdout is not None
    for line in events.stdout:
        now = time.monotonic()
        found = json.loads(line)["object"]
        name = found["metadata"]["name"]
        began.setdefault(name, now)
        conditions = {each["type"]: each["status"] for each in found["status"].get("conditions", ())}
        if conditions.get("Ready") == "True" and name not in took:
            took[name] = now - began[name]
            if len(took) == PODS:
                break
    return list(took.values())


def processor_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
