"""A few seconds of the fuzzer on each run of the tests; `make -C tests/fuzz/guest run SECONDS=…` for more."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_guests_parsers_survive_the_fuzzer(tmp_path: Path) -> None:
    program = tmp_path / "fuzz_agent"
    assert shutil.which("clang"), "clang is missing: make build/stamps/debian"
    built = subprocess.run(["make", "-s", "-C", HERE, f"BUILD={tmp_path}"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    run = subprocess.run(
        [
            program,
            "-max_total_time=8",
            "-max_len=70000",
            f"-artifact_prefix={tmp_path}/",
            tmp_path / "found",
            HERE / "corpus",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
