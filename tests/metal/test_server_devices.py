"""Devices and vGPUs through the API of the whole server, with QEMU on the virtual host's KVM:
``tests/real/test_devices.py`` runs in there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.metal import vmm_host
from tests.metal.image import build_mdev_modules
from tests.metal.rig import MetalHost

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]

TIMEOUT = 3600
LOAD = """
set -e
modprobe -a vfio mdev
[ -e /sys/class/mdev_bus/mtty ] || insmod /opt/mdev/mtty.ko
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalHost]:
    """With a parent of vGPUs."""
    with vmm_host.boot_for_tests(tmp_path_factory.mktemp("guest")) as booted:
        release = booted.check("uname -r").strip()
        booted.put({f"/opt/mdev/{module.name}": module for module in build_mdev_modules(release).glob("*.ko")})
        booted.check(LOAD)
        yield booted


@pytest.mark.parametrize("what", ["nvme", "vgpu"])
def test_of_the_whole_server(what: str, host: MetalHost) -> None:
    selection = f"tests/real/test_devices.py -k {what}"
    output = vmm_host.run_tests(host, selection, seconds=TIMEOUT, HYPEMAN_TEST_HYPERVISOR="qemu")
    assert "1 passed" in output and "skipped" not in output, output
