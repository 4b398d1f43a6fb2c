"""The systemd units: systemd itself finds nothing wrong in them, and the walls around the server stand."""

from __future__ import annotations

import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"


def test_systemd_understands_them(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in UNITS.glob("hypeman*"):
        # the program need not be installed here
        text = unit.read_text().replace("/usr/bin/hypeman", "/bin/true").replace("Documentation=file:", "#")
        (tmp_path / unit.name).write_text(text)
    for unit in tmp_path.glob("*.service"):
        verdict = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)],
            capture_output=True,
            text=True,
            env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        )
        complaints = [line for line in verdict.stderr.splitlines() if "hypeman" in line]
        assert not complaints


def test_the_servers_end_is_not_the_vms_end() -> None:
    server, machines = read("hypeman.service"), read("hypeman-vms.service")
    assert server["Service"]["KillMode"] == "process"
    assert server["Unit"]["Requires"] == "hypeman-vms.service", "not BindsTo or PartOf"
    assert "PartOf" not in machines["Unit"]
    assert machines["Service"]["Delegate"].split() == ["cpu", "memory", "pids"]
    assert server["Service"]["RuntimeDirectoryPreserve"] == "yes", "sockets of living VMs are in there"


def read(name: str) -> ConfigParser:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    return parser
