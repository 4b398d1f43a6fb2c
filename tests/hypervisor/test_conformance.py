"""Every driver that can run here, held to the same suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypeman.host.processes import Processes
from hypeman.hypervisor.interface import Capabilities, Driver
from hypeman.hypervisor.kinds import HypervisorKind
from tests.conformance.check_driver import CHECKS, Check, check_driver
from tests.fakes.fake_vmm import ALL, FakeDriver, FakeMachine
from tests.hypervisor.conftest import Found, config_maker
from tests.hypervisor.real import REAL_KINDS, guest_cmdline, real_driver


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("able", ["able", "unable"])
async def test_fake(check: Check, able: str, tmp_path: Path) -> None:
    machine = FakeMachine()
    capabilities = ALL if able == "able" else Capabilities(available=True, version="1.0.0", pause=True)

    def make_driver() -> Driver:
        return FakeDriver(machine, capabilities=capabilities, opens_disks=True)

    make_config = config_maker(tmp_path, Path("/kernel"), None)
    await check_driver(check, make_driver, make_config, tmp_path, tmp_path / "template")
    assert machine.alive() == []


@pytest.mark.real
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", REAL_KINDS, ids=lambda kind: str(kind.value))
async def test_real(
    kind: HypervisorKind,
    check: Check,
    capabilities: Capabilities,
    found: Found,
    guest_files: tuple[Path, Path],
    processes: Processes,
    folder: Path,
) -> None:
    make = real_driver(kind, processes, kernel=str(guest_files[0]), folder=str(folder.parent))

    def make_driver() -> Driver:
        driver = make()
        driver.adopt_capabilities(capabilities)
        return driver

    make_config = config_maker(folder, *guest_files, cmdline=guest_cmdline(make_driver()))
    directory = folder / "captures"
    directory.mkdir(mode=0o711)
    await check_driver(check, make_driver, make_config, directory, found.folder / kind.value)
