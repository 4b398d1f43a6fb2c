"""The names of the hypervisors; apart from ``interface.py`` so that types and the command line,
which never meet a VMM, need not load Trio for an enum."""

from __future__ import annotations

import enum


class HypervisorKind(enum.StrEnum):
    """The names that the API uses (§1.5)."""

    CLOUD_HYPERVISOR = "cloud-hypervisor"
    FIRECRACKER = "firecracker"
    QEMU = "qemu"
    QEMU_MICROVM = "qemu-microvm"
    VZ = "vz"
