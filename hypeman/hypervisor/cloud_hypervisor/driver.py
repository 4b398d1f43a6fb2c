"""Cloud Hypervisor driver. KVM only.

It starts as its own user in empty namespaces and a root directory with little in it (``files.py``), with its seccomp
filters and landlock on; its API socket listens already, TAPs come as descriptors. A snapshot is loaded lazily: pages
come from the file as the guest touches them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import trio

from hypeman.errors import NotSupported
from hypeman.host.landlock import landlock_abi
from hypeman.host.processes import Process, Processes, Program, open_for_child
from hypeman.host.temporary_access import temporary_access
from hypeman.hypervisor import captures
from hypeman.hypervisor.binary import BinaryProbe, BinarySpec, Missing
from hypeman.hypervisor.cloud_hypervisor import config as native
from hypeman.hypervisor.cloud_hypervisor.files import root_of
from hypeman.hypervisor.cloud_hypervisor.vmm import SNAPSHOT_MEMORY, SNAPSHOT_SUMMED, CloudHypervisorVmm, room_of
from hypeman.hypervisor.interface import Capabilities, LaunchFailed, Nic, VmConfig, Vmm, VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KVM_DEVICE, KvmProof
from hypeman.hypervisor.remote import emptied, listen_for_guest, listening, populated, started, wait_api
from hypeman.hypervisor.run_dir import API_SOCKET, ROOM
from hypeman.hypervisor.unix_http import UnixHttp
from hypeman.hypervisor.vmm_process import (
    VFIO_DEVICE,
    find,
    give_vfio_groups,
    max_file_size,
    new_handle,
    take_back_directories,
    vfio_groups,
)

_PING = "/api/v1/vmm.ping"
_USERFAULTS = "/dev/userfaultfd"
"""Since Linux 6.1; without it, memory is read in whole before a restored VM runs."""

OpenTap = Callable[[str], Awaitable[int]]


class CloudHypervisorDriver(BinaryProbe):
    """The ``cloud-hypervisor`` kind."""

    kind = HypervisorKind.CLOUD_HYPERVISOR
    spec = BinarySpec(
        "cloud-hypervisor",
        "Cloud Hypervisor",
        r"cloud-hypervisor v(\d+)\.(\d+)(?:\.(\d+))?",
        native.MINIMUM_VERSION,
    )

    def __init__(
        self,
        processes: Processes,
        open_tap: OpenTap,
        *,
        kvm: KvmProof,
        binary: str = "",
        folders: tuple[str, ...] = (),
    ) -> None:
        """``open_tap`` gives a descriptor of a TAP; below ``folders`` lie disks to plug and captures, which
        landlock has to let it open."""
        super().__init__(processes, binary=binary)
        self._open_tap = open_tap
        self._kvm = kvm
        self._folders = folders

    async def _able(self, binary: str, version: str) -> Capabilities:
        if why_not := await self._kvm.why_not():
            raise Missing(f"it requires KVM, but {why_not}", binary=binary, version=version)
        return Capabilities(
            available=True,
            accelerator="kvm",
            standby=True,
            fork=True,
            pause=True,
            hotplug_memory=True,
            hotplug_disk=True,
            hotplug_ports=native.MAX_DISKS,
            balloon=True,
            vsock=True,
            pci_passthrough=os.access(VFIO_DEVICE, os.F_OK),
            disk_io_limit=True,
            disk_resize=True,
            max_disks=native.MAX_DISKS,
        )

    def kernel_cmdline(self, *, hotplug_memory: bool) -> str:
        return native.kernel_cmdline()

    def validate(self, config: VmConfig) -> None:
        self._require_available()
        if config.pci_devices and not self._capabilities.pci_passthrough:
            raise NotSupported("PCI passthrough requires VFIO, which this host does not have")
        native.check(config)

    async def launch(self, config: VmConfig) -> Vmm:
        self.validate(config)
        with _room(config, self._folders) as room, populated(room, config, os.symlink, kernel=True):
            async with self._started(config) as vmm:
                api = vmm.api
                await api.request("PUT", "/api/v1/vm.create", native.vm_config(config, landlock=self._opens(config)))
                for nic in config.nics:
                    with await self._tap(nic) as fd:
                        await api.request("PUT", "/api/v1/vm.add-net", native.net_config(nic), fds=[fd])
                await api.request("PUT", "/api/v1/vm.boot")
        return vmm

    def _opens(self, config: VmConfig) -> tuple[str, ...] | None:
        """What landlock has to let the VMM open later than its own look at the VM's configuration finds; None where
        the host's kernel has not enough of it."""
        if not landlocked():
            return None
        folders = map(native.folder_link, range(len(self._folders)))
        return (*folders, *((VFIO_DEVICE, *vfio_groups(config)) if config.pci_devices else ()))

    async def restore(self, config: VmConfig, capture: Path, *, keep_capture: bool, paused: bool = False) -> Vmm:
        self.validate(config)
        saved = await trio.to_thread.run_sync(captures.read, capture)
        version = self._capabilities.version
        captures.check_fits(saved, config, kind=self.kind, version=version, machine="kvm/host")
        lazily = os.access(_USERFAULTS, os.F_OK)
        with contextlib.ExitStack() as opened:
            room = opened.enter_context(_room(config, self._folders))
            opened.enter_context(populated(room, config, os.symlink, kernel=True))
            for name in saved.files:
                opened.enter_context(temporary_access(capture / name, config.uid, write=False))
            if lazily:  # pages that the kernel itself touches for a vCPU need the device, which others must not open
                opened.enter_context(temporary_access(Path(_USERFAULTS), config.uid))
            taps = [opened.enter_context(await self._tap(nic)) for nic in config.nics]
            async with self._started(config, capture, *((_USERFAULTS,) if lazily else ())) as vmm:
                body = native.restore_config(_as_it_wrote_them(room, capture), config.nics, lazily=lazily)
                await vmm.api.request("PUT", "/api/v1/vm.restore", body, fds=taps, timeout=600)
                if not keep_capture:
                    captures.note(Path(config.run_dir), capture)
                if not paused:
                    await vmm.resume()
        return vmm

    async def reattach(self, handle: VmmHandle) -> Vmm:
        process = find(self._processes, handle)
        try:
            await UnixHttp(os.path.join(handle.run_dir, API_SOCKET)).request("GET", _PING)
            return self._vmm(handle, process)
        except BaseException:
            process.close()
            raise

    @contextlib.asynccontextmanager
    async def _started(
        self, config: VmConfig, capture: Path | None = None, *devices: str
    ) -> AsyncIterator[CloudHypervisorVmm]:
        """Start a VMM that answers and has no VM yet, and sees ``capture`` and ``devices`` besides what every VMM does;
        it is killed if the block fails."""
        room, binary = room_of(config.run_dir), self._capabilities.binary
        root = await trio.to_thread.run_sync(
            lambda: root_of(config, room, binary=binary, folders=self._folders, capture=capture)
        )
        with contextlib.ExitStack() as opened:
            api = listening(Path(config.run_dir, API_SOCKET)).detach()
            opened.callback(os.close, api)
            os.mkfifo(os.path.join(config.run_dir, native.EVENTS), 0o600)
            events = open_for_child(os.path.join(config.run_dir, native.EVENTS), os.O_RDWR)
            opened.callback(os.close, events)
            program = Program(
                argv=(
                    binary,
                    *("--api-socket", f"fd={api}", "--event-monitor", f"fd={events}", "--seccomp", "true"),
                ),
                log=config.vmm_log,
                output=config.console_log,
                cwd=str(room),
                mark=config.run_dir,
                fds=(api, events),
                uid=config.uid,
                gid=config.gid,
                devices=(KVM_DEVICE,),
                root_files=root.files,
                own_files=root.own,
                other_devices=(*root.devices, *devices),
                cgroup=config.cgroup,
                max_file_size=max_file_size(config),
                locked_memory=config.memory_bytes + config.hotplug_bytes if config.pci_devices else 0,
            )
            async with started(self._processes, program) as process:
                opened.close()  # or a VMM that dies would leave its API socket listening, in us
                vmm = self._vmm(new_handle(self.kind, process, config), process)
                with vmm.unless_it_fails():
                    await wait_api(vmm.api, process, _PING)
                    yield vmm

    def _vmm(self, handle: VmmHandle, process: Process) -> CloudHypervisorVmm:
        api = UnixHttp(os.path.join(handle.run_dir, API_SOCKET))
        listener = listen_for_guest(room_of(handle.run_dir), handle.config)
        vmm = CloudHypervisorVmm(handle, process, api, listener)
        vmm.version = self._capabilities.version
        return vmm

    async def _tap(self, nic: Nic) -> contextlib.AbstractContextManager[int]:
        return _closing(await self._open_tap(nic.tap))


def landlocked() -> bool:
    """Whether the kernel has the Landlock ABI that Cloud Hypervisor needs; without it, VMs are less isolated."""
    return landlock_abi() >= native.LANDLOCK_ABI


@contextlib.contextmanager
def _room(config: VmConfig, folders: tuple[str, ...]) -> Iterator[Path]:
    """The VMM's working directory, with ways to ``folders``. The VMM may put its sockets there, and take away or
    replace nothing of ours. Root opens nothing in there: API socket and events are beside it."""
    room = Path(config.run_dir, ROOM)
    try:
        take_back_directories(config)
        emptied(Path(config.run_dir))
        Path(config.run_dir).chmod(0o711)
        emptied(room)
        for number, folder in enumerate(folders):
            (room / native.folder_link(number)).symlink_to(folder)
        if os.geteuid() == 0:
            os.chown(room, 0, config.gid)
            room.chmod(0o1770)
        give_vfio_groups(config)
    except OSError as error:
        raise LaunchFailed(f"{error.filename or room}: {error.strerror}") from error
    yield room


def _as_it_wrote_them(room: Path, capture: Path) -> str:
    """A directory of links to the files of ``capture`` under Cloud Hypervisor's names for them."""
    directory = room / "saved"
    try:
        directory.mkdir(mode=0o711)
        for name in SNAPSHOT_SUMMED:
            (directory / name).symlink_to(capture / name)
        (directory / SNAPSHOT_MEMORY).symlink_to(capture / captures.MEMORY)
    except OSError as error:
        raise LaunchFailed(f"{error.filename or directory}: {error.strerror}") from error
    return str(directory)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
