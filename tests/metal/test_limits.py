"""The control groups of VMMs on a host with cgroup v2 and systemd: ``limits_inside.py`` runs in there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.metal import vmm_host
from tests.metal.rig import MetalHost

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]

PATIENCE = 3600


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalHost]:
    with vmm_host.boot_for_tests(tmp_path_factory.mktemp("guest")) as booted:
        vmm_host.start_keeper(booted)
        yield booted


def test_vmms_are_held(host: MetalHost) -> None:
    """What processes and memory they may have (processors: test_neighbour.py). In one run: the start of pytest takes
    longer than each."""
    output = vmm_host.run_tests(host, "tests/metal/limits_inside.py -k 'processes or memory'", seconds=PATIENCE)
    assert "2 passed" in output, output


def test_a_guest_runs_under_the_units(host: MetalHost) -> None:
    """The walls that they build around the server and the VMMs are in nobody's way."""
    try:
        host.check("systemctl start hypeman", timeout=PATIENCE)
        output = host.check("cd /opt/hypeman && python3 -m tests.metal.under_units", timeout=PATIENCE)
        print(output)
        assert "under the units: ok" in output, output
    except AssertionError as error:
        error.add_note(host.run("journalctl --no-pager -o cat -u hypeman -u hypeman-vms | tail -60").output)
        raise
    finally:
        host.run("systemctl stop hypeman", timeout=PATIENCE)
