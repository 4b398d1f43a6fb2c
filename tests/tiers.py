"""Which test file belongs to which tier; ``make test-fast`` and ``make test`` read it here.

fast    needs no guest, namespace or registry; all of them together take less than a minute on two idle processors
whole   the same, but slower: crash matrices, servers with real time limits, hostile peers
real    real kernels, guests, namespaces or registries; requires root
metal   a virtual bare-metal host; `make test-metal` and `make test-appliance` only
fleet   a control plane of Kubernetes and three hosts in namespaces; `make test-fleet` only

A tier is a property of a file. ``tests/test_tiers.py`` requires that every test file has exactly one.
``python -m tests.tiers fast`` prints the files of a tier.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent

_WHOLE = """
    builds/test_crash.py
    bundle/test_format.py bundle/test_install.py
    conformance/test_python_sdk.py
    egress/test_bounds.py egress/test_confinement.py egress/test_connect.py egress/test_crash.py egress/test_engine.py
    egress/test_engine_kill.py egress/test_hostile.py egress/test_http1.py egress/test_http2.py
    egress/test_intermediary.py egress/test_restart.py
    egress/test_rotation.py egress/test_stack.py egress/test_structure.py egress/test_tls.py
    guest/test_agent_copy.py guest/test_agent_exec.py guest/test_agent_protocol.py
    host/test_cgroups.py host/test_processes.py
    hypervisor/test_conformance.py hypervisor/test_qemu_probe.py hypervisor/test_remote_drivers.py
    images/test_conformance.py images/test_crash.py images/test_created_from.py images/test_hostile.py
    images/test_import.py images/test_registry.py images/test_service.py images/test_worker.py
    ingress/test_crash.py
    instances/test_life.py instances/test_lifecycle.py instances/test_storage_trouble.py
    instances/test_trouble.py instances/test_unknown.py
    kube/test_crash.py
    server/test_serve.py test_backup.py
    walls/test_hostile_archives.py walls/test_hostile_guest.py walls/test_hostile_remote_vmm.py
    walls/test_silent_guest.py walls/test_what_a_vmm_sees.py
"""
WHOLE = frozenset(_WHOLE.split())

REAL_FOLDERS = frozenset(["habits", "real"])
METAL_FOLDERS = frozenset(["metal"])
FLEET_FOLDERS = frozenset(["fleet"])


def files() -> list[str]:
    """Every test file, relative to ``tests``."""
    return sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py"))


def tier_of(file: str) -> str:
    """``fast``, ``whole``, ``real``, ``metal`` or ``fleet``."""
    folder = file.split("/")[0]
    if folder in METAL_FOLDERS:
        return "metal"
    if folder in FLEET_FOLDERS:
        return "fleet"
    if folder in REAL_FOLDERS or is_marked_real(file):
        return "real"
    return "whole" if file in WHOLE else "fast"


def is_marked_real(file: str) -> bool:
    """Whether all tests of the file carry the mark ``real``, or run in a namespace, which marks them."""
    text = (TESTS / file).read_text()
    if any(line.startswith("pytestmark") and "pytest.mark.real" in line for line in text.splitlines()):
        return True
    tests = text.count("\ndef test_") + text.count("\nasync def test_")
    return tests > 0 and text.count("\n@in_namespace") == tests


if __name__ == "__main__":
    print(" ".join(f"tests/{file}" for file in files() if tier_of(file) == sys.argv[1]))
