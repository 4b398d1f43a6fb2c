"""What is in ``dist/``: ``make test-appliance`` names this file."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.packaging.build_steps import build_step
from tests.packaging.roots import dist


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [package] = dist().glob("hypeman_*.deb")
    folder = tmp_path_factory.mktemp("deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder


@pytest.fixture(scope="module")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [package] = dist().glob("hypeman-*.rpm")
    folder = tmp_path_factory.mktemp("rpm")
    subprocess.run(f"rpm2archive - < '{package}' | tar -xz", shell=True, cwd=folder, check=True)
    return folder


def test_every_object_finds_its_libraries_in_the_bundle(deb: Path) -> None:
    bundle = deb / "usr/lib/hypeman"
    assert len(build_step("bring_c_library").dynamic_objects(bundle)) > 40, "else this test looks at nothing"
    [loader] = (bundle / "_internal").glob("ld-linux-*")
    mode = loader.stat().st_mode
    loader.chmod(0o755)  # to ask it; ext/start maps it
    build_step("check_bundle").check_closed(bundle)
    loader.chmod(mode)


def test_no_way_to_install_asks_for_a_c_library() -> None:
    [package] = dist().glob("hypeman_*.deb")
    output = subprocess.run(["dpkg-deb", "-f", package, "Depends"], capture_output=True, text=True, check=True).stdout
    assert "nftables" in output and "libc" not in output
    [package] = dist().glob("hypeman-*.rpm")
    output = subprocess.run(["rpm", "-qp", "--requires", package], capture_output=True, text=True, check=True).stdout
    assert "nftables" in output and "libc" not in output
    with tarfile.open(next(dist().glob("hypeman-*.tar.gz"))) as tar:
        [script] = [name for name in tar.getnames() if name.endswith("/install.sh")]
        member = tar.extractfile(script)
        assert member is not None and "libc" not in member.read().decode()


def test_the_rpm_has_the_files_of_the_deb(deb: Path, rpm: Path) -> None:
    ours, theirs = contents(deb), contents(rpm)
    ours["usr/share/zsh/site-functions/_hypeman"] = ours.pop("usr/share/zsh/vendor-completions/_hypeman")
    for debians_own in ("usr/share/lintian/overrides/hypeman", "usr/share/doc/hypeman/changelog.gz"):
        del ours[debians_own]
    assert theirs == ours


def test_the_rpm_is_whole(tmp_path: Path) -> None:
    [package] = dist().glob("hypeman-*.rpm")
    assert subprocess.run(["rpm", "-K", package], capture_output=True).returncode == 0
    altered = bytearray(package.read_bytes())
    altered[len(altered) // 2] ^= 1
    (tmp_path / "altered.rpm").write_bytes(altered)
    assert subprocess.run(["rpm", "-K", tmp_path / "altered.rpm"], capture_output=True).returncode != 0


def contents(root: Path) -> dict[str, tuple[int, str]]:
    """Path → mode, and digest or target."""
    found = {}
    for path in root.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(root))] = (0, str(path.readlink()))
        elif path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(root))] = (stat.S_IMODE(path.stat().st_mode), digest)
    return found
