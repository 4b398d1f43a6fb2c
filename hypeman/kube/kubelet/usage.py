"""What the node and its pods use, as ``/stats/summary`` and ``/metrics/resource`` report it. Pure.

``kubectl top`` takes it from metrics-server, which scrapes ``/metrics/resource``. A pod's use is that of its VMM, as
the host sees it: the processor time of its vCPUs, and the guest's memory that is resident. A pod in standby uses
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from msgspec import Struct

from hypeman.instances.model.types import InstanceUsage


class PodUsage(Struct, frozen=True):
    namespace: str
    pod: str
    uid: str
    container: str
    started_at: datetime | None
    usage: InstanceUsage | None
    """None: no VMM."""
    cores: float | None = None
    """Since the last look; None: this is the first one."""


class NodeUsage(Struct, frozen=True, kw_only=True):
    name: str
    booted_at: datetime
    cpu_seconds: float
    cores: float | None = None
    memory_total: int
    """Bytes, as the following ones."""
    memory_available: int
    disk_total: int
    disk_free: int


class Rates:
    """Cores in use between two looks at counters of processor seconds."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float, float | None]] = {}

    def of(self, key: str, seconds: float, now: float) -> float | None:
        """None at the first look, and after the counter began again. Looks in the same second give the same answer."""
        last = self._last.get(key)
        if last is not None and now - last[0] < 1.0:
            return last[2]
        rate = (seconds - last[1]) / (now - last[0]) if last is not None and seconds >= last[1] else None
        self._last[key] = (now, seconds, rate)
        return rate

    def keep(self, keys: Iterable[str]) -> None:
        """Forget all others."""
        kept = set(keys)
        self._last = {key: value for key, value in self._last.items() if key in kept}


def summarize(node: NodeUsage, pods: Iterable[PodUsage], now: datetime) -> dict[str, Any]:
    """The body of ``/stats/summary``."""
    time = _time(now)
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
        "pods": [_pod(pod, time) for pod in pods],
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
    if pod.started_at is not None:
        container["startTime"] = _time(pod.started_at)
    return {**found, **used, "containers": [container], "network": {"time": time, **network, "interfaces": [network]}}


def _cpu(time: str, seconds: float, cores: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"time": time, "usageCoreNanoSeconds": int(seconds * 1e9)}
    if cores is not None:
        found["usageNanoCores"] = int(cores * 1e9)
    return found


def render_metrics(node: NodeUsage, pods: Iterable[PodUsage], now: datetime) -> str:
    """The body of ``/metrics/resource``, in Prometheus' text format with times in milliseconds."""
    stamp = int(now.timestamp() * 1000)
    found = _Metrics(stamp)
    found.add("node_cpu_usage_seconds_total", "counter", {}, node.cpu_seconds)
    found.add("node_memory_working_set_bytes", "gauge", {}, node.memory_total - node.memory_available)
    for pod in pods:
        if pod.usage is None:
            continue
        of_pod = {"namespace": pod.namespace, "pod": pod.pod}
        of_container = {"container": pod.container, **of_pod}
        if pod.started_at is not None:
            found.add("container_start_time_seconds", "gauge", of_container, pod.started_at.timestamp())
        for prefix, labels in (("container", of_container), ("pod", of_pod)):
            found.add(f"{prefix}_cpu_usage_seconds_total", "counter", labels, pod.usage.cpu_seconds)
            found.add(f"{prefix}_memory_working_set_bytes", "gauge", labels, pod.usage.memory_rss_bytes)
    found.add("resource_scrape_error", "gauge", {}, 0)
    return found.text()


class _Metrics:
    """Samples, written by the name of their metric."""

    def __init__(self, stamp: int) -> None:
        self._stamp = stamp
        self._lines: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, labels: Mapping[str, str], value: float) -> None:
        lines = self._lines.setdefault(name, [f"# TYPE {name} {kind}"])
        # names of pods, containers and namespaces need no escape
        inner = ",".join(f'{key}="{text}"' for key, text in labels.items())
        lines.append(f"{name}{{{inner}}} {value!r} {self._stamp}" if inner else f"{name} {value!r} {self._stamp}")

    def text(self) -> str:
        return "".join(f"{line}\n" for lines in self._lines.values() for line in lines)


def _time(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
