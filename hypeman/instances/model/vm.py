"""Builds a VMM's VmConfig from a record. Pure.

Disks, in the order the guest sees them; the guest finds each by its serial number:

    root      the image, read-only, shared by all instances of it
    overlay   the writable layer
    boot      boot configuration for the guest, and where it writes its outcome
    v…, w…    volumes and the write layers over read-only ones
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from hypeman.hypervisor.interface import Disk, Nic, PciDevice, VmConfig
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import VolumeMount
from hypeman.network.types import Lease
from hypeman.paths import Paths


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM needs from other capabilities, looked up immediately before use."""

    root_disk: Path
    kernel: str
    initrd: str | None
    cmdline: str
    lease: Lease | None
    mtu: int
    devices: tuple[str, ...] = ()
    """sysfs paths."""
    uid: int = 0
    vsock: bool = False
    hotplug: bool = False
    """The VMM supports disk hotplug."""
    cgroup: str = ""


def volume_disk_id(volume_id: str) -> str:
    """Serial number of a volume's disk. virtio allows 20 bytes; ids may be longer."""
    return "v" + hashlib.sha256(volume_id.encode()).hexdigest()[:18]


def volume_overlay_disk_id(volume_id: str) -> str:
    return "w" + volume_disk_id(volume_id)[1:]


DISK_PORTS = 8
"""Disks that can be hotplugged; each needs a PCI port, whose scan costs boot time."""


def free_port(ports: Mapping[str, int]) -> int:
    """The lowest free port; 0 if all are taken."""
    return next((port for port in range(1, DISK_PORTS + 1) if port not in ports.values()), 0)


def assign_ports(volumes: Iterable[VolumeMount]) -> dict[str, int]:
    """Ports for the volumes of a new instance. A volume with a write layer is two disks and is fixed."""
    ports: dict[str, int] = {}
    for volume in volumes:
        port = free_port(ports)
        if not volume.overlay and port:
            ports[volume.volume_id] = port
    return ports


def volume_disk(paths: Paths, volume_id: str, *, readonly: bool, port: int) -> Disk:
    return Disk(
        port=port,
        id=volume_disk_id(volume_id),
        path=str(paths.volume_disk(volume_id)),
        readonly=readonly,
        shared=readonly,
    )


def vm_disks(record: InstanceRecord, root_disk: Path, paths: Paths, *, hotplug: bool) -> tuple[Disk, ...]:
    """The disks in the order in which the guest sees them. Without ``hotplug`` all are fixed."""
    spec = record.spec
    mine = paths.instance(record.id)
    disks = [
        Disk(id="root", path=str(root_disk), readonly=True, shared=True, bps=spec.disk_io_bps),
        Disk(id="overlay", path=str(mine.overlay), bps=spec.disk_io_bps),
        Disk(id="boot", path=str(mine.boot_disk)),
    ]
    for volume in spec.volumes:
        port = record.ports.get(volume.volume_id, 0) if hotplug else 0
        disks.append(volume_disk(paths, volume.volume_id, readonly=volume.readonly, port=port))
        if volume.overlay:
            overlay = mine.volume_overlay(volume.volume_id)
            disks.append(Disk(id=volume_overlay_disk_id(volume.volume_id), path=str(overlay)))
    return tuple(disks)


def vm_config(record: InstanceRecord, around: Environment, paths: Paths) -> VmConfig:
    spec = record.spec
    mine = paths.instance(record.id)
    nics: tuple[Nic, ...] = ()
    if around.lease is not None and around.lease.enabled:
        nics = (Nic(id="net0", tap=around.lease.tap, mac=around.lease.mac, mtu=around.mtu),)
    return VmConfig(
        instance_id=record.id,
        name=record.name,
        vcpus=spec.vcpus,
        memory_bytes=spec.memory_bytes,
        hotplug_bytes=spec.hotplug_bytes,
        kernel=around.kernel,
        initrd=around.initrd,
        cmdline=around.cmdline,
        disks=vm_disks(record, around.root_disk, paths, hotplug=around.hotplug),
        nics=nics,
        pci_devices=tuple(PciDevice(id=f"dev{n}", sysfs_path=path) for n, path in enumerate(around.devices)),
        run_dir=str(mine.run),
        jail=str(mine.jail),
        console_log=str(mine.log("app")),
        vmm_log=str(mine.log("vmm")),
        vsock_cid=around.lease.cid if around.vsock and around.lease is not None else 0,
        uid=around.uid,
        gid=around.uid,
        cgroup=around.cgroup,
        disk_ports=DISK_PORTS if around.hotplug else 0,
    )
