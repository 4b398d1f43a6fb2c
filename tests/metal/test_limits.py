"""The control groups of VMMs on a host with cgroup v2 and systemd: ``limits_inside.py`` runs in there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hypervisor.conftest import NoGuest
from tests.metal import vmm_host
from tests.metal.image import build_image, missing
from tests.metal.rig import MetalHost

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]

UNIT = "hypeman-vms.service"
PATIENCE = 3600


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalHost]:
    if reason := missing():
        pytest.skip(reason)
    try:
        booted = vmm_host.boot(build_image(), tmp_path_factory.mktemp("guest"))
    except NoGuest as reason:
        pytest.skip(str(reason))
    with booted:
        booted.put({f"/etc/systemd/system/{UNIT}": vmm_host.ROOT / "systemd" / UNIT})
        booted.check(f"systemctl daemon-reload && systemctl start {UNIT}")
        yield booted


@pytest.mark.parametrize("what", ["processes", "memory", "processors"])
def test_a_vmm_is_held(what: str, host: MetalHost) -> None:
    said = vmm_host.run_tests(host, f"tests/metal/limits_inside.py -k test_{what}", seconds=PATIENCE)
    assert "1 passed" in said, said


def test_its_neighbour_is_spared(host: MetalHost) -> None:
    said = vmm_host.run_tests(
        host, "-s tests/metal/limits_inside.py -k neighbour", seconds=PATIENCE, HYPEMAN_TEST_HYPERVISOR="qemu"
    )
    print(said)
    assert "1 passed" in said, said
