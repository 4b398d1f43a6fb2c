"""Guest memory: a memfd while the VM runs, a file only once it is saved.

If it were always a file on disk, the kernel would keep writing each page that the guest touches to disk within half
a minute, and a full disk would kill the VM. So:

    a fresh VM          a memfd, which disappears with its VMM however that exits
    a capture           what the guest has in use, in a sparse file
    a restore           that file, mapped privately; it is removed when the guest runs and disappears with its VMM
    a fork              that file, mapped privately: pages the guest writes are its own, the rest is shared

A VM with plugged memory is restored into a new memfd instead: QEMU saves plugged memory only together with all of a
private mapping.

The memory of a VMM is found through its descriptors, so a restarted server finds it as well. A compromised VMM can
replace a descriptor at any moment. So it is copied once (pidfd_getfd), and the copy is checked: the inode recorded
at launch, the size, the seals of a memfd, that a private mapping's file is a regular one. What is read through the
mapping itself (/proc/PID/mem) can only be what the VMM has. Memory that is filled is written through the VMM's own
mapping, so that the pages are charged to the VM's control group and not to ours.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from hypeman.host.files import copy_range, data_ranges, start_writing
from hypeman.host.processes import copy_descriptor
from hypeman.hypervisor.captures import MEMORY
from hypeman.hypervisor.interface import LaunchFailed, VmConfig, VmmBroken, VmmHandle

_NAME = "hypeman-guest"
_DELETED = " (deleted)"
_CHUNK = 1 << 20
_PAGE = 4096
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
        return _names_memory(os.readlink(link))
    except FileNotFoundError:  # closed meanwhile
        return False


def _is_memory(copy: int, handle: VmmHandle) -> bool:
    found = os.fstat(copy)
    if found.st_size != handle.config.memory_bytes or not stat.S_ISREG(found.st_mode):
        return False
    try:
        seals = fcntl.fcntl(copy, fcntl.F_GET_SEALS)
    except OSError:  # not a memfd: the file of a capture, mapped privately, if the VMM itself can read it
        readable = not fcntl.fcntl(copy, fcntl.F_GETFL) & os.O_PATH
        return readable and handle.memory_inode != 0 and found.st_ino == handle.memory_inode
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
                        raise VmmBroken(f"{saved} cannot be loaded: it ends too early")
                    start += len(chunk)
    except OSError as error:
        raise VmmBroken(f"{saved} cannot be loaded into process {pid}: {error.strerror}") from error


def save_private(handle: VmmHandle, target: Path, *, flush: bool) -> None:
    """Write the memory of a paused VMM, which maps a file privately, into the new sparse file ``target``: what the
    guest has written from the VMM, the rest from the file. ``flush``: it will be flushed. Blocks; raises VmmBroken."""
    pid = handle.pid
    descriptor = of_process(handle)
    try:
        with (
            open(descriptor, "rb", buffering=0) as file,
            open(target, "xb", buffering=0, opener=_private) as saved,
            open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
        ):
            begin = _address(pid, handle.memory_inode)
            size = handle.config.memory_bytes
            os.truncate(saved.fileno(), size)
            written = _written_pages(pid, begin, size)
            for start, end in data_ranges(file.fileno()):
                for low, high in _unmarked(written, start, end):
                    copy_range(file.fileno(), saved.fileno(), low, high)
                if flush:
                    start_writing(saved.fileno(), start, end)
            buffer = memoryview(bytearray(_CHUNK))
            for start, end in _marked(written):
                while start < end:
                    count = os.preadv(memory.fileno(), [buffer[: min(end - start, _CHUNK)]], begin + start)
                    if count <= 0 or os.pwrite(saved.fileno(), buffer[:count], start) != count:
                        raise VmmBroken(f"the memory of process {pid} ends too early")
                    start += count
    except OSError as error:
        raise VmmBroken(f"the memory of process {pid} cannot be saved: {error.strerror}") from error


def is_unlinked(handle: VmmHandle) -> bool:
    """Whether a private mapping's file has no name any more, so that no other VMM will map it. Raises VmmBroken."""
    descriptor = of_process(handle)
    try:
        return os.fstat(descriptor).st_nlink == 0
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


_WRITTEN, _UNWRITTEN = re.compile(rb"\x01+"), re.compile(rb"\x00+")
_IS_OWN = bytes(bool(byte & 0xC0 and not byte & 0x20) for byte in range(256))
"""Top byte of an entry of /proc/PID/pagemap → 1 for a page, present or swapped out, that is not the file's."""


def _written_pages(pid: int, begin: int, size: int) -> bytes:
    """For each page of the mapping at ``begin`` 1 if the VMM or its guest has written it, else 0."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        file.seek(begin // _PAGE * 8)
        entries = bytearray()
        while len(entries) < size // _PAGE * 8:
            more = file.read(min(size // _PAGE * 8 - len(entries), 1 << 20))
            if not more:
                raise VmmBroken(f"process {pid} has unmapped its guest memory")
            entries += more
    return bytes(entries[7::8]).translate(_IS_OWN)


def _marked(pages: bytes) -> Iterator[tuple[int, int]]:
    """Start and end in bytes of each run of 1."""
    for run in _WRITTEN.finditer(pages):
        yield run.start() * _PAGE, run.end() * _PAGE


def _unmarked(pages: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end of each run of 0 within a range of bytes."""
    for run in _UNWRITTEN.finditer(pages, start // _PAGE, -(-end // _PAGE)):
        yield max(start, run.start() * _PAGE), min(end, run.end() * _PAGE)


def _address(pid: int, inode: int) -> int:
    """Address at which VMM ``pid`` maps the memory with this inode; one mapping, which the kernel may list in parts."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[4] == str(inode) and _names_memory(fields[5]):
            return int(fields[0].partition("-")[0], 16) - int(fields[2], 16)
    raise VmmBroken(f"process {pid} has mapped no guest memory")


def _names_memory(path: str) -> bool:
    return path.startswith(f"/memfd:{_NAME} ") or path.removesuffix(_DELETED).endswith(f"/{MEMORY}")
