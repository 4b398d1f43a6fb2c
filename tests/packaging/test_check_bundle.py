"""The build's check refuses a bundle that a promised host could not run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.packaging.glibc import check_bundle


def test_an_object_for_a_newer_c_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = check_bundle()
    shutil.copy("/bin/true", tmp_path / "program")
    (tmp_path / "text").write_text("GLIBC_9.9")
    [wanted] = module.glibc_needs(tmp_path).values()
    monkeypatch.setattr(module, "GLIBC", wanted)
    module.check_glibc(tmp_path)
    monkeypatch.setattr(module, "GLIBC", (wanted[0], wanted[1] - 1))
    with pytest.raises(SystemExit, match="newer than the promised"):
        module.check_glibc(tmp_path)
