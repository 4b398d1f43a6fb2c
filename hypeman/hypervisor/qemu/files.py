"""Contents of QEMU's root directory: QEMU with its libraries, firmware and accelerator, and some devices.

Everything else is passed as a descriptor (``config.py``). So a compromised QEMU has no access to host files, other
VMs, sockets, /run, /tmp or /dev/shm.
"""

from __future__ import annotations

import glob
import os
import subprocess

from hypeman.architecture import HOST
from hypeman.host.program_files import NotRunnable, files_of, once_per_version

FIRMWARE = (
    *("bios-256k.bin", "bios-microvm.bin", "qboot.rom", "vgabios.bin", "kvmvapic.bin"),
    *("linuxboot.bin", "linuxboot_dma.bin", "multiboot.bin", "multiboot_dma.bin", "pvh.bin"),
)
"""What q35 and microvm load, as far as an installation has it; arm64's virt loads none for a kernel."""
_MODULES = tuple(f"accel-{name}-{HOST.machine}.so" for name in ("tcg", "qtest"))
DEVICES = ("/dev/null", "/dev/urandom")


@once_per_version
def root_files(binary: str) -> tuple[str, ...]:
    """Files for ``Program.root_files``. Raises NotRunnable. Blocks for some 20 ms, once for each version of QEMU."""
    try:
        output = subprocess.run([binary, "-L", "help"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotRunnable(f"{binary} does not name its firmware: {error}") from None
    files = set(files_of(binary))
    folders = [os.path.normpath(line) for line in output.splitlines() if line.startswith("/")]
    for name in FIRMWARE:
        files.update(path for folder in folders if os.path.isfile(path := f"{folder}/{name}"))
    for name in _MODULES:
        for module in glob.glob(f"/usr/lib*/*/qemu/{name}") + glob.glob(f"/usr/lib*/qemu/{name}"):
            files.update(files_of(module))
    return tuple(sorted(files))
