"""The oldest system that is promised, Debian 11: ``make test-appliance`` names this file.

Ubuntu 22.04 and RHEL 9 have newer versions of all that matters here, but no registry that the tests may use has them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.roots import Root, make_root, overlay

pytestmark = [pytest.mark.real, pytest.mark.slow]

GOLDEN = Path(__file__).parents[1] / "golden" / "network"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    with overlay(make_root("bullseye"), tmp_path_factory.mktemp("root")) as made:
        yield made


@pytest.mark.parametrize("name", ["ruleset.nft", "ruleset-without-private.nft"])
def test_its_nft_takes_our_rules(root: Root, name: str) -> None:
    subprocess.run(["cp", GOLDEN / name, root.path / "media"], check=True)
    done = root.run(f"nft --version && nft -f /media/{name} && nft list table inet hypeman")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "v0.9.8" in done.stdout and "@ports_at_tcp" in done.stdout
