"""Which PCI functions the host itself needs: those that hold file systems, swap or routes.

    mounted or swapped block device → what it is made of (dm, md, partitions) → the function above it
    interface with a route          → what it is made of (bond, bridge, VLAN)  → the function above it

Giving one of these to a guest would take the host's disk or its way out. An interface counts when a
route leads through it (IPv6 link-local ones apart, which every interface has).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def holders(sysfs_root: Path, proc_root: Path = Path("/proc"), *, uplink: str = "") -> dict[str, str]:
    """PCI address → what it does for the host ("holds /", "carries the default route (eth0)").

    ``uplink`` is the interface that the settings name. Blocks as little as reading /proc does. All
    functions above the device count: a disk behind a USB controller holds the controller.
    """
    found: dict[str, str] = {}
    for device, what in _block_devices(proc_root):
        for path in _below(sysfs_root / "dev/block" / device, "slaves/"):
            _note(found, sysfs_root, path, what)
    for interface, what in _interfaces(proc_root, uplink):
        for path in _below(sysfs_root / "class/net" / interface, "lower_"):
            _note(found, sysfs_root, path, f"{what} ({interface})")
    return found


def _note(found: dict[str, str], sysfs_root: Path, path: Path, what: str) -> None:
    parts = path.parts
    if "nvme-subsystem" in parts:  # with multipath the disk hangs below the subsystem, its controllers beside it
        subsystem = Path(*parts[: parts.index("nvme-subsystem") + 2])
        for controller in subsystem.glob("nvme*"):
            if controller.is_symlink():
                _note(found, sysfs_root, controller.resolve(), what)
    for part in parts:
        if _ADDRESS.fullmatch(part) and os.path.lexists(sysfs_root / "bus/pci/devices" / part):
            found.setdefault(part, what)


def _below(link: Path, parts: str) -> Iterator[Path]:
    """The device behind ``link`` and all that it is made of: what its ``parts`` ("slaves/", "lower_") lead to."""
    waiting, seen = [str(link)], set()
    while waiting:
        path = _target(waiting.pop())
        if path in seen:
            continue
        seen.add(path)
        yield Path(path)
        directory, _, prefix = parts.rpartition("/")
        for whole in (path, os.path.dirname(path)) if directory and os.path.exists(f"{path}/partition") else (path,):
            place = os.path.join(whole, directory)
            waiting += (os.path.join(place, name) for name in _names(place) if name.startswith(prefix))


def _target(link: str) -> str:
    """Where a link of sysfs leads: one step, since its targets have no links in their paths. Hosts with
    hundreds of TAPs have as many routes, and resolving each path wholly takes ten times longer."""
    try:
        return os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
    except OSError:
        return link


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _block_devices(proc_root: Path) -> Iterator[tuple[str, str]]:
    """("259:0", "holds /") for all mounts and swap."""
    for line in _lines(proc_root / "self/mountinfo"):
        fields = line.split(" ")
        if "-" not in fields or len(fields) < 8:
            continue
        what = f"holds {_unescaped(fields[4])}"
        yield fields[2], what
        source = fields[fields.index("-") + 2] if len(fields) > fields.index("-") + 2 else ""
        if source.startswith("/"):  # btrfs reports a made-up number; its source names one real device
            yield from ((number, what) for number in _number_of(_unescaped(source)))
    for line in _lines(proc_root / "swaps")[1:]:
        yield from ((number, "holds swap") for number in _number_of(_unescaped(line.split()[0])))


def _number_of(path: str) -> list[str]:
    try:
        status = os.stat(path)
    except OSError:
        return []
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev  # a swap file: the disk below it
    return [f"{os.major(device)}:{os.minor(device)}"]


def _interfaces(proc_root: Path, uplink: str) -> Iterator[tuple[str, str]]:
    if uplink:
        yield uplink, "is the uplink"
    routed: dict[str, str] = {}
    for line in _lines(proc_root / "net/route")[1:]:
        fields = line.split()
        if len(fields) > 7:
            default = fields[1] == fields[7] == "00000000"
            _route(routed, fields[0], default=default)
    for line in _lines(proc_root / "net/ipv6_route"):
        fields = line.split()
        if len(fields) == 10 and fields[9] != "lo" and not fields[0].startswith(("fe80", "ff")):
            _route(routed, fields[9], default=fields[0] == "0" * 32 and fields[1] == "00" and fields[4] != "0" * 32)
    yield from routed.items()


def _route(routed: dict[str, str], interface: str, *, default: bool) -> None:
    if default or interface not in routed:
        routed[interface] = "carries the default route" if default else "carries a route"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(text: str) -> str:
    """Spaces and the like are octal in these files."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
