"""Captures on disk: what counts as one, and for how long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hypeman.hypervisor import captures
from hypeman.hypervisor.interface import CaptureInvalid, VmConfig
from hypeman.hypervisor.kinds import HypervisorKind

CONFIG = VmConfig(
    instance_id="a", name="a", vcpus=1, memory_bytes=4096, kernel="", initrd=None, cmdline="", disks=(),
    run_dir="", jail="", console_log="", vmm_log="",
)  # fmt: skip


def make(directory: Path, *, flush: bool) -> None:
    (directory / captures.STATE).write_bytes(b"state")
    captures.publish(
        directory, kind=HypervisorKind.QEMU, version="1", machine="m", config=CONFIG, summed=("state",), flush=flush
    )


def test_an_unflushed_capture_ends_with_the_hosts_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    fsync = os.fsync

    def recorded(fd: int) -> None:
        flushed.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recorded)
    make(tmp_path, flush=False)
    assert flushed == []
    assert captures.read(tmp_path).files == {"state": 5}
    monkeypatch.setattr(captures, "_boot_id", lambda: "the next one")
    with pytest.raises(CaptureInvalid, match="not yet on disk"):
        captures.read(tmp_path)
    captures.make_lasting(tmp_path)
    with pytest.raises(CaptureInvalid, match="not yet on disk"):
        captures.read(tmp_path)


def test_it_can_be_made_to_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server does at its start with what a killed one left."""
    make(tmp_path, flush=False)
    captures.make_lasting(tmp_path)
    monkeypatch.setattr(captures, "_boot_id", lambda: "the next one")
    assert captures.read(tmp_path).boot_id == ""
    captures.make_lasting(tmp_path / "missing")
