"""What hypervisors a host has is found out once, and again when something that it depends on has changed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hypeman.hypervisor.catalog import Catalog
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.store import Store
from tests.fakes.fake_vmm import FakeDriver


class Asked(FakeDriver):
    asked = 0

    async def probe(self):  # type: ignore[no-untyped-def]
        self.asked += 1
        return await super().probe()


async def was_asked(store: Store, *depends_on: str | Path) -> bool:
    """A server starts; whether it had to ask its driver."""
    driver = Asked()
    catalog = Catalog((driver,), store=store, default="", depends_on={HypervisorKind.QEMU: map(str, depends_on)})
    await catalog.probe()
    assert driver.capabilities.available
    return driver.asked > 0


async def test_an_answer_is_remembered(store: Store, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.touch()
    assert await was_asked(store, program, "accelerator=kvm")
    assert not await was_asked(store, program, "accelerator=kvm")
    assert await was_asked(store, program, "accelerator=tcg")
    os.utime(program, (1, 1))
    assert await was_asked(store, program, "accelerator=kvm")
    assert not await was_asked(store, program, "accelerator=kvm")
    program.unlink()
    assert await was_asked(store, program, "accelerator=kvm")


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device node requires root")
async def test_a_device_is_known_by_its_permissions_and_not_by_its_time(store: Store, tmp_path: Path) -> None:
    """udev gives /dev/kvm a new time with every VM."""
    device = tmp_path / "kvm"
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert await was_asked(store, device)
    os.utime(device, (1, 1))
    assert not await was_asked(store, device)
    device.chmod(0o660)
    assert await was_asked(store, device)
    os.chown(device, -1, 7)
    assert await was_asked(store, device)
