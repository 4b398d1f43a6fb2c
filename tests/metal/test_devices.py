"""Passthrough and vGPUs on a real kernel: VFIO, an IOMMU, KVM guests, mdev. See rig.py.

The kernel, its drivers and the guests are real; only the machine is emulated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.metal.rig import MetalHost

pytestmark = pytest.mark.metal

Call = Callable[..., Any]


@pytest.fixture
def call(metal: MetalHost) -> Iterator[Call]:
    """Ask the service inside: ``call("claim one - nic + bind one")``. Its store is deleted after the test."""

    def ask(*words: str, timeout: float = 600) -> Any:
        line = " ".join(words)
        code, output = metal.run(f"cd /opt/hypeman && python3 -m tests.metal.inside {line}", timeout=timeout)
        assert code == 0, f"{words}: {output}\n{metal.console(2000)}"
        return json.loads(output.splitlines()[-1])

    yield ask
    metal.run("rm -rf /var/lib/hypeman-devices")


@pytest.fixture
def found(metal: MetalHost, call: Call) -> dict[str, list[dict[str, Any]]]:
    """The host's functions by "vendor:device", in order of address."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for device in call("available"):
        by_id.setdefault(f"{device['vendor_id']}:{device['device_id']}", []).append(device)
    return by_id


VMM_USER = 510001
NIC, NVME, VGA, AUDIO = "8086:10d3", "1b36:0010", "1234:1111", "8086:2668"


def driver(metal: MetalHost, address: str) -> str:
    return metal.check(f"basename $(readlink /sys/bus/pci/devices/{address}/driver || echo none)").strip()


def inner(metal: MetalHost, modules: str, script: str, *devices: str, uid: int = 0) -> str:
    """The output of ``script`` in a KVM guest inside the host that has ``devices``; its VMM runs as ``uid``."""
    metal.put({"/opt/inner.sh": Path(__file__).parent / "inner.sh", "/opt/script": script.encode()})
    arguments = " ".join(f"-device vfio-pci,sysfsdev={path}" for path in devices)
    user = f"INNER_UID={uid} " if uid else ""
    output = metal.check(f'{user}sh /opt/inner.sh "{modules}" "$(cat /opt/script)" {arguments}', timeout=1200)
    assert "INNER-END" in output, output
    return output


def test_sees_the_machine_as_it_is(found: dict[str, list[dict[str, Any]]]) -> None:
    """Groups as the IOMMU makes them, bridges and the host's own disk refused with the reason."""
    nics, (disk,), (card,), (audio,) = found[NIC], found[NVME], found[VGA], found[AUDIO]
    assert all("reason" not in device for device in (*nics, disk, card, audio))
    alone, first, second = nics
    assert alone["iommu_group"] != first["iommu_group"] == second["iommu_group"]
    assert card["iommu_group"] == audio["iommu_group"]
    root = found["1af4:1001"][0]  # the other one has our files
    assert "holds /" in root["reason"]
    assert {port["reason"] for port in found["1b36:000c"]} == {"is a bridge"}
    assert nics[0]["current_driver"] == "e1000e"
    assert nics[0]["vendor_name"] == "Intel Corporation"


def test_an_nvme_goes_to_a_kvm_guest_and_comes_back(
    metal: MetalHost, call: Call, found: dict[str, list[dict[str, Any]]], nvme_disk: Path
) -> None:
    """The guest reads what only the disk holds, writes to it, and the host has its driver again. The VMM runs as an
    ordinary user, who may open the group by a temporary ACL."""
    address = found[NVME][0]["pci_address"]
    before = driver(metal, address)
    (path,) = call(f"register {address} disk + claim one - disk + bind one {VMM_USER}")
    assert driver(metal, address) == "vfio-pci"
    assert call("list")[0]["bound_to_vfio"]
    mark = nvme_disk.read_bytes().split(b"\n")[0].decode()
    script = "until [ -b /dev/nvme0n1 ]; do usleep 100000; done; head -n 1 /dev/nvme0n1; "
    script += "echo written-inside | dd of=/dev/nvme0n1 bs=512 seek=8 conv=sync,fsync 2>/dev/null"
    assert mark in inner(metal, "nvme", script, path, uid=VMM_USER)
    assert nvme_disk.read_bytes()[4096:].startswith(b"written-inside\n")
    assert call("unbind one + release one + bindings") == []
    assert driver(metal, address) == before == "nvme"
    metal.check("until [ -b /dev/nvme0n1 ]; do sleep 0.2; done; head -c 14 /dev/nvme0n1", timeout=60)
    call("delete", "disk")


def test_two_functions_of_a_group_go_together(
    metal: MetalHost, call: Call, found: dict[str, list[dict[str, Any]]]
) -> None:
    """The guest gets the one that was asked for; VFIO takes the group only because both were bound."""
    first, second = (device["pci_address"] for device in found[NIC][1:])
    (path,) = call(f"register {first} nic + claim one - nic + bind one")
    assert [driver(metal, address) for address in (first, second)] == ["vfio-pci", "vfio-pci"]
    output = inner(metal, "e1000e", "cat /sys/class/net/eth0/address; cat /sys/bus/pci/devices/*/vendor", path)
    assert "52:54:00" in output
    call("unbind", "one")
    assert [driver(metal, address) for address in (first, second)] == ["e1000e", "e1000e"]
    assert {link.split()[-1] for link in metal.check("ls /sys/class/net").split()} >= {"lo"}


def test_killed_at_every_step_on_the_real_kernel(
    metal: MetalHost, call: Call, found: dict[str, list[dict[str, Any]]]
) -> None:
    card, audio = found[VGA][0]["pci_address"], found[AUDIO][0]["pci_address"]
    call("register", card, "card")
    call("claim", "one", "-", "card")
    result = call("kills", "one", card, audio, timeout=1200)
    print(f"{result['kills']} kills on the real kernel")
    assert result["kills"] >= 20


def test_without_the_kernels_module_nothing_is_touched(
    metal: MetalHost, call: Call, found: dict[str, list[dict[str, Any]]]
) -> None:
    """A kernel without vfio-pci: the bind fails and says so. (Failures at each write: tests/devices.)"""
    first, second = (device["pci_address"] for device in found[NIC][1:])
    call("register", first, "nic")
    call("claim", "one", "-", "nic")
    metal.check("modprobe -r vfio-pci; mv /lib/modules/$(uname -r)/kernel/drivers/vfio /lib/modules/kept && depmod")
    try:
        answer = call("bind", "one")
        assert answer["status"] == 500
        assert "vfio-pci" in answer["message"]
    finally:
        metal.check("mv /lib/modules/kept /lib/modules/$(uname -r)/kernel/drivers/vfio && depmod")
    assert [driver(metal, address) for address in (first, second)] == ["e1000e", "e1000e"]
    assert call("bindings") == []


def test_a_device_that_another_process_has_open_comes_back_when_it_lets_go(
    metal: MetalHost, call: Call, found: dict[str, list[dict[str, Any]]]
) -> None:
    """The kernel's unbind waits for it. The service does not: it reports that and completes the unbind later."""
    address = found[NIC][0]["pci_address"]
    call(f"register {address} nic + claim one - nic")
    answer = call("unbind-held", "one")
    assert address in answer["message"] and "has not returned" in answer["message"], answer
    assert answer["kept"] == [address]
    assert driver(metal, address) == "e1000e"
    assert call("release one + delete nic + bindings") == []


def test_vgpus_of_a_real_mdev_parent(metal: MetalHost, call: Call) -> None:
    """The kernel's mdpy: slots counted, a vGPU made, shown to a KVM guest, removed."""
    metal.check("modprobe -a vfio mdev; insmod /opt/mdev/mdpy.ko")
    status = call("gpu")
    assert status["mode"] == "vgpu"
    free = {profile["name"]: profile["available"] for profile in status["profiles"]}
    assert free == {"mdpy-vga": 4, "mdpy-xga": 4, "mdpy-hd": 4}
    call(" + ".join(f"claim guest{number} mdpy-vga" for number in range(4)))
    assert call("claim", "guest4", "mdpy-vga")["error"] == "insufficient_resources"
    assert call("claim", "guest4", "mdpy-8k")["error"] == "invalid_request"
    (path,) = call("bind", "guest0")
    assert call("gpu")["used_slots"] == 4
    output = inner(metal, "", "cat /sys/bus/pci/devices/*/device", path + ",display=off")
    assert "0x000f" in output
    end = " + ".join(f"unbind guest{number} + release guest{number}" for number in range(4))
    assert call(f"{end} + gpu")["used_slots"] == 0
    assert metal.check("ls /sys/bus/mdev/devices").strip() == ""
    metal.check("rmmod mdpy")


def test_unplugged_while_registered(metal: MetalHost, call: Call, found: dict[str, list[dict[str, Any]]]) -> None:
    """Last: the NIC does not come back."""
    address = found[NIC][0]["pci_address"]
    call("register", address, "nic")
    call("claim", "one", "-", "nic")
    metal.qmp("device_del", id="nic")
    metal.check(f"while [ -e /sys/bus/pci/devices/{address} ]; do sleep 0.2; done", timeout=120)
    answer = call("bind", "one")
    assert (answer["status"], address in answer["message"]) == (409, True), answer
    assert call("list")[0]["bound_to_vfio"] is False
    assert call("unbind one + release one + delete nic + list") == []
