"""The part of a live VMM that is common to all kinds: its process and its VM's current configuration."""

from __future__ import annotations

import msgspec
import trio

from hypeman.errors import InvalidRequest, NotFound, NotSupported
from hypeman.host.processes import Process
from hypeman.hypervisor.interface import Disk, VmConfig, VmmHandle
from hypeman.hypervisor.vmm_process import kill_and_wait, vcpu_turns
from hypeman.units import MIB


class LiveVmm:
    """The part of a Vmm that does not talk to the VMM."""

    def __init__(self, handle: VmmHandle, process: Process) -> None:
        self._handle = handle
        self._process = process
        self._channel: trio.SocketStream | None = None
        """Stream to the guest agent; one at a time."""
        self._changing = trio.Lock()  # serialises capture and hot-plug
        self._killed = False

    @property
    def handle(self) -> VmmHandle:
        return self._handle

    @property
    def config(self) -> VmConfig:
        """Current configuration, including hot-plugged disks."""
        return self._handle.config

    def vcpu_turns(self) -> int | None:
        return vcpu_turns(self._handle.pid)

    async def kill(self) -> None:
        self._killed = self._killed or self._process.alive()
        with trio.CancelScope(shield=True):  # do not leave it partly killed
            await kill_and_wait(self._process)

    async def aclose(self) -> None:
        if self._channel is not None:
            await trio.aclose_forcefully(self._channel)
        self._process.close()

    def _disk(self, disk_id: str) -> Disk:
        for disk in self.config.disks:
            if disk.id == disk_id:
                return disk
        raise NotFound(f"the VM has no disk {disk_id!r}")

    def _pullable(self, disk_id: str) -> Disk:
        disk = self._disk(disk_id)
        if disk.port == 0:
            raise NotSupported(f"disk {disk_id!r} is not removable and cannot be detached from a running VM")
        return disk

    def _now_has_disks(self, disks: tuple[Disk, ...]) -> None:
        config = msgspec.structs.replace(self.config, disks=disks)
        self._handle = msgspec.structs.replace(self._handle, config=config)

    def _check_memory(self, size: int) -> None:
        """Raise NotSupported or InvalidRequest if the VM cannot have ``size`` bytes."""
        low, high = self.config.memory_bytes, self.config.memory_bytes + self.config.hotplug_bytes
        if self.config.hotplug_bytes == 0:
            raise NotSupported("this VM was created without hot-pluggable memory")
        if not low <= size <= high:
            raise InvalidRequest(f"memory must be between {low} and {high} bytes, not {size}")

    async def can_lend(self) -> bool:
        return not self.config.pci_devices

    async def _check_balloon(self, size: int) -> None:
        """Raise NotSupported or InvalidRequest if the guest cannot lend ``size`` bytes."""
        if not 0 <= size < self.config.memory_bytes or size % MIB:
            raise InvalidRequest(f"a guest can lend whole MiB of its {self.config.memory_bytes} bytes, not {size}")
        if size and not await self.can_lend():
            raise NotSupported("this VM's memory cannot be lent: a device pins it, or it is mapped from a capture")
