"""A guest's boot configuration, as a Struct and as the bytes of a small raw disk.

Twin of ``ext/guest_agent/boot_config.c``. The disk has no file system: a header, fields (see
``fields.py``), padding, and in its last 4 KB an area where the guest records its outcome, in case the host
was not connected to receive it.

    0    magic "HYPEBOOT", u32 version, u32 length, u32 CRC-32 of the fields, u32 offset of the outcome
    24   fields
    …    outcome: magic "HYPEOVER", u32 length, u32 CRC-32, nonce, u8 event, fields

Disk ids are virtio serial numbers, limited to 20 bytes. Three are fixed: BOOT_DISK_ID, ROOT_DISK_ID and
OVERLAY_DISK_ID.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
import zlib
from typing import Annotated

import msgspec
from msgspec import Meta

from hypeman.errors import InvalidRequest
from hypeman.guest.fields import FieldWriter, MalformedFields, Tag
from hypeman.guest.types import Exited, Fatal, parse_event

BOOT_DISK_ID = "boot"
ROOT_DISK_ID = "root"
OVERLAY_DISK_ID = "overlay"
DISK_ID_BYTES = 20

CA_BUNDLE_PATH = "/etc/hypeman/ca-bundle.pem"
"""In a guest with extra certificates: the image's roots plus ours. For variables that *replace* the roots."""
CA_CERT_PATH = "/etc/hypeman/ca.pem"
"""Only ours, for variables that add to the roots."""

_HEADER = struct.Struct("<8sIIII")
_MAGIC = b"HYPEBOOT"
_VERSION = 1
_BLOCK = 4096
_MAX_FIELDS = 1024 * 1024
_MAX_STRINGS = 8192
MAX_BOOT_DISK = 2 * _MAX_FIELDS
"""Maximum bytes of a boot disk of ours; a VMM may enlarge it."""

_OUTCOME_HEADER = struct.Struct("<8sII16s")
_OUTCOME_MAGIC = b"HYPEOVER"
_OUTCOME_BYTES = 4096


class GuestNetwork(msgspec.Struct, frozen=True):
    """The guest's only interface, identified by its MAC."""

    mac: str
    address: str
    prefix: Annotated[int, Meta(ge=0, le=32)]
    gateway: str = ""
    """Default gateway, always on-link regardless of the prefix; empty for none."""
    dns: tuple[str, ...] = ()
    mtu: int = 0
    """0 keeps the device's."""


class GuestVolume(msgspec.Struct, frozen=True):
    """A disk mounted in the guest."""

    disk_id: str
    path: str
    readonly: bool = False
    fs_type: str = "ext4"
    overlay_disk_id: str = ""
    """A second disk for this guest's writes; the volume itself is then read-only."""
    files: bool = False
    """Each file of it is mounted on its own, over the one of its path below ``path``, which may be the root."""


class CaCertificate(msgspec.Struct, frozen=True):
    """A certificate authority for the guest to trust."""

    pem: str
    subject_hash: str = ""
    """OpenSSL's hash of the subject (8 hexadecimal digits), for /etc/ssl/certs/<hash>.0; empty skips that file."""


class Pid1(enum.IntEnum):
    """Who is process 1, as the image's program sees it."""

    DETECT = 0
    """The program if it is an init system (``ext/guest_agent/pid1.h``), else the agent."""
    AGENT = 1
    WORKLOAD = 2


class Ulimit(msgspec.Struct, frozen=True):
    """A resource limit of every program; ``UNLIMITED`` for none."""

    resource: int
    """``resource.RLIMIT_NOFILE`` …"""
    soft: int
    hard: int


UNLIMITED = 2**64 - 1
MAX_VOLUME_DIRS = 256
MAX_SYSCTLS = 64
MAX_ULIMITS = 16


class BootConfig(msgspec.Struct, frozen=True):
    """One boot of one guest."""

    instance_id: str
    hostname: str
    nonce: bytes
    """16 random bytes per boot that authenticate the agent."""
    argv: tuple[str, ...]
    """The image's entry point and command. An init such as /sbin/init runs as process 1."""
    env: tuple[str, ...] = ()
    """"NAME=value" each."""
    cwd: str = ""
    user: str = ""
    """As in an image's config: name, uid, name:group … Empty: root."""
    root_fs: str = "erofs"
    overlay: bool = True
    """Writes go to the disk OVERLAY_DISK_ID (ext4), otherwise to memory."""
    volumes: tuple[GuestVolume, ...] = ()
    network: GuestNetwork | None = None
    ca_certificates: tuple[CaCertificate, ...] = ()
    stop_signal: int = 15
    grace_seconds: float = 10.0
    idle: bool = False
    """Starts no program: the guest runs until it is stopped."""
    skip_agent: bool = False
    """Disables exec, copy and stat; events and shutdown still work."""
    machine_id: str = ""
    """32 hexadecimal digits for an image that has an /etc/machine-id."""
    clock_ns: int = 0
    """When this was written, in nanoseconds since 1970: the guest's clock is not earlier. The exact time follows over
    the channel before the program starts."""
    disk_order: tuple[str, ...] = ()
    """Ids in device order, only for VMMs that cannot set disk serial numbers."""
    console: str = ""
    """Device for the program's output; empty: the kernel's console."""
    power_off_by_reset: bool = False
    """The VMM exits on reset, not on power-off (Firecracker, microvm without ACPI)."""
    volume_dirs: tuple[str, ...] = ()
    """Directories that the image declares as volumes: created if missing."""
    pid1: Pid1 = Pid1.DETECT
    shm_bytes: int = 0
    """Size of /dev/shm; 0: half of the memory, 64 MiB at least."""
    sysctls: tuple[str, ...] = ()
    """"name=value" each, over the agent's own; one that the kernel refuses ends the boot."""
    ulimits: tuple[Ulimit, ...] = ()
    """Over the agent's own."""


def render_boot_disk(config: BootConfig) -> bytes:
    """The whole disk, a multiple of 4 KB. Raises InvalidRequest for an invalid config."""
    try:
        fields = _render_fields(config).render()
    except ValueError as error:
        raise InvalidRequest(f"the guest's configuration cannot be encoded: {error}") from error
    if len(fields) > _MAX_FIELDS or len(config.argv) + len(config.env) > _MAX_STRINGS:
        raise InvalidRequest("command and environment are larger than 1 MB or 8192 entries")
    for entries, most, what in (
        (config.volume_dirs, MAX_VOLUME_DIRS, "volumes of the image"),
        (config.sysctls, MAX_SYSCTLS, "sysctls"),
        (config.ulimits, MAX_ULIMITS, "ulimits"),
    ):
        if len(entries) > most:
            raise InvalidRequest(f"{len(entries)} {what}: at most {most} are possible")
    outcome_offset = -(-(_HEADER.size + len(fields)) // _BLOCK) * _BLOCK
    header = _HEADER.pack(_MAGIC, _VERSION, len(fields), zlib.crc32(fields), outcome_offset)
    return (header + fields).ljust(outcome_offset + _OUTCOME_BYTES, b"\0")


def parse_outcome(disk: bytes, nonce: bytes) -> Exited | Fatal | None:
    """How the boot with this nonce ended, if the guest recorded it; None otherwise.

    The bytes are written by the guest and as untrusted as its messages.
    """
    if len(disk) < _HEADER.size:
        return None
    magic, version, _, _, offset = _HEADER.unpack_from(disk)
    if magic != _MAGIC or version != _VERSION or offset + _OUTCOME_BYTES > len(disk):
        return None
    magic, length, crc, its_nonce = _OUTCOME_HEADER.unpack_from(disk, offset)
    record = disk[offset + 16 : offset + 16 + length]
    if magic != _OUTCOME_MAGIC or length > _OUTCOME_BYTES - 16 or its_nonce != nonce or zlib.crc32(record) != crc:
        return None
    try:
        event = parse_event(record[16:])
    except MalformedFields:
        return None
    return event if isinstance(event, Exited | Fatal) else None


def render_network(writer: FieldWriter, network: GuestNetwork) -> None:
    """Append the fields of a network. Raises ValueError for invalid addresses."""
    mac = bytes.fromhex(network.mac.replace(":", ""))
    if len(mac) != 6:
        raise ValueError(f"{network.mac!r} is not a MAC address")
    writer.add(Tag.MAC, mac)
    writer.add(Tag.ADDRESS, ipaddress.IPv4Address(network.address).packed)
    writer.u8(Tag.PREFIX, network.prefix)
    if network.gateway:
        writer.add(Tag.GATEWAY, ipaddress.IPv4Address(network.gateway).packed)
    for server in network.dns[:4]:
        writer.add(Tag.DNS, ipaddress.IPv4Address(server).packed)
    if network.mtu:
        writer.u32(Tag.MTU, network.mtu)


def render_volume(volume: GuestVolume) -> FieldWriter:
    """The nested fields of a volume."""
    writer = FieldWriter()
    writer.text(Tag.DISK_ID, check_disk_id(volume.disk_id))
    writer.text(Tag.PATH, volume.path)
    writer.text(Tag.FS_TYPE, volume.fs_type)
    writer.flag(Tag.READONLY, volume.readonly)
    if volume.files:
        writer.flag(Tag.FILES, True)
    if volume.overlay_disk_id:
        writer.text(Tag.OVERLAY_DISK_ID, check_disk_id(volume.overlay_disk_id))
    return writer


def check_disk_id(disk_id: str) -> str:
    """``disk_id`` if it fits a virtio serial number, else raises ValueError."""
    if not 1 <= len(disk_id.encode()) <= DISK_ID_BYTES:
        raise ValueError(f"disk id {disk_id!r} must have 1 to {DISK_ID_BYTES} bytes")
    return disk_id


def _render_fields(config: BootConfig) -> FieldWriter:
    if len(config.nonce) != 16:
        raise ValueError("the nonce must have 16 bytes")
    writer = FieldWriter()
    writer.text(Tag.INSTANCE_ID, config.instance_id)
    writer.text(Tag.HOSTNAME, config.hostname)
    writer.add(Tag.NONCE, config.nonce)
    for argument in config.argv:
        writer.text(Tag.ARG, argument)
    for variable in config.env:
        writer.text(Tag.ENV, variable)
    writer.text(Tag.CWD, config.cwd)
    writer.text(Tag.USER, config.user)
    writer.text(Tag.ROOT_FS, config.root_fs)
    writer.flag(Tag.OVERLAY, config.overlay)
    for volume in config.volumes:
        writer.nested(Tag.VOLUME, render_volume(volume))
    if config.network is not None:
        render_network(writer, config.network)
    for ca in config.ca_certificates:
        nested = FieldWriter().text(Tag.CA_PEM, ca.pem)
        if ca.subject_hash:
            nested.text(Tag.CA_HASH, ca.subject_hash)
        writer.nested(Tag.CA, nested)
    writer.u32(Tag.STOP_SIGNAL, config.stop_signal)
    writer.u64(Tag.GRACE_MS, round(config.grace_seconds * 1000))
    writer.flag(Tag.IDLE, config.idle)
    writer.flag(Tag.SKIP_AGENT, config.skip_agent)
    writer.flag(Tag.POWER_OFF_BY_RESET, config.power_off_by_reset)
    writer.u64(Tag.CLOCK_NS, config.clock_ns)
    writer.text(Tag.CONSOLE, config.console)
    if config.machine_id:
        writer.text(Tag.MACHINE_ID, config.machine_id)
    for disk_id in config.disk_order:
        writer.text(Tag.DISK_ORDER, check_disk_id(disk_id))
    for path in config.volume_dirs:
        writer.text(Tag.VOLUME_DIR, path)
    if config.pid1 is not Pid1.DETECT:
        writer.u8(Tag.PID1, config.pid1)
    if config.shm_bytes:
        writer.u64(Tag.SHM_BYTES, config.shm_bytes)
    for sysctl in config.sysctls:
        writer.text(Tag.SYSCTL, sysctl)
    for limit in config.ulimits:
        writer.add(Tag.ULIMIT, struct.pack("<IQQ", limit.resource, limit.soft, limit.hard))
    return writer
