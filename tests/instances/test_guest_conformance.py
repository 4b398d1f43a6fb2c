"""The fake guest of the crash matrix, held to the suite that a real guest passes (tests/guest/test_real_guest.py)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from hypeman.hypervisor.interface import Disk, VmConfig
from tests.conformance.check_guest import Bench, run_all
from tests.fakes.fake_vmm import FakeMachine, Memory
from tests.instances.fake_world import FakeGuest


async def test_fake(tmp_path: Path) -> None:
    config = VmConfig(
        instance_id="one", name="one", vcpus=1, memory_bytes=1 << 20, kernel="/kernel", initrd=None, cmdline="",
        disks=(Disk(id="v-one", path=str(tmp_path / "disk")),), run_dir=str(tmp_path), jail="", console_log="",
        vmm_log="",
    )  # fmt: skip
    process = FakeMachine().start(config, Memory())
    guest = FakeGuest(process)

    async def is_frozen() -> bool:
        return guest.frozen

    async def hostname() -> str:
        return str(guest.identity["hostname"])

    @contextlib.asynccontextmanager
    async def busy(path: str) -> AsyncIterator[None]:
        guest.busy.add(path)
        yield
        guest.busy.discard(path)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest.run)
        await run_all(
            Bench(guest, disk="v-one", is_frozen=is_frozen, hostname=hostname, busy=busy, wait_off=process.ended.wait)
        )
