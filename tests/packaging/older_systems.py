"""Systems with an older C library than the bundle's, or with none: ``make test-appliance`` names this file.

Debian 11 is the oldest that is promised. Ubuntu 22.04 and RHEL 9 have newer versions of all that matters here, but no
registry that the tests may use has them. The kernel is that of the machine that runs the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.roots import Root, dist, make_root, overlay
from tests.real.appliance import busybox_archive

pytestmark = [pytest.mark.real, pytest.mark.slow]

GOLDEN = Path(__file__).parents[1] / "golden" / "network"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    with overlay(make_root("bullseye"), tmp_path_factory.mktemp("root")) as made:
        yield made


@pytest.mark.parametrize("name", ["ruleset.nft", "ruleset-without-private.nft"])
def test_its_nft_takes_our_rules(root: Root, name: str) -> None:
    subprocess.run(["cp", GOLDEN / name, root.path / "media"], check=True)
    result = root.run(f"nft --version && nft -f /media/{name} && nft list table inet hypeman")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "v0.9.8" in result.stdout and "@ports_at_tcp" in result.stdout


INSTALLED = """
    set -e
    step() { printf '\\nSTEP %s\\n' "$*"; }
    getconf GNU_LIBC_VERSION
    echo /usr/lib/x86_64-linux-gnu/libmnl.so.0 > /etc/ld.so.preload    # is not to be loaded into ours
    grep -q libmnl /proc/self/maps
    cd /media && tar -xzf hypeman-*.tar.gz && ./hypeman-*-linux-*/install.sh
    step installed
    hypeman --version
    hypeman --format json doctor > /media/doctor.json || true
    hypeman health
    step answers
    server=$(cat /run/hypeman-server.pid)
    cat /proc/$server/comm
    for own in $server $(cat /proc/$server/task/*/children); do
        sed -n 's,^[0-9a-f-]* r-xp .* \\(/.*\\),\\1,p' /proc/$own/maps | grep -v ^/usr/lib/hypeman/ && exit 1
    done
    step runs nothing of the host
    hypeman image import --name localhost/hello:1 hello.tar
    hypeman run -d --name web --memory 128MB --cpus 1 localhost/hello:1
    hypeman wait web --state Running --timeout 5m
    hypeman exec web -- echo exec works
    step instance runs
    hypeman rm --force web
    /usr/share/hypeman/uninstall.sh --purge
    step removed
"""


def test_debian_11_installs_it_and_runs_an_instance(root: Root) -> None:
    [package] = dist().glob("hypeman-*-linux-amd64.tar.gz")
    shutil.copy(package, root.path / "media")
    (root.path / "media/hello.tar").write_bytes(busybox_archive())
    result = root.run(INSTALLED)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-6000:]
    assert "glibc 2.31" in report and "exec works" in report
    findings = {
        finding["name"]: finding["verdict"] for finding in json.loads((root.path / "media/doctor.json").read_text())
    }
    assert findings["kernel"] == "ok"
    assert [line.removeprefix("STEP ") for line in result.stdout.splitlines() if line.startswith("STEP")] == [
        "installed", "answers", "runs nothing of the host", "instance runs", "removed",
    ]  # fmt: skip


def test_a_root_without_any_c_library_runs_the_command(tmp_path: Path) -> None:
    """As on Alpine: BusyBox, static, and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("requires root")
    for name in ("bin", "proc", "dev", "tmp", "etc", "sys", "run", "root"):
        (tmp_path / name).mkdir()
    shutil.copy("/bin/busybox", tmp_path / "bin/busybox")
    applets = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in set(applets) - {"busybox"}:
        (tmp_path / "bin" / applet).symlink_to("busybox")
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (tmp_path / "etc/nsswitch.conf").write_text("passwd: sss files systemd\nhosts: mdns4_minimal files resolve dns\n")
    [program] = (path for path in dist().iterdir() if path.name.endswith("-linux-amd64") and path.is_file())
    shutil.copy(program, tmp_path / "hypeman")
    script = """
        /hypeman --version && /hypeman --format json doctor > /doctor.json
        [ $? -le 1 ] && [ ! -e /lib ] && [ ! -e /lib64 ] && [ ! -e /usr/lib ]
    """
    result = Root(tmp_path).run(script)
    assert result.returncode == 0 and result.stdout.startswith("hypeman"), result.stdout + result.stderr
    assert {"kernel", "nft"} <= {finding["name"] for finding in json.loads((tmp_path / "doctor.json").read_text())}
