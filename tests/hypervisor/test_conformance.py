"""Every driver that can run here, held to the same suite."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hypeman.host.processes import Processes
from hypeman.hypervisor.interface import Capabilities, Driver
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KvmProof
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

    make_config = config_maker(tmp_path, Path("/kernel"), None)
    await check_driver(check, make_driver, make_config, tmp_path, tmp_path / "template")
    assert machine.alive() == []


class Seen:
    """What all tests of a run share about one kind of VMM."""

    def __init__(self, folder: Path) -> None:
        self.capabilities: dict[HypervisorKind, Capabilities] = {}
        self.folder = folder


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(tmp_path_factory.mktemp("warm"))


@pytest.mark.real
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", [HypervisorKind.QEMU, HypervisorKind.QEMU_MICROVM])
async def test_qemu(
    kind: HypervisorKind,
    check: Check,
    make_config: MakeConfig,
    guest_files: tuple[Path, Path],
    processes: Processes,
    seen: Seen,
    tmp_path: Path,
) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")

    async def no_tap(name: str) -> int:
        raise OSError(f"no TAP {name} in this test")

    def make_driver() -> QemuDriver:
        driver = QemuDriver(processes, no_tap, kvm=KvmProof(processes, kernel=str(guest_files[0])), kind=kind)
        if kind in seen.capabilities:
            driver.adopt_capabilities(seen.capabilities[kind])
        return driver

    if kind not in seen.capabilities:
        seen.capabilities[kind] = await make_driver().probe()
    directory = tmp_path / "captures"
    directory.mkdir()
    await check_driver(check, make_driver, make_config, directory, seen.folder / kind.value)
