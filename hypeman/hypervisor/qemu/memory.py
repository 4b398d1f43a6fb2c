"""Guest memory: the kernel's alone while the VM runs, a file only once it is saved.

Were it a file on a disk all the time, the kernel would write each page that the guest touches to that disk within half
a minute, again and again, and a full disk would end the VM. So:

    a VM of its own     a memfd, which is gone with its VMM, whoever ends it
    a capture           the memfd copied into a sparse file
    a restore           that file copied into a new memfd
    a fork              that file, mapped privately: what the guest writes is its own, the rest is everybody's

The memfd is found through the VMM's descriptors, so a server that was restarted finds it as well. A restored guest's
memory is written through the VMM's own mapping, so that the pages count for the VM's control group and not for ours.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypeman.host.files import data_ranges
from hypeman.hypervisor.interface import LaunchFailed, VmConfig, VmmBroken

_NAME = "hypeman-guest"
_CHUNK = 1 << 20


def new(config: VmConfig) -> int:
    """A descriptor of memory, all zeros, that ``config.uid`` may open. Raises LaunchFailed."""
    try:
        fd = os.memfd_create(_NAME)
        try:
            os.ftruncate(fd, config.memory_bytes)
            os.fchmod(fd, 0o600)
            if os.geteuid() == 0:
                os.fchown(fd, config.uid, config.gid)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise LaunchFailed(f"guest memory: {error.strerror}") from error
    return fd


def of_process(pid: int) -> Path:
    """A path that leads to the memory of VMM ``pid`` as long as it lives. Raises VmmBroken."""
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(entry).startswith(f"/memfd:{_NAME} "):
                return entry
    except OSError as error:
        raise VmmBroken(f"the memory of process {pid} can not be looked for: {error.strerror}") from error
    raise VmmBroken(f"process {pid} holds no guest memory")


def fill(pid: int, saved: Path) -> None:
    """Copy a saved memory into that of VMM ``pid``, whose vCPUs have not run yet. Blocks; raises VmmBroken."""
    try:
        begin = _address(pid)
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


def _address(pid: int) -> int:
    """Where VMM ``pid`` has mapped its guest's memory; one mapping, though the kernel may tell it in pieces."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[5].startswith(f"/memfd:{_NAME} "):
            return int(fields[0].partition("-")[0], 16) - int(fields[2], 16)
    raise VmmBroken(f"process {pid} has mapped no guest memory")
