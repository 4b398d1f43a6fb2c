"""What differs between the processors that hypeman runs on, as values. Pure.

``HOST`` is this machine's. Code that depends on the processor reads a field of an ``Architecture`` and never
compares names; what only one VMM needs (machine types, CPU models) is in that VMM's package, keyed by
``Architecture``.
"""

from __future__ import annotations

import platform

import msgspec


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """One processor architecture, for host and guests alike: guests have the host's."""

    name: str
    """As OCI images and Debian packages call it."""
    machine: str
    """As ``uname -m`` calls it, and QEMU in the name of its program."""
    kernel_file: str
    """Name of the uncompressed guest kernel: an ELF file with a PVH note, or arm64's boot image."""
    qemu_package: str
    """Debian's package with its QEMU."""
    qemu_console: str
    """The serial console's name in a guest of QEMU or Cloud Hypervisor."""
    firecracker_console: str
    early_console: str
    """Kernel argument that shows messages from before the console's driver, on QEMU."""
    reset_words: tuple[str, ...]
    """Kernel arguments that make a reset end the VM at once. Empty where the firmware interface (PSCI) does that."""
    firecracker_reset_words: tuple[str, ...]
    timer_words: tuple[str, ...]
    """Kernel arguments that keep a busy host from making the kernel give up on its timer."""

    @property
    def qemu(self) -> str:
        """Name of QEMU's program."""
        return f"qemu-system-{self.machine}"


AMD64 = Architecture(
    name="amd64",
    machine="x86_64",
    kernel_file="vmlinux",
    qemu_package="qemu-system-x86",
    qemu_console="ttyS0",
    firecracker_console="ttyS0",
    early_console="earlyprintk=serial,ttyS0",
    reset_words=("reboot=t",),
    firecracker_reset_words=("reboot=k",),
    timer_words=("no_timer_check",),
)

ARM64 = Architecture(
    name="arm64",
    machine="aarch64",
    kernel_file="Image",
    qemu_package="qemu-system-arm",
    qemu_console="ttyAMA0",
    firecracker_console="ttyS0",
    early_console="earlycon=pl011,0x9000000",
    reset_words=(),
    firecracker_reset_words=(),
    timer_words=(),
)

ALL = (AMD64, ARM64)


def named(machine: str) -> Architecture | None:
    """The architecture called ``machine`` by ``uname -m``, Debian or OCI; None for one that is not supported."""
    return next((each for each in ALL if machine.lower() in (each.machine, each.name)), None)


HOST = named(platform.machine()) or AMD64
"""This machine's. A command-line client runs on any: there nothing but the default platform depends on it."""
