"""The architecture whose guests the tests start: this machine's, or the one that HYPEMAN_TEST_ARCH names, emulated.

``make test-arm64`` runs the suites of guest and QEMU driver with ``HYPEMAN_TEST_ARCH=arm64``.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

from hypeman import architecture

TOP = Path(__file__).parents[1]
MACHINE = architecture.named(os.environ.get("HYPEMAN_TEST_ARCH", "")) or architecture.HOST
FOREIGN = MACHINE is not architecture.HOST
GUEST = TOP / "build" / (f"guest-{MACHINE.name}" if FOREIGN else "guest")
"""Where ``packaging/kernel/choose`` puts kernel and initrd."""
COMPILER = f"{MACHINE.machine}-linux-gnu-gcc" if FOREIGN else "gcc"


@cache
def busybox() -> Path:
    """A static busybox that guests can run. Raises CalledProcessError if it cannot be fetched."""
    if not FOREIGN:
        return Path("/bin/busybox")
    folder = TOP / "build" / f"busybox-{MACHINE.name}"
    program = folder / "bin/busybox"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        apt = [str(TOP / "packaging/foreign-apt"), MACHINE.name, "apt-get", "-qq", "download", "busybox-static"]
        subprocess.run(apt, cwd=folder, check=True)
        subprocess.run(["dpkg-deb", "-x", *map(str, folder.glob("*.deb")), str(folder)], check=True)
    return program
