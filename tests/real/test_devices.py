"""A device of the host in a guest, through the API of a real server: QEMU's NVMe, which only virtual hosts have
(tests/metal/vmm_host.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.real.appliance import IMAGE, PATIENCE, Appliance
from tests.real.kind import KIND

pytestmark = [pytest.mark.real, pytest.mark.slow]

NVME = ("0x1b36", "0x0010")
MARK = "only-on-the-disk-8c21"
READ = "until [ -b /dev/nvme0n1 ]; do sleep 1; done; head -n 1 /dev/nvme0n1"


@pytest.fixture
def address() -> str:
    """Where it is."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        if tuple((device / name).read_text().strip() for name in ("vendor", "device")) == NVME:
            return device.name
    pytest.skip("no NVMe of QEMU here")


async def test_an_nvme_goes_to_a_guest_and_comes_back(address: str, appliance: Appliance) -> None:
    """Kept over a restart of the server and over stop and start; the host has its driver again at the end."""
    driver, disk = Path(f"/sys/bus/pci/devices/{address}/driver"), Path("/dev/nvme0n1")
    with disk.open("wb") as file:
        file.write(f"{MARK}\n".encode())
    await appliance.post("/devices", {"pci_address": address, "name": "disk"})
    if KIND == "firecracker":
        body = {"name": "one", "image": IMAGE, "devices": ["disk"]}
        refused = await appliance.ask("POST", "/instances", json=body)
        assert refused.status_code == 501 and "cannot do devices" in refused.json()["message"], refused.text
        assert driver.resolve().name == "nvme" and await appliance.get("/instances") == []
        return
    await appliance.create("one", devices=["disk"])
    assert driver.resolve().name == "vfio-pci"
    assert await appliance.exec("one", "sh", "-c", READ) == (0, f"{MARK}\n")
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
    assert driver.resolve().name == "nvme"
    with trio.fail_after(PATIENCE):
        while not disk.is_block_device():
            await trio.sleep(0.1)
    with disk.open("rb") as file:
        assert file.read(8192)[4096:].startswith(b"written-inside\n")
    await appliance.delete("/devices/disk")
