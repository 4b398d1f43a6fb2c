"""A bundle on a host without a network: ``make test-appliance`` names this file.

The appliance's single file installs a bundle in a Debian root that has never seen hypeman; an instance runs at its end.
Then bundles that do not come up are rolled back below the running instance.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.roots import Root, dist, make_root, overlay
from tests.real.appliance import busybox_archive

pytestmark = [pytest.mark.real, pytest.mark.slow]

COMPOSE = """
services:
  hello:
    image: edge/hello:1
    command: ["sh", "-c", "echo it runs; exec sleep 1000000"]
"""
SETTINGS = "hypervisor: {accelerator: tcg}\nlog: {level: info}\n"


@pytest.fixture(scope="module", params=["bookworm", "bullseye"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    with overlay(make_root(request.param), tmp_path_factory.mktemp("root")) as made:
        yield made


def program() -> Path:
    return next(path for path in dist().iterdir() if path.name.endswith("-linux-amd64") and path.is_file())


def create(folder: Path, name: str, appliance: Path) -> None:
    words = ["bundle", "create", folder / f"{name}.hypeman", "--name", "edge", "--appliance", appliance]
    words += ["--secret-key", folder / "site.key", "--image", f"edge/hello:1={folder / 'hello.tar'}"]
    words += ["--settings", folder / "settings.yaml", "--compose", folder / "compose.yaml"]
    said = hypeman(folder, *words)
    assert "edge" in said


def hypeman(folder: Path, *words: object) -> str:
    environ = {"PATH": "/usr/bin:/bin", "HYPEMAN_UNPACK_DIR": str(folder / "unpacked")}
    result = subprocess.run([program(), *map(str, words)], env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def broken_appliance(folder: Path) -> Path:
    """The release, but its server ends at once."""
    [good] = dist().glob("hypeman-*-linux-amd64.tar.gz")
    (folder / "broken").mkdir()
    target = folder / "broken" / good.name
    (folder / "broken/tree").mkdir()
    subprocess.run(["tar", "-C", folder / "broken/tree", "-xzf", good], check=True)
    [top] = (folder / "broken/tree").iterdir()
    (top / "bundle/hypeman").write_text("#!/bin/sh\necho does not work >&2\nexit 1\n")
    subprocess.run(["tar", "-C", top.parent, "-czf", target, top.name], check=True)
    return target


def test_installs_without_a_network_and_goes_back_from_what_does_not_run(root: Root, tmp_path: Path) -> None:
    (tmp_path / "hello.tar").write_bytes(busybox_archive())
    (tmp_path / "compose.yaml").write_text(COMPOSE)
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    hypeman(tmp_path, "bundle", "keygen", tmp_path / "site")
    [appliance] = dist().glob("hypeman-*-linux-amd64.tar.gz")
    create(tmp_path, "good", appliance)
    create(tmp_path, "bad", broken_appliance(tmp_path))
    inside = root.path / "media"
    for name in ("good.hypeman", "bad.hypeman", "site.pub"):
        subprocess.run(["cp", tmp_path / name, inside], check=True)
    subprocess.run(["cp", program(), inside / "hypeman"], check=True)

    script = """
        set -e
        cd /media
        step() { echo "STEP $*"; }
        getent hosts example.org && exit 1
        cp good.hypeman altered.hypeman
        printf x | dd of=altered.hypeman bs=1 seek=5000000 conv=notrunc 2>/dev/null
        ! ./hypeman bundle install altered.hypeman --key site.pub || exit 1
        [ ! -e /usr/lib/hypeman ]; step altered file refused
        ./hypeman bundle install good.hypeman --key site.pub
        step installed
        hypeman ps
        for n in $(seq 300); do hypeman logs edge-hello 2>/dev/null | grep -q 'it runs' && break; sleep 0.5; done
        hypeman logs edge-hello
        hypeman exec edge-hello -- sh -c 'echo exec works; cat /proc/sys/kernel/hostname'
        grep -l accelerator /etc/hypeman/config.d/*.yaml
        step instance runs
        ! ./hypeman bundle install bad.hypeman --key site.pub || exit 1
        hypeman bundle status
        hypeman exec edge-hello -- echo still here
        step rolled back
    """
    result = root.run(script)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-6000:]
    assert [line for line in result.stdout.splitlines() if line.startswith("STEP")] == [
        "STEP altered file refused", "STEP installed", "STEP instance runs", "STEP rolled back",
    ]  # fmt: skip
    assert "exec works" in result.stdout and "still here" in result.stdout
    assert "the previous version is running again" in result.stderr and "rolled-back: edge" in result.stdout
