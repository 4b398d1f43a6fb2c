"""Everything that a VMM can open, list, write or connect to, of each kind: golden.

A new line is a new way out: it has to be looked at before it goes into the golden file (HYPEMAN_WRITE_GOLDEN=1 writes
it). The real drivers start ``look.c`` in the place of their VMM, with the walls of a VMM and all that it is given.
Firecracker's jailer is one of ours, which makes the same root; nothing but the kernel stands between VMM and host.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hypeman.host.landlock import landlock_abi
from hypeman.host.processes import Processes, groups_for
from hypeman.hypervisor.cloud_hypervisor.driver import CloudHypervisorDriver
from hypeman.hypervisor.firecracker.driver import FirecrackerDriver
from hypeman.hypervisor.interface import Driver, LaunchFailed, Nic, VmConfig
from hypeman.hypervisor.kvm import KVM_DEVICE, KvmProof
from hypeman.hypervisor.qemu.driver import QemuDriver
from tests.hypervisor.conftest import config_maker, folder, processes

__all__ = ["folder", "processes"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="requires root: makes namespaces and changes users")

GOLDEN = Path(__file__).parents[1] / "golden" / "walls"
KINDS = ("qemu", "cloud-hypervisor", "firecracker", "firecracker-with-a-network")


class Proved(KvmProof):
    """KVM is not needed for a look."""

    async def why_not(self) -> str:
        return ""

    async def why_not_as_root(self) -> str:
        return ""


@pytest.fixture
def programs(folder: Path) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("requires gcc")
    made = folder / "programs"
    made.mkdir(mode=0o755)
    source = Path(__file__).with_name("look.c")
    for name in ("qemu-system-x86_64", "cloud-hypervisor", "firecracker", "jailer"):
        if name == "qemu-system-x86_64":
            subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-static", "-o", made / name, source], check=True)
        else:
            (made / name).hardlink_to(made / "qemu-system-x86_64")
    return made


def driver_of(kind: str, processes: Processes, programs: Path, folder: Path) -> Driver:
    kvm = Proved(processes, kernel="")

    async def open_tap(name: str) -> int:
        return os.open("/dev/null", os.O_RDWR)

    if kind == "qemu":
        binary = str(programs / "qemu-system-x86_64")
        return QemuDriver(processes, open_tap, kvm=kvm, binary=binary)
    if kind == "cloud-hypervisor":
        binary, folders = str(programs / kind), (str(folder / "data"),)
        return CloudHypervisorDriver(processes, open_tap, kvm=kvm, binary=binary, folders=folders)
    return FirecrackerDriver(processes, kvm=kvm, binary=str(programs / "firecracker"))


def config_of(kind: str, folder: Path) -> VmConfig:
    """A VM beside whose files there are those of another one and a secret, in the data directory and elsewhere."""
    data = folder / "data"
    data.mkdir(mode=0o711)
    kernel, secret = folder / "vmlinux", folder / "secret"
    kernel.write_bytes(b"kernel")
    kernel.chmod(0o600)
    secret.write_bytes(b"secret")
    secret.chmod(0o644)
    make: Callable[[str], VmConfig] = config_maker(data, kernel, None)
    make("another")
    vm = make("mine")
    run = folder / "run"
    run.mkdir(mode=0o711)
    nics = () if kind == "firecracker" else (Nic("net0", "tap0", "02:00:00:00:00:01"),)
    return msgspec.structs.replace(vm, run_dir=str(run / "mine"), nics=nics)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_vmm_can_open_list_write_or_connect_to(
    kind: str, folder: Path, processes: Processes, programs: Path
) -> None:
    driver, vm = driver_of(kind, processes, programs, folder), config_of(kind, folder)
    assert (await driver.probe()).available
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
        abstract.bind("\0hypeman-test-look")
        with pytest.raises(LaunchFailed):
            await driver.launch(vm)
    seen = rendered(Path(vm.vmm_log).read_text(), folder)
    assert "# privileges" in seen and "filter of system calls yes" in seen, seen
    if landlock_abi() < 6:  # Linux 6.12
        seen = seen.replace("abstract sockets of the host\n", "")
    golden = GOLDEN / f"{kind}.txt"
    if os.environ.get("HYPEMAN_WRITE_GOLDEN"):
        golden.write_text(seen)
    assert by_section(seen) - by_section(golden.read_text()) == set()


PLACES: tuple[tuple[str, str], ...] = (
    (r"^(.* /)(usr|lib|lib64)(/.*)?$", r"\1<libraries and firmware>"),
    (r"^interface (?!lo$).*", "interfaces of the host"),
    (r"^device( read)?( write)? /dev/kvm$", "device read write /dev/kvm"),  # if its group may on this host
)


def rendered(said: str, folder: Path) -> str:
    """Sorted by section, the same on every host and in every run."""
    sections: dict[str, set[str]] = {}
    lines: set[str] = set()
    groups = f"groups {len(groups_for([KVM_DEVICE]))}"
    for line in said.splitlines():
        if line.startswith("# "):
            lines = sections.setdefault(line, set())
            continue
        line = line.replace(str(folder), "<folder>").replace(groups, "groups of its devices")
        if line.endswith(f" {folder.parent}"):
            line = line.removesuffix(str(folder.parent)) + "<above the folder>"
        for pattern, place in PLACES:
            line = re.sub(pattern, place, line)
        lines.add(line)
    return "".join(f"{name}\n" + "".join(f"{line}\n" for line in sorted(lines)) for name, lines in sections.items())


def by_section(text: str) -> set[tuple[str, str]]:
    section = ""
    found: set[tuple[str, str]] = set()
    for line in text.splitlines():
        section = line if line.startswith("# ") else section
        found.add((section, line))
    return found
