"""QEMU driver: launch, restore, reattach.

Start sequence: everything is opened here, as root; QEMU starts as its own user with only those descriptors
and with its vCPUs stopped; limits are set over QMP; then the vCPUs run. Errors include QEMU's own output,
and everything is cleaned up.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from hypeman.architecture import HOST, Architecture
from hypeman.errors import NotSupported
from hypeman.host.processes import Processes, Program, ToolFailed, open_for_child
from hypeman.host.program_files import NotRunnable
from hypeman.host.safe_open import open_directory
from hypeman.host.temporary_access import temporary_access
from hypeman.hypervisor import captures
from hypeman.hypervisor.binary import LOOK_PATIENCE, BinaryProbe, BinarySpec, Missing
from hypeman.hypervisor.interface import (
    Capabilities,
    LaunchFailed,
    VmConfig,
    Vmm,
    VmmBroken,
    VmmGone,
    VmmHandle,
)
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KVM_DEVICE, KvmProof
from hypeman.hypervisor.qemu import config as native
from hypeman.hypervisor.qemu import memory
from hypeman.hypervisor.qemu.client import QmpClient
from hypeman.hypervisor.qemu.files import DEVICES, root_files
from hypeman.hypervisor.qemu.tsc import tsc_khz
from hypeman.hypervisor.qemu.vmm import AGENT_SOCKET, QMP_SOCKET, QemuVmm
from hypeman.hypervisor.vmm_process import (
    VFIO_DEVICE,
    LogTail,
    end,
    find,
    give_vfio_groups,
    max_file_size,
    new_handle,
    take_back_directories,
    vfio_groups,
)

OpenTap = Callable[[str], Awaitable[int]]

_START = 30.0
_START_WITH_DEVICES = 300.0
"""Seconds until QEMU's first answer, typically 20 ms. With devices the kernel first clears and pins all guest
memory, which depends on its size, and the devices are reset."""


class QemuDriver(BinaryProbe):
    """The kinds ``qemu`` and ``qemu-microvm``, with KVM if it works, else TCG."""

    def __init__(
        self,
        processes: Processes,
        open_tap: OpenTap,
        *,
        kvm: KvmProof,
        kind: HypervisorKind = HypervisorKind.QEMU,
        binary: str = "",
        accelerator: str = "auto",
        vfio: str = VFIO_DEVICE,
        machine: Architecture = HOST,
    ) -> None:
        """``open_tap`` returns a descriptor of a TAP, ``kvm`` checks whether KVM works here; ``accelerator`` is
        ``auto``, ``kvm`` or ``tcg``. ``machine`` is the guests' architecture; another one than the host's is
        emulated (``tcg``)."""
        super().__init__(processes, binary=binary)
        version = r"QEMU emulator version (\d+)\.(\d+)\.(\d+)"
        self.spec = BinarySpec(machine.qemu, "QEMU", version, native.MINIMUM_VERSION)
        self.kind = kind
        self._architecture = machine
        self._wanted_board = native.BOARDS[machine].get(kind, native.NO_BOARD)
        self._open_tap = open_tap
        self._kvm = kvm
        self._wanted_accelerator = accelerator
        self._vfio = vfio

    # What it can do

    async def _able(self, binary: str, version: str) -> Capabilities:
        board = native.board_of(self._wanted_board, version)
        if board is native.NO_BOARD:
            reason = f"QEMU has no machine for {self.kind.value} on {self._architecture.name}"
            raise Missing(reason, binary=binary, version=version)
        await self._want_machine(board, binary, version)
        why_not_kvm = await self._why_not_kvm()
        if why_not_kvm and self._wanted_accelerator == "kvm":
            raise Missing(f"kvm is configured, but {why_not_kvm}", binary=binary, version=version)
        return Capabilities(
            available=True,
            accelerator="tcg" if why_not_kvm else "kvm",
            accelerator_reason=why_not_kvm,
            standby=True,
            fork=True,
            pause=True,
            hotplug_memory=board.pci,
            hotplug_disk=board.pci,
            hotplug_ports=native.MAX_DISK_PORTS if board.pci else 0,
            balloon=True,
            pci_passthrough=board.pci and not why_not_kvm and os.access(self._vfio, os.F_OK),
            disk_io_limit=True,
            disk_resize=True,
            max_disks=board.max_disks,
        )

    async def _want_machine(self, board: native.Board, binary: str, version: str) -> None:
        """Raise Missing for a QEMU built without ``board``: some distributions have only machines of their own."""
        try:
            known = (await self._processes.run([binary, "-machine", "help"], timeout=LOOK_PATIENCE)).decode(
                errors="replace"
            )
        except ToolFailed as error:
            raise Missing(error.message, binary=binary, version=version) from None
        if board.type not in {line.split(" ", 1)[0] for line in known.splitlines()}:
            raise Missing(
                f"this QEMU {version} was built without the machine {board.type}", binary=binary, version=version
            )

    async def _why_not_kvm(self) -> str:
        if self._architecture is not HOST:
            return f"guests are {self._architecture.name}, this host is {HOST.name}"
        return "tcg is configured" if self._wanted_accelerator == "tcg" else await self._kvm.why_not()

    @property
    def _accelerator(self) -> native.Accelerator:
        return native.KVM if self._capabilities.accelerator == "kvm" else native.EMULATORS[self._architecture]

    def kernel_cmdline(self, *, hotplug_memory: bool) -> str:
        return native.kernel_cmdline(hotplug_memory=hotplug_memory, machine=self._architecture)

    @property
    def _board(self) -> native.Board:
        return native.board_of(self._wanted_board, self._capabilities.version)

    @property
    def _machine(self) -> str:
        return native.machine_name(self._board, self._accelerator, self._capabilities.version)

    @property
    def _maps_readonly_files(self) -> bool:
        return tuple(map(int, self._capabilities.version.split(".")[:2])) >= native.READONLY_FILE

    def validate(self, config: VmConfig) -> None:
        self._require_available()
        can = self._capabilities
        if config.pci_devices and not can.pci_passthrough:
            raise NotSupported(f"{self.kind} cannot pass devices through here: it requires PCI, KVM and VFIO")
        if config.hotplug_bytes and not can.hotplug_memory:
            raise NotSupported(f"{self.kind} has no hot-plug of memory")
        if any(disk.port for disk in config.disks) and not can.hotplug_disk:
            raise NotSupported(f"{self.kind} has no hot-plug of disks")
        native.check(config, self._board)

    # Starting

    async def launch(self, config: VmConfig) -> Vmm:
        self.validate(config)
        with contextlib.ExitStack() as opened:
            own = memory.new(config)
            opened.callback(os.close, own)
            vmm = await self._start(config, own, kernel=True)
        return await _or_kill(vmm, vmm.resume)

    async def restore(self, config: VmConfig, capture: Path, *, keep_capture: bool, paused: bool = False) -> Vmm:
        self.validate(config)
        saved = await trio.to_thread.run_sync(captures.read, capture)
        captures.check_fits(
            saved,
            config,
            kind=self.kind,
            version=self._capabilities.version,
            machine=self._machine,
        )
        apart = captures.MEMORY in saved.files
        # Plugged memory is not mapped, and a VM with a private mapping could only be saved with it as a whole.
        private = apart and (keep_capture or not config.hotplug_bytes)
        state = captures.DEVICES if captures.DEVICES in saved.files else captures.STATE
        readonly = private and self._maps_readonly_files
        with contextlib.ExitStack() as opened:
            if private:
                opened.enter_context(temporary_access(capture / captures.MEMORY, config.uid, write=not readonly))
            fd = _open_saved(capture / captures.MEMORY, write=not readonly) if private else memory.new(config)
            opened.callback(os.close, fd)
            vmm = await self._start(
                config,
                fd,
                incoming=True,
                private_memory=private,
                readonly_file=readonly,
                devices_alone=state == captures.DEVICES,
            )

        async def bring_back() -> None:
            if apart and not private:
                await trio.to_thread.run_sync(memory.fill, vmm.handle, capture / captures.MEMORY)
            await vmm.load_state(capture / state, without_memory=apart and state == captures.STATE)
            if not keep_capture:
                captures.note(Path(config.run_dir), capture)
            for nic in config.nics if paused else ():
                await vmm.set_link(nic.id, up=False)
            if not paused:
                await vmm.resume()

        return await _or_kill(vmm, bring_back)

    async def reattach(self, handle: VmmHandle) -> Vmm:
        process = find(self._processes, handle)
        try:
            qmp = await QmpClient.connect(str(Path(handle.run_dir, QMP_SOCKET)))
        except VmmGone:
            alive = process.alive()
            process.close()
            if alive:
                raise VmmBroken(f"QEMU (pid {handle.pid}) lives but its QMP socket is gone") from None
            raise
        except BaseException:
            process.close()
            raise
        return QemuVmm(handle, process, qmp, board=self._board, machine=self._machine)

    async def _extra_cmdline(self) -> str:
        """An emulated CPU does not speculate, so mitigations are off; and microvm without KVM has no timer
        to calibrate the TSC with, so its frequency is passed to the kernel."""
        if self._accelerator.name == "kvm":
            return ""
        if self._board.pci:
            return "mitigations=off"
        return f"mitigations=off tsc_early_khz={await tsc_khz()} tsc=reliable"

    async def _start(
        self,
        config: VmConfig,
        guest_memory: int,
        *,
        kernel: bool = False,
        incoming: bool = False,
        private_memory: bool = False,
        readonly_file: bool = False,
        devices_alone: bool = False,
    ) -> QemuVmm:
        """QEMU with its vCPUs stopped, its limits set, and a QMP connection."""
        with contextlib.ExitStack() as opened:

            def keep(fd: int) -> int:
                opened.callback(os.close, fd)
                return fd

            try:
                take_back_directories(config)
                _fresh_run_dir(Path(config.run_dir))
                fds = native.Descriptors(
                    qmp=keep(_listen(Path(config.run_dir, QMP_SOCKET))),
                    agent=keep(_listen(Path(config.run_dir, AGENT_SOCKET))),
                    console=keep(open_for_child(config.console_log, _APPEND, log=True)),
                    memory=guest_memory,
                    kernel=keep(open_for_child(config.kernel, os.O_RDONLY)) if kernel else None,
                    initrd=keep(open_for_child(config.initrd, os.O_RDONLY)) if kernel and config.initrd else None,
                    disks={
                        disk.id: keep(
                            open_for_child(disk.path, os.O_RDONLY if disk.readonly else os.O_RDWR, regular=True)
                        )
                        for disk in config.disks
                    },
                    nics={nic.id: keep(await self._open_tap(nic.tap)) for nic in config.nics},
                )
                if config.pci_devices:
                    await trio.to_thread.run_sync(give_vfio_groups, config)
                words = LogTail(config.vmm_log)
            except OSError as error:
                raise LaunchFailed(f"{error.filename or config.run_dir}: {error.strerror}") from error
            argv = native.command_line(
                config,
                fds,
                binary=self._capabilities.binary,
                board=self._board,
                accelerator=self._accelerator,
                extra_cmdline=await self._extra_cmdline() if kernel else "",
                incoming=incoming,
                private_memory=private_memory,
                readonly_file=readonly_file,
                devices_alone=devices_alone,
            )
            root = await trio.to_thread.run_sync(_root_files, self._capabilities.binary)
            process = await self._processes.spawn(
                Program(
                    argv=argv,
                    log=config.vmm_log,
                    mark=config.run_dir,
                    fds=fds.all(),
                    uid=config.uid,
                    gid=config.gid,
                    devices=(KVM_DEVICE,) if self._accelerator.name == "kvm" else (),
                    root_files=(*root, *(("/sys",) if config.pci_devices else ())),
                    other_devices=(*DEVICES, *((VFIO_DEVICE, *vfio_groups(config)) if config.pci_devices else ())),
                    cgroup=config.cgroup,
                    max_file_size=max_file_size(config),
                    locked_memory=config.memory_bytes + config.hotplug_bytes if config.pci_devices else 0,
                )
            )
        # Our copies of the listening sockets are closed: if QEMU dies now, the connection breaks immediately.
        qmp = None
        try:
            limit = _START_WITH_DEVICES if config.pci_devices else _START
            qmp = await QmpClient.connect(str(Path(config.run_dir, QMP_SOCKET)), timeout=limit)
            handle = new_handle(self.kind, process, config, memory_inode=memory.inode(guest_memory))
            vmm = QemuVmm(handle, process, qmp, board=self._board, machine=self._machine)
            for disk in config.disks:
                await vmm.limit_disk(disk)
        except BaseException as error:
            if qmp is not None:
                qmp.close()
            await end(process)
            if isinstance(error, VmmGone | VmmBroken):
                raise LaunchFailed(f"QEMU did not start: {str(words) or error.message}") from error
            raise
        return vmm


_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


async def _or_kill(vmm: QemuVmm, then: Callable[[], Awaitable[None]]) -> QemuVmm:
    """``vmm`` after ``then``; if that fails or is cancelled, the VMM is killed."""
    words = LogTail(vmm.config.vmm_log)
    try:
        await then()
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await vmm.kill()
            await vmm.aclose()
        if isinstance(error, VmmGone | VmmBroken):
            raise LaunchFailed(f"{error.message}: {words}".removesuffix(": ")) from error
        raise
    return vmm


def _root_files(binary: str) -> tuple[str, ...]:
    try:
        return root_files(binary)
    except NotRunnable as error:
        raise LaunchFailed(str(error)) from None


def _fresh_run_dir(path: Path) -> None:
    """Accessible only to root: QEMU has its sockets as descriptors and needs no access here. Raises OSError."""
    path.mkdir(mode=0o700, exist_ok=True)
    directory = open_directory(path)
    try:
        if os.geteuid() == 0:
            os.fchown(directory, 0, 0)  # it may have been owned by the VMM's user
        os.fchmod(directory, 0o700)
        for old in (QMP_SOCKET, AGENT_SOCKET, captures.NOTE):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(old, dir_fd=directory)
    finally:
        os.close(directory)


def _listen(path: Path) -> int:
    """A descriptor of a socket that is already listening, so that clients need not wait for QEMU."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen(1)
        return sock.detach()


def _open_saved(path: Path, *, write: bool) -> int:
    try:
        return open_for_child(str(path), os.O_RDWR if write else os.O_RDONLY, regular=True)
    except OSError as error:
        raise LaunchFailed(f"{path}: {error.strerror}") from error
