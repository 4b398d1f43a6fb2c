"""Names of vendors and devices from the ``pci.ids`` database.

The file has some 35,000 lines in 1.4 MB and a host has a handful of vendors: only the lines of a
vendor that was asked for are parsed, found by searching the mapped file for its heading. Opening
costs nothing, a vendor 0.5 to 8 ms (Intel has most), once.

The database is that of https://pci-ids.ucw.cz, under the GPL-2+ or the BSD-3-Clause licence; we take
the latter. The appliance carries a copy in ``data/``, put there when it is built.
"""

from __future__ import annotations

import logging
import mmap
import re
from pathlib import Path

log = logging.getLogger(__name__)

SYSTEM_FILES = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")
BUNDLED_FILE = Path(__file__).parent / "data" / "pci.ids"

_NEXT_HEADING = re.compile(rb"\n[^\t#\n]")
_DEVICE = re.compile(rb"^\t([0-9a-f]{4})  (.*)$", re.MULTILINE)


class PciIds:
    """``PciIds.open`` finds the database; without one every name is empty."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data = data
        self._vendors: dict[int, tuple[str, dict[int, str]]] = {}

    @classmethod
    def open(cls, configured: str = "") -> PciIds:
        """The configured file, or the first that exists of the system's and our own."""
        files = (configured,) if configured else (*SYSTEM_FILES, str(BUNDLED_FILE))
        for file in files:
            try:
                with Path(file).open("rb") as opened:
                    return cls(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
                continue
        log.warning("no pci.ids in %s: devices have no names", ", ".join(files))
        return cls(b"")

    def vendor(self, vendor: int) -> str:
        return self._vendor(vendor)[0]

    def device(self, vendor: int, device: int) -> str:
        return self._vendor(vendor)[1].get(device, "")

    def _vendor(self, vendor: int) -> tuple[str, dict[int, str]]:
        known = self._vendors.get(vendor)
        if known is None:
            known = self._vendors[vendor] = self._parse(vendor)
        return known

    def _parse(self, vendor: int) -> tuple[str, dict[int, str]]:
        heading = b"\n%04x  " % vendor
        start = self._data.find(heading)
        if start < 0:
            return "", {}
        # The file's classes have headings of another form ("C 03  Display controller"), so none is missed.
        following = _NEXT_HEADING.search(self._data, start + len(heading))
        text = self._data[start + len(heading) : following.start() if following else len(self._data)]
        name, _, devices = text.partition(b"\n")
        return _text(name), {int(number, 16): _text(name) for number, name in _DEVICE.findall(devices)}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace").strip()
