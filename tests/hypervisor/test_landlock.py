"""Cloud Hypervisor behind landlock: one that was taken over opens no file that is not its VM's, whatever the file's
permissions say, however the VM came to be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from hypeman.host.landlock import landlock_abi
from hypeman.host.processes import Processes
from hypeman.hypervisor.cloud_hypervisor.config import LANDLOCK_ABI
from hypeman.hypervisor.cloud_hypervisor.vmm import CloudHypervisorVmm
from hypeman.hypervisor.interface import Capabilities, Disk, Driver, VmConfig, Vmm
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.unix_http import ApiRefused
from tests.conformance.check_driver import Guest, ending
from tests.hypervisor.conftest import config_maker
from tests.hypervisor.real import SLOWNESS, guest_cmdline, real_driver

pytestmark = [pytest.mark.real, pytest.mark.parametrize("kind", [HypervisorKind.CLOUD_HYPERVISOR], ids=["real"])]


@pytest.fixture
def landlocked(capabilities: Capabilities) -> None:
    if landlock_abi() < LANDLOCK_ABI:
        pytest.skip("this kernel has not enough of landlock: Cloud Hypervisor wants Linux 6.2")


@pytest.fixture
def runs() -> Iterator[Path]:
    """Where the run directories are: not below the data directory, as in truth."""
    with tempfile.TemporaryDirectory(prefix="hv-run-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A file that all may read and write, outside of all folders of VMs."""
    with tempfile.TemporaryDirectory(prefix="everybodys-") as name:
        Path(name).chmod(0o777)
        file = Path(name, "disk.raw")
        file.touch()
        file.chmod(0o666)
        os.truncate(file, 1 << 20)
        yield file


@pytest.mark.usefixtures("landlocked")
async def test_it_opens_no_file_that_is_not_its_vms(
    kind: HypervisorKind,
    guest_files: tuple[Path, Path],
    processes: Processes,
    folder: Path,
    runs: Path,
    everybodys: Path,
) -> None:
    """A fork is restored as on another host, whose data directory is called otherwise."""

    async def driver_in(data: Path) -> tuple[Driver, Callable[[str], VmConfig]]:
        data.mkdir(mode=0o711)
        driver = real_driver(kind, processes, kernel=str(guest_files[0]), folder=str(data))()
        await driver.probe()
        config_of = config_maker(data, *guest_files, cmdline=guest_cmdline(driver))
        return driver, lambda name: msgspec.structs.replace(config_of(name), run_dir=str(runs / name))

    async def walled(vmm: Vmm, plugged: Path) -> None:
        await Guest.of(vmm)
        assert isinstance(vmm, CloudHypervisorVmm)
        disk = {"id": "foreign", "path": str(everybodys), "image_type": "Raw"}
        with pytest.raises(ApiRefused, match=r"os error 13"):
            await vmm.api.request("PUT", "/api/v1/vm.add-disk", disk)
        plugged.touch()
        os.truncate(plugged, 1 << 20)
        await vmm.add_disk(Disk("plugged", str(plugged)))  # what its server lends it, it gets
        await vmm.remove_disk("plugged")

    here, there = folder / "here", folder / "there"
    with trio.fail_after(60 * SLOWNESS):
        driver, make_config = await driver_in(here)
        async with ending(await driver.launch(make_config("one"))) as vmm:
            await walled(vmm, here / "plugged.raw")
            saved = here / "saved"
            saved.mkdir()
            saved.chmod(0o777)
            await vmm.capture(saved)
        driver, make_config = await driver_in(there)
        saved = saved.rename(there / "saved")
        async with ending(await driver.restore(make_config("two"), saved, keep_capture=True)) as fork:
            await walled(fork, there / "plugged.raw")
