"""The control group of a VMM spares its neighbours: ``limits_inside.py`` runs in there."""

from __future__ import annotations

import pytest

from tests.metal import vmm_host

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]


def test_a_neighbour_is_spared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """On two processors: on one, fair shares alone would double what a neighbour waits."""
    with vmm_host.boot_for_tests(tmp_path_factory.mktemp("guest"), cpus=2) as host:
        vmm_host.start_keeper(host)
        selection = "-s tests/metal/limits_inside.py -k neighbour"
        said = vmm_host.run_tests(host, selection, seconds=3600, HYPEMAN_TEST_HYPERVISOR="qemu")
    print(said)
    assert "1 passed" in said, said
