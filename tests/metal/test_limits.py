"""The control groups of VMMs on a host with cgroup v2 and systemd: ``limits_inside.py`` runs in there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.metal import vmm_host
from tests.metal.rig import MetalHost

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]

UNITS = ("hypeman-vms.service", "hypeman.service", "hypeman.slice")
PATIENCE = 3600
SERVER = b"""[Service]
ExecStart=
ExecStart=/usr/bin/python3 -m hypeman serve
WorkingDirectory=/opt/hypeman
Environment=HYPERVISOR__KVM_PATIENCE=100 REQUEST_TIMEOUT=900 PORT=0
WatchdogSec=0
TimeoutStartSec=15min
"""
"""What is another in the virtual host: our code is not installed, and all takes longer."""


@pytest.fixture(scope="module")
def host(server_host: MetalHost) -> MetalHost:
    """With the units that the package installs."""
    units: dict[str, bytes | Path] = {f"/etc/systemd/system/{unit}": vmm_host.ROOT / "systemd" / unit for unit in UNITS}
    server_host.put({**units, "/etc/systemd/system/hypeman.service.d/test.conf": SERVER})
    server_host.check("systemctl daemon-reload && systemctl start hypeman-vms")
    return server_host


@pytest.mark.parametrize("what", ["processes", "memory", "processors"])
def test_a_vmm_is_held(what: str, host: MetalHost) -> None:
    said = vmm_host.run_tests(host, f"tests/metal/limits_inside.py -k test_{what}", seconds=PATIENCE)
    assert "1 passed" in said, said


def test_a_guest_runs_under_the_units(host: MetalHost) -> None:
    """The walls that they build around the server and the VMMs are in nobody's way."""
    try:
        host.check("systemctl start hypeman", timeout=PATIENCE)
        said = host.check("cd /opt/hypeman && python3 -m tests.metal.under_units", timeout=PATIENCE)
        assert "under the units: ok" in said, said
    except AssertionError as error:
        error.add_note(host.run("journalctl --no-pager -o cat -u hypeman -u hypeman-vms | tail -60").output)
        raise
    finally:
        host.run("systemctl stop hypeman", timeout=PATIENCE)


def test_its_neighbour_is_spared(host: MetalHost) -> None:
    said = vmm_host.run_tests(
        host, "-s tests/metal/limits_inside.py -k neighbour", seconds=PATIENCE, HYPEMAN_TEST_HYPERVISOR="qemu"
    )
    print(said)
    assert "1 passed" in said, said
