"""The real server on the real host, but for its VMMs, which take no time: what is left is our own share.

``python -m tests.bench.fake_vmm_server`` reads its configuration from the environment, as ``hypeman serve``. With
``FAKE_DEVICES`` (a directory) its PCI functions are made up as well: two GPUs of one model, and one that has two vGPUs.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from hypeman import app
from hypeman.config import load_config
from hypeman.devices.service import Devices
from hypeman.hypervisor.catalog import Catalog
from hypeman.instances.machine.machine import Machine
from hypeman.store import Store
from tests.devices.kernel import FakeKernel, add_mdev_parent
from tests.devices.trees import FakeFunction, Tree
from tests.fakes.fake_vmm import FakeDriver, FakeVmm
from tests.instances.fake_world import FakeGuest


class Guests:
    """Connects each channel with a guest that is ready at once."""

    def __init__(self) -> None:
        self._opening: list[FakeVmm] = []

    def opened(self, vmm: FakeVmm, stream: Any) -> None:
        self._opening.append(vmm)

    def connect(self, stream: Any, nonce: bytes) -> FakeGuest:
        return FakeGuest(self._opening.pop().process)


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


def serve(driver: FakeDriver) -> None:
    """Run the server with ``driver`` alone."""
    if root := os.environ.get("FAKE_DEVICES"):
        os.environ |= {"DEVICES__SYSFS_ROOT": f"{root}/sys", "DEVICES__DEV_ROOT": f"{root}/dev"}
        vars(app)["Devices"] = partial(Devices, sysfs=fake_kernel(Path(root)))
    guests = Guests()
    driver.guest = guests.opened

    def catalog(settings: object, store: Store, *_: object, **__: object) -> Catalog:
        return Catalog((driver,), store=store, default="qemu", depends_on={})

    vars(app)["make_catalog"] = catalog
    vars(app)["Machine"] = partial(Machine, connect=guests.connect)  # type: ignore[arg-type]
    app.main(load_config())


if __name__ == "__main__":
    serve(FakeDriver())
