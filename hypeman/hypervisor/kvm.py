"""Checks once whether KVM works here, by booting a kernel.

Being able to open ``/dev/kvm`` is not enough: in nested clouds it may hang, or make the VMM abort, as soon as a
real kernel runs. So the guest kernel is booted on it without a root file system: it prints its boot messages
and panics, which ends the VMM.
"""

from __future__ import annotations

import os
import shutil

import trio

from hypeman.architecture import AMD64, ARM64, HOST, Architecture
from hypeman.config import HypervisorConfig
from hypeman.host.processes import Processes, ToolFailed, open_to_users

KVM_DEVICE = "/dev/kvm"
_PROOF_LIMIT = 9
"""Total time limit as a multiple of ``patience``. The probe takes 0.5 s on bare metal and 10 s in a virtual machine
that emulates virtualisation as well."""
_ATTEMPTS = 3
"""How often a kernel may end before its first line. Where virtualisation is emulated, one of two probes that ran at the
same time did, on a host whose VMs ran well; the end is immediate, so another attempt costs little."""

_BOARDS = {AMD64: "q35", ARM64: "virt,gic-version=host"}


def _probe_words(machine: Architecture) -> tuple[str, ...]:
    """Arguments of the probe kernel: it says what it is at once, and ends."""
    console = (f"console={machine.qemu_console}", machine.early_console)
    return (*console, "panic=-1", *machine.reset_words, "cryptomgr.notests")


class KvmProof:
    """The probe for one host, guest kernel and QEMU; shared by all drivers that use KVM.

    ``patience``: seconds to wait for output from the probe kernel. ``own_users``: VMMs run as their own users,
    not as root, which runs the probe kernel.
    """

    def __init__(
        self,
        processes: Processes,
        *,
        kernel: str,
        qemu_binary: str = "",
        patience: float = 10.0,
        own_users: bool = False,
    ) -> None:
        self._processes = processes
        self._kernel = kernel
        self._qemu = qemu_binary
        self._patience = patience
        self._own_users = own_users
        self._asking = trio.Lock()
        self._answer: str | None = None

    @classmethod
    def configured(cls, processes: Processes, settings: HypervisorConfig, *, kernel: str) -> KvmProof:
        """The probe with the QEMU binary, patience and VMM users from ``settings``."""
        return cls(
            processes,
            kernel=kernel,
            qemu_binary=settings.qemu_binary,
            patience=settings.kvm_patience,
            own_users=settings.uid_base > 0,
        )

    async def why_not(self) -> str:
        """Empty if an ordinary kernel boots on KVM here and a VMM can open it; else the reason, in one line."""
        if self._own_users and os.access(KVM_DEVICE, os.F_OK) and not open_to_users(KVM_DEVICE):
            return f"only root may open {KVM_DEVICE}, and VMMs are other users; 'chgrp kvm' and 'chmod 660' it"
        return await self.why_not_as_root()

    async def why_not_as_root(self) -> str:
        """The same for a VMM with its own device node (created by Firecracker's jailer)."""
        async with self._asking:
            if self._answer is None:
                self._answer = await self._try()
            return self._answer

    async def _try(self) -> str:
        if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
            return f"{KVM_DEVICE} is not there or cannot be opened"
        if not os.access(self._kernel, os.R_OK):
            return f"there is no kernel {self._kernel} to test it with"
        qemu = self._qemu or shutil.which(HOST.qemu)
        if qemu is None:
            return ""  # no QEMU to probe with; other VMMs fail immediately with an error if KVM does not work
        argv = [
            qemu, "-machine", _BOARDS[HOST], "-accel", "kvm", "-cpu", "host", "-m", "128M",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", self._kernel,
            "-append", " ".join(_probe_words(HOST)),
        ]  # fmt: skip
        limit = _PROOF_LIMIT * self._patience
        for _ in range(_ATTEMPTS):
            try:
                output = await self._processes.run(argv, timeout=limit, quiet_limit=self._patience)
            except ToolFailed as error:
                return f"an ordinary kernel does not run on {KVM_DEVICE}: {error.message.splitlines()[0][:300]}"
            if b"Linux version" in output:
                return ""
        return f"a kernel on {KVM_DEVICE} ended {_ATTEMPTS} times without printing anything"
