"""What is downloaded, looked at closely: ``make test-appliance``.

Builds the committed state twice, in two directories, and compares the results byte by byte; then looks into
what came out. The file's name keeps it out of `make test`, since it takes some minutes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two ``dist`` directories of one commit."""
    folder = tmp_path_factory.mktemp("builds")
    made = []
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in ("one", "a-longer-name-for-the-other"):
        clone = folder / name
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        subprocess.run(["git", "checkout", "--quiet", commit.stdout.strip()], cwd=clone, check=True)
        result = subprocess.run([clone / "packaging/appliance/build"], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        made.append(clone / "dist")
    return made[0], made[1]


def test_two_builds_of_one_commit_are_the_same_bytes(builds: tuple[Path, Path]) -> None:
    one, other = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dist.iterdir()} for dist in builds
    )
    assert one == other


def test_the_checksums_are_right(builds: tuple[Path, Path]) -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=builds[0], check=True)


def test_the_list_of_contents_names_every_file(builds: tuple[Path, Path]) -> None:
    (sbom,) = builds[0].glob("*.cdx.json")
    components = json.loads(sbom.read_text())["components"]
    listed = {component["name"] for component in components if component["type"] == "file"}
    with tarfile.open(next(builds[0].glob("*.tar.gz"))) as tar:
        packed = {name.partition("/bundle/")[2] for name in tar.getnames() if tar.getmember(name).isfile()} - {""}
    assert {name for name in packed if not name.startswith("licences/")} == listed
    named = {component["name"] for component in components}
    assert {"linux", "trio", "libssl3", "libpython3.11", "libc6", "libgcc-s1", "musl"} <= named


def test_everything_belongs_to_root(builds: tuple[Path, Path]) -> None:
    with tarfile.open(next(builds[0].glob("*.tar.gz"))) as tar:
        assert {(member.uid, member.gid) for member in tar} == {(0, 0)}
        assert not [member.name for member in tar if member.mode & 0o022 and not member.issym()]
    listing = subprocess.run(
        ["dpkg-deb", "-c", next(builds[0].glob("*.deb"))], capture_output=True, text=True, check=True
    )
    assert {line.split()[1] for line in listing.stdout.splitlines()} == {"root/root"}


def test_the_single_file_runs(builds: tuple[Path, Path], tmp_path: Path) -> None:
    (program,) = (path for path in builds[0].iterdir() if path.name.endswith("-linux-amd64"))
    environment = {"PATH": "/usr/bin:/bin", "HYPEMAN_UNPACK_DIR": str(tmp_path)}
    output = subprocess.run([program, "--version"], env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert "hypeman" in output.stdout.lower()


def test_lintian_finds_nothing_that_is_not_explained(builds: tuple[Path, Path]) -> None:
    """Every override in debian/lintian-overrides says why."""
    (package,) = builds[0].glob("*.deb")
    result = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", package], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
