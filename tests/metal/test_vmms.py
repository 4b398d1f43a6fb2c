"""The real Cloud Hypervisor and Firecracker on the virtual host's KVM: the conformance suite of drivers, the real agent
(``tests/hypervisor/test_real_agent.py``), landlock, and the whole server (``tests/real``): life cycles, saved memory,
and kills of the server in the middle of each operation. Some twenty minutes for each module and kind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.metal import vmm_host
from tests.metal.rig import MetalHost

pytestmark = [pytest.mark.metal, pytest.mark.real, pytest.mark.slow]

WANTED = {
    "cloud-hypervisor": ("cloud-hypervisor",),
    "firecracker": ("firecracker", "jailer"),
}
SERVER_TESTS = {
    "test_spine": "not many_at_once_and",
    "test_memory": "not ends_when_its_time",
    "test_devices": "not vgpu",  # whose parent is made for Debian's own kernel: test_server_devices.py
    "test_backup": "",
    "test_kill": "",
}
"""Module of tests/real → selection of its tests."""
TIMEOUT = 5400
ALLOWED_SKIPS = ("has no hot-plug", "cannot do devices")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalHost]:
    if not vmm_host.programs():
        pytest.skip(f"none of {', '.join(vmm_host.PROGRAMS)} is in HYPEMAN_TEST_VMMS or PATH")
    with vmm_host.boot_for_tests(tmp_path_factory.mktemp("guest"), newer_kernel=True, cpus=2) as booted:
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
    output = vmm_host.run_tests(host, f"tests/hypervisor/{module}.py -k 'real and {kind}'", seconds=TIMEOUT)
    check_ran(output)


@pytest.mark.parametrize("kind", ["cloud-hypervisor"], indirect=True)
def test_landlock(kind: str, host: MetalHost) -> None:
    check_ran(vmm_host.run_tests(host, "tests/hypervisor/test_landlock.py", seconds=TIMEOUT))


@pytest.mark.parametrize("kind", WANTED, indirect=True)
@pytest.mark.parametrize("module", SERVER_TESTS)
def test_whole_server(kind: str, module: str, host: MetalHost) -> None:
    points = os.environ.get("KILL_POINTS", "1")
    selection = f"tests/real/{module}.py -k '{SERVER_TESTS[module] or module}'"
    output = vmm_host.run_tests(host, selection, seconds=TIMEOUT, HYPEMAN_TEST_HYPERVISOR=kind, KILL_POINTS=points)
    check_ran(output)


def check_ran(output: str) -> None:
    """No test was skipped but those of abilities that a VMM lacks."""
    print(output)
    lines = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    skipped = [line for line in lines if not any(reason in line for reason in ALLOWED_SKIPS)]
    assert " passed" in output and not skipped, output
