"""The packages in fresh roots, by the commands of the README: ``make test-appliance`` names this file.

The ``.deb``: Debian 12 is what is developed on. Debian 13 has, as Ubuntu 24.04 has, the libraries that were renamed for
64-bit times, and a newer systemd, nftables and QEMU. The ``.rpm``: no registry that the tests may use has a
distribution of RPM, so rpm installs it in Debian 12, whose packages it does not know (``--nodeps``); files, scripts and
upgrades are rpm's.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.packaging.roots import PACKAGES, dist, make_root, overlay
from tests.real.appliance import busybox_archive

APT = {
    "install": "apt-get install -y --no-install-recommends ./hypeman_*.deb qemu-system-x86",
    "again": "apt-get install -y --reinstall --no-install-recommends ./hypeman_*.deb",
    "remove": "apt-get purge -y hypeman",
}
RPM = {
    "install": "rpm -K hypeman-*.rpm && rpm --nodeps -i hypeman-*.rpm",
    "again": "rpm --nodeps -U --replacepkgs hypeman-*.rpm && rpm -V --nodeps hypeman",
    "remove": "rpm -e hypeman && rm -r /etc/hypeman /var/lib/hypeman && groupdel hypeman",
}

SCRIPT = """
    set -e
    cd /media
    step() {{ printf '\\nSTEP %s\\n' "$*"; }}
    {install}
    getent group hypeman
    [ "$(stat -c '%a %U:%G' /run/hypeman/hypeman.sock)" = "660 root:hypeman" ]
    step installed
    hypeman doctor || true
    hypeman token | grep -q '^ey'
    curl -fsS --unix-socket /run/hypeman/hypeman.sock http://localhost/instances
    curl -fsS --unix-socket /run/hypeman/hypeman.sock http://localhost/ui/ | grep -qi '<!doctype html>'
    step API and web UI answer
    curl -fsS --unix-socket /run/hypeman/hypeman.sock -T hello.tar -X POST \
        'http://localhost/images/import?name=localhost/hello:1'
    for n in $(seq 300); do hypeman image list | grep -q ready && break; sleep 0.2; done
    hypeman run -d --name web --memory 128MB --cpus 1 localhost/hello:1
    hypeman wait web --state Running --timeout 5m
    hypeman exec web -- echo exec works
    hypeman ps --all | grep web
    step instance runs
    {again}
    hypeman exec web -- echo still here
    step instance outlives the reinstallation
    hypeman rm --force web
    {remove}
    for gone in /etc/hypeman /var/lib/hypeman /usr/lib/hypeman /usr/bin/hypeman; do [ ! -e $gone ]; done
    ! getent group hypeman
    ! ip link | grep -q hype
    step removed
"""


@pytest.mark.parametrize(("suite", "kind"), [("bookworm", "deb"), ("trixie", "deb"), ("bookworm", "rpm")])
def test_a_package_by_the_readme(suite: str, kind: str, tmp_path: Path) -> None:
    [package] = dist().glob(f"hypeman[-_]*.{kind}")
    script = SCRIPT.format(**(RPM if kind == "rpm" else APT))
    lower = make_root(suite, f"{PACKAGES},systemd,curl,ca-certificates,rpm", name=f"{suite}-packages")
    with overlay(lower, tmp_path) as root:
        subprocess.run(["cp", package, root.path / "media"], check=True)
        (root.path / "media/hello.tar").write_bytes(busybox_archive())
        result = root.run(script)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert [line.removeprefix("STEP ") for line in result.stdout.splitlines() if line.startswith("STEP")] == [
        "installed", "API and web UI answer", "instance runs", "instance outlives the reinstallation", "removed",
    ]  # fmt: skip
    assert "exec works" in result.stdout and "still here" in result.stdout
