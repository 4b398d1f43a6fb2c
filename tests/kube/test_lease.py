"""Since when the cluster has not heard of the node, also over a restart of the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypeman.kube import lease
from hypeman.kube.lease import LeaseClock


def test_a_heartbeat_counts_from_when_it_was_sent(tmp_path: Path) -> None:
    moments = iter([100.0, 139.0, 139.0, 141.0, 141.0, 141.0, 141.0])
    clock = LeaseClock(40, lambda: next(moments), tmp_path / "heartbeat")
    assert not clock.is_valid, "the cluster has not heard of it yet"
    clock.renewed(100.0)
    assert (clock.is_valid, clock.lost_for) == (True, 39.0)
    assert not clock.is_valid
    restarted = LeaseClock(40, lambda: next(moments), tmp_path / "heartbeat")
    assert (restarted.lost_for, restarted.is_valid) == (41.0, False), "it goes on counting"


def test_a_reboot_or_a_damaged_file_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "heartbeat"
    LeaseClock(40, lambda: 500.0, file).renewed(500.0)
    assert LeaseClock(40, lambda: 600.0, file).lost_for == 100
    assert LeaseClock(40, lambda: 10.0, file).lost_for == 0, "a clock that has gone back"
    monkeypatch.setattr(lease, "boot_id", lambda: "another")
    assert LeaseClock(40, lambda: 600.0, file).lost_for == 0
    file.write_text("nonsense")
    assert LeaseClock(40, lambda: 600.0, file).lost_for == 0
    assert LeaseClock(40, lambda: 600.0, tmp_path / "no" / "where").lost_for == 0
