"""The control groups of VMMs on a host with cgroup v2 and systemd: ``limits_inside.py`` runs in there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.metal import vmm_host
from tests.metal.rig import MetalHost

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]

TIMEOUT = 3600


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalHost]:
    with vmm_host.boot_for_tests(tmp_path_factory.mktemp("guest")) as booted:
        vmm_host.start_keeper(booted)
        yield booted


def test_vmms_are_held(host: MetalHost) -> None:
    """Limits on processes and memory (processors: test_neighbour.py). In one run: the start of pytest takes longer than
    each."""
    output = vmm_host.run_tests(host, "tests/metal/limits_inside.py -k 'processes or memory'", seconds=TIMEOUT)
    assert "2 passed" in output, output


def test_a_guest_runs_under_the_units(host: MetalHost) -> None:
    """Their confinement of the server and the VMMs breaks nothing."""
    try:
        host.check("systemctl start hypeman", timeout=TIMEOUT)
        output = host.check("cd /opt/hypeman && python3 -m tests.metal.under_units", timeout=TIMEOUT)
        print(output)
        assert "under the units: ok" in output, output
    except AssertionError as error:
        error.add_note(host.run("journalctl --no-pager -o cat -u hypeman -u hypeman-vms | tail -60").output)
        raise
    finally:
        host.run("systemctl stop hypeman", timeout=TIMEOUT)
