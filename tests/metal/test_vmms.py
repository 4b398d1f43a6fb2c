"""Cloud Hypervisor and Firecracker themselves on the virtual host's KVM: the suite that all drivers are held to, and
the real agent at work (``tests/hypervisor/test_real_agent.py``). A quarter of an hour for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hypervisor.conftest import NoGuest
from tests.metal import vmm_host
from tests.metal.image import build_image, missing
from tests.metal.rig import MetalHost

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]

WANTED = {
    "cloud-hypervisor": ("cloud-hypervisor",),
    "firecracker": ("firecracker", "jailer"),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalHost]:
    if not vmm_host.programs():
        pytest.skip(f"none of {', '.join(vmm_host.PROGRAMS)} is in HYPEMAN_TEST_VMMS or PATH")
    if reason := missing():
        pytest.skip(reason)
    try:
        booted = vmm_host.boot(build_image(), tmp_path_factory.mktemp("guest"))
    except NoGuest as reason:
        pytest.skip(str(reason))
    with booted:
        yield booted


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """One whose programs are all here."""
    name: str = request.param
    if absent := [program for program in WANTED[name] if program not in vmm_host.programs()]:
        pytest.skip(f"no {' and no '.join(absent)} in HYPEMAN_TEST_VMMS or PATH")
    return name


@pytest.mark.parametrize("kind", WANTED, indirect=True)
@pytest.mark.parametrize("module", ["test_conformance", "test_real_agent"])
def test_on_real_kvm(kind: str, module: str, host: MetalHost) -> None:
    said = vmm_host.run_tests(host, f"tests/hypervisor/{module}.py -k 'real and {kind}'", seconds=2400)
    skipped = [line for line in said.splitlines() if line.startswith("SKIPPED") and "has no hot-plug" not in line]
    assert " passed" in said and not skipped, said
