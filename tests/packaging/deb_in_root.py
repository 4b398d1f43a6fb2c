"""The `.deb` in fresh roots, by the commands of the README: ``make test-appliance`` names this file.

Debian 12 is what it is built on. Debian 13 has, as Ubuntu 24.04 has, the libraries that were renamed for 64-bit times,
and a newer systemd, nftables and QEMU; a root of Ubuntu is not in any registry that the tests may use.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.packaging.roots import PACKAGES, dist, make_root, overlay
from tests.real.appliance import busybox_archive

SCRIPT = """
    set -e
    cd /media
    step() { printf '\\nSTEP %s\\n' "$*"; }
    apt-get install -y --no-install-recommends ./hypeman_*.deb qemu-system-x86
    getent group hypeman
    [ "$(stat -c '%a %U:%G' /run/hypeman/hypeman.sock)" = "660 root:hypeman" ]
    step installed
    hypeman doctor || true
    hypeman token | grep -q '^ey'
    curl -fsS --unix-socket /run/hypeman/hypeman.sock http://localhost/instances
    step API answers
    curl -fsS --unix-socket /run/hypeman/hypeman.sock -T hello.tar -X POST \
        'http://localhost/images/import?name=localhost/hello:1'
    for n in $(seq 300); do hypeman image list | grep -q ready && break; sleep 0.2; done
    hypeman run -d --name web --memory 128MB --cpus 1 localhost/hello:1
    hypeman wait web --state Running --timeout 5m
    hypeman exec web -- echo exec works
    hypeman ps --all | grep web
    step instance runs
    apt-get install -y --reinstall --no-install-recommends ./hypeman_*.deb
    hypeman exec web -- echo still here
    step instance outlives the reinstallation
    hypeman rm --force web
    apt-get purge -y hypeman
    for gone in /etc/hypeman /var/lib/hypeman /usr/lib/hypeman /usr/bin/hypeman; do [ ! -e $gone ]; done
    ! getent group hypeman
    ! ip link | grep -q hype
    step purged
"""


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_the_deb_by_the_readme(suite: str, tmp_path: Path) -> None:
    [deb] = dist().glob("hypeman_*_amd64.deb")
    lower = make_root(suite, f"{PACKAGES},systemd,curl,ca-certificates", name=f"{suite}-apt")
    with overlay(lower, tmp_path) as root:
        subprocess.run(["cp", deb, root.path / "media"], check=True)
        (root.path / "media/hello.tar").write_bytes(busybox_archive())
        done = root.run(SCRIPT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert [line.removeprefix("STEP ") for line in done.stdout.splitlines() if line.startswith("STEP")] == [
        "installed", "API answers", "instance runs", "instance outlives the reinstallation", "purged",
    ]  # fmt: skip
    assert "exec works" in done.stdout and "still here" in done.stdout
