"""Which hypervisors this host has, probed once and stored.

Probing may take long: whether KVM works is known only after a kernel has booted on it, and a
``/dev/kvm`` that hangs takes ten seconds. So the server starts serving while it probes, and the
result is stored until one of its inputs changes: the host's boot and kernel, the guest kernel,
the VMM's binary and the settings.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import trio

from hypeman.errors import NotSupported
from hypeman.hypervisor.interface import Capabilities, Driver
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.store import Store, Table

log = logging.getLogger(__name__)

PROBES: Table[Capabilities] = Table("hypervisor-probes", Capabilities)

PREFERENCE = (
    HypervisorKind.CLOUD_HYPERVISOR,
    HypervisorKind.QEMU,
    HypervisorKind.FIRECRACKER,
    HypervisorKind.QEMU_MICROVM,
)


class Catalog:
    """The drivers by kind. ``probe`` once, then ``driver`` and ``default``."""

    def __init__(
        self,
        drivers: Iterable[Driver],
        *,
        store: Store,
        default: str,
        depends_on: Mapping[HypervisorKind, Iterable[str]],
    ) -> None:
        """``depends_on``: files and settings that each kind's result depends on."""
        self.drivers: dict[HypervisorKind, Driver] = {driver.kind: driver for driver in drivers}
        self._store = store
        self._wanted = default
        self._depends_on = depends_on
        self._probed = trio.Event()

    async def probe(self) -> None:
        """Probe every driver without a stored result; then the catalog is ready."""
        async with trio.open_nursery() as nursery:
            for driver in self.drivers.values():
                nursery.start_soon(self._probe, driver)
        self._probed.set()
        log.info("default hypervisor is %s", self.default().value)

    async def wait_ready(self) -> None:
        await self._probed.wait()

    def driver(self, kind: HypervisorKind) -> Driver:
        """The driver of ``kind``. Raises NotSupported, with the reason, if it cannot launch VMs here."""
        if kind is HypervisorKind.VZ:
            raise NotSupported("hypervisor vz is Apple's Virtualization.framework: it runs on macOS hosts only")
        driver = self.drivers.get(kind)
        if driver is None:
            raise NotSupported(f"hypervisor {kind.value} is not part of this server")
        if not driver.capabilities.available:
            raise NotSupported(f"hypervisor {kind.value} is not available: {driver.capabilities.reason}")
        return driver

    def default(self) -> HypervisorKind:
        """The configured kind, else Cloud Hypervisor where it works with KVM, else QEMU."""
        if self._wanted:
            return HypervisorKind(self._wanted)
        for kind in PREFERENCE:
            driver = self.drivers.get(kind)
            if driver is not None and driver.capabilities.available:
                return kind
        return HypervisorKind.QEMU

    async def _probe(self, driver: Driver) -> None:
        key = f"{driver.kind.value}/{self._fingerprint(driver.kind)}"
        known = self._store.read(lambda txn: txn.get(PROBES, key))
        if known is not None:
            driver.adopt_capabilities(known)
            return
        found = await driver.probe()
        if found.available:  # missing programs may be installed at any time: probe again at the next start
            await self._store.write(lambda txn: txn.put(PROBES, key, found))
        log.info(
            "hypervisor %s: %s", driver.kind.value, found.reason or f"{found.version} with {found.accelerator or 'kvm'}"
        )

    def _fingerprint(self, kind: HypervisorKind) -> str:
        facts = [os.uname().release, Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
        for item in self._depends_on.get(kind, ()):
            try:
                status = os.stat(item)
                # KVM notifies udev of each VM, and udev then updates the device's mtime.
                time = 0 if stat.S_ISCHR(status.st_mode) else status.st_mtime_ns
                facts.append(f"{item}:{status.st_size}:{time}:{status.st_ino}")
                facts.append(f"{status.st_mode:o}:{status.st_gid}")
            except OSError:
                facts.append(item)
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def features(capabilities: Capabilities) -> tuple[str, ...]:
    """The features of a kind, under their names in the API (§2.1)."""
    supported = {
        "snapshots": capabilities.standby,
        "standby": capabilities.standby,
        "fork": capabilities.fork,
        "pause": capabilities.pause,
        "hotplug-memory": capabilities.hotplug_memory,
        "balloon-control": capabilities.balloon,
        "vsock": capabilities.vsock,
        "gpu-passthrough": capabilities.pci_passthrough,
        "disk-io-limit": capabilities.disk_io_limit,
        "disk-resize": capabilities.disk_resize,
    }
    return tuple(name for name, able in supported.items() if able)
