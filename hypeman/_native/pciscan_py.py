"""Python twin of ext/pciscan.pyx: same results, byte for byte, and the oracle of its tests.

A row is (address, vendor, device, class, subsystem vendor, subsystem device, driver or None,
IOMMU group or -1, NUMA node or -1, physical function or None, sriov_totalvfs, reset methods).
Numbers missing from sysfs are -1. Entries that are not PCI addresses, or whose vendor, device and
class cannot be read (a symlink loop, a device removed meanwhile), are listed in ``problems``.

The header of the .pyx explains which files are read, and why no others.
"""

from __future__ import annotations

import errno
import os
import re

Row = tuple[str, int, int, int, int, int, str | None, int, int, str | None, int, str]

_ADDRESS = re.compile(rb"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
_HEX = re.compile(rb"(?:0[xX])?+([0-9a-fA-F]{1,8})")
_DECIMAL = re.compile(rb"[0-9]{1,9}")
_IDS = re.compile(rb"(?:0[xX])?+([0-9a-fA-F]{1,8})(?::(?:0[xX])?+([0-9a-fA-F]{1,8}))?")
_MAX_FILE = 4095
_MAX_NAME = 255
_MAX_RESET = 127
_MAX_ADDRESS = 23
_MAX_VENDORS = 32
_BRIDGE = 0x06


class Scanner:
    """The devices of a sysfs root as last read. Not thread-safe."""

    def __init__(self, root: str) -> None:
        self._path = root + "/bus/pci/devices"
        self._inodes: dict[bytes, int] = {}
        self._drivers: dict[bytes, bytes] = {}
        self._problems: list[tuple[bytes, int]] = []

    @property
    def problems(self) -> list[tuple[str, int]]:
        """Skipped entries and the reason: (name, errno)."""
        return [(_text(name), error) for name, error in self._problems]

    def scan(self) -> list[Row]:
        """Read everything again: one row per function, sorted by address.

        Raises OSError if the directory itself cannot be read.
        """
        self._problems = []
        self._inodes.clear()
        self._drivers.clear()
        top = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return self._read(top, self._entries(), set())
        finally:
            os.close(top)

    def look(self) -> tuple[list[tuple[str, str | None]], list[str], list[Row]]:
        """Changes since the last ``scan`` or ``look``.

        Returns ([(address, driver or None)], [addresses gone], [rows new or replaced]).
        """
        self._problems = []
        changed: list[tuple[str, str | None]] = []
        before = dict(self._inodes)
        unknown: list[tuple[bytes, int]] = []
        seen: set[bytes] = set()
        top = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name, inode in self._entries():
                if before.get(name) != inode:
                    unknown.append((name, inode))
                    continue
                seen.add(name)
                driver = _link_name(top, name + b"/driver", _MAX_NAME)
                if driver != self._drivers[name]:
                    self._drivers[name] = driver
                    changed.append((_text(name), _text(driver) or None))
            gone = [name for name in before if name not in seen]
            for name in gone:
                del self._inodes[name], self._drivers[name]
            new = self._read(top, unknown, None)
        finally:
            os.close(top)
        return sorted(changed, key=lambda pair: _order(pair[0])), sorted(map(_text, gone), key=_order), new

    def _entries(self) -> list[tuple[bytes, int]]:
        with os.scandir(self._path.encode()) as entries:
            return [(entry.name, entry.inode()) for entry in entries if not entry.name.startswith(b".")]

    def _read(self, top: int, entries: list[tuple[bytes, int]], physical: set[int] | None) -> list[Row]:
        """The rows of ``entries`` in order; entries without a row are added to ``problems``.

        ``physical`` collects the vendors that have physical functions; None if not known.
        """
        rows: list[Row] = []
        neighbour: Row | None = None
        wanted = []
        for name, inode in entries:
            if _ADDRESS.fullmatch(name):
                wanted.append((name.decode(), inode))
            else:
                self._problems.append((name, errno.EINVAL))
        for address, inode in sorted(wanted, key=lambda pair: _order(pair[0])):
            name = address.encode()
            try:
                directory = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
            except OSError as error:
                self._problems.append((name, error.errno or errno.EINVAL))
                continue
            try:
                row, driver = _row(directory, address, neighbour, physical)
            finally:
                os.close(directory)
            if row is None:
                self._problems.append((name, errno.ENOENT))
                continue
            self._inodes[name], self._drivers[name] = inode, driver
            if row[3] >> 16 != _BRIDGE:
                neighbour = row
                if physical is not None and row[10] and len(physical) < _MAX_VENDORS:
                    physical.add(row[1])
            rows.append(row)
        return rows


def _row(directory: int, address: str, neighbour: Row | None, physical: set[int] | None) -> tuple[Row | None, bytes]:
    """The row, or None if ids are missing, and the driver's name as spelled in sysfs.

    ``neighbour`` is the endpoint read before it, ``physical`` as in ``Scanner._read``.
    """
    ids, driver = _parse_uevent(_read_file(directory, "uevent", _MAX_FILE))
    vendor, device = ids.get(b"PCI_ID", (-1, -1))
    if vendor < 0 or device < 0:
        vendor, device = _read_hex(directory, "vendor"), _read_hex(directory, "device")
        driver = _link_name(directory, b"driver", _MAX_NAME)
    class_code = ids.get(b"PCI_CLASS", (-1, -1))[0]
    if class_code < 0:
        class_code = _read_hex(directory, "class")
    subsystem = ids.get(b"PCI_SUBSYS_ID", (-1, -1))
    if min(subsystem) < 0:
        subsystem = _read_hex(directory, "subsystem_vendor"), _read_hex(directory, "subsystem_device")
    if min(vendor, device, class_code) < 0:
        return None, b""
    group = _decimal(_link_name(directory, b"iommu_group", _MAX_NAME))
    known = (address, vendor, device, class_code, *subsystem, _text(driver) or None, group)
    if class_code >> 16 == _BRIDGE:
        return (*known, -1, None, 0, ""), driver
    if neighbour is not None and neighbour[0].startswith(address[:-4]):  # the same except for "dd.f"
        node = neighbour[8]
    else:
        node = _decimal(_read_file(directory, "numa_node", 31))
    physfn = b""
    if physical is None or vendor in physical or len(physical) == _MAX_VENDORS:
        physfn = _link_name(directory, b"physfn", _MAX_ADDRESS)
    if not _ADDRESS.fullmatch(physfn):
        physfn = b""
    virtual = 0 if physfn else max(_decimal(_read_file(directory, "sriov_totalvfs", 31)), 0)
    reset = _read_file(directory, "reset_method", _MAX_RESET).partition(b"\0")[0].rstrip(b"\n")
    return (*known, node, physfn.decode() or None, virtual, _text(reset)), driver


def _parse_uevent(text: bytes) -> tuple[dict[bytes, tuple[int, int]], bytes]:
    """The lines of ``uevent`` that hold one or two hex numbers (-1 if missing), and the driver."""
    found: dict[bytes, tuple[int, int]] = {}
    driver = b""
    for line in text.partition(b"\0")[0].split(b"\n"):
        key, equals, value = line.partition(b"=")
        if equals and key == b"DRIVER":
            driver = value if len(value) <= _MAX_NAME else b""
        elif equals and key in (b"PCI_CLASS", b"PCI_ID", b"PCI_SUBSYS_ID"):
            match = _IDS.match(value)
            first, second = match.groups() if match else (None, None)
            found[key] = (int(first, 16) if first else -1, int(second, 16) if second else -1)
    return found, driver


def _read_file(directory: int, name: str, size: int) -> bytes:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return b""
    try:
        return os.read(fd, size)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _read_hex(directory: int, name: str) -> int:
    match = _HEX.match(_read_file(directory, name, 31))
    return int(match[1], 16) if match else -1


def _decimal(text: bytes) -> int:
    match = _DECIMAL.match(text)
    return int(match[0]) if match else -1


def _link_name(directory: int, name: bytes, longest: int) -> bytes:
    """The last component of the target of link ``name``; empty if there is none or it is too long."""
    try:
        target = os.readlink(name, dir_fd=directory).rpartition(b"/")[2]
    except OSError:
        return b""
    return target if len(target) <= longest else b""


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def _order(address: str) -> tuple[int, str]:
    return len(address), address
