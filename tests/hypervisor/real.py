"""The drivers of the VMMs that are really there, for the suite, the lifecycle on a virtual host and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from hypeman.host.processes import Processes
from hypeman.hypervisor.cloud_hypervisor.driver import CloudHypervisorDriver
from hypeman.hypervisor.firecracker.driver import FirecrackerDriver
from hypeman.hypervisor.interface import Driver
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KvmProof
from hypeman.hypervisor.qemu.driver import QemuDriver
from tests.machine import MACHINE

SLOWNESS = float(os.environ.get("HYPEMAN_TEST_SLOWNESS", "1"))

REAL_KINDS = (
    HypervisorKind.QEMU,
    HypervisorKind.QEMU_MICROVM,
    HypervisorKind.CLOUD_HYPERVISOR,
    HypervisorKind.FIRECRACKER,
)


async def no_tap(name: str) -> int:
    raise OSError(f"no TAP {name} in this test")


def real_driver(
    kind: HypervisorKind,
    processes: Processes,
    *,
    kernel: str,
    folder: str,
    open_tap: Callable[[str], Awaitable[int]] = no_tap,
) -> Callable[[], Driver]:
    """Makes drivers of ``kind``, not probed. Below ``folder`` lie all disks and captures. HYPEMAN_TEST_VMMS names a
    folder with programs to take instead of those in PATH; a QEMU is called after its kind there."""
    kvm = KvmProof(processes, kernel=kernel, patience=10.0 * SLOWNESS)
    programs = os.environ.get("HYPEMAN_TEST_VMMS", "")
    binary = os.path.join(programs, kind.value) if programs else ""

    def make() -> Driver:
        if kind is HypervisorKind.CLOUD_HYPERVISOR:
            return CloudHypervisorDriver(processes, open_tap, kvm=kvm, binary=binary, folders=(folder,))
        if kind is HypervisorKind.FIRECRACKER:
            return FirecrackerDriver(processes, kvm=kvm, binary=binary)
        program = binary if os.path.exists(binary) else ""
        return QemuDriver(processes, open_tap, kvm=kvm, kind=kind, binary=program, machine=MACHINE)

    return make


def guest_cmdline(driver: Driver) -> str:
    """The command line of guest_init.c for a driver that has been probed."""
    words = [driver.kernel_cmdline(hotplug_memory=True)]
    if not driver.capabilities.disk_serials:
        words.append("disks=root,overlay")
    if not driver.capabilities.power_off:
        words.append("poweroff=reset")
    return " ".join(words)
