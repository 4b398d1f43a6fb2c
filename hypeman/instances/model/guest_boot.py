"""Builds the guest's boot configuration from a record and its image. Pure."""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Mapping, Sequence

from hypeman.guest.boot import BootConfig, CaCertificate, GuestVolume
from hypeman.guest.boot import GuestNetwork as BootNetwork
from hypeman.guest.settings import parse_settings
from hypeman.hypervisor.interface import Capabilities, Disk
from hypeman.images.types import ImageConfig
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.validate import guest_env
from hypeman.instances.model.vm import volume_disk_id, volume_overlay_disk_id
from hypeman.network.types import GuestNetwork

STOP_GRACE = 10.0
"""Seconds between the stop signal and the kill, as with Docker."""


def boot_config(
    record: InstanceRecord,
    image: ImageConfig,
    *,
    root_fs: str,
    disks: Sequence[Disk],
    network: GuestNetwork | None,
    egress_env: Mapping[str, str],
    certificates: tuple[CaCertificate, ...],
    able: Capabilities,
    clock_ns: int,
) -> BootConfig:
    """``disks`` are in the order in which the guest sees them; ``able`` is its VMM's capabilities."""
    spec = record.spec
    env = {**dict(image.env), **guest_env(spec), **egress_env}
    settings = parse_settings(spec.tags, image.labels)
    return BootConfig(
        instance_id=record.id,
        hostname=hostname(record),
        machine_id=machine_id(record.id),
        nonce=record.nonce,
        argv=command_line(image, spec.entrypoint, spec.cmd),
        env=tuple(f"{key}={value}" for key, value in env.items()),
        cwd=spec.working_dir or image.working_dir,
        user=spec.user or image.user,
        idle=spec.idle,
        root_fs=root_fs,
        volumes=tuple(
            GuestVolume(
                disk_id=volume_disk_id(volume.volume_id),
                path=volume.mount_path,
                readonly=volume.readonly,
                overlay_disk_id=volume_overlay_disk_id(volume.volume_id) if volume.overlay else "",
                files=bool(volume.files),
            )
            for volume in sorted(
                spec.volumes, key=lambda each: bool(each.files)
            )  # files lie over what directories bring
        ),
        network=boot_network(network),
        ca_certificates=certificates,
        stop_signal=signal_number(image.stop_signal),
        grace_seconds=STOP_GRACE,
        skip_agent=spec.skip_guest_agent,
        clock_ns=clock_ns,
        disk_order=() if able.disk_serials else tuple(disk.id for disk in disks),
        power_off_by_reset=not able.power_off,
        volume_dirs=tuple(dict.fromkeys((*image.volumes, *settings.volume_dirs))),
        pid1=settings.pid1,
        shm_bytes=settings.shm_bytes,
        sysctls=settings.sysctls,
        ulimits=settings.ulimits,
    )


def hostname(record: InstanceRecord) -> str:
    """As requested, else the instance's name; a fork has its own name unless its source requested one."""
    return record.spec.hostname or record.name


def command_line(
    image: ImageConfig, entrypoint: tuple[str, ...] | None, cmd: tuple[str, ...] | None
) -> tuple[str, ...]:
    """What the guest runs: the image's entry point and command, or their overrides. As with Docker,
    overriding the entry point drops the image's command."""
    if entrypoint is not None:
        return (*entrypoint, *(cmd or ()))
    return (*(image.entrypoint or ()), *(cmd if cmd is not None else image.cmd or ()))


def signal_number(name: str) -> int:
    """An image's StopSignal: ``SIGINT``, ``int``, ``2``, ``SIGRTMIN+3``, ``RTMAX-1``. Anything else is SIGTERM."""
    text = name.upper().removeprefix("SIG")
    if text.isdecimal() and 0 < int(text) <= signal.SIGRTMAX:
        return int(text)
    if realtime := _REALTIME.fullmatch(text):
        base = signal.SIGRTMIN if realtime["base"] == "MIN" else signal.SIGRTMAX
        number = base + int(realtime["offset"] or "0")
        return number if signal.SIGRTMIN <= number <= signal.SIGRTMAX else int(signal.SIGTERM)
    try:
        return int(signal.Signals[f"SIG{text}"])
    except KeyError:
        return int(signal.SIGTERM)


_REALTIME = re.compile(r"RT(?P<base>MIN|MAX)(?P<offset>[+-]\d{1,2})?")


def boot_network(network: GuestNetwork | None) -> BootNetwork | None:
    """The guest's network as its agent sets it up."""
    if network is None:
        return None
    return BootNetwork(
        mac=network.mac,
        address=network.address,
        prefix=network.prefix_length,
        gateway=network.gateway,
        dns=(network.dns_server,),
        mtu=network.mtu,
    )


def machine_id(instance_id: str) -> str:
    """32 hex digits (machine-id(5)), a function of the instance's id."""
    return hashlib.sha256(b"machine-id:" + instance_id.encode()).hexdigest()[:32]
