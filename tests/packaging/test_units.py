"""The systemd units: systemd itself finds nothing wrong in them, and the walls around the server stand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "SECURITY.md"
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


@pytest.mark.parametrize("unit", ["hypeman", "hypeman-vms", "hypeman-node"])
def test_exposure_is_what_the_document_says(unit: str) -> None:
    """The score, as systemd 252 finds it, and every setting that it misses."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    security = ["systemd-analyze", "security", "--offline=true", str(UNITS / f"{unit}.service")]
    result = subprocess.run(security, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", result.stdout)
    assert score is not None, result
    document = DOCUMENT.read_text()
    promised = re.search(rf"`{unit}\.service` ([0-9.]+)", document)
    assert promised is not None
    assert float(score[1]) <= float(promised[1]) + 0.1, "settings that were there are missing"
    found = subprocess.run([*security, "--json=short"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    missing = [check["name"] for check in json.loads(found.stdout) if check["set"] is False and check["exposure"]]
    table = document.partition("## The units")[2]
    assert missing and [name for name in missing if not any(word in table for word in words(name))] == []


def words(name: str) -> list[str]:
    """How the document may name a setting: each capability of a group, the setting, or its value."""
    setting, _, value = name.partition("=")
    value = value.removeprefix("~")
    if setting == "CapabilityBoundingSet":
        prefix, _, rest = value.partition("(")
        return [f"`{prefix}{each}".rstrip("*") for each in rest.rstrip(")").split("|")] if rest else [f"`{value}`"]
    return [f"`{setting}"] if not value or value.startswith(("AF_", "…")) or "=" in value else [f"`{value}`"]


def test_the_servers_end_is_not_the_vms_end() -> None:
    server, machines = read("hypeman.service"), read("hypeman-vms.service")
    assert server["Service"]["KillMode"] == "process"
    assert server["Unit"]["Requires"] == "hypeman-vms.service", "not BindsTo or PartOf"
    assert "PartOf" not in machines["Unit"]
    assert machines["Service"]["NotifyAccess"] == "main", "VMMs are in its control group, too"
    assert server["Service"].get("NotifyAccess", "main") == "main"
    assert machines["Service"]["Delegate"].split() == ["cpu", "memory", "pids"]
    assert server["Service"]["RuntimeDirectoryPreserve"] == "yes", "sockets of living VMs are in there"


def test_the_server_may_call_what_it_needs() -> None:
    """The last word on a system call counts: a set that is taken away, and what is given back of it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    lines = (UNITS / "hypeman.service").read_text().splitlines()
    denied: set[str] = set()
    for line in lines:
        if line.startswith("SystemCallFilter="):
            words = line.partition("=")[2]
            calls = _calls(words.removeprefix("~").split())
            denied = denied | calls if words.startswith("~") else denied - calls
    assert {"ptrace", "kexec_load", "init_module"} <= denied, "else this test looks at nothing"
    assert not denied & NEEDED, denied & NEEDED


NEEDED = {
    *("mount", "move_mount", "open_tree", "umount2", "setns", "unshare", "pivot_root", "mknodat", "setxattr"),
    *("pidfd_open", "pidfd_send_signal", "pidfd_getfd", "prlimit64", "memfd_create", "userfaultfd", "copy_file_range"),
    *("landlock_create_ruleset", "landlock_restrict_self"),
}
"""What server, VMMs and the jailer call and a filter might well deny."""


def test_the_server_may_open_the_sockets_that_it_opens() -> None:
    allowed = set(read("hypeman.service")["Service"]["RestrictAddressFamilies"].split())
    text = "".join(file.read_text() for file in (UNITS.parent / "hypeman").rglob("*.py"))
    named = set(re.findall(r"socket\.(AF_[A-Z0-9]+)", text)) - {"AF_UNSPEC"}  # which no socket has
    assert "AF_UNIX" in named, "else this test looks at nothing"
    assert not named - allowed, named - allowed


def _calls(words: list[str]) -> set[str]:
    found: set[str] = set()
    for word in words:
        if word.startswith("@"):
            listed = subprocess.run(
                ["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True
            ).stdout.split("\n")[1:]
            found |= _calls([line.strip() for line in listed if line.strip() and not line.strip().startswith("#")])
        else:
            found.add(word)
    return found


def read(name: str) -> ConfigParser:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    return parser
