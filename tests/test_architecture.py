"""Architectures as values: which is which, and that what we ship for them is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hypeman import architecture
from hypeman.architecture import AMD64, ARM64, Architecture
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.qemu import config as qemu

TOP = Path(__file__).parents[1]


def test_names() -> None:
    for name in ("x86_64", "amd64", "AMD64"):
        assert architecture.named(name) is AMD64
    for name in ("aarch64", "arm64"):
        assert architecture.named(name) is ARM64
    assert architecture.named("riscv64") is None
    assert architecture.named("") is None


@pytest.mark.parametrize("machine", architecture.ALL, ids=lambda machine: str(machine.name))
def test_every_architecture_has_a_board_and_an_emulated_cpu(machine: Architecture) -> None:
    assert qemu.BOARDS[machine][HypervisorKind.QEMU].pci
    assert qemu.EMULATORS[machine].name == "tcg"


def test_the_processor_is_looked_at_in_one_place() -> None:
    """Elsewhere in the package the difference is a field of an Architecture."""
    looks = re.compile(r"\bmachine\(\)|uname\(\)\.machine")
    found = [path.name for path in sorted((TOP / "hypeman").rglob("*.py")) if looks.search(path.read_text())]
    assert found == ["architecture.py"]


def test_what_arm64_takes_out_of_the_kernels_configuration_is_in_it() -> None:
    config = (TOP / "packaging/kernel/config").read_text()
    lines = (TOP / "packaging/kernel/config.arm64").read_text().splitlines()
    removed = [line[1:] for line in lines if line.startswith("-")]
    added = [line.split("=")[0] for line in lines if line.startswith("CONFIG_")]
    assert removed and added and len(set(added)) == len(added)
    for name in removed:
        assert re.search(rf"^(# )?{name}[= ]", config, re.MULTILINE), f"{name} is not in config"
    for name in set(added) - set(removed):
        assert not re.search(rf"^(# )?{name}[= ]", config, re.MULTILINE), f"{name} is in config already"
