"""One list of drivers, and everything that names kinds agrees with it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from hypeman import doctor
from hypeman.cli.instances import HYPERVISOR_HELP, HYPERVISORS
from hypeman.config import Config, HypervisorChoice, HypervisorConfig
from hypeman.host.processes import Processes
from hypeman.hypervisor import catalog
from hypeman.hypervisor.binary import find_binary
from hypeman.hypervisor.drivers import AnyDriver, make_drivers
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KvmProof
from tests.hypervisor.real import REAL_KINDS
from tests.walls.test_what_a_vmm_sees import GOLDEN, KINDS


async def no_tap(name: str) -> int:
    raise AssertionError(name)


@pytest.fixture
def drivers() -> tuple[AnyDriver, ...]:
    return make_drivers(HypervisorConfig(), Processes(), no_tap, kernel="/no/kernel")


def test_every_kind_but_apples_has_one_driver(drivers: tuple[AnyDriver, ...]) -> None:
    expected = sorted(set(HypervisorKind) - {HypervisorKind.VZ})
    assert sorted(driver.kind for driver in drivers) == expected, "hypeman/hypervisor/drivers.py lacks one"


def test_names_elsewhere_are_those_of_the_list(drivers: tuple[AnyDriver, ...]) -> None:
    kinds = {driver.kind.value for driver in drivers}
    assert set(get_args(HypervisorChoice)) == {"", *kinds}, "hypeman/config.py"
    assert {kind.value for kind in catalog.PREFERENCE} == kinds, "hypeman/hypervisor/catalog.py"
    assert set(HYPERVISORS.values()) <= kinds
    assert set(REAL_KINDS) == kinds, "tests/hypervisor/real.py: it would not be tested with its real program"
    assert all(kind in HYPERVISOR_HELP for kind in kinds)


def test_each_program_has_a_golden_list_of_what_it_can_reach(drivers: tuple[AnyDriver, ...]) -> None:
    """``tests/walls/test_what_a_vmm_sees.py`` makes the lists; both kinds of QEMU are one program."""
    kinds = {driver.kind.value for driver in drivers} - {HypervisorKind.QEMU_MICROVM.value}
    assert kinds <= set(KINDS) == {path.stem for path in GOLDEN.glob("*.txt")}


async def test_the_doctor_has_a_finding_for_each(
    drivers: tuple[AnyDriver, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def works(self: KvmProof) -> str:
        return ""

    monkeypatch.setattr(KvmProof, "why_not", works)
    found = {finding.name async for finding in doctor._hypervisor(Config())}
    assert found - {"kvm"} == {driver.kind.value for driver in drivers}


def test_a_program_is_started_from_where_its_parts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU found in /bin, a link to /usr/bin, does not find its modules below /usr/lib in its walls."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "usr/bin/qemu").write_text("#!/bin/sh\n")
    (tmp_path / "usr/bin/qemu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_binary("qemu") == str(tmp_path.resolve() / "usr/bin/qemu")
    assert find_binary("qemu", "/opt/bin/qemu") == "/opt/bin/qemu"
