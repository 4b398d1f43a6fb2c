"""VmConfig to the requests that make a Firecracker VM, in their order. Pure.

Paths are names in the root of the VMM's jail (``jail.py``): a snapshot remembers the paths of its disks, and
Firecracker cannot be given others at load time.
"""

from __future__ import annotations

import re

import msgspec

from hypeman.architecture import HOST, Architecture
from hypeman.errors import InvalidRequest, NotSupported
from hypeman.hypervisor.interface import Disk, VmConfig
from hypeman.hypervisor.run_dir import GUEST_CID, INITRD, KERNEL, VSOCK, disk_link
from hypeman.units import MIB

MINIMUM_VERSION = (1, 16)
"""The oldest that these requests were checked against."""
MEMORY_SLOT = 128
"""MiB; unit in which memory is plugged."""
MAX_RUN_DIR = 85
"""Of the 107 bytes of a socket path; ``/jail/vsock.sock_1024`` follows."""
MAX_DISKS = 16
MAX_NICS = 4

_REFILL_MS = 1000
_ID = re.compile(r"[a-z][a-z0-9_]{0,19}")


class Call(msgspec.Struct, frozen=True):
    """One request of the API."""

    method: str
    target: str
    body: dict[str, object]


def kernel_cmdline(*extra: str, machine: Architecture = HOST) -> str:
    """The guest kernel's command line. Firecracker has no power-off: its guests end with a reset."""
    words = [f"console={machine.firecracker_console}", "quiet", "loglevel=1", "panic=-1"]
    words += [*machine.firecracker_reset_words, "pci=off", "cryptomgr.notests"]
    return " ".join((*words, *extra))


def boot_calls(config: VmConfig) -> tuple[Call, ...]:
    """All requests of a cold start; the last one starts the guest."""
    boot: dict[str, object] = {"kernel_image_path": KERNEL, "boot_args": config.cmdline}
    if config.initrd is not None:
        boot["initrd_path"] = INITRD
    machine: dict[str, object] = {"vcpu_count": config.vcpus, "mem_size_mib": config.memory_bytes // MIB}
    calls = [
        Call("PUT", "/machine-config", machine),
        Call("PUT", "/boot-source", boot),
        *(Call("PUT", f"/drives/{drive_id(disk.id)}", drive(disk)) for disk in config.disks),
    ]
    for nic in config.nics:
        body: dict[str, object] = {
            "iface_id": nic.id,
            "host_dev_name": nic.tap,
            "guest_mac": nic.mac,
            "mtu": nic.mtu,
        }
        calls.append(Call("PUT", f"/network-interfaces/{nic.id}", body))
    calls.append(Call("PUT", "/vsock", {"guest_cid": GUEST_CID, "uds_path": VSOCK}))
    calls.append(Call("PUT", "/entropy", {}))
    # No free-page reporting: a restored VM's memory is a private mapping of its capture.
    calls.append(Call("PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": True}))
    if config.hotplug_bytes:
        calls.append(Call("PUT", "/hotplug/memory", {"total_size_mib": config.hotplug_bytes // MIB}))
    calls.append(Call("PUT", "/actions", {"action_type": "InstanceStart"}))
    return tuple(calls)


def drive_id(disk_id: str) -> str:
    """Firecracker allows letters, digits and underscores."""
    return disk_id.replace("-", "_")


def drive(disk: Disk) -> dict[str, object]:
    """One disk. Its limit holds for reads and writes together."""
    body: dict[str, object] = {
        "drive_id": drive_id(disk.id),
        "path_on_host": disk_link(disk.id),
        "is_root_device": False,
        "is_read_only": disk.readonly,
        "cache_type": "Writeback",  # a guest's flush reaches the host's disk
    }
    if disk.bps:
        body["rate_limiter"] = {"bandwidth": {"size": disk.bps, "refill_time": _REFILL_MS}}
    return body


def snapshot_call(state: str, memory: str) -> Call:
    """Save the paused VM into two files."""
    body = {"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory}
    return Call("PUT", "/snapshot/create", dict(body))


def load_call(config: VmConfig, state: str, memory: str) -> Call:
    """Restore a VM, paused; its memory is mapped privately from the file."""
    body: dict[str, object] = {
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": memory},
        "resume_vm": False,
    }
    if config.nics:
        body["network_overrides"] = [{"iface_id": nic.id, "host_dev_name": nic.tap} for nic in config.nics]
    return Call("PUT", "/snapshot/load", body)


def state_call(*, running: bool) -> Call:
    return Call("PATCH", "/vm", {"state": "Resumed" if running else "Paused"})


def resize_disk_call(disk: Disk) -> Call:
    """Make Firecracker re-read a disk's size."""
    name = drive_id(disk.id)
    return Call("PATCH", f"/drives/{name}", {"drive_id": name, "path_on_host": disk_link(disk.id)})


def resize_memory_call(config: VmConfig, size: int) -> Call:
    return Call("PATCH", "/hotplug/memory", {"requested_size_mib": (size - config.memory_bytes) // MIB})


def balloon_call(size: int) -> Call:
    return Call("PATCH", "/balloon", {"amount_mib": size // MIB})


def check(config: VmConfig) -> None:
    """Raise NotSupported for what Firecracker does not support, InvalidRequest for what no VMM could run."""
    if config.pci_devices:
        raise NotSupported("Firecracker cannot pass devices through")
    if any(disk.port for disk in config.disks):
        raise NotSupported("Firecracker has no hot-plug of disks")
    names = [drive_id(disk.id) for disk in config.disks]
    for wrong, message in (
        (not 1 <= config.vcpus <= 32, f"{config.vcpus} vCPUs; 1 to 32 are possible"),
        (config.memory_bytes <= 0 or config.memory_bytes % MIB, "memory must be whole MiB"),
        (config.hotplug_bytes % (MEMORY_SLOT * MIB), f"hot-plug memory must be whole {MEMORY_SLOT} MiB"),
        (len(config.disks) > MAX_DISKS, f"at most {MAX_DISKS} disks are possible"),
        (len(config.nics) > MAX_NICS, f"at most {MAX_NICS} network interfaces are possible"),
        (len(set(names)) < len(names), "two disks have the same id"),
        (not all(map(_ID.fullmatch, names)), "ids of disks are a letter and up to 19 of a-z0-9-"),
        (any(disk.shared and not disk.readonly for disk in config.disks), "a shared disk must be read-only"),
        (len(config.run_dir.encode()) > MAX_RUN_DIR, f"run_dir is longer than {MAX_RUN_DIR} bytes"),
    ):
        if wrong:
            raise InvalidRequest(f"Firecracker cannot run this VM: {message}")
