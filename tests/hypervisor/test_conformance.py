"""Every driver that can run here, held to the same suite."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hypeman.host.processes import Processes
from hypeman.hypervisor.interface import Capabilities, Driver
from hypeman.hypervisor.qemu.driver import QemuDriver
from tests.conformance.check_driver import CHECKS, Check, check_driver
from tests.fakes.fake_vmm import ALL, FakeDriver, FakeMachine
from tests.hypervisor.conftest import MakeConfig, config_maker


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("able", ["able", "unable"])
async def test_fake(check: Check, able: str, tmp_path: Path) -> None:
    machine = FakeMachine()
    capabilities = ALL if able == "able" else Capabilities(available=True, version="1.0.0", pause=True)

    def make_driver() -> Driver:
        return FakeDriver(machine, capabilities=capabilities, opens_disks=True)

    await check_driver(check, make_driver, config_maker(tmp_path, Path("/kernel"), None), tmp_path)
    assert machine.alive() == []


@pytest.fixture(scope="session")
def qemu_capabilities() -> dict[str, Capabilities]:
    """Found once for all tests."""
    return {}


@pytest.mark.real
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_qemu(
    check: Check,
    make_config: MakeConfig,
    guest_files: tuple[Path, Path],
    processes: Processes,
    qemu_capabilities: dict[str, Capabilities],
    tmp_path: Path,
) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")

    async def no_tap(name: str) -> int:
        raise OSError(f"no TAP {name} in this test")

    def make_driver() -> QemuDriver:
        driver = QemuDriver(processes, no_tap, kernel=str(guest_files[0]))
        if "qemu" in qemu_capabilities:
            driver.adopt_capabilities(qemu_capabilities["qemu"])
        return driver

    if "qemu" not in qemu_capabilities:
        qemu_capabilities["qemu"] = await make_driver().probe()
    directory = tmp_path / "captures"
    directory.mkdir()
    await check_driver(check, make_driver, make_config, directory)
