"""VmConfig to QEMU's command line. Pure: the same config gives the same arguments, in the same order.

Two boards on x86-64. ``Q35`` is the default, since only it has hot-plug of disks and memory, and an accurate clock
without KVM. ``MICROVM`` (the kind ``qemu-microvm``) has no PCI: it boots faster with fewer features. ``VIRT`` is
arm64's; its PCI Express bus is laid out as that of q35. Versioned
machine types are pinned, since a capture can only be loaded by the type that wrote it.
With PCI each device has its fixed place on the bus, so that a disk that was plugged or pulled moves no other:

    slot   01 agent port   02 balloon   03 random numbers   05 hot-pluggable memory
           08…0f network   10…12 fixed disks (8 functions each)
           18…1a ports that take disks at run time   1c ports with passed-through devices

QEMU opens no file by name: disks, logs and TAPs come as descriptors (``/dev/fdset``), the sockets
already listen, kernel and memory are reached through ``/proc/self/fd``. So the VMM's user needs no
way into our directories, and no path has to survive QEMU's option syntax.

The guest channel is a virtio-serial port: it works on every host (vhost-vsock requires a kernel module),
answers in 0.15 ms, and a port belongs to one VM, where a vsock listener would be shared by all.
"""

from __future__ import annotations

import re

import msgspec

from hypeman.architecture import AMD64, ARM64, HOST, Architecture
from hypeman.errors import InvalidRequest
from hypeman.hypervisor.interface import Disk, VmConfig
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.units import MIB


class Board(msgspec.Struct, frozen=True):
    """A machine type and its capabilities."""

    type: str
    options: str
    pci: bool
    pinned: bool
    """The type is versioned, so newer QEMUs load captures of older ones."""
    max_disks: int
    max_nics: int
    console_reopens: bool = True
    """Its serial device takes another log file while it runs."""


Q35 = Board("pc-q35-7.2", "sata=off,smbus=off,vmport=off", pci=True, pinned=True, max_disks=48, max_nics=8)
MICROVM = Board("microvm", "", pci=False, pinned=False, max_disks=16, max_nics=4)
"""24 places for virtio; the port, the balloon and the random numbers take three."""
VIRT = Board("virt-7.2", "gic-version=max", pci=True, pinned=True, max_disks=48, max_nics=8, console_reopens=False)
"""The newest interrupt controller that the accelerator has: GICv3 with MSI under TCG, the host's under KVM."""
NO_BOARD = Board("none", "", pci=False, pinned=False, max_disks=0, max_nics=0)
"""A kind that this architecture's QEMU does not have."""

BOARDS: dict[Architecture, dict[HypervisorKind, Board]] = {
    AMD64: {HypervisorKind.QEMU: Q35, HypervisorKind.QEMU_MICROVM: MICROVM},
    ARM64: {HypervisorKind.QEMU: VIRT},
}

MINIMUM_VERSION = (5, 2)
"""Debian 11's, and older than Ubuntu 22.04's. A pinned board of 7.2 is that of its own version there (``board_of``)."""
_PINNED_VERSION = (7, 2)
READONLY_FILE = (8, 2)
"""Since this version QEMU can map a file privately that it cannot write to; before, it opened it for writing."""
AGENT_PORT_NAME = "hypeman.agent"
LOG_PORT_NAME = "hypeman.log"
"""Names of virtio-serial ports; the agent looks for them in /sys/class/virtio-ports."""
MAX_DISK_PORTS = 24
"""Each costs a boot under TCG 20 ms."""
MAX_FIXED_DISKS = 24
MAX_PCI_DEVICES = 8
MAX_SERIAL = 20
"""Bytes that virtio-blk has for a serial number."""
MAX_VCPUS = 255
MAX_RUN_DIR = 90
"""Of the 107 bytes of a socket path."""
MEMORY_BLOCK = 2 * 1024 * 1024
"""Unit in which virtio-mem plugs."""
_ID = re.compile(rf"[a-z][a-z0-9-]{{0,{MAX_SERIAL - 1}}}")
_OWN_IDS = frozenset({"serial", "agent-port", "balloon", "hotplug-memory"})

CONSOLE_SET = "console"
"""Tag (``opaque``) of the descriptor set that the console is written to."""


class Accelerator(msgspec.Struct, frozen=True):
    """How the vCPUs run; part of what a capture depends on."""

    name: str
    """``kvm`` or ``tcg``."""
    cpu: str
    """Model for ``-cpu``."""

    @property
    def options(self) -> str:
        # A translation buffer of 32 MB costs no time at boot and saves 10-18 MB of RSS against the default.
        return "kvm" if self.name == "kvm" else "tcg,thread=multi,tb-size=32"


# x86-64-v2, which is what today's images want, and random numbers from the first moment on. ``max`` would
# run AVX2 programs too, but costs every boot 0.35 s of 2.3 s CPU.
TCG = Accelerator("tcg", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+lahf_lm,+rdrand,+aes")
KVM = Accelerator("kvm", "host")
TCG_ARM64 = Accelerator("tcg", "neoverse-n1")
"""ARMv8.2 with atomics and crypto instructions, which today's programs look for. ``max`` would have pointer
authentication, which is slow to emulate, and changes with QEMU's version."""

EMULATORS = {AMD64: TCG, ARM64: TCG_ARM64}


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptor numbers that QEMU inherits, by what they are for."""

    qmp: int
    """A listening unix socket, as is ``agent``."""
    agent: int
    console: int
    memory: int
    disks: dict[str, int]
    """By disk id; opened for reading only or for both, as the disk says."""
    nics: dict[str, int]
    kernel: int | None = None
    """None for a restore: the kernel is in the memory that comes back."""
    initrd: int | None = None

    def all(self) -> tuple[int, ...]:
        rest = (self.kernel, self.initrd)
        return (
            *(self.qmp, self.agent, self.console, self.memory, *self.disks.values(), *self.nics.values()),
            *(fd for fd in rest if fd is not None),
        )


def check(config: VmConfig, board: Board) -> None:
    """Raise InvalidRequest for a config that no QEMU can run."""
    fixed = [disk for disk in config.disks if disk.port == 0]
    ports = [disk.port for disk in config.disks if disk.port]
    ids = [each.id for group in (config.disks, config.nics, config.pci_devices) for each in group]
    for wrong, message in (
        (not 1 <= config.vcpus <= MAX_VCPUS, f"{config.vcpus} vCPUs; 1 to {MAX_VCPUS} are possible"),
        (config.memory_bytes < MIB or config.memory_bytes % MIB, "memory must be whole MiB"),
        (config.hotplug_bytes < 0 or config.hotplug_bytes % MEMORY_BLOCK, "hot-plug memory must be whole 2 MiB"),
        (len(config.disks) > board.max_disks, f"at most {board.max_disks} disks are possible"),
        (len(fixed) > MAX_FIXED_DISKS, f"{len(fixed)} fixed disks; at most {MAX_FIXED_DISKS} are possible"),
        (not 0 <= config.disk_ports <= MAX_DISK_PORTS, f"at most {MAX_DISK_PORTS} disk ports are possible"),
        (any(not 0 < port <= config.disk_ports for port in ports), f"disk ports are 1 to {config.disk_ports}"),
        (len(set(ports)) < len(ports), "two disks have the same port"),
        (any(disk.shared and not disk.readonly for disk in config.disks), "a shared disk must be read-only"),
        (len(config.nics) > board.max_nics, f"at most {board.max_nics} network interfaces are possible"),
        (len(config.pci_devices) > MAX_PCI_DEVICES, f"at most {MAX_PCI_DEVICES} devices can be passed through"),
        (len(set(ids)) < len(ids), "two devices have the same id"),
        (not all(map(_ID.fullmatch, ids)), f"ids of devices are a letter and up to {MAX_SERIAL - 1} of a-z0-9-"),
        (bool(_OWN_IDS.intersection(ids)), f"these ids are the driver's: {', '.join(sorted(_OWN_IDS))}"),
        (any("," in device.sysfs_path for device in config.pci_devices), "a device path must have no comma"),
        (len(config.run_dir.encode()) > MAX_RUN_DIR, f"run_dir is longer than {MAX_RUN_DIR} bytes"),
    ):
        if wrong:
            raise InvalidRequest(f"QEMU cannot run this VM: {message}")


def board_of(board: Board, version: str) -> Board:
    """``board`` in the QEMU of ``version``: one that is older than the pinned type has the type of its own version."""
    numbers = tuple(map(int, version.split(".")[:2])) if version else _PINNED_VERSION
    if not board.pinned or numbers >= _PINNED_VERSION:
        return board
    name, _, _ = board.type.rpartition("-")
    return msgspec.structs.replace(board, type=f"{name}-{'.'.join(map(str, numbers))}")


def machine_name(board: Board, accelerator: Accelerator, version: str) -> str:
    """What a capture's state depends on besides the config, in one word."""
    return f"{board.type if board.pinned else f'{board.type}-{version}'}/{accelerator.name}/{accelerator.cpu}"


def kernel_cmdline(*extra: str, hotplug_memory: bool = False, machine: Architecture = HOST) -> str:
    """The guest kernel's command line for this machine.

    ``no_timer_check`` keeps a busy host from making the kernel panic over late ticks in its first 30 ms (seen
    under TCG). ``loglevel=1`` keeps the console, which is the instance's log, to what is fatal.
    ``cryptomgr.notests`` is the one argument that shortens the boot (18-20 %); ``panic=-1`` together with
    ``-no-reboot`` turns a panic into an exit at once; with hot-pluggable memory the kernel would set
    64 MB aside for bounce buffers that virtio never uses.
    """
    words = [f"console={machine.qemu_console}", "quiet", "panic=-1", *machine.reset_words, "loglevel=1"]
    words += [*machine.timer_words, "cryptomgr.notests", "random.trust_cpu=on"]
    if hotplug_memory:
        words.append("swiotlb=noforce")
    return " ".join((*words, *extra))


def command_line(
    config: VmConfig,
    fds: Descriptors,
    *,
    binary: str,
    board: Board,
    accelerator: Accelerator,
    extra_cmdline: str = "",
    incoming: bool = False,
    private_memory: bool = False,
    readonly_file: bool = False,
    devices_alone: bool = False,
) -> tuple[str, ...]:
    """All arguments of QEMU. It always starts with its vCPUs stopped.

    ``extra_cmdline``: what this host has to tell the guest kernel. ``incoming``: it waits for a saved
    state. ``private_memory``: what the guest writes stays out of the memory file, which several VMs may
    then share. ``readonly_file``: the descriptor of a private mapping cannot be written to (``READONLY_FILE``).
    ``devices_alone``: the saved state is that of the devices (``captures.DEVICES``).
    """
    mib = config.memory_bytes >> 20
    memory = f"{mib}M"
    if config.hotplug_bytes:
        memory += f",slots=1,maxmem={mib + (config.hotplug_bytes >> 20)}M"
    share = "off" if private_memory else "on"
    if readonly_file:
        share += ",readonly=on,rom=off"
    options = f",{board.options}" if board.options else ""
    arguments = [
        binary,
        *("-name", f"{config.instance_id},debug-threads=on"),
        *("-machine", f"{board.type}{options},memory-backend=mem"),
        *("-accel", accelerator.options),
        *("-cpu", accelerator.cpu),
        *("-smp", f"cpus={config.vcpus},sockets=1,cores={config.vcpus},threads=1"),
        *("-m", memory),
        *("-object", f"memory-backend-file,id=mem,size={mib}M,mem-path=/proc/self/fd/{fds.memory},share={share}"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-chardev", f"socket,id=qmp,fd={fds.qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *_descriptor_set(1, fds.console, CONSOLE_SET),
        *("-chardev", "file,id=console,path=/dev/fdset/1,append=on", "-serial", "chardev:console"),
        *("-device", _virtio(board, "serial", "id=serial,max_ports=3", "01.0")),
        *("-chardev", f"socket,id=agent,fd={fds.agent},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT_NAME},id=agent-port"),
        # What the program prints goes the quick way into the same file: a serial line leaves the guest for each byte.
        *("-chardev", "file,id=log,path=/dev/fdset/1,append=on"),
        *("-device", f"virtserialport,chardev=log,name={LOG_PORT_NAME},id=log-port"),
        # No free-page-reporting: with private memory QEMU 7.2 answers it by punching holes into the
        # memory file, which all forks of one capture share.
        *("-device", _virtio(board, "balloon", "id=balloon,deflate-on-oom=on", "02.0")),
        *("-object", "rng-builtin,id=random", "-device", _virtio(board, "rng", "rng=random", "03.0")),
    ]
    if config.hotplug_bytes:
        # Anonymous memory: virtio-mem of QEMU 7.2 empties a shared file when it starts, also on a restore.
        arguments += [
            *("-object", f"memory-backend-ram,id=hotmem,size={config.hotplug_bytes >> 20}M"),
            *("-device", "virtio-mem-pci,id=hotplug-memory,memdev=hotmem,requested-size=0,bus=pcie.0,addr=05.0"),
        ]
    if devices_alone:
        # xen-save-devices-state, which writes nothing but devices, writes no section that describes the machine.
        arguments += ["-global", "migration.send-configuration=off"]
    for index in range(config.disk_ports if board.pci else 0):
        port = _root_port(f"disk-port{index + 1}", 0x18, index, chassis=index + 1)
        arguments += ["-device", f"{port},io-reserve=0"]  # virtio uses no I/O space, and there is little of it
    for index, _ in enumerate(config.pci_devices):
        arguments += ["-device", _root_port(f"pci-port{index + 1}", 0x1C, index, chassis=100 + index)]
    for index, nic in enumerate(config.nics):
        options = f"id={nic.id},netdev=tap-{nic.id},mac={nic.mac},host_mtu={nic.mtu}"
        if board.pci:
            options += ",romfile="
        arguments += [
            *("-netdev", f"tap,id=tap-{nic.id},fd={fds.nics[nic.id]}"),
            *("-device", _virtio(board, "net", options, f"{8 + index:02x}.0")),
        ]
    fixed = 0
    for number, disk in enumerate(config.disks, 2):
        arguments += _descriptor_set(number, fds.disks[disk.id], disk_set(disk.id))
        arguments += ["-blockdev", _json(block_node(disk, number))]
        arguments += ["-device", _options(disk_device(disk, board, place=_fixed_place(fixed)))]
        fixed += disk.port == 0
    for index, device in enumerate(config.pci_devices):
        arguments += ["-device", f"vfio-pci,id={device.id},sysfsdev={device.sysfs_path},bus=pci-port{index + 1}"]
    if fds.kernel is not None:
        arguments += ["-kernel", f"/proc/self/fd/{fds.kernel}", "-append", f"{config.cmdline} {extra_cmdline}".strip()]
        if fds.initrd is not None:
            arguments += ["-initrd", f"/proc/self/fd/{fds.initrd}"]
    if incoming:
        arguments += ["-incoming", "defer"]
    return tuple(arguments)


def disk_set(disk_id: str) -> str:
    """Tag of the descriptor set that holds this disk's file."""
    return f"disk:{disk_id}"


def disk_node(disk_id: str) -> str:
    """Name of a disk's block node."""
    return f"node-{disk_id}"


def block_node(disk: Disk, descriptor_set: int) -> dict[str, object]:
    """Arguments of ``blockdev-add``, and of ``-blockdev``."""
    file = {
        "driver": "file",
        "filename": f"/dev/fdset/{descriptor_set}",
        "locking": "off" if disk.shared else "on",
    }
    return {
        "driver": "raw",
        "node-name": disk_node(disk.id),
        "read-only": disk.readonly,
        "discard": "unmap",
        "file": file,
    }


def disk_device(disk: Disk, board: Board, *, place: str = "") -> dict[str, object]:
    """Arguments of ``device_add`` and ``-device``. ``place`` is a fixed disk's slot; the others sit in a port."""
    where: dict[str, object] = {}
    if disk.port:
        where = {"bus": f"disk-port{disk.port}"}
    elif board.pci:
        where = {"bus": "pcie.0", "addr": place, "multifunction": True}
    return {
        "driver": "virtio-blk-pci" if board.pci else "virtio-blk-device",
        "id": disk.id,
        "drive": disk_node(disk.id),
        "serial": disk.id,
        # Report I/O errors to the guest; the default would stop the VM when the host's disk is full.
        "werror": "report",
        "rerror": "report",
        **where,
    }


def throttled_device(disk_id: str, board: Board) -> str:
    """Name of a disk for ``block_set_io_throttle``."""
    return f"/machine/peripheral/{disk_id}/virtio-backend" if board.pci else disk_id


def _virtio(board: Board, model: str, options: str, place: str) -> str:
    if board.pci:
        return f"virtio-{model}-pci,{options},bus=pcie.0,addr={place}"
    return f"virtio-{model}-device,{options}"


def _fixed_place(index: int) -> str:
    return f"{0x10 + index // 8:02x}.{index % 8}"


def _root_port(name: str, slot: int, index: int, *, chassis: int) -> str:
    place = f"{slot + index // 8:02x}.{index % 8}"
    where = f"bus=pcie.0,addr={place},multifunction=on,chassis={chassis},slot={chassis}"
    return f"pcie-root-port,id={name},{where}"


def _descriptor_set(number: int, fd: int, tag: str) -> list[str]:
    return ["-add-fd", f"fd={fd},set={number},opaque={tag}"]


def _options(arguments: dict[str, object]) -> str:
    """Arguments of ``device_add`` as those of ``-device``, which takes JSON only from QEMU 6.2 on."""
    words = [str(arguments["driver"])]
    for name, value in arguments.items():
        if name != "driver":
            text = ("off", "on")[value] if isinstance(value, bool) else str(value).replace(",", ",,")
            words.append(f"{name}={text}")
    return ",".join(words)


def _json(arguments: dict[str, object]) -> str:
    return msgspec.json.encode(arguments).decode()
