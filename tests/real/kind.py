"""Which VMM the whole-server tests run on, and how patient they are.

``HYPEMAN_TEST_HYPERVISOR=firecracker pytest tests/real/…`` has all of them on Firecracker with KVM; without it they
run on QEMU under emulation, which every host can. ``HYPEMAN_TEST_VMMS`` names a folder with programs that are not in
PATH. ``HYPEMAN_TEST_SLOWNESS``: so many times slower is the host, which may be virtual itself.
"""

from __future__ import annotations

import os

KIND = os.environ.get("HYPEMAN_TEST_HYPERVISOR", "")
SLOWNESS = float(os.environ.get("HYPEMAN_TEST_SLOWNESS", "1"))
_PROGRAMS = os.environ.get("HYPEMAN_TEST_VMMS", "")

WARM = os.environ.get("HYPEMAN_TEST_WARM", "")
"""A folder to keep data directories in with which a server starts: whether KVM works is found out in them, and the
image is made. On a slow host that takes minutes, and each test has a server of its own."""

PATIENCE = 180.0 * SLOWNESS
"""Seconds for anything that a guest does; under emulation, beside other guests, it may take its time."""
TAKES_DISKS = KIND in ("", "qemu", "cloud-hypervisor")
"""Disks come and go while a guest runs."""
OTHER = "qemu" if KIND not in ("", "qemu") else "qemu-microvm"
"""Another kind, which is also there."""
STATE_FILE = "state.json" if KIND == "cloud-hypervisor" else "state"
"""What a capture holds of the devices."""


def few(number: int) -> int:
    """So many guests at once, or HYPEMAN_TEST_MANY (three) where each takes its time."""
    return number if SLOWNESS == 1 else min(number, int(os.environ.get("HYPEMAN_TEST_MANY", "3")))


def settings() -> dict[str, str]:
    """Of the server's configuration, in its environment."""
    if not KIND:
        return {"HYPERVISOR__ACCELERATOR": "tcg"}
    path = os.environ["PATH"]
    return {
        "HYPERVISOR__DEFAULT": KIND,
        "HYPERVISOR__ACCELERATOR": "kvm",
        "HYPERVISOR__KVM_PATIENCE": str(10 * SLOWNESS),
        "REQUEST_TIMEOUT": str(60 * SLOWNESS),
        "PATH": f"{_PROGRAMS}:{path}" if _PROGRAMS else path,
    }
