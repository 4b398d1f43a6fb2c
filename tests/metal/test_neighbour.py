"""A host with two processors: a VMM is limited to its share, and its control group protects its neighbours.
``limits_inside.py`` runs in there."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.metal import vmm_host
from tests.metal.rig import MetalHost

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]

log = logging.getLogger(__name__)

INSIDE = "-s tests/metal/limits_inside.py"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalHost]:
    """On one processor nothing would exceed the limit, and fair shares alone would double what a neighbour waits."""
    with vmm_host.boot_for_tests(tmp_path_factory.mktemp("guest"), cpus=2) as booted:
        vmm_host.start_keeper(booted)
        yield booted


def test_a_vmm_is_held_to_its_processors(host: MetalHost) -> None:
    output = vmm_host.run_tests(host, f"{INSIDE} -k processors", seconds=3600)
    assert "1 passed" in output, output


def test_a_neighbour_is_spared(host: MetalHost) -> None:
    output = vmm_host.run_tests(host, f"{INSIDE} -k neighbour", seconds=3600, HYPEMAN_TEST_HYPERVISOR="qemu")
    log.info("%s", "\n".join(line for line in output.splitlines() if " times" in line))
    assert "1 passed" in output, output
