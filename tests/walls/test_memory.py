"""Rule 2: what a VMM holds is copied once, and the copy is checked before it is used."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from hypeman.hypervisor.interface import VmConfig, VmmBroken, VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.qemu import memory

SIZE = 1 << 20
SECRET = "root's own"


def config(directory: Path) -> VmConfig:
    return VmConfig(
        instance_id="a", name="a", vcpus=1, memory_bytes=SIZE, kernel="", initrd=None, cmdline="", disks=(),
        run_dir=str(directory), jail="", console_log="", vmm_log="",
    )  # fmt: skip


@contextmanager
def vmm(directory: Path, script: str) -> Iterator[tuple[VmmHandle, int]]:
    """A process that holds guest memory as QEMU does, and has run ``script``, where ``fd`` is its number."""
    fd = memory.new(config(directory))
    os.pwrite(fd, b"guest memory", 0)
    program = f"import os, sys\nfd = {fd}\n{script}\nprint('ready', flush=True)\nsys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=(fd,), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield (
            VmmHandle(HypervisorKind.QEMU, process.pid, 0, "", str(directory), config(directory), memory.inode(fd)),
            fd,
        )
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)
        os.close(fd)


def read(handle: VmmHandle) -> bytes:
    fd = memory.of_process(handle)
    try:
        return os.pread(fd, 12, 0)
    finally:
        os.close(fd)


def test_the_memory_is_found(tmp_path: Path) -> None:
    with vmm(tmp_path, "") as (handle, _):
        assert read(handle) == b"guest memory"
        old = msgspec.structs.replace(handle, memory_inode=0)
        assert read(old) == b"guest memory", "that of a VMM started by an older version"


def another_memfd(victim: Path) -> str:
    return (
        "other = os.memfd_create('hypeman-guest', os.MFD_ALLOW_SEALING)\n"
        f"os.ftruncate(other, {SIZE}); os.dup2(other, fd)"
    )


def a_file(victim: Path) -> str:
    return f"os.dup2(os.open({str(victim)!r}, os.O_PATH), fd)"


def a_file_of_that_name(victim: Path) -> str:
    return f"os.dup2(os.open({str(victim)!r}, os.O_RDONLY), fd)"


def nothing(victim: Path) -> str:
    return "os.close(fd)"


@pytest.mark.parametrize(
    "switch", [another_memfd, a_file, a_file_of_that_name, nothing], ids=lambda switch: switch.__name__
)
def test_what_was_put_in_its_place_is_not_taken(switch: Callable[[Path], str], tmp_path: Path) -> None:
    victim = tmp_path / "memfd:hypeman-guest (deleted)"
    victim.write_bytes(SECRET.encode().ljust(SIZE))
    with vmm(tmp_path, switch(victim)) as (handle, _), pytest.raises(VmmBroken, match="does not hold"):
        memory.of_process(handle)


def test_a_descriptor_that_is_switched_all_the_time_never_leads_elsewhere(tmp_path: Path) -> None:
    """The tried attack: between a memfd and an O_PATH descriptor of a root file, back and forth."""
    victim = tmp_path / "victim"
    victim.write_bytes(SECRET.encode().ljust(SIZE))
    switch = (
        "import threading\n"
        f"good, bad = os.dup(fd), os.open({str(victim)!r}, os.O_PATH)\n"
        "def run():\n"
        "    while True: os.dup2(bad, fd); os.dup2(good, fd)\n"
        "threading.Thread(target=run, daemon=True).start()"
    )
    with vmm(tmp_path, switch) as (handle, _):
        for _ in range(300):
            assert read(handle) == b"guest memory"


def test_the_vmm_cannot_change_its_size(tmp_path: Path) -> None:
    with vmm(tmp_path, "") as (_, fd):
        for size in (0, SIZE * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_private_mapping_is_saved_with_what_was_written(tmp_path: Path) -> None:
    """From the VMM what it has written, also pages that it wrote back as they were; the rest from a file without a
    name; holes stay."""
    page, pages = 4096, SIZE // 4096
    saved = bytearray(SIZE)
    for number in (1, 2, 3, 7, pages - 1):
        saved[number * page : (number + 1) * page] = bytes([number % 256]) * page
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for number in (1, 2, 3, 7, pages - 1):
            file.seek(number * page)
            file.write(bytes([number % 256]) * page)
    program = (
        "import mmap, os, sys\n"
        f"fd = os.open({str(path)!r}, os.O_RDWR)\n"
        f"memory = mmap.mmap(fd, {SIZE}, flags=mmap.MAP_PRIVATE)\n"
        f"memory[2 * {page}] = 99; memory[5 * {page} + 1] = 98; memory[3 * {page}] = 3; memory[7 * {page}]\n"
        f"os.unlink({str(path)!r})\n"
        "print('ready', flush=True)\nsys.stdin.read()"
    )
    saved[2 * page], saved[5 * page + 1] = 99, 98
    inode = path.stat().st_ino
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        handle = VmmHandle(HypervisorKind.QEMU, process.pid, 0, "", str(tmp_path), config(tmp_path), inode)
        target = tmp_path / "saved"
        memory.save_private(handle, target, flush=True)
        assert target.read_bytes() == saved
        assert target.stat().st_blocks * 512 <= 8 * page, "holes stay holes"
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        assert memory.is_unlinked(handle)
        with pytest.raises(VmmBroken, match="File exists"):
            memory.save_private(handle, target, flush=True)
        with pytest.raises(VmmBroken, match="does not hold"):
            memory.save_private(
                msgspec.structs.replace(handle, memory_inode=inode + 1), tmp_path / "other", flush=False
            )
        process.stdin.close()
