"""Captures on disk: one directory each, complete or absent.

    state          QEMU's device state (and memory, if it was not read apart)
    devices        QEMU's device state alone, of a VM whose memory is a private mapping
    memory         guest memory as QEMU maps it, sparse
    …              or the files of another VMM
    capture.json   written last, by rename; without it the directory is not a capture

A capture is checked before a VMM is started: an incomplete or foreign one is refused without an attempt.
Memory is checked only by size, since reading it would cost the time that mapping saves.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec

from hypeman.errors import InternalError
from hypeman.host.files import flush_directory, write_file
from hypeman.host.safe_open import open_regular
from hypeman.hypervisor.interface import Capture, CaptureInvalid, Disk, VmConfig
from hypeman.hypervisor.kinds import HypervisorKind

RECORD = "capture.json"
STATE = "state"
DEVICES = "devices"
MEMORY = "memory"
NOTE = "restored-from"


def publish(
    directory: Path,
    *,
    kind: HypervisorKind,
    version: str,
    machine: str,
    config: VmConfig,
    summed: tuple[str, ...],
    flush: bool = True,
) -> Capture:
    """Make the files in ``directory`` a capture: flush them, checksum those in ``summed``, write the record.

    Without ``flush`` it is valid until the host's next boot: a crash of the host might leave a part of it.
    """
    sizes, sums = {}, {}
    try:
        for path in sorted(directory.iterdir()):
            with open(open_regular(path, os.O_RDONLY), "rb") as file:  # its VMM may hold a lease on it
                if flush:
                    os.fsync(file.fileno())
                sizes[path.name] = os.fstat(file.fileno()).st_size
                if path.name in summed:
                    sums[path.name] = _sum(file.fileno())
        capture = Capture(kind, version, machine, config, sizes, sums, "" if flush else _boot_id())
        if flush:
            _write(directory, capture)
        else:
            (directory / RECORD).write_bytes(_rendered(capture))
    except OSError as error:
        raise InternalError(f"the capture in {directory} cannot be written: {error.strerror}") from error
    return capture


def make_lasting(directory: Path) -> None:
    """Flush the capture in ``directory`` if that was not done. Blocks; raises OSError."""
    try:
        capture = read(directory)
    except CaptureInvalid:
        return
    if capture.boot_id:
        for name in capture.files:
            with open(open_regular(directory / name, os.O_RDONLY), "rb") as file:
                os.fsync(file.fileno())
        _write(directory, msgspec.structs.replace(capture, boot_id=""))


def _write(directory: Path, capture: Capture) -> None:
    write_file(directory / RECORD, _rendered(capture))


def _rendered(capture: Capture) -> bytes:
    return msgspec.json.format(msgspec.json.encode(capture))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read(directory: Path) -> Capture:
    """The complete capture in ``directory``. Raises CaptureInvalid."""
    try:
        capture = msgspec.json.decode((directory / RECORD).read_bytes(), type=Capture)
    except FileNotFoundError:
        raise CaptureInvalid(f"{directory} holds no complete capture") from None
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        raise CaptureInvalid(f"the record of the capture in {directory} cannot be read: {error}") from None
    if capture.boot_id and capture.boot_id != _boot_id():
        raise CaptureInvalid(f"the capture in {directory} was not yet on disk when the host went down")
    for name, size in capture.files.items():
        if "/" in name:
            raise CaptureInvalid(f"the capture in {directory} names a file outside of it: {name!r}")
        try:
            with open(open_regular(directory / name, os.O_RDONLY), "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise CaptureInvalid(f"{name} of the capture in {directory} has {found} bytes instead of {size}")
                if name in capture.checksums and _sum(file.fileno()) != capture.checksums[name]:
                    raise CaptureInvalid(f"{name} of the capture in {directory} was changed: wrong checksum")
        except OSError as error:
            raise CaptureInvalid(f"{name} of the capture in {directory}: {error.strerror}") from None
    return capture


def note(run_dir: Path, directory: Path) -> None:
    """Record in the run directory which capture to remove when the guest resumes; a later server may be the one
    that resumes it."""
    (run_dir / NOTE).write_text(str(directory))


def invalidate_noted(run_dir: Path) -> None:
    """Durably remove the record of the noted capture, if there is one. Memory changes from here on: if we are killed
    in between, there is a paused VM or a complete capture, never a capture that does not match its memory."""
    with contextlib.suppress(FileNotFoundError):
        _invalidate(Path((run_dir / NOTE).read_text()))


def remove_noted(run_dir: Path) -> None:
    """Remove the files of the noted capture, once the guest runs; it need not wait for that."""
    with contextlib.suppress(FileNotFoundError):
        consume(Path((run_dir / NOTE).read_text()))
        (run_dir / NOTE).unlink()


def check_fits(capture: Capture, config: VmConfig, *, kind: HypervisorKind, version: str, machine: str) -> None:
    """Raise CaptureInvalid unless a VM of ``config`` can be restored from ``capture``."""
    old, differences = capture.config, []
    if capture.kind != kind:
        raise CaptureInvalid(f"the capture was made by {capture.kind} and cannot be loaded by {kind}")
    if _numbers(capture.version) > _numbers(version):
        differences.append(f"it was made by version {capture.version}, here is {version}")
    if capture.machine != machine:
        differences.append(f"it was made on {capture.machine}, here is {machine}")
    for name in ("vcpus", "memory_bytes", "hotplug_bytes", "disk_ports"):
        if getattr(old, name) != getattr(config, name):
            differences.append(f"{name} was {getattr(old, name)}, now {getattr(config, name)}")
    for what, before, now in (
        ("disks", [_shape(disk) for disk in old.disks], [_shape(disk) for disk in config.disks]),
        ("network interfaces", [nic.id for nic in old.nics], [nic.id for nic in config.nics]),
        ("passed-through devices", list(old.pci_devices), list(config.pci_devices)),
    ):
        if before != now:
            differences.append(f"the {what} differ")
    if differences:
        raise CaptureInvalid("the capture does not fit: " + "; ".join(differences))


def consume(directory: Path) -> None:
    """Invalidate a capture durably and delete its files, since its VM resumes. A no-op if there is none."""
    with contextlib.suppress(FileNotFoundError):
        _invalidate(directory)
        for path in directory.iterdir():
            path.unlink()


def _invalidate(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (directory / RECORD).unlink()
        flush_directory(directory)


def _shape(disk: Disk) -> tuple[object, ...]:
    return disk.id, disk.readonly, disk.port


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _sum(fd: int) -> str:
    digest = hashlib.sha256()
    os.lseek(fd, 0, os.SEEK_SET)
    while chunk := os.read(fd, 1024 * 1024):
        digest.update(chunk)
    return "sha256:" + digest.hexdigest()
