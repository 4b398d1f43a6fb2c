"""The build's check refuses a bundle that would need something of the host's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.packaging.build_steps import build_step


def test_a_library_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check, bring = build_step("check_bundle"), build_step("bring_c_library")
    (tmp_path / "_internal").mkdir()
    (tmp_path / "_internal/text").write_text("GLIBC_9.9")
    shutil.copy("/usr/bin/python3", tmp_path / "_internal/bootloader")
    bring.bring(tmp_path)
    check.check_closed(tmp_path)
    assert "objects find their libraries in the bundle" in capsys.readouterr().out
    (tmp_path / "_internal/libm.so.6").unlink()
    with pytest.raises(SystemExit, match=r"_internal/bootloader: .*: libm\.so\.6: cannot open"):
        check.check_closed(tmp_path)
