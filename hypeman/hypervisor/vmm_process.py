"""The process of a VMM, as all drivers deal with it: named, found again, ended, and quoted when it failed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

import trio

from hypeman.host.processes import Process, Processes, ProcessId
from hypeman.hypervisor.interface import VmConfig, VmmGone, VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind

_POLL = 0.02


def new_handle(kind: HypervisorKind, process: Process, config: VmConfig, *, memory_inode: int = 0) -> VmmHandle:
    name = process.identity
    return VmmHandle(kind, name.pid, name.start_time, name.boot_id, config.run_dir, config, memory_inode)


def find(processes: Processes, handle: VmmHandle) -> Process:
    """The process of a handle. Raises VmmGone."""
    process = processes.find(ProcessId(handle.pid, handle.start_time, handle.boot_id))
    if process is None:
        raise VmmGone(f"the VMM of {handle.config.instance_id} (pid {handle.pid}) has ended")
    return process


async def end(process: Process) -> None:
    """Kill and reap; not to be cancelled half way."""
    with trio.CancelScope(shield=True):
        process.kill()
        await process.wait()
        process.close()


async def end_stray(processes: Processes, run_dir: str) -> bool:
    """End the VMM that was started for ``run_dir``; whether there was one."""
    process = await trio.to_thread.run_sync(processes.find_marked, run_dir)
    if process is None:
        return False
    await end(process)
    return True


async def became(condition: Callable[[], Awaitable[bool]], seconds: float, *, every: float = _POLL) -> bool:
    """Whether ``condition`` came true in time; for what a VMM tells only when it is asked."""
    with trio.move_on_after(seconds):
        while True:
            if await condition():
                return True
            await trio.sleep(every)
    return False


VFIO_DEVICE = "/dev/vfio/vfio"
"""There where VFIO is; the groups lie beside it."""


def give_vfio_groups(config: VmConfig) -> None:
    """Let the VMM's user open the devices that are passed through. Raises OSError."""
    for group in vfio_groups(config):
        os.chown(group, config.uid, config.gid)


def vfio_groups(config: VmConfig) -> list[str]:
    """The files of the groups that the devices passed through are in. Raises OSError."""
    links = (os.readlink(f"{device.sysfs_path}/iommu_group") for device in config.pci_devices)
    return [f"/dev/vfio/{os.path.basename(link)}" for link in links]


class LastWords:
    """What a VMM writes to its log from now on."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._start = os.stat(log).st_size if os.access(log, os.F_OK) else 0

    def __str__(self) -> str:
        """In one line; empty if it said nothing."""
        with contextlib.suppress(OSError), open(self._log, "rb") as file:
            file.seek(self._start)
            return " / ".join(file.read(2000).decode(errors="replace").split("\n")).strip(" /")
        return ""
