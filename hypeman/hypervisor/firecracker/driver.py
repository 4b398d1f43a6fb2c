"""Firecracker driver. KVM only.

Its jailer starts it: as its own user, in a root directory of its own (``jail.py``), besides the control group and the
empty namespaces that all VMMs are in, without a way to new privileges and behind its seccomp filters. It opens TAPs by
name, so a VM with a network has to be in the host's network namespace and its TAP has to belong to ``config.uid``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import trio

from hypeman.host.processes import Process, Processes, Program
from hypeman.host.temporary_access import temporary_access
from hypeman.hypervisor import captures
from hypeman.hypervisor.binary import BinaryProbe, BinarySpec, Missing, find_binary, version_of
from hypeman.hypervisor.firecracker import config as native
from hypeman.hypervisor.firecracker import jail
from hypeman.hypervisor.firecracker.vmm import FirecrackerVmm
from hypeman.hypervisor.interface import Capabilities, LaunchFailed, VmConfig, Vmm, VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KvmProof
from hypeman.hypervisor.remote import listen_for_guest, started, wait_api
from hypeman.hypervisor.run_dir import API_SOCKET, INITRD, KERNEL, LOG
from hypeman.hypervisor.unix_http import UnixHttp
from hypeman.hypervisor.vmm_process import find, max_file_size, needs_libraries, new_handle

_NUMBERS = r" v(\d+)\.(\d+)\.(\d+)"


class FirecrackerDriver(BinaryProbe):
    """The ``firecracker`` kind."""

    kind = HypervisorKind.FIRECRACKER
    spec = BinarySpec("firecracker", "Firecracker", "Firecracker" + _NUMBERS, native.MINIMUM_VERSION)
    _jailer_spec = BinarySpec("jailer", "Firecracker jailer", "Jailer" + _NUMBERS, native.MINIMUM_VERSION)

    def __init__(self, processes: Processes, *, kvm: KvmProof, binary: str = "", jailer: str = "") -> None:
        super().__init__(processes, binary=binary)
        self._kvm = kvm
        self._configured_jailer = jailer

    def programs(self) -> tuple[str, ...]:
        firecracker = super().programs()
        return (*firecracker, *filter(None, map(self._jailer, firecracker)))

    def _jailer(self, firecracker: str) -> str:
        """The one that is configured, else that which came with ``firecracker``, named as it is in a release, else
        one in PATH; empty if none."""
        name = os.path.basename(firecracker).replace("firecracker", "jailer")
        beside = os.path.join(os.path.dirname(firecracker), name)
        if not self._configured_jailer and beside != firecracker and os.access(beside, os.X_OK):
            return beside
        return find_binary(self._jailer_spec.name, self._configured_jailer)

    async def _able(self, binary: str, version: str) -> Capabilities:
        if os.geteuid() != 0:
            raise Missing("its jailer requires root", binary=binary, version=version)
        if needs_libraries(binary):
            raise Missing(
                "it is linked dynamically, and its jail has no libraries: install the static build of its releases",
                binary=binary,
                version=version,
            )
        jailer = await version_of(self._processes, self._jailer_spec, self._jailer(binary))
        if jailer != version:
            raise Missing(f"its jailer is of version {jailer}", binary=binary, version=version)
        if why_not := await self._kvm.why_not_as_root():
            raise Missing(f"it requires KVM, but {why_not}", binary=binary, version=version)
        return Capabilities(
            available=True,
            accelerator="kvm",
            standby=True,
            fork=True,
            pause=True,
            hotplug_memory=True,
            balloon=True,
            vsock=True,
            disk_io_limit=True,
            disk_resize=True,
            max_disks=native.MAX_DISKS,
            disk_serials=False,
            power_off=False,
        )

    def kernel_cmdline(self, *, hotplug_memory: bool) -> str:
        return native.kernel_cmdline()

    def validate(self, config: VmConfig) -> None:
        self._require_available()
        native.check(config)

    async def launch(self, config: VmConfig) -> Vmm:
        self.validate(config)
        with jail.jail(config, self._capabilities.binary) as base, contextlib.ExitStack() as opened:
            for name, path in ((KERNEL, config.kernel), (INITRD, config.initrd)):
                if path is not None:
                    await _bring(Path(path), jail.room_of(config.run_dir) / name)
                    opened.enter_context(temporary_access(Path(path), config.uid, write=False))
            async with self._started(config, base) as vmm:
                for call in native.boot_calls(config):
                    await vmm.call(call)
        return vmm

    async def restore(self, config: VmConfig, capture: Path, *, keep_capture: bool, paused: bool = False) -> Vmm:
        self.validate(config)
        saved = await trio.to_thread.run_sync(captures.read, capture)
        version = self._capabilities.version
        captures.check_fits(saved, config, kind=self.kind, version=version, machine="kvm/host")
        with (
            jail.jail(config, self._capabilities.binary) as base,
            _let_in(config, capture),
        ):
            async with self._started(config, base) as vmm:
                await vmm.call(native.load_call(config, captures.STATE, captures.MEMORY), timeout=600)
                vmm.vsock_reset = True
                if not keep_capture:
                    captures.note(Path(config.run_dir), capture)
                if not paused:
                    await vmm.resume()
        return vmm

    async def reattach(self, handle: VmmHandle) -> Vmm:
        process = find(self._processes, handle)
        try:
            vmm = self._vmm(handle, process)
            with vmm.unless_it_fails():
                await vmm.state()
            return vmm
        except BaseException:
            process.close()
            raise

    async def kill_stray(self, run_dir: str) -> bool:
        there_was = await super().kill_stray(run_dir)
        await trio.to_thread.run_sync(jail.take_down, run_dir)
        return there_was

    @contextlib.asynccontextmanager
    async def _started(self, config: VmConfig, base: Path) -> AsyncIterator[FirecrackerVmm]:
        """Start a VMM that answers and has no VM yet; it is killed if the block fails."""
        binary = self._capabilities.binary
        program = Program(
            argv=(
                self._jailer(binary),
                *("--id", jail.name_of(config), "--exec-file", binary, "--chroot-base-dir", str(base)),
                *("--uid", str(config.uid), "--gid", str(config.gid)),
                *("--", "--api-sock", API_SOCKET),
                *("--log-path", LOG, "--level", "Error"),  # else it would go to the console
            ),
            log=config.vmm_log,
            output=config.console_log,
            mark=config.run_dir,
            cgroup=config.cgroup,
            max_file_size=max_file_size(config),
            isolated=not config.nics,
            jailer=True,
        )
        async with started(self._processes, program) as process:
            vmm = self._vmm(new_handle(self.kind, process, config), process)
            with vmm.unless_it_fails():
                await wait_api(vmm.api, process, "/")
                yield vmm

    def _vmm(self, handle: VmmHandle, process: Process) -> FirecrackerVmm:
        room = jail.room_of(handle.run_dir)
        api = UnixHttp(str(room / API_SOCKET), pid=process.pid)
        vmm = FirecrackerVmm(handle, process, api, listen_for_guest(room, handle.config))
        vmm.version = self._capabilities.version
        return vmm


async def _bring(file: Path, name: Path) -> None:
    """Link or copy ``file`` into a jail; in a thread, since a copy takes time (28 MB in 15 ms)."""
    try:
        await trio.to_thread.run_sync(jail.let_in, file, name)
    except OSError as error:
        raise LaunchFailed(f"{error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def _let_in(config: VmConfig, capture: Path) -> Iterator[None]:
    """Put a capture into the jail while it is being loaded."""
    room = jail.room_of(config.run_dir)
    with contextlib.ExitStack() as opened:
        for name in (captures.STATE, captures.MEMORY):
            try:
                opened.enter_context(temporary_access(capture / name, config.uid, write=False))
                jail.let_in(capture / name, room / name)
            except OSError as error:
                raise LaunchFailed(f"{error.filename}: {error.strerror}") from error
            opened.callback(jail.take_out, room / name)
        yield
