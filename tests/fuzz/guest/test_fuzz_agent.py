"""A few seconds of the fuzzer on each run of the tests; `make -C tests/fuzz/guest run SECONDS=…` for more."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_guests_parsers_survive_the_fuzzer(tmp_path: Path) -> None:
    program = tmp_path / "fuzz_agent"
    built = subprocess.run(["make", "-s", "-C", HERE, f"BUILD={tmp_path}"], capture_output=True, text=True)
    if built.returncode != 0:
        pytest.skip("no clang with libFuzzer and AddressSanitizer here (libclang-rt-14-dev)")
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
