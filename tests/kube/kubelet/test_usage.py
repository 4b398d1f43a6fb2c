"""What the node and its pods use, as metrics-server reads it: names, times, and when counters began."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hypeman.instances.model.types import InstanceUsage
from hypeman.kube.kubelet.usage import NodeUsage, PodUsage, Rates, Sample, render_metrics, summarize

BOOTED = datetime(2030, 1, 1, tzinfo=UTC)
RESTORED = BOOTED + timedelta(days=2)
READ = BOOTED + timedelta(days=3)
NODE_READ = READ + timedelta(milliseconds=750)

NODE = NodeUsage(
    name="here", read_at=NODE_READ, booted_at=BOOTED, cpu_seconds=1234.5, cores=0.5, memory_total=1000,
    memory_available=400, disk_total=50, disk_free=20,
)  # fmt: skip
USAGE = InstanceUsage(
    instance_id="i1", instance_name="web-1", cpu_seconds=12.25, memory_rss_bytes=180_000_000, memory_vms_bytes=1,
    allocated_vcpus=1, allocated_memory_bytes=1, network_rx_bytes=7, network_tx_bytes=9, vmm_started_at=RESTORED,
)  # fmt: skip


def pod(name: str = "web", usage: InstanceUsage | None = USAGE, **changes: Any) -> PodUsage:
    found = PodUsage(
        namespace="default", pod=name, uid=f"uid-{name}", container="main", started_at=BOOTED, usage=usage, cores=0.25
    )
    return msgspec.structs.replace(found, **changes)


def metrics(*pods: PodUsage) -> dict[str, Metric]:
    text = render_metrics(Sample(NODE, pods, READ))
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_names_kinds_and_labels_are_a_kubelets() -> None:
    found = metrics(pod())
    assert {name: each.type for name, each in found.items()} == {
        "node_cpu_usage_seconds": "counter",
        "node_memory_working_set_bytes": "gauge",
        "container_start_time_seconds": "gauge",
        "container_cpu_usage_seconds": "counter",
        "container_memory_working_set_bytes": "gauge",
        "pod_cpu_usage_seconds": "counter",
        "pod_memory_working_set_bytes": "gauge",
        "resource_scrape_error": "gauge",
    }
    values: dict[str, Any] = {
        sample.name: (sample.labels, sample.value) for each in found.values() for sample in each.samples
    }
    of_pod = {"namespace": "default", "pod": "web"}
    assert values["node_cpu_usage_seconds_total"] == ({}, 1234.5)
    assert values["node_memory_working_set_bytes"] == ({}, 600)
    assert values["container_cpu_usage_seconds_total"] == ({"container": "main", **of_pod}, 12.25)
    assert values["pod_memory_working_set_bytes"] == (of_pod, 180_000_000)


def test_each_value_has_the_time_at_which_it_was_read() -> None:
    """Rates are differences of values by differences of times: a sample that the server kept is as old as it is."""
    for family in metrics(pod()).values():
        for sample in family.samples:
            of_node = sample.name.startswith(("node_", "resource_"))
            assert sample.timestamp is not None
            assert math.isclose(float(sample.timestamp), (NODE_READ if of_node else READ).timestamp())


def test_a_containers_start_is_that_of_its_counters() -> None:
    """After a standby the VMM is new and the guest is not; metrics-server takes the counters as 0 at the start."""
    (start,) = metrics(pod())["container_start_time_seconds"].samples
    assert start.value == RESTORED.timestamp()
    summary = summarize(Sample(NODE, (pod(),), READ))["pods"][0]
    assert (summary["startTime"], summary["containers"][0]["startTime"]) == (
        "2030-01-01T00:00:00Z", "2030-01-03T00:00:00Z",
    )  # fmt: skip


def test_a_pod_without_a_vmm_uses_nothing() -> None:
    """In standby, or not made yet: metrics-server has no entry for it."""
    found = metrics(pod(), pod("asleep", usage=None))
    named = {sample.labels.get("pod") for each in found.values() for sample in each.samples}
    assert named == {None, "web"}
    asleep = summarize(Sample(NODE, (pod("asleep", usage=None),), READ))["pods"][0]
    assert asleep["containers"] == [] and "cpu" not in asleep


def test_rates() -> None:
    rates = Rates()
    assert rates.of("a", 10.0, 100.0) is None
    assert rates.of("a", 12.0, 104.0) == 0.5
    assert rates.of("a", 12.0, 104.5) == 0.5, "the same look"
    assert rates.of("a", 1.0, 108.0) is None, "the counter began again"
    assert rates.of("a", 2.0, 50.0) is None, "the clock was set back"
    assert rates.of("a", 3.0, 52.0) == 0.5
