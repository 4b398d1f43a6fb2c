"""Names from pci.ids."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hypeman.devices.pciids import SYSTEM_FILES, PciIds

TEXT = b"""# a comment
0001  First Vendor
\t0002  First Device
\t\t0001 0003  Subsystem
10de  NVIDIA Corporation
# comment within
\t20b5  GA100 [A100 PCIe 80GB]
\tFFFF  not lower case
10df  No devices
C 03  Display controller
\t00  VGA compatible controller
ffff  Illegal Vendor ID"""


def test_names() -> None:
    ids = PciIds(b"\n" + TEXT)
    assert (ids.vendor(0x10DE), ids.device(0x10DE, 0x20B5)) == ("NVIDIA Corporation", "GA100 [A100 PCIe 80GB]")
    assert (ids.vendor(1), ids.device(1, 2)) == ("First Vendor", "First Device")
    assert (ids.vendor(0x10DF), ids.device(0x10DF, 0)) == ("No devices", "")
    assert ids.vendor(0xFFFF) == "Illegal Vendor ID"
    assert (ids.vendor(0xDEAD), ids.device(0xDEAD, 1), ids.device(0x10DE, 3)) == ("", "", "")


def test_without_a_data_base_names_are_empty(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for configured in (str(tmp_path / "no"), str(empty)):
        assert PciIds.open(configured).vendor(0x8086) == ""


def test_the_lazy_parser_agrees_with_a_plain_one_on_the_real_file() -> None:
    file = next((Path(name) for name in SYSTEM_FILES if Path(name).exists()), None)
    if file is None:
        pytest.skip("no pci.ids here")
    expected: dict[int, tuple[str, dict[int, str]]] = {}
    vendor = -1
    for line in file.read_text("utf-8").splitlines():
        if match := re.match(r"([0-9a-f]{4})  (.*)", line):
            vendor = int(match[1], 16)
            expected[vendor] = match[2].strip(), {}
        elif line.startswith("C "):
            break
        elif match := re.match(r"\t([0-9a-f]{4})  (.*)", line):
            expected[vendor][1][int(match[1], 16)] = match[2].strip()
    ids = PciIds.open(str(file))
    for number in (*list(expected)[::7], 0x8086, 0x10DE):
        assert ids._vendor(number) == expected[number]
