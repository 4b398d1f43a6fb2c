"""Rules 1 and 3, as far as VMM processes are concerned: their writes are bounded, and the directories are root's."""

from __future__ import annotations

import os
import resource
import stat
import sys
from pathlib import Path

import msgspec
import pytest

from hypeman.host.ownership import take_back
from hypeman.host.processes import Processes, Program
from hypeman.hypervisor.interface import Disk, VmConfig, VmmBroken
from hypeman.hypervisor.vmm_process import (
    allow_file_size,
    max_file_size,
    take_back_capture,
    take_back_directories,
)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="requires root: gives directories to other users")
VMM_UID = 510017
MIB = 1 << 20


def config(directory: Path) -> VmConfig:
    own = directory / "instances" / "a"
    (own / "logs").mkdir(parents=True)
    overlay = own / "overlay.raw"
    with open(overlay, "wb") as file:
        file.truncate(5 << 30)
    return VmConfig(
        instance_id="a", name="a", vcpus=1, memory_bytes=192 * MIB, kernel="", initrd=None, cmdline="",
        disks=(Disk("overlay", str(overlay)), Disk("gone", str(own / "gone"))), run_dir=str(directory / "run"),
        jail=str(own / "jail"), console_log=str(own / "logs/app.log"), vmm_log=str(own / "logs/vmm.log"),
    )  # fmt: skip


@as_root
async def test_a_file_grows_to_its_limit_and_the_vmm_lives_on(tmp_path: Path) -> None:
    """Its own disk, its log, a hole at the end of either: an error for the VMM, and nothing more."""
    script = (
        "import os\n"
        f"fd = os.open({str(tmp_path / 'disk')!r}, os.O_RDWR | os.O_CREAT)\n"
        "for grow in (lambda: os.ftruncate(fd, 1 << 40), lambda: os.pwrite(fd, b'x', 1 << 30),\n"
        "             lambda: os.posix_fallocate(fd, 0, 1 << 30)):\n"
        "    try: grow(); print('grown')\n"
        "    except OSError as error: print(error.errno)\n"
        f"os.ftruncate(fd, {MIB}); print('alive')"
    )
    program = Program(
        argv=(sys.executable, "-c", script), log=str(tmp_path / "log"), mark=str(tmp_path), max_file_size=MIB
    )
    process = await Processes().spawn(program)
    assert await process.wait() == 0
    process.close()
    assert (tmp_path / "log").read_text().split() == ["27", "27", "27", "alive"], "EFBIG"
    assert (tmp_path / "disk").stat().st_size == MIB


def test_the_limit_is_what_the_vm_needs(tmp_path: Path) -> None:
    whole = config(tmp_path)
    assert max_file_size(whole) == 5 << 30, "its largest disk"
    assert max_file_size(msgspec.structs.replace(whole, disks=())) == (192 << 20) + (1 << 30), "all that it could save"
    shared = msgspec.structs.replace(whole.disks[0], readonly=True)
    assert max_file_size(msgspec.structs.replace(whole, disks=(shared,))) < 5 << 30


def test_a_disk_that_is_plugged_in_raises_it(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        os.read(0, 0)
        while True:
            os.kill(os.getpid(), 19)
    try:
        os.waitpid(pid, os.WUNTRACED)
        for size, limit in ((MIB // 2, MIB), (2 * MIB, 2 * MIB), (MIB, 2 * MIB)):
            allow_file_size(pid, size)
            assert resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] == limit
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    allow_file_size(os.getpid(), MIB)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY, "no limit is not made one"


@as_root
def test_the_directories_around_a_vmm_are_roots_when_it_starts(tmp_path: Path) -> None:
    """Regardless of who created them and gave them to the VMM's user."""
    vm = config(tmp_path)
    around = [Path(vm.jail).parent, Path(vm.console_log).parent]
    for directory in around:
        os.chown(directory, VMM_UID, VMM_UID)
        directory.chmod(0o777)
    take_back_directories(vm)
    for directory in around:
        found = directory.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o755)


@as_root
def test_a_capture_is_roots_and_empty_before_anything_is_saved(tmp_path: Path) -> None:
    os.chown(tmp_path, VMM_UID, VMM_UID)
    take_back_capture(tmp_path)
    assert tmp_path.stat().st_uid == 0
    os.mkfifo(tmp_path / "state")
    with pytest.raises(VmmBroken, match="'state' was put into it"):
        take_back_capture(tmp_path)


def test_a_link_is_not_taken_back(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(OSError):
        take_back(tmp_path / "link")
    with pytest.raises(VmmBroken):
        take_back_capture(tmp_path / "link")
