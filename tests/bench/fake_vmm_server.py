"""The real server on the real host, but for its VMMs, which take no time: what is left is our own share.

``python -m tests.bench.fake_vmm_server`` reads its configuration from the environment, as ``hypeman serve``. With
``FAKE_DEVICES`` (a directory) its PCI functions are made up as well: two GPUs of one model, and one that has two vGPUs.
With ``FAKE_LOAD`` each VM seems to use CORES_PER_VCPU and MEMORY_SHARE of what it has; otherwise, nothing that means
anything.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hypeman import app, wiring
from hypeman.config import load_config
from hypeman.devices.service import Devices
from hypeman.host.usage import Usage
from hypeman.hypervisor.catalog import Catalog
from hypeman.instances import sampler
from hypeman.instances.machine.machine import Machine
from hypeman.store import Store
from tests.devices.kernel import FakeKernel, add_mdev_parent
from tests.devices.trees import FakeFunction, Tree
from tests.fakes.fake_vmm import FakeDriver, FakeMachine, FakeVmm
from tests.instances.fake_world import FakeGuest


class Guests:
    """Connects each channel with a guest that is ready at once."""

    def __init__(self) -> None:
        self._opening: list[FakeVmm] = []

    def opened(self, vmm: FakeVmm, stream: Any) -> None:
        self._opening.append(vmm)

    def connect(self, stream: Any, nonce: bytes) -> FakeGuest:
        return FakeGuest(self._opening.pop().process)


CORES_PER_VCPU, MEMORY_SHARE = 0.25, 0.5


class Load:
    """What the VMs of a machine seem to use."""

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self._began: dict[int, float] = {}

    def read(self, pid: int) -> Usage:
        process = self._machine.processes.get(pid)
        if process is None or process.exit is not None:
            return Usage()
        now = time.monotonic()
        age = now - self._began.setdefault(pid, now)
        return Usage(
            cpu_seconds=age * CORES_PER_VCPU * process.config.vcpus,
            rss_bytes=int(process.config.memory_bytes * MEMORY_SHARE),
        )


GPUS = ("0000:01:00.0", "0000:02:00.0")
GPU_CLASS = "10de-20b5"
SHARED_GPU, PROFILE = "0000:03:00.0", "T4-1Q"


def fake_kernel(root: Path) -> FakeKernel:
    """The one below ``root``; an earlier server may have made it."""
    fresh = not (root / "sys").exists()
    tree = Tree(root / "sys")
    if fresh:
        for group, address in enumerate(GPUS, 1):
            tree.add(FakeFunction(address=address, vendor=0x10DE, device=0x20B5, class_code=0x030200, driver="nouveau",
                                  group=group))  # fmt: skip
        add_mdev_parent(tree, SHARED_GPU, {"nvidia-222": (f"GRID {PROFILE}", "", 2)})
    return FakeKernel(tree, root / "dev", dict.fromkeys(GPUS, "nouveau"))


def replace(module: ModuleType, name: str, part: object) -> None:
    """Raises AttributeError if the server is no longer put together there."""
    getattr(module, name)
    setattr(module, name, part)


def serve(driver: FakeDriver) -> None:
    """Run the server with ``driver`` alone."""
    if root := os.environ.get("FAKE_DEVICES"):
        os.environ |= {"DEVICES__SYSFS_ROOT": f"{root}/sys", "DEVICES__DEV_ROOT": f"{root}/dev"}
        replace(wiring, "Devices", partial(Devices, sysfs=fake_kernel(Path(root))))
    if os.environ.get("FAKE_LOAD"):
        replace(sampler, "read_usage", Load(driver.machine).read)
    guests = Guests()
    driver.guest = guests.opened

    def catalog(settings: object, store: Store, *_: object, **__: object) -> Catalog:
        return Catalog((driver,), store=store, default="qemu", depends_on={})

    replace(wiring, "make_catalog", catalog)
    replace(wiring, "Machine", partial(Machine, connect=guests.connect))  # type: ignore[arg-type]
    app.main(load_config())


if __name__ == "__main__":
    serve(FakeDriver())
