"""What the node and its pods use, as ``/stats/summary`` and ``/metrics/resource`` report it. Pure.

``kubectl top`` takes it from metrics-server, which scrapes ``/metrics/resource``. A pod's use is that of its VMM, as
the host sees it: the processor time of its vCPUs, and the guest's memory that is resident. A pod in standby uses
nothing. Counters begin with the VMM, and a container's start is that of its counters: after a standby the pod is older.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from msgspec import UNSET, Struct

from hypeman.instances.model.types import InstanceUsage


class PodUsage(Struct, frozen=True, kw_only=True):
    namespace: str
    pod: str
    uid: str
    container: str
    started_at: datetime | None
    """When the guest booted."""
    usage: InstanceUsage | None
    """None: no VMM."""
    cores: float | None = None
    """Since the last look; None: this is the first one."""


class NodeUsage(Struct, frozen=True, kw_only=True):
    name: str
    read_at: datetime
    booted_at: datetime
    cpu_seconds: float
    cores: float | None = None
    memory_total: int
    """Bytes, as the following ones."""
    memory_available: int
    disk_total: int
    disk_free: int


class Sample(Struct, frozen=True):
    """The node and its pods, each as of when it was read."""

    node: NodeUsage
    pods: tuple[PodUsage, ...]
    pods_read_at: datetime


class Rates:
    """Cores in use between two looks at counters of processor seconds."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float, float | None]] = {}

    def of(self, key: str, seconds: float, now: float) -> float | None:
        """None at the first look, and after the counter began again or the clock was set back. Looks in the same second
        give the same answer."""
        last = self._last.get(key)
        if last is not None and now < last[0]:
            last = None
        if last is not None and now - last[0] < 1.0:
            return last[2]
        rate = (seconds - last[1]) / (now - last[0]) if last is not None and seconds >= last[1] else None
        self._last[key] = (now, seconds, rate)
        return rate

    def keep(self, keys: Iterable[str]) -> None:
        """Forget all others."""
        kept = set(keys)
        self._last = {key: value for key, value in self._last.items() if key in kept}


def summarize(sample: Sample) -> dict[str, Any]:
    """The body of ``/stats/summary``."""
    node = sample.node
    time = _time(node.read_at)
    used = node.memory_total - node.memory_available
    return {
        "node": {
            "nodeName": node.name,
            "startTime": _time(node.booted_at),
            "cpu": _cpu(time, node.cpu_seconds, node.cores),
            "memory": {
                "time": time,
                "availableBytes": node.memory_available,
                "usageBytes": used,
                "workingSetBytes": used,
            },
            "fs": {
                "time": time,
                "availableBytes": node.disk_free,
                "capacityBytes": node.disk_total,
                "usedBytes": node.disk_total - node.disk_free,
            },
        },
        "pods": [_pod(pod, _time(sample.pods_read_at)) for pod in sample.pods],
    }


def _pod(pod: PodUsage, time: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "podRef": {"name": pod.pod, "namespace": pod.namespace, "uid": pod.uid},
        "containers": [],
    }
    if pod.started_at is not None:
        found["startTime"] = _time(pod.started_at)
    if pod.usage is None:
        return found
    resident = pod.usage.memory_rss_bytes
    used = {
        "cpu": _cpu(time, pod.usage.cpu_seconds, pod.cores),
        "memory": {"time": time, "usageBytes": resident, "workingSetBytes": resident, "rssBytes": resident},
    }
    network = {"name": "eth0", "rxBytes": pod.usage.network_rx_bytes, "txBytes": pod.usage.network_tx_bytes}
    container = {"name": pod.container, **used}
    if (began := counted_since(pod)) is not None:
        container["startTime"] = _time(began)
    return {**found, **used, "containers": [container], "network": {"time": time, **network, "interfaces": [network]}}


def _cpu(time: str, seconds: float, cores: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"time": time, "usageCoreNanoSeconds": int(seconds * 1e9)}
    if cores is not None:
        found["usageNanoCores"] = int(cores * 1e9)
    return found


def counted_since(pod: PodUsage) -> datetime | None:
    """When its counters were 0."""
    began = pod.usage.vmm_started_at if pod.usage is not None else UNSET
    return pod.started_at if began is UNSET else began


def render_metrics(sample: Sample) -> str:
    """The body of ``/metrics/resource``, in Prometheus' text format with times in milliseconds."""
    node, found = sample.node, _Metrics()
    found.add("node_cpu_usage_seconds_total", "counter", {}, node.cpu_seconds, node.read_at)
    found.add("node_memory_working_set_bytes", "gauge", {}, node.memory_total - node.memory_available, node.read_at)
    for pod in sample.pods:
        if pod.usage is None:
            continue
        of_pod, at = {"namespace": pod.namespace, "pod": pod.pod}, sample.pods_read_at
        of_container = {"container": pod.container, **of_pod}
        if (began := counted_since(pod)) is not None:
            found.add("container_start_time_seconds", "gauge", of_container, began.timestamp(), at)
        for prefix, labels in (("container", of_container), ("pod", of_pod)):
            found.add(f"{prefix}_cpu_usage_seconds_total", "counter", labels, pod.usage.cpu_seconds, at)
            found.add(f"{prefix}_memory_working_set_bytes", "gauge", labels, pod.usage.memory_rss_bytes, at)
    found.add("resource_scrape_error", "gauge", {}, 0, node.read_at)
    return found.text()


class _Metrics:
    """Samples, written by the name of their metric."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, labels: Mapping[str, str], value: float, at: datetime) -> None:
        lines = self._lines.setdefault(name, [f"# TYPE {name} {kind}"])
        # names of pods, containers and namespaces need no escape
        inner = ",".join(f'{key}="{text}"' for key, text in labels.items())
        lines.append(f"{name}{{{inner}}}" if inner else name)
        lines[-1] += f" {value!r} {int(at.timestamp() * 1000)}"

    def text(self) -> str:
        return "".join(f"{line}\n" for lines in self._lines.values() for line in lines)


def _time(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
