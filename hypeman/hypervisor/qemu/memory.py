"""Guest memory: a memfd while the VM runs, a file only once it is saved.

If it were always a file on disk, the kernel would keep writing each page that the guest touches to disk within half
a minute, and a full disk would kill the VM. So:

    a fresh VM          a memfd, which disappears with its VMM however that exits
    a capture           the memfd copied into a sparse file
    a restore           that file copied into a new memfd
    a fork              that file, mapped privately: pages the guest writes are its own, the rest is shared

The memfd is found through the VMM's descriptors, so a restarted server finds it as well. A compromised VMM can
replace a descriptor at any moment. So it is copied once (pidfd_getfd), and the copy is checked: the inode recorded
at launch, the seals that fix its size, the size. A restored guest's memory is written through the VMM's own mapping,
so that the pages are charged to the VM's control group and not to ours.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hypeman.host.files import data_ranges
from hypeman.host.processes import copy_descriptor
from hypeman.hypervisor.interface import LaunchFailed, VmConfig, VmmBroken, VmmHandle

_NAME = "hypeman-guest"
_CHUNK = 1 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_CANDIDATES = 64
"""QEMU has about five memfds; the limit bounds the search if it has thousands."""


def new(config: VmConfig) -> int:
    """A descriptor of zeroed memory that ``config.uid`` may open. Raises LaunchFailed."""
    try:
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, config.memory_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)  # fix its size, not its content
            os.fchmod(fd, 0o600)
            if os.geteuid() == 0:
                os.fchown(fd, config.uid, config.gid)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise LaunchFailed(f"guest memory: {error.strerror}") from error
    return fd


def inode(fd: int) -> int:
    """Identifies this memory among all others on the host."""
    return os.fstat(fd).st_ino


def of_process(handle: VmmHandle) -> int:
    """A read-only descriptor of a running VMM's memory. Raises VmmBroken if the VMM no longer has the memory that it
    was started with. Blocks for less than 1 ms."""
    pid, seen = handle.pid, 0
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            if not _may_be_memory(f"/proc/{pid}/fd/{entry}"):
                continue
            if (seen := seen + 1) > _MAX_CANDIDATES:
                break
            copy = copy_descriptor(pid, int(entry))
            try:
                if _is_memory(copy, handle):
                    # Through our own descriptor, so it opens the file that was checked; with its own file offset.
                    return os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(copy)
    except OSError as error:
        raise VmmBroken(f"the memory of process {pid} cannot be looked for: {error.strerror}") from error
    raise VmmBroken(f"process {pid} does not hold the guest memory that it was started with")


def _may_be_memory(link: str) -> bool:
    try:
        return os.readlink(link).startswith(f"/memfd:{_NAME} ")
    except FileNotFoundError:  # closed meanwhile
        return False


def _is_memory(copy: int, handle: VmmHandle) -> bool:
    found = os.fstat(copy)
    try:
        seals = fcntl.fcntl(copy, fcntl.F_GET_SEALS)
    except OSError:  # not a memfd
        return False
    if found.st_size != handle.config.memory_bytes:
        return False
    if handle.memory_inode == 0:  # started by an older version, which recorded no inode and set no seals
        return found.st_uid in (0, handle.config.uid)
    return found.st_ino == handle.memory_inode and seals & _SEALS == _SEALS


def fill(handle: VmmHandle, saved: Path) -> None:
    """Copy saved memory into a VMM whose vCPUs have not run yet. Blocks; raises VmmBroken."""
    pid = handle.pid
    try:
        begin = _address(pid, handle.memory_inode)
        with open(saved, "rb", buffering=0) as file, open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            for start, end in data_ranges(file.fileno()):
                memory.seek(begin + start)
                file.seek(start)
                while start < end:
                    chunk = file.read(min(end - start, _CHUNK))
                    if not chunk or memory.write(chunk) != len(chunk):
                        raise VmmBroken(f"{saved} can not be loaded: it ends too early")
                    start += len(chunk)
    except OSError as error:
        raise VmmBroken(f"{saved} can not be loaded into process {pid}: {error.strerror}") from error


def _address(pid: int, inode: int) -> int:
    """Address at which VMM ``pid`` maps the memory with this inode; one mapping, which the kernel may list in parts."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[4] == str(inode) and fields[5].startswith(f"/memfd:{_NAME} "):
            return int(fields[0].partition("-")[0], 16) - int(fields[2], 16)
    raise VmmBroken(f"process {pid} has mapped no guest memory")
