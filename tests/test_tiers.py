"""Every test file has one tier, the table of tiers names only files that exist, and no test can wait without end."""

from __future__ import annotations

import signal

import pytest

from tests import conftest, tiers


def test_the_table_names_files_that_exist() -> None:
    assert set(tiers.files()) >= tiers.WHOLE


def test_a_file_has_one_tier() -> None:
    """A file that is marked real as a whole needs no entry, and must have none."""
    twice = {file for file in tiers.WHOLE if tiers.tier_of(file) != "whole"}
    assert not twice, "these are real, metal or fleet already: remove them from WHOLE"


@pytest.mark.parametrize("file", [file for file in tiers.files() if tiers.tier_of(file) == "fast"])
def test_a_fast_file_starts_no_guest_and_no_registry(file: str) -> None:
    text = (tiers.TESTS / file).read_text()
    if file == "test_tiers.py":
        return
    wanted = [word for word in ("running_registry(", "booted(", "appliance_in_world(") if word in text]
    assert not wanted, f"{file} uses {wanted}: mark it real or add it to tests/tiers.py"


def test_a_test_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of conftest.py interrupts whatever waits, also outside of Trio."""
    with pytest.raises(conftest.TookTooLong), conftest.time_limit(0.05, "this test"):
        signal.pause()
