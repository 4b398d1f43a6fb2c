"""`kubectl top` through metrics-server, and the autoscaler that asks for the same figures: those of the VMs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from hypeman.host import facts
from tests.bench.fake_vmm_server import CORES_PER_VCPU, MEMORY_SHARE
from tests.fleet.control import eventually
from tests.fleet.fleet import Fleet, deployment, in_namespace, pod, resources, without_real
from tests.fleet.metrics import RESOLUTION_SECONDS, MetricsServer

pytestmark = pytest.mark.fleet

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def metrics(fleet: Fleet) -> Iterator[MetricsServer]:
    with MetricsServer(fleet.control) as server:
        yield server


def top(fleet: Fleet, *arguments: str) -> dict[str, tuple[int, int]]:
    """By name: thousandths of a core and MiB."""
    lines = fleet.control.kubectl("top", *arguments, "--no-headers").splitlines()
    found = {}
    for name, cpu, *rest in (line.split() for line in lines):
        memory = next(each for each in rest if each.endswith("Mi"))
        found[name] = (int(cpu.removesuffix("m")), int(memory.removesuffix("Mi")))
    return found


def close(value: float, expected: float, share: float) -> bool:
    return abs(value - expected) <= share * expected


def size(cpu: str, memory: str) -> dict[str, Any]:
    return {"resources": resources(cpu=cpu, memory=memory)}


def test_top_pod_shows_what_the_vms_use(fleet: Fleet, metrics: MetricsServer) -> None:
    """Fakes whose use is known: a quarter of each vCPU, and half of the memory."""
    with fleet.namespace() as namespace:
        fleet.control.apply(
            pod("small", namespace, node="host1", container=size("1", "128Mi")),
            pod("large", namespace, node="host2", container=size("4", "512Mi")),
        )
        fleet.wait_running(namespace, 2)

        def agrees() -> bool:
            found = top(fleet, "pod", "-n", namespace)
            for name, vcpus, memory in (("small", 1, 128), ("large", 4, 512)):
                cpu, used = found[name]
                assert close(cpu, 1000 * vcpus * CORES_PER_VCPU, 0.2), found
                assert used == memory * MEMORY_SHARE, found
            return True

        eventually(agrees, "the figures are those of the VMs", metrics.program)
        by_container = fleet.control.kubectl("top", "pod", "-n", namespace, "--containers", "--no-headers")
        assert sorted(line.split()[:2] for line in by_container.splitlines()) == [["large", "main"], ["small", "main"]]


def test_top_node_shows_what_the_host_uses(fleet: Fleet, metrics: MetricsServer) -> None:
    """All hosts of the fleet are on one machine, whose figures each of them reports."""

    def agrees() -> bool:
        cores = rate(facts.cpu_seconds)
        found = top(fleet, "node")
        used = (facts.memory_bytes() - facts.available_memory_bytes()) / MIB
        assert set(found) == {host.name for host in fleet.hosts}
        for cpu, memory in found.values():
            assert close(cpu, 1000 * cores, 0.3), (cpu, cores)
            assert close(memory, used, 0.15), (memory, used)
        return True

    eventually(agrees, "the figures are the machine's", metrics.program)
    _, _, _, memory, percent = fleet.control.kubectl("top", "node", "host1", "--no-headers").split()
    allocatable = fleet.control.get("node", "host1")["status"]["allocatable"]["memory"]
    share = int(memory.removesuffix("Mi")) * 1024 / int(allocatable.removesuffix("Ki"))
    assert abs(int(percent.removesuffix("%")) - 100 * share) <= 1, "of what pods may use, oversubscription included"


def test_a_busy_guest_is_told_from_an_idle_one(fleet: Fleet, metrics: MetricsServer) -> None:
    """Real VMs: one computes and fills memory, the other sleeps. The figures are those that the host has of them."""
    host = fleet.host("host3")
    compute = "dd if=/dev/zero of=/dev/shm/full bs=1M count=96 && while true; do true; done"
    with fleet.namespace() as namespace:
        fleet.control.apply(
            pod("idle", namespace, node=host.name, container=size("1", "256Mi")),
            pod("busy", namespace, node=host.name, container={**size("1", "256Mi"), "command": ["sh", "-c", compute]}),
        )
        fleet.wait_running(namespace, 2)
        ids = {each["tags"]["kubernetes.io/pod"]: each["id"] for each in in_namespace(host, namespace)}

        def of_host(name: str, figure: str) -> float:
            [found] = [each for each in host.ask("GET", "/stats")["instances"] if each["instance_id"] == ids[name]]
            return float(found[figure])

        def agrees() -> bool:
            cores = rate(partial(of_host, "busy", "cpu_seconds"))
            found = top(fleet, "pod", "-n", namespace)
            (busy, full), (idle, empty) = found["busy"], found["idle"]
            assert close(busy, 1000 * cores, 0.3), (busy, cores)
            assert busy > 4 * idle, found
            assert close(full, of_host("busy", "memory_rss_bytes") / MIB, 0.1), found
            assert full > empty + 80, found
            return True

        eventually(agrees, "the figures are those of the VMs", metrics.program, host.node)


def test_a_deployment_grows_by_what_its_pods_use(fleet: Fleet, metrics: MetricsServer) -> None:
    """The horizontal pod autoscaler of the cluster: each pod uses a quarter of its request, and a tenth is wanted."""
    with fleet.namespace() as namespace:
        fleet.control.apply(
            deployment("web", namespace, 1, affinity=without_real(), container=size("1", "128Mi")),
            {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": {"name": "web", "namespace": namespace},
                "spec": {
                    "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
                    "minReplicas": 1,
                    "maxReplicas": 3,
                    "metrics": [
                        {
                            "type": "Resource",
                            "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 10}},
                        }
                    ],
                },
            },
        )
        fleet.wait_running(namespace, 3)
        [metric] = fleet.control.get("hpa", "web", "-n", namespace)["status"]["currentMetrics"]
        assert close(metric["resource"]["current"]["averageUtilization"], 100 * CORES_PER_VCPU, 0.2), metric


def rate(read: Callable[[], float]) -> float:
    """Of a counter, for a second, over as long as metrics-server looks at."""
    began, before = time.monotonic(), read()
    time.sleep(RESOLUTION_SECONDS)
    return (read() - before) / (time.monotonic() - began)
