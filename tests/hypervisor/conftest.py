"""A guest for VMM tests: the guest kernel of the build, and guest_init.c in the place of the agent."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from hypeman.host.processes import Processes
from hypeman.hypervisor.interface import Capabilities, Disk, VmConfig
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.qemu.config import kernel_cmdline
from tests.hypervisor.real import real_driver
from tests.machine import COMPILER, GUEST, MACHINE

_SOURCE = Path(__file__).with_name("guest_init.c")

MakeConfig = Callable[[str], VmConfig]


class NoGuest(Exception):
    """Why there is no guest to test with."""


@pytest.fixture(scope="session")
def guest_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Kernel and initrd of the test guest."""
    try:
        return guest_from(tmp_path_factory.mktemp("guest"))
    except NoGuest as reason:
        pytest.skip(str(reason))


def guest_from(folder: Path) -> tuple[Path, Path]:
    """Kernel and initrd, from the folder that HYPEMAN_TEST_GUEST names, for hosts without a compiler, or made in
    ``folder``."""
    if made := os.environ.get("HYPEMAN_TEST_GUEST"):
        return Path(made, "vmlinux"), Path(made, "initrd.cpio")
    return build_guest(folder)


def build_guest(folder: Path) -> tuple[Path, Path]:
    """Kernel and initrd. The kernel unpacks archives that stand one behind the other into one root, so
    the test's init comes to the modules of the real initrd."""
    kernel, initrd = GUEST / MACHINE.kernel_file, GUEST / "initrd.cpio"
    if not kernel.exists() or not initrd.exists():
        raise NoGuest(f"no guest kernel in {GUEST}; make it with 'make ready'")
    compiler = shutil.which(COMPILER) or shutil.which("cc")
    if compiler is None:
        raise NoGuest("no C compiler for the test guest")
    init, both = folder / "test-init", folder / "initrd.cpio"
    subprocess.run([compiler, "-O2", "-static", "-o", init, _SOURCE, "-lpthread"], check=True)
    both.write_bytes(initrd.read_bytes() + archive("test-init", init.read_bytes()))
    both.chmod(0o644)
    return kernel, both


def archive(name: str, data: bytes) -> bytes:
    """A cpio archive ("newc") of one executable file."""

    def entry(name: str, mode: int, data: bytes) -> bytes:
        fields = (1 if data else 0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        return _padded(head) + _padded(data)

    return entry(name, 0o100755, data) + entry("TRAILER!!!", 0, b"")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


class Found:
    """What all tests of a run share: what is here of each kind, and a VM of it to fork."""

    def __init__(self, kernel: str, folder: Path) -> None:
        self._kernel = kernel
        self._capabilities: dict[HypervisorKind, Capabilities] = {}
        self.folder = folder

    def capabilities(self, kind: HypervisorKind) -> Capabilities:
        if kind not in self._capabilities:
            processes = Processes()
            driver = real_driver(kind, processes, kernel=self._kernel, folder=str(self.folder))()
            self._capabilities[kind] = trio.run(driver.probe)
            processes.close()
        return self._capabilities[kind]


@pytest.fixture(scope="session")
def found(guest_files: tuple[Path, Path]) -> Iterator[Found]:
    with tempfile.TemporaryDirectory(prefix="hv-warm-") as name:
        Path(name).chmod(0o711)
        yield Found(str(guest_files[0]), Path(name))


@pytest.fixture
def capabilities(kind: HypervisorKind, found: Found) -> Capabilities:
    """What ``kind`` can do here. Skips where it is not; from a fixture that does not wait, which keeps the reason."""
    capabilities = found.capabilities(kind)
    if not capabilities.available:
        pytest.skip(f"{kind.value}: {capabilities.reason}")
    return capabilities


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that other users can pass, as they can the data directory; pytest's own they cannot."""
    with tempfile.TemporaryDirectory(prefix="hv-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    made = Processes()
    yield made
    made.close()


@pytest.fixture
def make_config(tmp_path: Path, guest_files: tuple[Path, Path]) -> MakeConfig:
    return config_maker(tmp_path, *guest_files)


def config_maker(
    directory: Path,
    kernel: Path,
    initrd: Path | None,
    *,
    uid: int = 510000,
    cmdline: str = kernel_cmdline(hotplug_memory=True),
) -> MakeConfig:
    """Configs below ``directory``, each with its own user, a shared read-only disk and a writable one."""
    uids: dict[str, int] = {}

    def make(name: str) -> VmConfig:
        own = directory / name
        own.mkdir(exist_ok=True, mode=0o711)
        root, overlay = directory / "root.raw", own / "overlay.raw"
        for disk in (root, overlay):
            if not disk.exists():
                disk.write_bytes(disk.stem.encode().ljust(1 << 20, b"\0"))
        user = uids.setdefault(name, uid + len(uids)) if os.geteuid() == 0 else 0
        return VmConfig(
            instance_id=name,
            name=name,
            vcpus=1,
            memory_bytes=192 << 20,
            kernel=str(kernel),
            initrd=str(initrd) if initrd is not None else None,
            cmdline=f"{cmdline} rdinit=/test-init",
            disks=(
                Disk("root", str(root), readonly=True, shared=True),
                Disk("overlay", str(overlay), bps=64 << 20),
            ),
            run_dir=str(own / "run"),
            jail=str(own / "jail"),
            console_log=str(own / "console.log"),
            vmm_log=str(own / "vmm.log"),
            uid=user,
            gid=user,
        )

    return make
