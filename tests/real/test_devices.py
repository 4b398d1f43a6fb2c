"""Devices of the host in a guest, through the API of a real server: QEMU's NVMe, and vGPUs of the kernel's sample
drivers. Only virtual hosts have them (tests/metal/vmm_host.py)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
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
SEES = "cat /sys/bus/pci/devices/*/vendor"

WITHOUT_DEVICES = pytest.mark.skipif(KIND == "firecracker", reason="Firecracker cannot do devices")


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
    assert driver(address) == "vfio-pci"
    await appliance.post("/instances/one/start", {})
    await appliance.wait("one", "Running")
    assert await appliance.exec("one", "sh", "-c", READ) == (0, f"{MARK}\n")
    await appliance.delete("/instances/one")
    assert driver(address) == "nvme"
    await until(DISK.is_block_device, "the host has its disk again")
    with DISK.open("rb") as file:
        assert file.read(8192)[4096:].startswith(b"written-inside\n")
    await appliance.delete("/devices/disk")


def descriptors(pid: int) -> Iterator[int]:
    """Those that a VMM has of VFIO devices."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(entry) == "anon_inode:[vfio-device]":
                yield int(entry.name)


def copy_of(pid: int, number: int) -> int:
    """A descriptor of ours for what is open in another process."""
    process = os.pidfd_open(pid)
    try:
        copy = int(ctypes.CDLL(None).syscall(438, process, number, 0))  # pidfd_getfd
    finally:
        os.close(process)
    assert copy >= 0
    return copy


@WITHOUT_DEVICES
async def test_a_device_in_trouble(address: str, appliance: Appliance) -> None:
    """One server for both stories: its start takes minutes where these devices are."""
    await held_by_another_process(address, appliance)
    await taken_out_of_the_running_host(address, appliance)


async def held_by_another_process(address: str, appliance: Appliance) -> None:
    """The kernel cannot give it back meanwhile. The server goes on, says what it waits for, and ends the matter by
    itself when the other process has let go."""
    await with_the_disk(address, appliance)
    (pid,) = appliance.vmms()
    held = [copy_of(pid, number) for number in descriptors(pid)]
    assert held
    try:
        for method, path in (("DELETE", "/instances/one"), ("DELETE", "/devices/disk")):
            refused = await appliance.ask(method, path)
            assert not refused.is_success and address in refused.json()["message"], refused.text
            assert "unbind has not returned" in refused.json()["message"], refused.text
        other = await appliance.ask("POST", "/instances", json={"name": "two", "image": IMAGE, "devices": ["disk"]})
        assert other.status_code == 409 and "disk" in other.json()["message"], other.text
        await appliance.create("three")
        await appliance.delete("/instances/three")
    finally:
        for number in held:
            os.close(number)
    await until(lambda: driver(address) == "nvme", "the host has its device again")
    for instance in await appliance.get("/instances"):
        await appliance.delete(f"/instances/{instance['id']}")
    await appliance.delete("/devices/disk")


async def taken_out_of_the_running_host(address: str, appliance: Appliance) -> None:
    """The guest goes on without it, everybody hears of it, and a start without it is refused by name."""
    await with_the_disk(address, appliance)
    await trio.run_process(["sh", "-c", f"echo 1 > /sys/bus/pci/devices/{address}/remove"])
    try:
        with trio.fail_after(PATIENCE):
            while not (await appliance.get("/devices/disk")).get("missing"):
                await trio.sleep(0.5)
        with trio.fail_after(PATIENCE):
            while not await appliance.get("/events?type=device.vanished&instance=one&follow=false"):
                await trio.sleep(0.5)
        assert await appliance.exec("one", "echo", "there") == (0, "there\n")
        await appliance.post("/instances/one/stop")
        refused = await appliance.ask("POST", "/instances/one/start", json={})
        assert refused.status_code == 409 and "device disk" in refused.json()["message"], refused.text
    finally:
        Path("/sys/bus/pci/rescan").write_text("1")
    await appliance.post("/instances/one/start", {})
    await appliance.wait("one", "Running")
    assert await appliance.exec("one", "sh", "-c", READ) == (0, f"{MARK}\n")
    await appliance.delete("/instances/one")
    await appliance.delete("/devices/disk")


@pytest.fixture
def sample_drivers() -> None:
    """Parents of vGPUs. In a fixture, so that no server is started where they are missing."""
    if absent := [name for name in ("mtty", "mbochs") if not Path("/sys/class/mdev_bus", name).exists()]:
        pytest.skip(f"no {' and no '.join(absent)} here")


@WITHOUT_DEVICES
@pytest.mark.usefixtures("sample_drivers")
async def test_vgpus_live_with_their_instances(appliance: Appliance) -> None:
    """Made at the first start, kept while it is stopped, removed with it."""
    await a_vgpu_lives_with_its_instance("mtty-1", "0x4348", appliance, restart=True)
    await a_vgpu_lives_with_its_instance("mbochs-small", "0x1234", appliance, restart=False)


async def a_vgpu_lives_with_its_instance(profile: str, vendor: str, appliance: Appliance, *, restart: bool) -> None:
    made = Path("/sys/bus/mdev/devices")

    async def used() -> int:
        return int((await appliance.get("/resources"))["gpu"]["used_slots"])

    assert await used() == 0
    await appliance.create("one", gpu={"profile": profile})
    assert vendor in (await appliance.exec("one", "sh", "-c", SEES))[1].split()
    assert (len([*made.iterdir()]), await used()) == (1, 1)
    if restart:
        appliance.kill()
        await appliance.start()
        assert vendor in (await appliance.exec("one", "sh", "-c", SEES))[1].split()
    await appliance.post("/instances/one/stop")
    assert (len([*made.iterdir()]), await used()) == (1, 1)
    await appliance.post("/instances/one/start", {})
    await appliance.wait("one", "Running")
    assert vendor in (await appliance.exec("one", "sh", "-c", SEES))[1].split()
    await appliance.delete("/instances/one")
    assert ([*made.iterdir()], await used()) == ([], 0)
