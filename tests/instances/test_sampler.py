"""The usage of all instances, read once for all who ask."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing
from msgspec import UNSET

from hypeman.instances.sampler import PERIOD, Sampler


async def test_many_readers_cost_one_reading_a_second(autojump_clock: trio.testing.MockClock) -> None:
    read: list[str] = []
    spec = SimpleNamespace(memory_bytes=2**30, hotplug_bytes=2**30, vcpus=2)

    def records() -> list[Any]:
        read.append("records")
        return [
            SimpleNamespace(id="runs", name="a", spec=spec, handle=SimpleNamespace(pid=os.getpid())),
            SimpleNamespace(id="stopped", name="a", spec=spec, handle=None),
            SimpleNamespace(id="gone", name="a", spec=spec, handle=SimpleNamespace(pid=2**22 + 1)),
        ]

    sampler = Sampler(records, lambda: {"runs": (7, 9)}, lambda: datetime.now(UTC))
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(sampler.get)
    found = {instance.instance_id: instance for instance in (await sampler.get()).instances}
    assert len(read) == 1
    assert set(found) == {"runs", "gone"}
    assert found["runs"].memory_rss_bytes > 2**20
    assert (found["runs"].network_rx_bytes, found["runs"].network_tx_bytes) == (7, 9)
    assert (found["runs"].instance_name, found["runs"].allocated_memory_bytes) == ("a", 2**31)
    assert (found["gone"].memory_rss_bytes, found["gone"].network_rx_bytes) == (0, 0)
    await trio.sleep(PERIOD)
    await sampler.get()
    assert len(read) == 2


async def test_a_vmm_began_when_its_process_did(autojump_clock: trio.testing.MockClock) -> None:
    """The same time at each look, and in each server: for a program that computes rates, another one is a new
    counter."""
    spec = SimpleNamespace(memory_bytes=2**30, hotplug_bytes=0, vcpus=2)
    with subprocess.Popen(["sleep", "60"]) as process:
        began = datetime.now(UTC)
        record: Any = SimpleNamespace(id="runs", name="a", spec=spec, handle=SimpleNamespace(pid=process.pid))
        gone: Any = SimpleNamespace(id="gone", name="a", spec=spec, handle=SimpleNamespace(pid=2**22 + 1))
        times = set()
        for _ in range(2):
            sampler = Sampler(lambda: [record, gone], dict, lambda: datetime.now(UTC))
            for _ in range(2):
                await trio.sleep(PERIOD)
                found = {instance.instance_id: instance for instance in (await sampler.get()).instances}
                times.add(found["runs"].vmm_started_at)
                assert found["gone"].vmm_started_at is UNSET
        process.kill()
    (time,) = times
    assert isinstance(time, datetime)
    assert abs((time - began).total_seconds()) < 30, "the kernel knows its boot to a second; a busy machine is slow"
