"""A made-up machine with one of everything, and the service on it. Used by tests and by the processes they kill."""

from __future__ import annotations

from pathlib import Path

from hypeman.config import DevicesConfig
from hypeman.devices.service import Devices
from hypeman.store import Store
from tests.devices.kernel import FakeKernel
from tests.devices.trees import FakeFunction, Tree

PORT, GPU, AUDIO, NIC, DISK, SPARE = (
    "0000:00:01.0", "0000:01:00.0", "0000:01:00.1", "0000:02:00.0", "0000:03:00.0", "0000:04:00.0",
)  # fmt: skip
NATIVES = {PORT: "pcieport", GPU: "nouveau", AUDIO: "snd_hda_intel", NIC: "e1000e", DISK: "nvme"}
FUNCTIONS = (
    FakeFunction(address=PORT, class_code=0x060400, driver="pcieport", group=2),
    FakeFunction(
        address=GPU, vendor=0x10DE, device=0x20B5, class_code=0x030200, driver="nouveau", group=2, total_vfs=16
    ),
    FakeFunction(address=AUDIO, vendor=0x10DE, device=0x1AEF, class_code=0x040300, driver="snd_hda_intel", group=2),
    FakeFunction(address=NIC, group=3),
    FakeFunction(address=DISK, vendor=0x144D, device=0xA808, class_code=0x010802, driver="nvme", group=4),
    FakeFunction(address=SPARE, device=0x1234, class_code=0xFF0000, driver=None, group=5),
)


def make_proc(root: Path, *, boot_id: str = "boot-one") -> Path:
    (root / "sys/kernel/random").mkdir(parents=True, exist_ok=True)
    (root / "sys/kernel/random/boot_id").write_text(boot_id + "\n")
    return root


class Machine:
    """``tree`` and ``kernel`` lie below ``root``; a second Machine on the same root sees the same one."""

    def __init__(self, root: Path, *, fresh: bool = True, deadline: float = 30.0) -> None:
        self.root = root
        self.tree = Tree(root / "sys")
        if fresh:
            self.tree.add_all(FUNCTIONS)
        self.proc = make_proc(root / "proc") if fresh else root / "proc"
        self.kernel = FakeKernel(self.tree, root / "dev", dict(NATIVES), deadline=deadline)

    def service(self, store: Store) -> Devices:
        config = DevicesConfig(sysfs_root=str(self.tree.root), dev_root=str(self.root / "dev"))
        return Devices(store, config, sysfs=self.kernel, proc_root=self.proc)
