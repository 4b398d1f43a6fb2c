"""The list of drivers, used by server, doctor and configuration.

Adding a VMM: its name in ``kinds.py``, its driver here, its name in ``config.HypervisorChoice``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from hypeman.config import HypervisorConfig
from hypeman.host.processes import Processes
from hypeman.hypervisor.catalog import Catalog
from hypeman.hypervisor.cloud_hypervisor.driver import CloudHypervisorDriver
from hypeman.hypervisor.firecracker.driver import FirecrackerDriver
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KVM_DEVICE, KvmProof
from hypeman.hypervisor.qemu.driver import QemuDriver
from hypeman.hypervisor.vmm_process import VFIO_DEVICE
from hypeman.store import Store

OpenTap = Callable[[str], Awaitable[int]]
AnyDriver = QemuDriver | CloudHypervisorDriver | FirecrackerDriver


def make_drivers(
    settings: HypervisorConfig,
    processes: Processes,
    open_tap: OpenTap,
    *,
    kernel: str,
    folders: tuple[str, ...] = (),
) -> tuple[AnyDriver, ...]:
    """A driver of every kind, none of them probed; QEMU, which needs no KVM, first.

    ``open_tap`` returns a descriptor of a TAP, ``kernel`` is the guest kernel that probes KVM; disks and
    captures are below ``folders``.
    """
    kvm = KvmProof.configured(processes, settings, kernel=kernel)

    def qemu(kind: HypervisorKind) -> QemuDriver:
        return QemuDriver(
            processes,
            open_tap,
            kvm=kvm,
            kind=kind,
            binary=settings.qemu_binary,
            accelerator=settings.accelerator,
        )

    return (
        qemu(HypervisorKind.QEMU),
        qemu(HypervisorKind.QEMU_MICROVM),
        CloudHypervisorDriver(processes, open_tap, kvm=kvm, binary=settings.cloud_hypervisor_binary, folders=folders),
        FirecrackerDriver(processes, kvm=kvm, binary=settings.firecracker_binary, jailer=settings.jailer_binary),
    )


def make_catalog(
    settings: HypervisorConfig,
    store: Store,
    processes: Processes,
    open_tap: OpenTap,
    *,
    kernel: str,
    folders: tuple[str, ...],
) -> Catalog:
    """All drivers, and what a remembered answer of each depends on."""
    drivers = make_drivers(settings, processes, open_tap, kernel=kernel, folders=folders)
    common = (
        *(kernel, KVM_DEVICE, VFIO_DEVICE),
        *(f"{name}={getattr(settings, name)}" for name in ("accelerator", "kvm_patience", "uid_base")),
    )
    depends_on = {driver.kind: (*common, *driver.programs()) for driver in drivers}
    return Catalog(drivers, store=store, default=settings.default, depends_on=depends_on)
