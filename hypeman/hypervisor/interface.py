"""What a hypervisor must offer, whichever VMM it is.

    Driver   one per kind of VMM; holds no VM. Pure questions first (``capabilities``, ``validate``),
             then ``launch``, ``restore`` and ``reattach``, each of which returns a live Vmm.
    Vmm      one live process. Few methods; the optional ones are announced in Capabilities and
             raise NotSupported, before anything was touched, where they are not.

Rules that every driver keeps (``tests/conformance/check_driver.py`` holds them to it):

- A VmConfig is complete: the same config gives the same VM, also after a restart of ours.
- ``validate`` is pure and raises NotSupported or InvalidRequest before anything exists.
- ``launch`` and ``restore`` either return a live Vmm or leave no process behind, also when cancelled.
- The VMM outlives us. ``reattach`` finds it again from what ``Vmm.handle`` held, or raises VmmGone.
- ``kill`` is idempotent; ``wait_exit`` returns at once for a VMM that has already gone.
- Memory of the guest and captures are files of mode 0600.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec
import trio

from hypeman.errors import InternalError
from hypeman.hypervisor.kinds import HypervisorKind as HypervisorKind

AGENT_VSOCK_PORT = 1024
"""Where the guest agent listens when the channel is vsock."""


class Disk(msgspec.Struct, frozen=True):
    """One raw block device. ``id`` is stable and unique in the VM; it is also the serial number."""

    id: str
    path: str
    readonly: bool = False
    bps: int = 0
    """Limit in bytes per second for reads and writes each; 0 is none."""
    shared: bool = False
    """Other VMMs have the same file open; only with ``readonly``."""
    port: int = 0
    """Where it sits: 0 for good, n in the n-th of ``VmConfig.disk_ports``, from where ``remove_disk`` can
    take it while the guest runs. A port once given stays the disk's own, for a capture remembers it.
    ``add_disk`` chooses a free one for 0."""


class Nic(msgspec.Struct, frozen=True):
    """One network interface on a TAP that exists already. The VMM gets the TAP as a descriptor
    (``Host.links.open_tap``) where it takes one, else by name."""

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
    wants the very same devices."""

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
    """Directory for sockets; the driver makes it, empties it at each start, and gives it to ``uid`` only
    where the VMM itself must write there. At most 85 bytes, so that every socket path fits."""
    jail: str
    """Directory, not there yet, for a VMM that is shut into one: on the file system of disks and captures. The driver
    makes it and, with the VMM, removes it."""
    console_log: str
    """The serial console is appended to this file."""
    vmm_log: str
    """Output of the VMM itself."""
    hotplug_bytes: int = 0
    disk_ports: int = 8
    """Ports that disks can be plugged into and pulled from at run time; at most ``Capabilities.hotplug_ports``."""
    nics: tuple[Nic, ...] = ()
    pci_devices: tuple[PciDevice, ...] = ()
    vsock_cid: int = 0
    """A context id of this VM's own, taken where the VMM's guest channel is vsock; 0 for none."""
    uid: int = 0
    gid: int = 0
    """Who the VMM runs as; 0 only in tests and where the host forbids anything else."""
    cgroup: str = ""
    """Control group that the VMM is put into; empty for none."""


class Capabilities(msgspec.Struct, frozen=True):
    """What a kind of VMM can do on this host; the API tells them as runtime features (§2.1)."""

    available: bool
    """Can launch now; ``reason`` says why not."""
    reason: str = ""
    version: str = ""
    binary: str = ""
    accelerator: str = ""
    """``kvm`` or ``tcg``."""
    accelerator_reason: str = ""
    """Why not KVM; for ``doctor`` and the log."""
    standby: bool = False
    """Can save memory and devices to a file and come back from it."""
    fork: bool = False
    """A capture may be restored more than once, each with private memory."""
    pause: bool = False
    hotplug_memory: bool = False
    hotplug_disk: bool = False
    hotplug_ports: int = 0
    """How many ``disk_ports`` a VM can have."""
    balloon: bool = False
    vsock: bool = False
    pci_passthrough: bool = False
    disk_io_limit: bool = False
    disk_resize: bool = False
    max_disks: int = 24
    disk_serials: bool = True
    """Guests find a disk by its id; else only by its place among the disks."""
    power_off: bool = True
    """A guest can power off; else it ends by a reset."""


class VmmState(enum.StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    """The guest is off, the process still there."""


class ExitReason(enum.StrEnum):
    POWEROFF = "poweroff"
    """The guest ended in order."""
    RESET = "reset"
    """The guest rebooted or its kernel panicked; VMs are not rebooted behind our back."""
    KILLED = "killed"
    """We, or somebody on the host, ended the process."""
    FAILED = "failed"
    """The VMM gave up by itself; see its log."""


class VmmExit(msgspec.Struct, frozen=True):
    reason: ExitReason
    message: str = ""


class VmmHandle(msgspec.Struct, frozen=True):
    """What is stored so that a living VMM is found again: never trust a bare pid."""

    kind: HypervisorKind
    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of /proc/<pid>/stat: with the pid it names one process."""
    boot_id: str
    run_dir: str
    config: VmConfig
    memory_inode: int = 0
    """Of the memfd that is the guest's memory; 0 where there is none."""


class LaunchFailed(InternalError):
    """The VMM could not be started, or ended at once; nothing is left of it. Says what the VMM said."""


class VmmGone(InternalError):
    """The VMM of a handle is no longer alive."""


class VmmBroken(InternalError):
    """The VMM lives but does not answer, or answers nonsense."""


class CaptureInvalid(InternalError):
    """A capture is torn, changed, or was made by an incompatible VMM; it was not restored."""


class Capture(msgspec.Struct, frozen=True):
    """A saved VM in one directory, with all that a restore must check first. Written as
    ``capture.json`` beside the payload; a directory without it is not a capture."""

    kind: HypervisorKind
    version: str
    """Of the VMM that wrote it."""
    machine: str
    """Machine type, CPU model and accelerator as far as the state depends on them."""
    config: VmConfig
    files: dict[str, int]
    """Name below the directory → size in bytes."""
    checksums: dict[str, str]
    """Name → ``crc32c:…`` or ``sha256:…`` of the device state (not of memory, which is checked by size)."""


@runtime_checkable
class Vmm(Protocol):
    """One live VMM process."""

    @property
    def handle(self) -> VmmHandle: ...

    async def state(self) -> VmmState:
        """Asked of the VMM itself. Raises VmmGone or VmmBroken."""
        ...

    async def open_channel(self) -> trio.abc.Stream:
        """The byte stream to the guest agent; one at a time. A new one replaces the old one."""
        ...

    async def pause(self) -> None: ...
    async def resume(self) -> None: ...

    async def capture(self, directory: Path) -> Capture:
        """Pause and save the VM into ``directory`` (which exists and is empty); stays paused.

        The directory is complete and flushed to disk, ``capture.json`` last, before this returns. The VM may be
        resumed or killed afterwards, and resumed after a failure too; what it writes then does not reach the capture.
        The channel may have ended when the VM goes on (Firecracker resets it).
        """
        ...

    async def add_disk(self, disk: Disk) -> Disk:
        """Plug a disk in. Returns it with its port, as ``handle.config`` has it from now on. The guest hears of it
        a moment later; a capture before it has may come back without (Cloud Hypervisor forgets to tell again)."""
        ...

    async def remove_disk(self, disk_id: str) -> None:
        """Returns when the guest has let go of it; at once if the VM never got it, because the server was killed when
        it was about to plug it in. Raises VmmBroken after the VMM's own time limit."""
        ...

    async def resize_disk(self, disk_id: str, size: int) -> None: ...

    async def resize_memory(self, size: int) -> None:
        """Total guest memory in bytes, between ``memory_bytes`` and that plus ``hotplug_bytes``.

        Raises VmmBroken if the guest got only part of the way in time, which is common when it shall give
        memory back: it holds on to blocks that it uses, and goes on trying.
        """
        ...

    async def can_lend(self) -> bool:
        """Whether the guest can lend memory to the host: not where devices hold it in place, nor in a fork on QEMU,
        whose memory is a view of its capture that lending would tear."""
        ...

    async def set_balloon(self, size: int) -> None:
        """How many bytes of its memory the guest lends to the host: whole MiB, from 0, which gives all back, to less
        than ``memory_bytes``. Does not wait for the guest, which lends what is free, and takes back before it runs
        out.

        Raises NotSupported if it can not lend. A capture holds the size, so set it to 0 before.
        """
        ...

    async def set_link(self, nic_id: str, *, up: bool) -> None:
        """Plug or pull the guest's cable. Nothing happens where a VMM has none (all but QEMU): there the
        rules on the TAP keep a guest with a foreign address silent."""
        ...

    async def rotate_console(self) -> None:
        """Go on in a new, empty console log; the caller has renamed the old one to ``<console_log>.1``."""
        ...

    async def wait_exit(self) -> VmmExit:
        """Wait for the process to end; may be called by several tasks and again afterwards."""
        ...

    async def kill(self) -> None:
        """End the process at once and wait until it is gone."""
        ...

    async def aclose(self) -> None:
        """Let go of sockets and descriptors; the VMM lives on."""
        ...


@runtime_checkable
class Driver(Protocol):
    """One kind of VMM."""

    @property
    def kind(self) -> HypervisorKind: ...

    @property
    def capabilities(self) -> Capabilities:
        """Found once, by ``probe``."""
        ...

    async def probe(self) -> Capabilities:
        """Look for the binary, its version and a working accelerator. KVM counts only if an ordinary
        kernel really runs on it."""
        ...

    def adopt_capabilities(self, capabilities: Capabilities) -> None:
        """Take the answer of an earlier ``probe`` instead of asking again."""
        ...

    def kernel_cmdline(self, *, hotplug_memory: bool) -> str:
        """What the guest kernel wants to be told on this VMM's machine. Pure."""
        ...

    def validate(self, config: VmConfig) -> None:
        """Raise NotSupported or InvalidRequest for what this VMM can not do. Pure."""
        ...

    async def launch(self, config: VmConfig) -> Vmm:
        """Start the process and boot the guest. Raises LaunchFailed.

        All files are opened by us and handed over as descriptors where the VMM can take them: disks,
        logs and the kernel may belong to root in directories that ``config.uid`` can not enter.
        """
        ...

    async def restore(self, config: VmConfig, capture: Path, *, keep_capture: bool, paused: bool = False) -> Vmm:
        """Bring back the VM saved in ``capture``, with the names, paths and TAPs of ``config``.

        With ``keep_capture`` memory is mapped privately and the capture stays as it is (fork, restore
        from a snapshot). ``paused`` leaves the vCPUs stopped and the links down. Raises CaptureInvalid before
        anything is started if the capture does not fit.

        Without ``keep_capture`` the capture stays whole until the guest runs on, that is until
        ``resume`` (or until this returns, unless ``paused``); then it is used up and removed. So:
        restore paused, write down ``handle``, resume; killed anywhere in between, nothing is lost.
        """
        ...

    async def kill_stray(self, run_dir: str) -> bool:
        """End the VMM started for ``run_dir``, also one that we had no time to write down. Whether
        there was one."""
        ...

    async def reattach(self, handle: VmmHandle) -> Vmm:
        """Find the VMM of ``handle`` again after a restart of ours, else raise VmmGone."""
        ...
