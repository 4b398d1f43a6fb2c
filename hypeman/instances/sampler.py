"""What all instances have used, sampled at most once a second for all readers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta

import trio
from msgspec import UNSET

from hypeman.host import facts
from hypeman.host.usage import Usage, read_usage
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import InstanceUsage, UsageOfAll

PERIOD = 1.0
"""Seconds."""


class Sampler:
    """``traffic`` returns bytes received and sent by instance."""

    def __init__(
        self,
        records: Callable[[], Iterable[InstanceRecord]],
        traffic: Callable[[], Mapping[str, tuple[int, int]]],
        now: Callable[[], datetime],
    ) -> None:
        self._records = records
        self._traffic = traffic
        self._now = now
        self._lock = trio.Lock()
        self._newest = UsageOfAll(time=now(), instances=())
        self._read_at = -PERIOD

    async def get(self) -> UsageOfAll:
        """A sample that is at most PERIOD old."""
        async with self._lock:
            if trio.current_time() - self._read_at >= PERIOD:
                self._newest = await self._sample()
                self._read_at = trio.current_time()
            return self._newest

    async def _sample(self) -> UsageOfAll:
        records = {record.id: record for record in self._records() if record.handle is not None}
        pids = {instance_id: record.handle.pid for instance_id, record in records.items() if record.handle is not None}
        found, booted_at = await trio.to_thread.run_sync(_read_all, pids)  # 20 µs for each
        traffic = self._traffic()
        return UsageOfAll(
            time=self._now(),
            instances=tuple(
                usage_of(records[instance_id], usage, traffic.get(instance_id, (0, 0)), booted_at)
                for instance_id, usage in found.items()
            ),
        )


def usage_of(record: InstanceRecord, usage: Usage, traffic: tuple[int, int], booted_at: datetime) -> InstanceUsage:
    """``traffic``: bytes received and sent. ``booted_at``: the host, by the kernel, so that the time of a process is
    the same each time that it is read."""
    memory = record.spec.memory_bytes + record.spec.hotplug_bytes
    return InstanceUsage(
        instance_id=record.id,
        instance_name=record.name,
        cpu_seconds=usage.cpu_seconds,
        memory_rss_bytes=usage.rss_bytes,
        memory_vms_bytes=usage.vms_bytes,
        network_rx_bytes=traffic[0],
        network_tx_bytes=traffic[1],
        allocated_vcpus=record.spec.vcpus,
        allocated_memory_bytes=memory,
        memory_utilization_ratio=usage.rss_bytes / memory if memory else None,
        vmm_started_at=booted_at + timedelta(seconds=usage.started) if usage.started else UNSET,
    )


def _read_all(pids: Mapping[str, int]) -> tuple[dict[str, Usage], datetime]:
    return {instance_id: read_usage(pid) for instance_id, pid in pids.items()}, facts.booted_at()
