"""VMM process handling common to all drivers: identify, find again, kill, and quote its log on failure."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from hypeman.errors import InternalError
from hypeman.host.ownership import take_back
from hypeman.host.processes import Process, Processes, ProcessId
from hypeman.host.safe_open import open_log
from hypeman.hypervisor.interface import VmConfig, VmmBroken, VmmGone, VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.text import one_line

_POLL = 0.02
_PT_INTERP = 3
"""ELF program header type for the path of the dynamic loader."""
_KILL_LIMIT = 30.0
"""Seconds from SIGKILL to exit, which takes 5 to 50 ms unless the kernel itself waits for a device."""
_MAX_WORDS = 1000
"""Bytes of a VMM's log that an error quotes."""
_STATE = 1 << 30
"""Maximum bytes of device state in a saved VM, and of logs between rotations."""


def new_handle(kind: HypervisorKind, process: Process, config: VmConfig, *, memory_inode: int = 0) -> VmmHandle:
    name = process.identity
    return VmmHandle(kind, name.pid, name.start_time, name.boot_id, config.run_dir, config, memory_inode)


def take_back_directories(config: VmConfig) -> None:
    """Before a VMM starts: ensure that the VMM's user cannot change the directories in which root opens files,
    regardless of who created them. Raises OSError."""
    logs = {os.path.dirname(config.console_log), os.path.dirname(config.vmm_log)}
    for directory in (*sorted(logs), os.path.dirname(config.jail)):
        if directory:
            take_back(directory)


def take_back_capture(directory: Path) -> None:
    """Before a VM is saved: ensure the directory is empty and writable only by root. Raises VmmBroken."""
    try:
        take_back(directory)
        found = os.listdir(directory)
    except OSError as error:
        raise VmmBroken(f"{directory} cannot be used for a capture: {error.strerror}") from error
    if found:
        raise VmmBroken(f"{directory} is not empty: {sorted(found)[0][:80]!r} was put into it")


def max_file_size(config: VmConfig) -> int:
    """Maximum size of a file that this VMM writes (RLIMIT_FSIZE): that of its largest disk or of its saved state.
    Hot-plugged disks raise it (``allow_file_size``)."""
    sizes = [_disk_size(disk.path) for disk in config.disks if not disk.readonly]
    return max(config.memory_bytes + config.hotplug_bytes + _STATE, *sizes, 0)


def allow_file_size(pid: int, size: int) -> None:
    """Let VMM ``pid`` write files of ``size`` bytes, if it cannot already. Raises InternalError."""
    try:
        limits = Path(f"/proc/{pid}/limits").read_text()  # even reading with prlimit needs CAP_SYS_RESOURCE
        limit = next(line for line in limits.splitlines() if line.startswith("Max file size")).split()[3]
        if limit != "unlimited" and int(limit) < size:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
    except FileNotFoundError:
        return  # it has exited
    except OSError as error:
        raise InternalError(f"process {pid} cannot be allowed files of {size} bytes: {error.strerror}") from error


def _disk_size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0  # opening it will raise the error


def find(processes: Processes, handle: VmmHandle) -> Process:
    """The process of a handle. Raises VmmGone."""
    process = processes.find(ProcessId(handle.pid, handle.start_time, handle.boot_id))
    if process is None:
        raise VmmGone(f"the VMM of {handle.config.instance_id} (pid {handle.pid}) has ended")
    return process


def needs_libraries(program: str) -> bool:
    """Whether ``program`` is an ELF file that names a dynamic loader, so that it cannot run in an empty root."""
    try:
        with open(program, "rb") as file:
            header = file.read(64)
            if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # 64-bit, little-endian
                return False
            (table,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(table)
            entries = file.read(size * count)
    except OSError:
        return False
    kinds = (struct.unpack_from("<I", entries, at)[0] for at in range(0, len(entries) - 3, size or 1))
    return _PT_INTERP in kinds


async def end(process: Process) -> None:
    """Kill and reap, shielded from cancellation. Raises VmmBroken if it does not exit."""
    with trio.CancelScope(shield=True):
        await kill_and_wait(process)
        process.close()


async def kill_and_wait(process: Process) -> None:
    """Raises VmmBroken if SIGKILL does not end the process: it waits in the kernel for a dead disk."""
    process.kill()
    with trio.move_on_after(_KILL_LIMIT) as limit:
        await process.wait()
    if limit.cancelled_caught:
        raise VmmBroken(f"process {process.pid} did not end within {_KILL_LIMIT:g} s after SIGKILL")


async def end_stray(processes: Processes, run_dir: str) -> bool:
    """Kill the VMM that was started for ``run_dir``; returns whether there was one."""
    process = await trio.to_thread.run_sync(processes.find_marked, run_dir)
    if process is None:
        return False
    await end(process)
    return True


async def became(condition: Callable[[], Awaitable[bool]], seconds: float, *, every: float = _POLL) -> bool:
    """Whether ``condition`` became true in time; for state that must be polled from a VMM."""
    with trio.move_on_after(seconds):
        while True:
            if await condition():
                return True
            await trio.sleep(every)
    return False


_VCPU_THREADS = ("CPU ", "vcpu", "fc_vcpu")
"""How the names of vCPU threads begin: QEMU's, Cloud Hypervisor's, Firecracker's."""


def vcpu_turns(pid: int) -> int | None:
    """``Vmm.vcpu_turns`` of process ``pid``. Takes 0.1 ms."""
    turns, found = 0, False
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            lines = Path(f"/proc/{pid}/task/{task}/status").read_text(errors="replace").splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if status["Name"].startswith(_VCPU_THREADS):
                if not status["State"].startswith("S"):
                    return None
                turns += int(status["voluntary_ctxt_switches"])
                found = True
    except (OSError, KeyError, ValueError):
        return None  # it has exited
    return turns if found else None


VFIO_DEVICE = "/dev/vfio/vfio"
"""Exists if VFIO is available; the groups are next to it."""


def give_vfio_groups(config: VmConfig) -> None:
    """Allow the VMM's user to open the passed-through devices. Raises OSError."""
    for group in vfio_groups(config):
        os.chown(group, config.uid, config.gid)


def vfio_groups(config: VmConfig) -> list[str]:
    """Group files of the passed-through devices. Raises OSError."""
    links = (os.readlink(f"{device.sysfs_path}/iommu_group") for device in config.pci_devices)
    return [f"/dev/vfio/{os.path.basename(link)}" for link in links]


class LogTail:
    """The output that a VMM appends to its log from now on."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._start = os.stat(log).st_size if os.access(log, os.F_OK) else 0

    def __str__(self) -> str:
        """The output in one line without control characters; empty if there was none."""
        with contextlib.suppress(OSError), open(self._log, "rb") as file:
            file.seek(self._start)
            return one_line(" / ".join(file.read(_MAX_WORDS).decode(errors="replace").split("\n")).strip(" /"))
        return ""


def rotate_log(log: Path) -> None:
    """Rotate ``log`` for a process that cannot reopen what it writes to.

    The caller has renamed its file to ``log``.1; it gets its name back, empty, and a copy of it becomes ``log``.1.
    Output in between is lost: a few microseconds of console. The VMM is not asked which file it writes to: a
    compromised VMM could name any file.
    """
    renamed = log.with_suffix(log.suffix + ".1")
    try:
        with open(open_log(renamed, os.O_RDWR), "rb+", buffering=0) as old:
            copy = renamed.with_name(renamed.name + ".new")
            copy.unlink(missing_ok=True)
            with open(open_log(copy), "ab") as new:
                shutil.copyfileobj(old, new)
            renamed.rename(log)
            copy.rename(renamed)
            os.truncate(old.fileno(), 0)
    except OSError as error:
        raise InternalError(f"the console log {log} cannot be rotated: {error.strerror}") from error
