"""Cloud Hypervisor as a hypervisor. KVM only.

It starts as its own user in an empty network namespace, with its seccomp filters and landlock on; its API
socket listens already, TAPs come as descriptors. A snapshot is loaded lazily: pages come from the file
as the guest touches them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import trio

from hypeman.errors import NotSupported
from hypeman.host.loans import lent
from hypeman.host.processes import Process, Processes, Program, ToolFailed, open_for_child
from hypeman.hypervisor import captures
from hypeman.hypervisor.cloud_hypervisor import config as native
from hypeman.hypervisor.cloud_hypervisor.vmm import CloudHypervisorVmm
from hypeman.hypervisor.interface import Capabilities, Nic, VmConfig, Vmm, VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KVM_DEVICE, KvmProof
from hypeman.hypervisor.remote import listen_for_guest, listening_api, prepared, started, wait_api
from hypeman.hypervisor.run_dir import API_SOCKET
from hypeman.hypervisor.unix_http import UnixHttp
from hypeman.hypervisor.vmm_process import end_stray, find, new_handle

_BINARY = "cloud-hypervisor"
_VERSION = re.compile(r"cloud-hypervisor v(\d+)\.(\d+)(?:\.(\d+))?")
_PING = "/api/v1/vmm.ping"

OpenTap = Callable[[str], Awaitable[int]]


class CloudHypervisorDriver:
    """The ``cloud-hypervisor`` kind."""

    kind = HypervisorKind.CLOUD_HYPERVISOR

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
        self._processes = processes
        self._open_tap = open_tap
        self._kvm = kvm
        self._binary = binary
        self._folders = folders
        self._capabilities = Capabilities(available=False, reason="not looked for yet")

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def adopt_capabilities(self, capabilities: Capabilities) -> None:
        """Take the answer of an earlier ``probe``."""
        self._capabilities = capabilities

    async def probe(self) -> Capabilities:
        self._capabilities = await self._probe()
        return self._capabilities

    async def _probe(self) -> Capabilities:
        binary = self._binary or shutil.which(_BINARY) or ""
        if not binary:
            return Capabilities(available=False, reason=f"{_BINARY} is not installed")
        try:
            said = (await self._processes.run([binary, "--version"], timeout=20)).decode(errors="replace")
        except ToolFailed as error:
            return Capabilities(available=False, reason=error.message, binary=binary)
        if (match := _VERSION.search(said)) is None:
            reason = f"{binary} is no Cloud Hypervisor: {said[:80]!r}"
            return Capabilities(available=False, reason=reason, binary=binary)
        version = ".".join(part or "0" for part in match.groups())
        wanted = ".".join(map(str, native.MINIMUM_VERSION))
        reason = await self._kvm.why_not()
        reason = f"it wants KVM, but {reason}" if reason else ""
        if (int(match[1]), int(match[2])) < native.MINIMUM_VERSION:
            reason = f"Cloud Hypervisor {version} is too old, {wanted} is wanted"
        return Capabilities(
            available=not reason,
            reason=reason,
            version=version,
            binary=binary,
            accelerator="kvm",
            standby=True,
            fork=True,
            pause=True,
            hotplug_memory=True,
            hotplug_disk=True,
            hotplug_ports=native.MAX_DISKS,
            balloon=True,
            vsock=True,
            pci_passthrough=os.access("/dev/vfio/vfio", os.F_OK),
            disk_io_limit=True,
            disk_resize=True,
            max_disks=native.MAX_DISKS,
        )

    def kernel_cmdline(self, *, hotplug_memory: bool) -> str:
        return native.kernel_cmdline()

    def validate(self, config: VmConfig) -> None:
        can = self._capabilities
        if not can.available:
            raise NotSupported(f"{self.kind} can not be used here: {can.reason}")
        if config.pci_devices and not can.pci_passthrough:
            raise NotSupported("passing devices through wants VFIO, which this host has not")
        native.check(config)

    async def launch(self, config: VmConfig) -> Vmm:
        self.validate(config)
        with prepared(config, kernel=True):
            async with self._started(config) as vmm:
                api = vmm.api
                await api.request("PUT", "/api/v1/vm.create", native.vm_config(config, landlock=self._folders))
                for nic in config.nics:
                    with await self._tap(nic) as fd:
                        await api.request("PUT", "/api/v1/vm.add-net", native.net_config(nic), fds=[fd])
                await api.request("PUT", "/api/v1/vm.boot")
        return vmm

    async def restore(self, config: VmConfig, capture: Path, *, keep_capture: bool, paused: bool = False) -> Vmm:
        self.validate(config)
        saved = await trio.to_thread.run_sync(captures.read, capture)
        version = self._capabilities.version
        captures.check_fits(saved, config, kind=self.kind, version=version, machine="kvm/host")
        with prepared(config, kernel=True), contextlib.ExitStack() as opened:
            for name in saved.files:
                opened.enter_context(lent(capture / name, config.uid, write=False))
            taps = [opened.enter_context(await self._tap(nic)) for nic in config.nics]
            async with self._started(config) as vmm:
                body = native.restore_config(str(capture), config.nics, lazily=True)
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

    async def kill_stray(self, run_dir: str) -> bool:
        return await end_stray(self._processes, run_dir)

    @contextlib.asynccontextmanager
    async def _started(self, config: VmConfig) -> AsyncIterator[CloudHypervisorVmm]:
        """A VMM that answers and has no VM yet, ended again if the block fails."""
        with contextlib.ExitStack() as opened:
            api = listening_api(config)
            opened.callback(os.close, api)
            os.mkfifo(os.path.join(config.run_dir, native.EVENTS), 0o600)
            events = open_for_child(os.path.join(config.run_dir, native.EVENTS), os.O_RDWR)
            opened.callback(os.close, events)
            program = Program(
                argv=(
                    self._capabilities.binary,
                    *("--api-socket", f"fd={api}", "--event-monitor", f"fd={events}", "--seccomp", "true"),
                ),
                log=config.vmm_log,
                output=config.console_log,
                cwd=config.run_dir,
                mark=config.run_dir,
                fds=(api, events),
                uid=config.uid,
                gid=config.gid,
                devices=(KVM_DEVICE,),
                cgroup=config.cgroup,
                locked_memory=config.memory_bytes + config.hotplug_bytes if config.pci_devices else 0,
            )
            async with started(self._processes, program) as process:
                opened.close()  # or a VMM that dies would leave its API socket listening, in us
                vmm = self._vmm(new_handle(self.kind, process, config), process)
                with vmm.unless_it_fails():
                    await wait_api(vmm.api, process, _PING)
                    yield vmm

    def _vmm(self, handle: VmmHandle, process: Process) -> CloudHypervisorVmm:
        vmm = CloudHypervisorVmm(handle, process, listen_for_guest(handle.config))
        vmm.version = self._capabilities.version
        return vmm

    async def _tap(self, nic: Nic) -> contextlib.AbstractContextManager[int]:
        return _closing(await self._open_tap(nic.tap))


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
