"""VmConfig to Cloud Hypervisor's API bodies. Pure.

Paths are relative to the run directory (``remote.py``), so a snapshot, which keeps the whole config, needs
no rewriting when it is restored elsewhere. Network interfaces are not included: they are added with
their TAP's descriptor before the boot, since the VMM may not open a TAP by name.
"""

from __future__ import annotations

import re

from hypeman.architecture import HOST, Architecture
from hypeman.errors import InvalidRequest
from hypeman.hypervisor.interface import Disk, Nic, VmConfig
from hypeman.hypervisor.run_dir import GUEST_CID, INITRD, KERNEL, VSOCK, disk_link

MINIMUM_VERSION = (53, 0)
"""The oldest that these requests were checked against."""
EVENTS = "events"
"""FIFO for events in the run directory; it buffers them while no server runs."""
LANDLOCK_ABI = 3
"""Minimum Landlock ABI that Cloud Hypervisor needs; Linux 6.2 has it."""
MEMORY_BLOCK = 128 * 1024 * 1024
MAX_DISKS = 24
MAX_NICS = 8

_REFILL_MS = 1000
_ID = re.compile(r"[a-z][a-z0-9-]{0,19}")
_OWN_IDS = frozenset({"vsock"})


def kernel_cmdline(*extra: str, machine: Architecture = HOST) -> str:
    """The guest kernel's command line: like QEMU's, but a panic ends in a reset that the VMM reports."""
    words = [f"console={machine.qemu_console}", "quiet", "loglevel=1", "panic=-1"]
    words += [*machine.reset_words, "cryptomgr.notests", "random.trust_cpu=on"]
    return " ".join((*words, *extra))


def vm_config(config: VmConfig, *, landlock: tuple[str, ...] | None = None) -> dict[str, object]:
    """Body of ``vm.create``. ``landlock`` are files and directories that the VMM must be let open, of devices, of
    disks to plug, of captures; None where the host's kernel has not enough of it. The VMM's working directory, where
    it makes its vsock, is always among them. What can be saved remembers the names, so they must fit every VM that is
    restored from it, on every host.
    """
    memory: dict[str, object] = {"size": config.memory_bytes, "shared": False}
    if config.hotplug_bytes:
        memory |= {"hotplug_method": "VirtioMem", "hotplug_size": config.hotplug_bytes}
    payload = {"kernel": KERNEL, "cmdline": config.cmdline}
    if config.initrd is not None:
        payload["initramfs"] = INITRD
    body: dict[str, object] = {
        "cpus": {"boot_vcpus": config.vcpus, "max_vcpus": config.vcpus},
        "memory": memory,
        "payload": payload,
        "disks": [disk_config(disk) for disk in config.disks],
        "rng": {"src": "/dev/urandom"},
        # Memory is the VMM's own here, never a file that forks share, so free pages may go back to the host.
        "balloon": {"size": 0, "deflate_on_oom": True, "free_page_reporting": True},
        "serial": {"mode": "Tty"},  # standard output, which is the console log
        "console": {"mode": "Off"},
        "vsock": {"cid": GUEST_CID, "socket": VSOCK, "id": "vsock"},
    }
    if landlock is not None:
        body["landlock_enable"] = True
        body["landlock_rules"] = [{"path": path, "access": "rw"} for path in (".", *landlock)]
    if config.pci_devices:
        body["devices"] = [{"path": device.sysfs_path, "id": device.id} for device in config.pci_devices]
    return body


def disk_config(disk: Disk) -> dict[str, object]:
    """One disk, in ``vm.create`` and ``vm.add-disk``. Its limit holds for reads and writes together."""
    body: dict[str, object] = {
        "path": disk_link(disk.id),
        "readonly": disk.readonly,
        "id": disk.id,
        "serial": disk.id,
        "image_type": "Raw",  # never looked for in what the guest itself can write
    }
    if disk.bps:
        body["rate_limiter_config"] = {"bandwidth": {"size": disk.bps, "refill_time": _REFILL_MS}}
    return body


def folder_link(number: int) -> str:
    """What a directory that disks and captures lie in is called, in the working directory."""
    return f"folder-{number}"


def net_config(nic: Nic) -> dict[str, object]:
    """Body of ``vm.add-net``; the TAP's descriptor travels beside it. Without its MTU, which the VMM would set on
    the TAP and may not; guests read it from the boot disk."""
    return {"id": nic.id, "mac": nic.mac, "num_queues": 2}


def restore_config(source: str, nics: tuple[Nic, ...], *, lazily: bool) -> dict[str, object]:
    """Body of ``vm.restore``; one descriptor for each of ``nics`` travels beside it."""
    body: dict[str, object] = {
        "source_url": f"file://{source}",
        "memory_restore_mode": "OnDemand" if lazily else "Copy",
        "resume": False,
    }
    if nics:
        body["net_fds"] = [{"id": nic.id, "num_fds": 1} for nic in nics]
    return body


def check(config: VmConfig) -> None:
    """Raise InvalidRequest for what no Cloud Hypervisor could run."""
    ids = [each.id for group in (config.disks, config.nics, config.pci_devices) for each in group]
    for wrong, message in (
        (not 1 <= config.vcpus <= 254, f"{config.vcpus} vCPUs; 1 to 254 are possible"),
        (config.memory_bytes <= 0 or config.memory_bytes % (1 << 20), "memory must be whole MiB"),
        (config.hotplug_bytes % MEMORY_BLOCK, "hot-plug memory must be whole 128 MiB"),
        (len(config.disks) > MAX_DISKS, f"at most {MAX_DISKS} disks are possible"),
        (len(config.nics) > MAX_NICS, f"at most {MAX_NICS} network interfaces are possible"),
        (len(set(ids)) < len(ids) or bool(_OWN_IDS.intersection(ids)), "two devices have the same id"),
        (not all(map(_ID.fullmatch, ids)), "ids of devices are a letter and up to 19 of a-z0-9-"),
        (any(disk.shared and not disk.readonly for disk in config.disks), "a shared disk must be read-only"),
        (len(config.run_dir.encode()) > 90, "run_dir is longer than 90 bytes"),
    ):
        if wrong:
            raise InvalidRequest(f"Cloud Hypervisor cannot run this VM: {message}")
