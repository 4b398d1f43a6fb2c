"""Stands in for the kernel's side of a made-up tree: what a write below ``/sys`` makes happen.

``FakeKernel`` is the real ``Sysfs`` with the last step replaced, so time limits, threads and error
translation are the product's own. It can refuse, block or kill the process at any write; all state
is in the tree, so another process can go on where one was killed.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

from hypeman.host.sysfs import Sysfs
from tests.devices.trees import Tree


class FakeKernel(Sysfs):
    """``natives`` says which driver takes a function when it is probed without an override."""

    def __init__(self, tree: Tree, dev_root: Path, natives: dict[str, str], *, deadline: float = 30.0) -> None:
        super().__init__(tree.root, deadline=deadline)
        self.tree = tree
        self.dev_root = dev_root
        self.natives = natives
        self.writes: list[tuple[str, str]] = []
        self.refuse: dict[int, int] = {}
        """Number of a write (from 0) → errno."""
        self.kill_before = self.kill_after = -1
        self.gates: dict[str, threading.Event] = {}
        """A write whose path ends so waits for the event: a driver that does not let go."""
        (dev_root / "vfio").mkdir(parents=True, exist_ok=True)
        tree.add_driver("vfio-pci")

    def write_now(self, path: str, text: str) -> None:
        number = len(self.writes)
        self.writes.append((path, text))
        if number == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        if number in self.refuse:
            raise OSError(self.refuse[number], os.strerror(self.refuse[number]))
        for end, gate in self.gates.items():
            if path.endswith(end):
                gate.wait(60)
        self._act(path.split("/"), text.strip())
        if number == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def _act(self, path: list[str], text: str) -> None:
        match path:
            case ["bus", "pci", "devices", address, "driver_override"]:
                self._file(address, "driver_override").write_text((text or "(null)") + "\n")
            case ["bus", "pci", "drivers", driver, "unbind"]:
                if self._driver(text) != driver:
                    raise OSError(errno.ENODEV, "No such device")
                self._set_driver(text, None)
            case ["bus", "pci", "drivers", driver, "bind"]:
                if self._driver(text) is not None or self._wanted(text) != driver:
                    raise OSError(errno.ENODEV, "No such device")
                self._set_driver(text, driver)
            case ["bus", "pci", "drivers_probe"]:
                wanted = self._wanted(text)
                if self._driver(text) is None and wanted and (self.tree.pci / "drivers" / wanted).exists():
                    self._set_driver(text, wanted)
            case ["class", "mdev_bus", parent, "mdev_supported_types", kind, "create"]:
                self._create(parent, kind, text)
            case ["bus", "mdev", "devices", uuid, "remove"]:
                self._remove(uuid)
            case ["bus", "pci", "devices", address, "nvidia", "current_vgpu_type"]:
                if text != "0" and self._file(address, "nvidia/current_vgpu_type").read_text().strip() != "0":
                    raise OSError(errno.EPERM, "Operation not permitted")
                self._file(address, "nvidia/current_vgpu_type").write_text(text + "\n")
            case _:
                raise OSError(errno.ENOENT, "No such file or directory")

    def _file(self, address: str, name: str) -> Path:
        return self.tree.pci / "devices" / address / name

    def _driver(self, address: str) -> str | None:
        if not (self.tree.pci / "devices" / address).exists():
            raise OSError(errno.ENODEV, "No such device")
        return self.read_link(f"bus/pci/devices/{address}/driver")

    def _wanted(self, address: str) -> str | None:
        override = self._file(address, "driver_override").read_text().strip()
        return self.natives.get(address) if override == "(null)" else override

    def _set_driver(self, address: str, driver: str | None) -> None:
        self.tree.set_driver(address, driver)
        group = self.read_link(f"bus/pci/devices/{address}/iommu_group")
        node = self.dev_root / "vfio" / str(group)
        members = os.listdir(self.root / "kernel/iommu_groups" / str(group) / "devices")
        if any(self.read_link(f"bus/pci/devices/{member}/driver") == "vfio-pci" for member in members):
            node.touch()
        else:
            node.unlink(missing_ok=True)

    def _create(self, parent: str, kind: str, uuid: str) -> None:
        types = self.root / "class/mdev_bus" / parent / "mdev_supported_types"
        left = int((types / kind / "available_instances").read_text())
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        (types / kind / "available_instances").write_text(f"{left - 1}\n")
        (types / kind / "devices" / uuid).mkdir(parents=True)
        group = self.root / "kernel/iommu_groups" / str(1000 + int(uuid[:4], 16))
        group.mkdir(parents=True, exist_ok=True)
        devices = self.root / "bus/mdev/devices"
        devices.mkdir(parents=True, exist_ok=True)
        (types / kind / "devices" / uuid / "iommu_group").symlink_to(group)
        (devices / uuid).symlink_to(types / kind / "devices" / uuid)
        (self.dev_root / "vfio" / group.name).touch()

    def _remove(self, uuid: str) -> None:
        link = self.root / "bus/mdev/devices" / uuid
        if not link.is_symlink():
            raise OSError(errno.ENODEV, "No such device")
        made = link.resolve()
        (self.dev_root / "vfio" / Path(os.readlink(made / "iommu_group")).name).unlink()
        kind = made.parent.parent
        (made / "iommu_group").unlink()
        made.rmdir()
        link.unlink()
        left = int((kind / "available_instances").read_text())
        (kind / "available_instances").write_text(f"{left + 1}\n")


def render(tree: Tree) -> str:
    """Everything that our code may change, as text to compare."""
    lines = []
    for link in sorted((tree.pci / "devices").iterdir()):
        driver = os.readlink(link / "driver").rpartition("/")[2] if (link / "driver").is_symlink() else "-"
        lines.append(f"{link.name} {driver} {(link / 'driver_override').read_text().strip()}")
        vendor = link / "nvidia/current_vgpu_type"
        if vendor.exists():
            lines[-1] += f" vgpu={vendor.read_text().strip()}"
    mdevs = tree.root / "bus/mdev/devices"
    lines += sorted(f"mdev {path.name}" for path in mdevs.iterdir()) if mdevs.exists() else []
    return "\n".join(lines)


def add_mdev_parent(tree: Tree, address: str, types: dict[str, tuple[str, str, int]]) -> None:
    """``types``: id → (name, description, available)."""
    parents = tree.root / "class/mdev_bus"
    parents.mkdir(exist_ok=True)
    device = tree.path(address)
    device.mkdir(parents=True, exist_ok=True)
    for kind, (name, description, available) in types.items():
        path = device / "mdev_supported_types" / kind
        (path / "devices").mkdir(parents=True)
        (path / "name").write_text(name + "\n")
        if description:
            (path / "description").write_text(description + "\n")
        (path / "available_instances").write_text(f"{available}\n")
        (path / "device_api").write_text("vfio-pci\n")
    (parents / address).symlink_to(device)


def add_vendor_vgpu(tree: Tree, address: str, creatable: str) -> None:
    """The files of NVIDIA's driver on a virtual function of a kernel without its mdevs."""
    path = tree.path(address) / "nvidia"
    path.mkdir()
    (path / "creatable_vgpu_types").write_text(creatable)
    (path / "current_vgpu_type").write_text("0\n")
