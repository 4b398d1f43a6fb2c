"""Devices of the host in a guest, through the API of a real server: QEMU's NVMe, and vGPUs of the kernel's sample
drivers. Only virtual hosts have them (tests/metal/vmm_host.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.real.appliance import IMAGE, PATIENCE, Appliance
from tests.real.kind import KIND

pytestmark = [pytest.mark.real, pytest.mark.slow]

NVME = ("0x1b36", "0x0010")
DISK = Path("/dev/nvme0n1")
MARK = "only-on-the-disk-8c21"
READ = "until [ -b /dev/nvme0n1 ]; do sleep 1; done; head -n 1 /dev/nvme0n1"
MTTY = "0x4348"
SEES = "cat /sys/bus/pci/devices/*/vendor"


@pytest.fixture
def address() -> str:
    """Where the NVMe is."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        if tuple((device / name).read_text().strip() for name in ("vendor", "device")) == NVME:
            return device.name
    pytest.skip("no NVMe of QEMU here")


def driver(address: str) -> str:
    return Path(f"/sys/bus/pci/devices/{address}/driver").resolve().name


async def until(condition: Callable[[], object], what: str) -> None:
    with trio.move_on_after(PATIENCE):
        while not condition():
            await trio.sleep(0.1)
        return
    raise AssertionError(f"not in time: {what}")


async def with_the_disk(address: str, appliance: Appliance) -> None:
    """The instance ``one``, which has the NVMe as the device ``disk``."""
    await until(DISK.is_block_device, "the host has its disk")
    with DISK.open("wb") as file:
        file.write(f"{MARK}\n".encode())
    await appliance.post("/devices", {"pci_address": address, "name": "disk"})
    await appliance.create("one", devices=["disk"])
    assert driver(address) == "vfio-pci"
    assert await appliance.exec("one", "sh", "-c", READ) == (0, f"{MARK}\n")


async def test_an_nvme_goes_to_a_guest_and_comes_back(address: str, appliance: Appliance) -> None:
    """Kept over a restart of the server and over stop and start; the host has its driver again at the end."""
    if KIND == "firecracker":
        await appliance.post("/devices", {"pci_address": address, "name": "disk"})
        body = {"name": "one", "image": IMAGE, "devices": ["disk"]}
        refused = await appliance.ask("POST", "/instances", json=body)
        assert refused.status_code == 501 and "cannot do devices" in refused.json()["message"], refused.text
        assert driver(address) == "nvme" and await appliance.get("/instances") == []
        return
    await with_the_disk(address, appliance)
    write = "echo written-inside | dd of=/dev/nvme0n1 bs=512 seek=8 conv=sync,fsync 2>/dev/null"
    assert (await appliance.exec("one", "sh", "-c", write))[0] == 0
    refused = await appliance.ask("POST", "/instances/one/standby")
    assert refused.status_code == 501 and "device" in refused.json()["message"], refused.text
    appliance.kill()
    await appliance.start()
    assert await appliance.exec("one", "sh", "-c", READ) == (0, f"{MARK}\n")
    await appliance.post("/instances/one/stop")
    await appliance.post("/instances/one/start", {})
    await appliance.wait("one", "Running")
    assert await appliance.exec("one", "sh", "-c", READ) == (0, f"{MARK}\n")
    await appliance.delete("/instances/one")
    assert driver(address) == "nvme"
    await until(DISK.is_block_device, "the host has its disk again")
    with DISK.open("rb") as file:
        assert file.read(8192)[4096:].startswith(b"written-inside\n")
    await appliance.delete("/devices/disk")


@pytest.fixture
def mtty() -> None:
    """A parent of vGPUs. In a fixture, so that no server is started where it is missing."""
    if not Path("/sys/class/mdev_bus/mtty").exists():
        pytest.skip("no mtty here")


@pytest.mark.skipif(KIND == "firecracker", reason="Firecracker cannot do devices")
@pytest.mark.usefixtures("mtty")
async def test_a_vgpu_lives_with_its_instance(appliance: Appliance) -> None:
    """Made at the first start, kept over a restart of the server and while the instance is stopped."""
    made = Path("/sys/bus/mdev/devices")

    async def used() -> int:
        return int((await appliance.get("/resources"))["gpu"]["used_slots"])

    assert await used() == 0
    await appliance.create("one", gpu={"profile": "mtty-1"})
    assert MTTY in (await appliance.exec("one", "sh", "-c", SEES))[1].split()
    assert (len([*made.iterdir()]), await used()) == (1, 1)
    appliance.kill()
    await appliance.start()
    assert MTTY in (await appliance.exec("one", "sh", "-c", SEES))[1].split()
    await appliance.post("/instances/one/stop")
    assert (len([*made.iterdir()]), await used()) == (1, 1)
