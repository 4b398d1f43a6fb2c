"""The same tests against the data plane built with the sanitizers for addresses and undefined behaviour; some fuzzing.

Whatever the suite makes it do, it reads and writes only what it owns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "ext" / "egress"
SUITE = ("test_hostile.py", "test_http1.py", "test_http2.py", "test_connect.py", "test_tls.py", "test_scrub.py",
         "test_mtls.py", "test_postgres.py", "test_mysql.py", "test_transforms.py", "test_access.py",
         "test_sigv4.py::test_body_is_hashed", "test_sigv4.py::test_http2_body_is_hashed",
         "test_sigv4.py::test_refused",
         "../ingress/test_proxy.py", "../ingress/test_tls.py", "../ingress/test_grpc.py",
         "../ingress/test_passthrough.py")  # fmt: skip


def run(*argv: object, timeout: float = 600, **env: str) -> str:
    done = subprocess.run([str(each) for each in argv], cwd=ROOT, env={**os.environ, **env}, timeout=timeout,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout.strip()


def test_suite_under_sanitizers(tmp_path: Path) -> None:
    assert shutil.which("gcc"), "gcc is missing: make build/stamps/debian"
    built = tmp_path / "egress.so"
    source = tmp_path / "egress.c"
    run(sys.executable, "-m", "cython", "-3", "--module-name", "hypeman._native._egress_c", ROOT / "ext" / "egress.pyx",
        "-o", source)  # fmt: skip
    run("gcc", "-shared", "-fPIC", "-O1", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
        "-I", sysconfig.get_path("include"), "-I", SOURCES, source, *sorted(SOURCES.glob("*.c")),
        "-lssl", "-lcrypto", "-lnghttp2", "-lpthread", "-o", built)  # fmt: skip
    libraries = [run("gcc", f"-print-file-name={name}") for name in ("libasan.so", "libubsan.so")]
    reports = f"log_path={tmp_path}/report"
    environment = (f"HYPEMAN_EGRESS_SO={built}", f"LD_PRELOAD={':'.join(libraries)}",
                   f"ASAN_OPTIONS=detect_leaks=0:{reports}", f"UBSAN_OPTIONS={reports}")  # fmt: skip
    run(sys.executable, "-m", "pytest", "-q", "-x", *(Path(__file__).parent / name for name in SUITE),
        HYPEMAN_EGRESS_SANITIZED=" ".join(environment))  # fmt: skip
    assert not [report.read_text()[:4000] for report in tmp_path.glob("report.*")]


def test_fuzz_a_little(tmp_path: Path) -> None:
    """Ten seconds on the parsers, from the kept corpus."""
    assert shutil.which("clang"), "clang is missing: make build/stamps/debian"
    built = tmp_path / "fuzz"
    run("clang", "-g", "-O1", "-w", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined",
        "-D_GNU_SOURCE", "-I", SOURCES, ROOT / "tests" / "fuzz" / "egress_fuzz.c", *sorted(SOURCES.glob("*.c")),
        "-lssl", "-lcrypto", "-lnghttp2", "-lpthread", "-o", built)  # fmt: skip
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    run(built, "-max_len=40000", "-max_total_time=10", f"-artifact_prefix={tmp_path}/", corpus,
        ROOT / "tests" / "fuzz" / "egress")  # fmt: skip
