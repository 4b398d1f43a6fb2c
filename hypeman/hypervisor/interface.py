"""The interface that every hypervisor driver implements.

    Driver   one per kind of VMM; holds no VM. Pure functions (``capabilities``, ``validate``), and
             ``launch``, ``restore`` and ``reattach``, each of which returns a live Vmm.
    Vmm      one live process. Optional methods are listed in Capabilities; where unsupported they
             raise NotSupported before changing anything.

Rules for every driver (verified by ``tests/conformance/check_driver.py``):

- A VmConfig is complete: the same config gives the same VM, also after a server restart.
- ``validate`` is pure and raises NotSupported or InvalidRequest before anything exists.
- ``launch`` and ``restore`` either return a live Vmm or leave no process behind, even when cancelled.
- The VMM outlives the server. ``reattach`` finds it again from a stored ``Vmm.handle``, or raises VmmGone.
- ``kill`` is idempotent; ``wait_exit`` returns immediately if the VMM has already exited.
- Guest memory and captures are files of mode 0600.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import msgspec

from hypeman.errors import InternalError
from hypeman.hypervisor.kinds import HypervisorKind as HypervisorKind

if TYPE_CHECKING:  # for annotations; the types of this module are used by pure code
    import trio

AGENT_VSOCK_PORT = 1024
"""Port of the guest agent when the channel is vsock."""


class Disk(msgspec.Struct, frozen=True):
    """One raw block device. ``id`` is stable and unique in the VM; it is also the serial number."""

    id: str
    path: str
    readonly: bool = False
    bps: int = 0
    """Limit in bytes per second, for reads and writes each; 0: no limit."""
    shared: bool = False
    """Other VMMs may have the same file open; only with ``readonly``."""
    port: int = 0
    """0: not removable; n: in the n-th of ``VmConfig.disk_ports``, from which ``remove_disk`` can unplug it
    while the guest runs. A disk keeps its port, since captures contain it. ``add_disk`` replaces 0 by a
    free port."""


class Nic(msgspec.Struct, frozen=True):
    """One network interface on an existing TAP. The VMM gets the TAP as a descriptor
    (``Host.links.open_tap``) if it supports that, else by name."""

    id: str
    tap: str
    mac: str
    mtu: int = 1500


class PciDevice(msgspec.Struct, frozen=True):
    """A VFIO device: a PCI function by its sysfs path, or an mdev by its."""

    id: str
    sysfs_path: str


class VmConfig(msgspec.Struct, frozen=True):
    """One virtual machine, the same for all hypervisors. Stored with a capture, because a restore
    needs the same devices."""

    instance_id: str
    name: str
    vcpus: int
    memory_bytes: int
    kernel: str
    initrd: str | None
    cmdline: str
    disks: tuple[Disk, ...]
    """In the order in which the guest sees them."""
    run_dir: str
    """Directory for sockets; the driver creates it, empties it at each start, and makes ``uid`` its owner only
    if the VMM itself must write there. At most 85 bytes, so that every socket path fits."""
    jail: str
    """Path of a chroot for VMMs that use one, on the file system of disks and captures. The driver creates it and
    removes it with the VMM."""
    console_log: str
    """The serial console is appended to this file."""
    vmm_log: str
    """Output of the VMM itself."""
    hotplug_bytes: int = 0
    disk_ports: int = 8
    """Number of ports for disk hot-plug; at most ``Capabilities.hotplug_ports``."""
    nics: tuple[Nic, ...] = ()
    pci_devices: tuple[PciDevice, ...] = ()
    vsock_cid: int = 0
    """Unique vsock context id, if the VMM's guest channel is vsock; 0 for none."""
    uid: int = 0
    gid: int = 0
    """User that the VMM runs as; 0 only in tests and where the host allows nothing else."""
    cgroup: str = ""
    """Control group that the VMM is put into; empty for none."""


class Capabilities(msgspec.Struct, frozen=True):
    """What a kind of VMM supports on this host; the API returns them as runtime features (§2.1)."""

    available: bool
    """Can launch VMs; ``reason`` says why not."""
    reason: str = ""
    version: str = ""
    binary: str = ""
    accelerator: str = ""
    """``kvm`` or ``tcg``."""
    accelerator_reason: str = ""
    """Why not KVM; for ``doctor`` and the log."""
    standby: bool = False
    """Can save memory and devices to a file and restore from it."""
    fork: bool = False
    """A capture may be restored more than once, each with private memory."""
    pause: bool = False
    hotplug_memory: bool = False
    hotplug_disk: bool = False
    hotplug_ports: int = 0
    """Maximum ``disk_ports`` of a VM."""
    balloon: bool = False
    vsock: bool = False
    pci_passthrough: bool = False
    disk_io_limit: bool = False
    disk_resize: bool = False
    max_disks: int = 24
    disk_serials: bool = True
    """Guests can identify a disk by its id; else only by its position."""
    power_off: bool = True
    """A guest can power off; else it stops with a reset."""


class VmmState(enum.StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    """The guest is off, the process still runs."""


class ExitReason(enum.StrEnum):
    POWEROFF = "poweroff"
    """The guest shut down."""
    RESET = "reset"
    """The guest rebooted or its kernel panicked; the VMM itself never reboots a VM."""
    KILLED = "killed"
    """We, or someone on the host, killed the process."""
    FAILED = "failed"
    """The VMM failed; see its log."""


HALTED = "the guest halted"
"""Message of a VmmExit."""


class VmmExit(msgspec.Struct, frozen=True):
    reason: ExitReason
    message: str = ""


class VmmHandle(msgspec.Struct, frozen=True):
    """Stored to find a running VMM again: a bare pid is not enough."""

    kind: HypervisorKind
    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of /proc/<pid>/stat: with the pid it identifies one process."""
    boot_id: str
    run_dir: str
    config: VmConfig
    memory_inode: int = 0
    """Inode of the memfd that holds the guest's memory, or of the file that is mapped privately; 0 if unknown."""


class LaunchFailed(InternalError):
    """The VMM failed to start or exited immediately; it was cleaned up. Contains the VMM's error output."""


class VmmGone(InternalError):
    """The VMM of a handle is no longer running."""


class VmmBroken(InternalError):
    """The VMM is running but does not answer, or answers with invalid data."""


class CaptureInvalid(InternalError):
    """A capture is incomplete, modified, or from an incompatible VMM; it was not restored."""


class Capture(msgspec.Struct, frozen=True):
    """A saved VM in one directory, with everything that a restore must check first. Written as
    ``capture.json`` next to the payload; a directory without it is not a capture."""

    kind: HypervisorKind
    version: str
    """Version of the VMM that wrote it."""
    machine: str
    """Machine type, CPU model and accelerator as far as the state depends on them."""
    config: VmConfig
    files: dict[str, int]
    """Name below the directory → size in bytes."""
    checksums: dict[str, str]
    """Name → ``crc32c:…`` or ``sha256:…`` of the device state (not of memory, which is checked by size)."""
    boot_id: str = ""
    """The boot of the host in which it was written without being flushed; empty: flushed."""


@runtime_checkable
class Vmm(Protocol):
    """One live VMM process."""

    @property
    def handle(self) -> VmmHandle: ...

    async def state(self) -> VmmState:
        """State as reported by the VMM. Raises VmmGone or VmmBroken."""
        ...

    async def open_channel(self) -> trio.abc.Stream:
        """The byte stream to the guest agent; one at a time. A new one replaces the old one."""
        ...

    async def pause(self) -> None: ...
    async def resume(self) -> None: ...

    async def capture(self, directory: Path, *, flush: bool = True) -> Capture:
        """Pause the VM and save it into ``directory`` (which exists and is empty); it stays paused.

        The directory is complete, ``capture.json`` last, before this returns, and flushed to disk unless ``flush`` is
        false: then it is valid until the host's next boot. The VM may be
        resumed or killed afterwards, and resumed after a failure too; later writes do not affect the capture.
        The channel may be closed when the VM resumes (Firecracker resets it).
        """
        ...

    async def add_disk(self, disk: Disk) -> Disk:
        """Plug a disk in. Returns it with its port, as now in ``handle.config``. The guest is notified shortly
        after; a capture taken before that may restore without it (Cloud Hypervisor does not notify again)."""
        ...

    async def remove_disk(self, disk_id: str) -> None:
        """Returns when the guest has released the disk; immediately if the VM never got it, because the server was
        killed before plugging it in. Raises VmmBroken after the VMM's own time limit."""
        ...

    async def resize_disk(self, disk_id: str, size: int) -> None: ...

    async def resize_memory(self, size: int) -> None:
        """Set total guest memory in bytes, from ``memory_bytes`` to ``memory_bytes`` plus ``hotplug_bytes``.

        Raises VmmBroken if the guest did not reach the size in time, which is common when shrinking:
        it cannot release blocks that are in use, and keeps trying.
        """
        ...

    async def can_lend(self) -> bool:
        """Whether the guest can lend memory to the host (balloon): not if devices pin it, nor on QEMU if its memory is
        a mapping of a capture that others use, which ballooning would corrupt."""
        ...

    async def set_balloon(self, size: int) -> None:
        """Set how many bytes of its memory the guest lends to the host: whole MiB, from 0 (returns all) to less than
        ``memory_bytes``. Does not wait for the guest, which lends free memory and reclaims it before it runs out
        of memory.

        Raises NotSupported if it cannot lend. A capture contains the size, so set it to 0 before.
        """
        ...

    async def set_link(self, nic_id: str, *, up: bool) -> None:
        """Set the guest's link up or down. A no-op on VMMs without this feature (all but QEMU): there the
        rules on the TAP drop packets from a guest with a foreign address."""
        ...

    async def rotate_console(self) -> None:
        """Switch to a new, empty console log; the caller has renamed the old one to ``<console_log>.1``."""
        ...

    def vcpu_turns(self) -> int | None:
        """How often the vCPUs went to sleep so far; None if that is unknown, or if one of them does not sleep now.

        A Linux that is alive wakes up at least some times in a second. One that was halted never does.
        """
        ...

    async def wait_exit(self) -> VmmExit:
        """Wait for the process to exit; may be called by several tasks and again afterwards."""
        ...

    async def kill(self) -> None:
        """Kill the process and wait until it has exited."""
        ...

    async def aclose(self) -> None:
        """Close sockets and descriptors; the VMM keeps running."""
        ...


@runtime_checkable
class Driver(Protocol):
    """One kind of VMM."""

    @property
    def kind(self) -> HypervisorKind: ...

    @property
    def capabilities(self) -> Capabilities:
        """The result of ``probe``."""
        ...

    async def probe(self) -> Capabilities:
        """Check for the binary, its version and a working accelerator. KVM counts as working only if an
        ordinary kernel boots on it."""
        ...

    def adopt_capabilities(self, capabilities: Capabilities) -> None:
        """Use the result of an earlier ``probe`` instead of probing again."""
        ...

    def kernel_cmdline(self, *, hotplug_memory: bool) -> str:
        """The guest kernel command line for this VMM's machine. Pure."""
        ...

    def validate(self, config: VmConfig) -> None:
        """Raise NotSupported or InvalidRequest if this VMM cannot run ``config``. Pure."""
        ...

    async def launch(self, config: VmConfig) -> Vmm:
        """Start the process and boot the guest. Raises LaunchFailed.

        All files are opened by us and passed as descriptors if the VMM supports it: disks, logs
        and the kernel may belong to root, in directories that ``config.uid`` cannot enter.
        """
        ...

    async def restore(self, config: VmConfig, capture: Path, *, keep_capture: bool, paused: bool = False) -> Vmm:
        """Restore the VM saved in ``capture``, with the names, paths and TAPs of ``config``.

        With ``keep_capture`` the capture is unchanged (fork, restore from a snapshot). ``paused`` leaves the vCPUs
        stopped and the links down. Raises CaptureInvalid before anything is started if the capture does not match.

        Without ``keep_capture`` the capture stays intact until the guest resumes, that is until
        ``resume`` (or until this returns, unless ``paused``): its record is removed before the guest runs, its
        files after. So: restore paused, store ``handle``, resume; if we are killed anywhere in between, nothing is
        lost.
        """
        ...

    async def kill_stray(self, run_dir: str) -> bool:
        """Kill the VMM started for ``run_dir``, even if we were killed before recording it. Returns whether
        there was one."""
        ...

    async def reattach(self, handle: VmmHandle) -> Vmm:
        """Find the VMM of ``handle`` again after a server restart, else raise VmmGone."""
        ...
