"""The OCI distribution conformance suite (Go module proxy) against our registry.

Built once into build/; `make test-conformance` runs it. Not part of `make test`: it needs Go and its module proxy.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import trio

from tests.registry.conftest import Served

VERSION = "v0.0.0-20260831232431-97274622c111"
BIN = Path(__file__).parents[2] / "build" / "oci-conformance"


def build() -> Path:
    program = BIN / "conformance"
    if not program.exists():
        module = f"github.com/opencontainers/distribution-spec/conformance@{VERSION}"
        subprocess.run(["go", "install", module], check=True, timeout=500, env={**os.environ, "GOBIN": str(BIN)})
    return program


async def test_the_conformance_suite(served: Served, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OCI_REGISTRY": served.host,
        "OCI_TLS": "disabled",
        "OCI_USERNAME": "any",
        "OCI_PASSWORD": served.token,
        "OCI_RESULTS_DIR": str(tmp_path),
        "OCI_API_BLOBS_UPLOAD_CANCEL": "true",
        "OCI_API_BLOBS_DIGEST_HEADER": "true",
        "OCI_API_MANIFESTS_DIGEST_HEADER": "true",
        "OCI_DATA_SHA512": "false",  # the specification lets registries choose; blobs here have sha256 digests
    }
    with trio.fail_after(300):
        result = await trio.run_process(
            [build()], env=environment, capture_stdout=True, capture_stderr=True, check=False
        )
    cases = list(ElementTree.parse(tmp_path / "junit.xml").iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    print(f"{len(cases)} cases, {len(failed)} failed, {len(skipped)} skipped")
    assert len(cases) > 50 and not failed, (failed, result.stdout.decode()[-3000:], result.stderr.decode()[-1000:])
