"""What QEMU is found, and whether KVM proves itself: on programs that behave like the known cases."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hypeman.errors import NotSupported
from hypeman.host.processes import Processes
from hypeman.hypervisor import kvm as module
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KvmProof
from hypeman.hypervisor.qemu.driver import QemuDriver
from tests.hypervisor.conftest import config_maker

_MACHINES = "'Supported machines are:' 'microvm  microvm' 'pc-q35-7.2  Standard PC' 'pc-q35-6.2  Standard PC'"
_VERSION = f"""case "$*" in
    --version) echo 'QEMU emulator version 7.2.22 (Debian)'; exit;;
    "-machine help") printf '%s\\n' {_MACHINES}; exit;;
esac
"""
KVM_WORKS = _VERSION + "echo 'Linux version 6.1.0'; echo 'Kernel panic - not syncing: VFS'"
KVM_HANGS = _VERSION + "sleep 60"
KVM_HANGS_HALF_WAY = _VERSION + "echo 'Linux version 6.1.0'; sleep 60"
KVM_ABORTS = _VERSION + "echo 'failed to set MSR 0x10a' >&2; kill -ABRT $$"
KVM_SILENT = _VERSION + "exit 0"


async def probe(
    processes: Processes,
    folder: Path,
    script: str,
    *,
    accelerator: str = "auto",
    kind: HypervisorKind = HypervisorKind.QEMU,
    own_users: bool = False,
) -> QemuDriver:
    binary = folder / "qemu"
    binary.write_text("#!/bin/sh\n" + script + "\n")
    binary.chmod(0o755)

    async def no_tap(name: str) -> int:
        raise OSError(name)

    patience = 0.3 if script in (KVM_HANGS, KVM_HANGS_HALF_WAY) else 60.0
    kvm = KvmProof(processes, kernel=sys.executable, qemu_binary=str(binary), patience=patience, own_users=own_users)
    made = QemuDriver(processes, no_tap, kvm=kvm, binary=str(binary), accelerator=accelerator, kind=kind)
    await made.probe()
    return made


@pytest.fixture(autouse=True)
def have_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/kvm is there."""
    monkeypatch.setattr(os, "access", lambda path, mode: True)


async def test_kvm_that_runs_a_kernel_is_taken(processes: Processes, tmp_path: Path) -> None:
    driver = await probe(processes, tmp_path, KVM_WORKS)
    assert driver.capabilities.available and driver.capabilities.accelerator == "kvm"
    assert driver.capabilities.version == "7.2.22" and driver.capabilities.accelerator_reason == ""
    assert driver.capabilities.pci_passthrough and driver.capabilities.hotplug_disk


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (KVM_HANGS, "printed nothing for 0.3 s"),
        (KVM_HANGS_HALF_WAY, "printed nothing for 0.3 s"),
        (KVM_ABORTS, "SIGABRT.*failed to set MSR 0x10a"),
        (KVM_SILENT, "ended 3 times without printing anything"),
    ],
)
async def test_kvm_that_does_not_leads_to_tcg_with_the_reason(
    processes: Processes, tmp_path: Path, script: str, reason: str
) -> None:
    driver = await probe(processes, tmp_path, script)
    assert driver.capabilities.available and driver.capabilities.accelerator == "tcg"
    assert not driver.capabilities.pci_passthrough
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(driver.capabilities.accelerator_reason)
    driver = await probe(processes, tmp_path, script, accelerator="kvm")
    assert not driver.capabilities.available and "kvm is configured, but" in driver.capabilities.reason


async def test_a_kernel_that_ends_silently_is_tried_again(processes: Processes, tmp_path: Path) -> None:
    once = f'if mkdir "{tmp_path}/tried" 2>/dev/null; then exit 0; fi\n'
    driver = await probe(processes, tmp_path, KVM_WORKS.replace("echo 'Linux", once + "echo 'Linux"))
    assert (tmp_path / "tried").exists() and driver.capabilities.accelerator == "kvm"


async def test_kvm_that_only_root_may_open_is_none_for_vmms(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KVM_DEVICE", str(tmp_path / "kvm"))
    (tmp_path / "kvm").touch(mode=0o600)
    for own_users, accelerator in ((True, "tcg"), (False, "kvm")):
        driver = await probe(processes, tmp_path, KVM_WORKS, own_users=own_users)
        assert driver.capabilities.accelerator == accelerator
        assert ("only root may open" in driver.capabilities.accelerator_reason) == own_users
    (tmp_path / "kvm").chmod(0o666)
    driver = await probe(processes, tmp_path, KVM_WORKS, own_users=True)
    assert driver.capabilities.accelerator == "kvm"


async def test_an_older_qemu_has_the_board_of_its_version(processes: Processes, tmp_path: Path) -> None:
    driver = await probe(processes, tmp_path, _VERSION.replace("7.2.22", "6.2.0"), accelerator="tcg")
    assert driver.capabilities.available and driver.capabilities.version == "6.2.0"


async def test_tcg_may_be_asked_for(processes: Processes, tmp_path: Path) -> None:
    driver = await probe(processes, tmp_path, KVM_WORKS, accelerator="tcg")
    assert driver.capabilities.accelerator == "tcg" and driver.capabilities.accelerator_reason == "tcg is configured"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'QEMU emulator version 4.2.1'", "QEMU 4.2.1 is too old, 5.2 is required"),
        (
            _VERSION.replace("7.2.22", "9.1.0").replace("pc-q35-7.2", "pc-q35-rhel9.6.0"),
            "without the machine pc-q35-7.2",
        ),
        (_VERSION.replace("7.2.22", "5.2.0"), "without the machine pc-q35-5.2"),
        ("echo 'something else'", "is not QEMU"),
        ("echo broken >&2; exit 1", "broken"),
    ],
)
async def test_what_is_no_usable_qemu_says_why(processes: Processes, tmp_path: Path, script: str, reason: str) -> None:
    driver = await probe(processes, tmp_path, script)
    assert not driver.capabilities.available and reason in driver.capabilities.reason
    with pytest.raises(NotSupported, match="cannot be used here"):
        driver.validate(config_maker(tmp_path, Path("/kernel"), None)("refused"))


async def test_microvm_says_what_it_has_not(processes: Processes, tmp_path: Path) -> None:
    can = (await probe(processes, tmp_path, KVM_WORKS, kind=HypervisorKind.QEMU_MICROVM)).capabilities
    assert can.available and can.standby and can.fork
    assert not (can.hotplug_disk or can.hotplug_memory or can.pci_passthrough) and can.hotplug_ports == 0
