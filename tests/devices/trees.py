"""Made-up sysfs trees: the files and links that our code reads and writes, in a directory.

``Tree`` lays functions out as the kernel does (``bus/pci/devices/ADDR`` is a link into ``devices/``).
What writes do to it is in kernel.py.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec


class FakeFunction(msgspec.Struct, kw_only=True):
    address: str
    vendor: int = 0x8086
    device: int = 0x10D3
    class_code: int = 0x020000
    subsystem: tuple[int, int] = (0x8086, 0xA01F)
    driver: str | None = "e1000e"
    group: int | None = 1
    numa: int = -1
    physfn: str | None = None
    total_vfs: int | None = None
    reset: str | None = "flr bus"


class Tree:
    """A sysfs root under construction."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pci = root / "bus/pci"
        for name in ("bus/pci/devices", "bus/pci/drivers", "devices", "kernel/iommu_groups", "class/net", "dev/block"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def path(self, address: str) -> Path:
        """The real directory of a function, not the link."""
        return self.root / "devices" / f"pci{address.rpartition(':')[0]}" / address

    def add(self, function: FakeFunction) -> Path:
        f = function
        path = self.path(f.address)
        path.mkdir(parents=True)
        (path / "vendor").write_text(f"0x{f.vendor:04x}\n")
        (path / "device").write_text(f"0x{f.device:04x}\n")
        (path / "class").write_text(f"0x{f.class_code:06x}\n")
        (path / "subsystem_vendor").write_text(f"0x{f.subsystem[0]:04x}\n")
        (path / "subsystem_device").write_text(f"0x{f.subsystem[1]:04x}\n")
        (path / "numa_node").write_text(f"{f.numa}\n")
        (path / "driver_override").write_text("(null)\n")
        (path / "uevent").write_text(uevent(f))
        if f.reset is not None:
            (path / "reset_method").write_text(f.reset + "\n")
        if f.total_vfs is not None:
            (path / "sriov_totalvfs").write_text(f"{f.total_vfs}\n")
            (path / "sriov_numvfs").write_text("0\n")
        if f.physfn is not None:
            (path / "physfn").symlink_to(self.path(f.physfn))
        (path / "config").write_bytes(config_space(f))
        (path / "resource").write_text("0x0 0x0 0x0\n" * 13)
        (path / "irq").write_text("0\n")
        if f.group is not None:
            members = self.root / "kernel/iommu_groups" / str(f.group) / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / f.address).symlink_to(path)
            (path / "iommu_group").symlink_to(members.parent)
        if f.driver is not None:
            self.add_driver(f.driver)
            self.set_driver(f.address, f.driver)
        (self.pci / "devices" / f.address).symlink_to(os.path.relpath(path, self.pci / "devices"))
        return path

    def add_all(self, functions: Iterable[FakeFunction]) -> None:
        for function in functions:
            self.add(function)

    def add_driver(self, name: str) -> Path:
        path = self.pci / "drivers" / name
        path.mkdir(exist_ok=True)
        return path

    def set_driver(self, address: str, name: str | None) -> None:
        """Move the driver link in one step, as the kernel does; also the entry below the driver."""
        path = self.path(address)
        link = path / "driver"
        if link.is_symlink():
            (link.resolve() / address).unlink(missing_ok=True)
            link.unlink()
        if name is not None:
            driver = self.add_driver(name)
            link.symlink_to(driver)
            (driver / address).symlink_to(path)
        if (path / "uevent").exists():
            lines = [line for line in (path / "uevent").read_text().splitlines() if not line.startswith("DRIVER=")]
            (path / "uevent").write_text("\n".join(([f"DRIVER={name}"] if name else []) + lines) + "\n")

    def remove(self, address: str) -> None:
        """Hot-unplug."""
        self.set_driver(address, None)
        (self.pci / "devices" / address).unlink()
        for member in self.root.glob(f"kernel/iommu_groups/*/devices/{address}"):
            member.unlink()
        shutil.rmtree(self.path(address))


def uevent(f: FakeFunction) -> str:
    lines = [f"DRIVER={f.driver}"] if f.driver else []
    lines += [
        f"PCI_CLASS={f.class_code:X}",
        f"PCI_ID={f.vendor:04X}:{f.device:04X}",
        f"PCI_SUBSYS_ID={f.subsystem[0]:04X}:{f.subsystem[1]:04X}",
        f"PCI_SLOT_NAME={f.address}",
        f"MODALIAS=pci:v{f.vendor:08X}d{f.device:08X}",
    ]
    return "\n".join(lines) + "\n"


def config_space(f: FakeFunction) -> bytes:
    """The 64 bytes that lspci reads."""
    head = bytearray(64)
    head[0:4] = f.vendor.to_bytes(2, "little") + f.device.to_bytes(2, "little")
    head[9:12] = f.class_code.to_bytes(3, "little")
    head[0x2C:0x30] = f.subsystem[0].to_bytes(2, "little") + f.subsystem[1].to_bytes(2, "little")
    return bytes(head)


def server(count: int, seed: int = 0) -> Iterator[FakeFunction]:
    """``count`` functions as a large machine has them: bridges, NICs with VFs, GPUs with audio, NVMe."""
    rng = random.Random(seed)
    made = 0
    bus = 0
    while made < count:
        prefix = f"{bus // 256:04x}:{bus % 256:02x}:"
        slot = [
            FakeFunction(address=prefix + "00.0", class_code=0x060400, driver="pcieport", group=bus * 10, reset=None)
        ]
        kind = rng.choice(("gpu", "nic", "nvme", "bare"))
        ids = prefix + "01."
        if kind == "gpu":
            gpu: Any = {"vendor": 0x10DE, "group": bus * 10 + 8, "numa": bus % 2}
            slot.append(FakeFunction(address=ids + "0", device=0x20B5, class_code=0x030200, driver="nvidia", **gpu))
            slot.append(FakeFunction(address=ids + "1", device=0x1AEF, class_code=0x040300, driver=None, **gpu))
        elif kind == "nic":
            nic: Any = {"numa": bus % 2, "reset": "flr"}
            slot.append(FakeFunction(address=ids + "0", driver="igb", group=bus * 10 + 8, total_vfs=7, **nic))
            virtual: Any = {"device": 0x1520, "driver": "igbvf", "physfn": ids + "0", **nic}
            slot += (FakeFunction(address=f"{prefix}02.{n}", group=bus * 10 + n, **virtual) for n in range(1, 8))
        elif kind == "nvme":
            nvme: Any = {"vendor": 0x144D, "device": 0xA808, "class_code": 0x010802, "driver": "nvme"}
            slot.append(FakeFunction(address=ids + "0", group=bus * 10 + 8, reset="flr", **nvme))
        else:
            slot.append(FakeFunction(address=ids + "0", driver=None, class_code=0xFF0000, group=bus * 10 + 8))
        yield from slot[: count - made]
        made += len(slot)
        bus += 1
