"""Does KVM work here? Asked once, answered by a kernel.

A ``/dev/kvm`` that can be opened proves nothing: in nested clouds there are some that hang, or make the VMM
abort, at the first thing that a real kernel does. So the guest kernel is booted on it, without a root: it
says its lines, panics, and with that the VMM ends.
"""

from __future__ import annotations

import os
import shutil

import trio

from hypeman.config import HypervisorConfig
from hypeman.host.processes import Processes, ToolFailed, open_to_users

KVM_DEVICE = "/dev/kvm"
_PROOF_LIMIT = 9
"""How many times the patience until the kernel's end. On metal all takes 0.5 s, 10 s in a virtual machine that
emulates the virtualisation too."""


class KvmProof:
    """The proof for one host, one guest kernel and one QEMU; shared by all drivers that want KVM.

    ``patience``: seconds until the kernel's first word and between any two. ``own_users``: VMMs run as users of
    their own, not as root, who runs the kernel on trial.
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
        """The proof with the QEMU, the patience and the users of VMMs that ``settings`` name."""
        return cls(
            processes,
            kernel=kernel,
            qemu_binary=settings.qemu_binary,
            patience=settings.kvm_patience,
            own_users=settings.uid_base > 0,
        )

    async def why_not(self) -> str:
        """Empty if an ordinary kernel runs on KVM here, and a VMM can open it; else why not, in one line."""
        if self._own_users and os.access(KVM_DEVICE, os.F_OK) and not open_to_users(KVM_DEVICE):
            return f"only root may open {KVM_DEVICE}, and VMMs are other users; 'chgrp kvm' and 'chmod 660' it"
        return await self.why_not_as_root()

    async def why_not_as_root(self) -> str:
        """The same for a VMM that is given a device of its own (Firecracker's jailer makes one)."""
        async with self._asking:
            if self._answer is None:
                self._answer = await self._try()
            return self._answer

    async def _try(self) -> str:
        if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
            return f"{KVM_DEVICE} is not there or can not be opened"
        if not os.access(self._kernel, os.R_OK):
            return f"there is no kernel {self._kernel} to try it with"
        qemu = self._qemu or shutil.which("qemu-system-x86_64")
        if qemu is None:
            return ""  # nothing to try it with; other VMMs fail at once and say so where it does not work
        argv = [
            qemu, "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "128M",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", self._kernel,
            "-append", "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1 reboot=t cryptomgr.notests",
        ]  # fmt: skip
        try:
            said = await self._processes.run(argv, timeout=_PROOF_LIMIT * self._patience, quiet_limit=self._patience)
        except ToolFailed as error:
            return f"an ordinary kernel does not run on {KVM_DEVICE}: {error.message.splitlines()[0][:300]}"
        return "" if b"Linux version" in said else f"a kernel on {KVM_DEVICE} ended without a word"
