"""The virtual host of the device tests. Each module has a host of its own: there are never two at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.metal.image import build_image, build_mdev_modules, missing
from tests.metal.rig import MetalHost, dual_nic, gpu, nic, nvme
from tests.metal.vmm_host import packages

ROOT = Path(__file__).parents[2]
OURS = ("hypeman", "tests/__init__.py", "tests/metal", "tests/devices")


@pytest.fixture(scope="module")
def nvme_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The medium of the host's NVMe, with a mark that only a reader of the disk can know."""
    disk = tmp_path_factory.mktemp("nvme") / "disk"
    with disk.open("wb") as file:
        file.write(b"mark-" + os.urandom(8).hex().encode() + b"\n")
        file.truncate(16 << 20)
    return disk


@pytest.fixture(scope="module")
def metal(nvme_disk: Path) -> Iterator[MetalHost]:
    """A host with NICs, an NVMe, a GPU with audio, and our code in /opt/hypeman."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    image = build_image()
    modules = build_mdev_modules(image.release)
    devices = (nic("nic", 0), nvme("disk", 1, nvme_disk), dual_nic("dual", 2), gpu("gpu", 3))
    files: dict[str, bytes | Path] = {f"/opt/hypeman/{name}": ROOT / name for name in OURS if (ROOT / name).exists()}
    files |= {f"/opt/hypeman/{name}": path for name, path in packages().items()}
    files |= {f"/opt/mdev/{module.name}": module for module in modules.glob("*.ko")}
    with MetalHost.boot(image, devices=devices, files=files) as host:
        yield host
