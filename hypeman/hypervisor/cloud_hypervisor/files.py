"""Contents of Cloud Hypervisor's root directory: itself with its libraries, what it opens by name, and some devices.

Unlike QEMU it opens files while it runs: disks that are plugged in, and captures. So the directories that these lie in
are there as well (``folders``), with the owners and modes that they have; everything else of the host is not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from hypeman.host.program_files import NotRunnable, files_of
from hypeman.hypervisor.interface import LaunchFailed, VmConfig
from hypeman.hypervisor.vmm_process import VFIO_DEVICE, vfio_groups

DEVICES = ("/dev/null", "/dev/urandom")


class Root(NamedTuple):
    """For ``Program``: ``root_files``, ``own_files`` and ``other_devices``."""

    files: tuple[str, ...]
    own: tuple[str, ...]
    devices: tuple[str, ...]


def root_of(
    config: VmConfig, room: Path, *, binary: str, folders: tuple[str, ...], capture: Path | None = None
) -> Root:
    """What the VMM of ``config`` sees. Raises LaunchFailed. Blocks for some 10 ms, once for each version of it."""
    try:
        program = files_of(binary)
    except NotRunnable as error:
        raise LaunchFailed(str(error)) from None
    read = [config.kernel, config.initrd, *(disk.path for disk in config.disks if disk.readonly)]
    written = [str(room), *(disk.path for disk in config.disks if not disk.readonly)]
    if capture is not None:
        read.append(str(capture))
    passed = (VFIO_DEVICE, *vfio_groups(config)) if config.pci_devices else ()
    return Root(
        (*program, *_outside(folders, *filter(None, read)), *(("/sys",) if config.pci_devices else ())),
        (*folders, *_outside(folders, *written)),
        (*DEVICES, *passed),
    )


def _outside(folders: tuple[str, ...], *paths: str) -> list[str]:
    """Those that are not in one of ``folders`` anyway, by the names that links lead to as well."""
    there = {name for path in paths for name in (path, os.path.realpath(path))}
    return sorted(path for path in there if not any(path.startswith(f"{folder}/") for folder in folders))
