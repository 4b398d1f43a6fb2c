"""Firecracker as a hypervisor. KVM only.

It starts as its own user, in its own control group, without a way to new privileges and behind its seccomp
filters. It opens TAPs by name, so a VM with a network has to be in the host's network namespace and its
TAP has to belong to ``config.uid``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from hypeman.errors import NotSupported
from hypeman.host.loans import lent
from hypeman.host.processes import Process, Processes, Program, ToolFailed
from hypeman.hypervisor import captures
from hypeman.hypervisor.firecracker import config as native
from hypeman.hypervisor.firecracker.vmm import FirecrackerVmm
from hypeman.hypervisor.interface import Capabilities, VmConfig, Vmm, VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KVM_DEVICE, KvmProof
from hypeman.hypervisor.remote import listen_for_guest, prepared, started, wait_api
from hypeman.hypervisor.run_dir import API_SOCKET, LOG
from hypeman.hypervisor.unix_http import UnixHttp
from hypeman.hypervisor.vmm_process import end_stray, find, new_handle

_BINARY = "firecracker"
_VERSION = re.compile(r"Firecracker v(\d+)\.(\d+)\.(\d+)")


class FirecrackerDriver:
    """The ``firecracker`` kind."""

    kind = HypervisorKind.FIRECRACKER

    def __init__(self, processes: Processes, *, kvm: KvmProof, binary: str = "") -> None:
        self._processes = processes
        self._kvm = kvm
        self._binary = binary
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
            return Capabilities(available=False, reason=f"{binary} is no Firecracker: {said[:80]!r}", binary=binary)
        version = ".".join(match.groups())
        reason = await self._kvm.why_not()
        reason = f"it wants KVM, but {reason}" if reason else ""
        if (int(match[1]), int(match[2])) < native.MINIMUM_VERSION:
            reason = f"Firecracker {version} is too old, {'.'.join(map(str, native.MINIMUM_VERSION))} is wanted"
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
            balloon=True,
            vsock=True,
            disk_io_limit=True,
            disk_resize=True,
            max_disks=native.MAX_DISKS,
        )

    def kernel_cmdline(self, *, hotplug_memory: bool) -> str:
        return native.kernel_cmdline()

    def validate(self, config: VmConfig) -> None:
        if not self._capabilities.available:
            raise NotSupported(f"{self.kind} can not be used here: {self._capabilities.reason}")
        native.check(config)

    async def launch(self, config: VmConfig) -> Vmm:
        self.validate(config)
        with prepared(config, kernel=True):
            async with self._started(config) as vmm:
                for call in native.boot_calls(config):
                    await vmm.call(call)
        return vmm

    async def restore(self, config: VmConfig, capture: Path, *, keep_capture: bool, paused: bool = False) -> Vmm:
        self.validate(config)
        saved = await trio.to_thread.run_sync(captures.read, capture)
        version = self._capabilities.version
        captures.check_fits(saved, config, kind=self.kind, version=version, machine="kvm/host")
        state, memory = capture / captures.STATE, capture / captures.MEMORY
        with contextlib.ExitStack() as loans:
            loans.enter_context(prepared(config, kernel=False))
            for file in (state, memory):
                loans.enter_context(lent(file, config.uid, write=False))
            async with self._started(config) as vmm:
                await vmm.call(native.load_call(config, str(state), str(memory)), timeout=600)
                if not keep_capture:
                    captures.note(Path(config.run_dir), capture)
                if not paused:
                    await vmm.resume()
        return vmm

    async def reattach(self, handle: VmmHandle) -> Vmm:
        process = find(self._processes, handle)
        try:
            await UnixHttp(os.path.join(handle.run_dir, API_SOCKET)).request("GET", "/")
            return self._vmm(handle, process)
        except BaseException:
            process.close()
            raise

    async def kill_stray(self, run_dir: str) -> bool:
        return await end_stray(self._processes, run_dir)

    @contextlib.asynccontextmanager
    async def _started(self, config: VmConfig) -> AsyncIterator[FirecrackerVmm]:
        """A VMM that answers and has no VM yet, ended again if the block fails."""
        log = _link_log(config)
        program = Program(
            argv=(
                self._capabilities.binary,
                *("--api-sock", API_SOCKET, "--id", config.instance_id),
                *("--log-path", LOG, "--level", "Warning"),  # or its log would be on the guest's console
            ),
            log=config.vmm_log,
            output=config.console_log,
            cwd=config.run_dir,
            mark=config.run_dir,
            uid=config.uid,
            gid=config.gid,
            devices=(KVM_DEVICE,),
            cgroup=config.cgroup,
            isolated=not config.nics,
        )
        with lent(log, config.uid):
            async with started(self._processes, program) as process:
                vmm = self._vmm(new_handle(self.kind, process, config), process)
                with vmm.unless_it_fails():
                    await wait_api(vmm.api, process, "/")
                    yield vmm

    def _vmm(self, handle: VmmHandle, process: Process) -> FirecrackerVmm:
        vmm = FirecrackerVmm(handle, process, listen_for_guest(handle.config))
        vmm.version = self._capabilities.version
        return vmm


def _link_log(config: VmConfig) -> Path:
    """The log, there and under its name in the run directory."""
    log = Path(config.vmm_log)
    log.touch(mode=0o600)
    Path(config.run_dir, LOG).symlink_to(log)
    return log
