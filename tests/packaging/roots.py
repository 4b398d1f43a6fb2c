"""Roots of distributions, made once by mmdebstrap, in which the appliance is installed and run without a network.

No systemd runs in there: ``systemctl`` and ``systemd-run`` are stand-ins that start and stop the server as the unit
would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
KEPT = TOP / "build" / "test-roots"
PACKAGES = "nftables,iproute2,e2fsprogs,kmod,qemu-system-x86"

_SYSTEMCTL = """#!/bin/sh
# Starts and stops the server; VMs and the engine are left alone, as KillMode=process does.
pid=/run/hypeman-server.pid
case "$*" in
*"stop hypeman.service"*)
    [ -e $pid ] || exit 0
    kill "$(cat $pid)" 2>/dev/null
    while kill -0 "$(cat $pid)" 2>/dev/null; do sleep 0.1; done
    rm -f $pid ;;
*"start "*hypeman.service*)
    mkdir -p /run/hypeman /var/lib/hypeman
    chmod 711 /var/lib/hypeman
    # systemd's where /bin is no link, not that of the installing user
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    setsid /usr/bin/hypeman serve >>/var/log/hypeman.log 2>&1 </dev/null &
    echo $! > $pid
    n=0
    until HOME=/root /usr/bin/hypeman health >/dev/null 2>&1; do
        kill -0 "$(cat $pid)" 2>/dev/null || { tail -n 3 /var/log/hypeman.log >&2; exit 1; }
        n=$((n + 1)); [ $n -lt 600 ] || exit 1
        sleep 0.2
    done ;;
esac
exit 0
"""


def make_root(suite: str, packages: str = PACKAGES, *, name: str = "") -> Path:
    """The root of a Debian suite, which is never written to; skips where none can be made. ``name``: of another set of
    packages."""
    kept = KEPT / (name or suite)
    if kept.exists():
        return kept
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        pytest.skip("requires root and mmdebstrap")
    KEPT.mkdir(parents=True, exist_ok=True)
    half = kept.with_name(f"{kept.name}.new")
    subprocess.run(["rm", "-rf", half], check=True)
    command = [
        "unshare", "--mount", "mmdebstrap", "--quiet", "--variant=minbase", '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=path-exclude=/usr/share/doc/*", f"--include={packages}", suite, str(half),
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no {suite} to be had: {made.stderr.strip()[-300:]}")
    half.rename(kept)
    return kept


class Root:
    """An overlay of a root, with a network namespace in which there is nothing but loopback."""

    def __init__(self, merged: Path) -> None:
        self.path = merged

    def run(self, script: str, *, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run a shell script in there, as process 1 of its own; everything it starts ends with it."""
        inside = "mount -t proc proc /proc; ip link set lo up; mkdir -p /run/systemd/system; " + script
        set_up = (
            'mount --make-rprivate / && cd "$0" && mount -t sysfs -o ro sys sys && mount --rbind /dev dev && '
            'mount -t tmpfs run run && exec chroot . /bin/sh -c "$1"'
        )
        command = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
                   "/bin/sh", "-c", set_up, str(self.path), inside]  # fmt: skip
        environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout)


@contextmanager
def overlay(lower: Path, work: Path) -> Iterator[Root]:
    """A writable root above ``lower``, below ``work``."""
    for name in ("upper", "scratch", "merged"):
        (work / name).mkdir(parents=True)
    merged = work / "merged"
    options = f"lowerdir={lower},upperdir={work / 'upper'},workdir={work / 'scratch'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
    try:
        for name, text in (("systemctl", _SYSTEMCTL), ("systemd-run", "#!/bin/sh\nexit 0\n")):
            (merged / "usr/bin" / name).write_text(text)
            (merged / "usr/bin" / name).chmod(0o755)
        yield Root(merged)
    finally:
        subprocess.run(["umount", "-l", merged], check=True)


def dist() -> Path:
    """The finished build: ``dist/``, or the directory that HYPEMAN_TEST_DIST names."""
    found = Path(os.environ.get("HYPEMAN_TEST_DIST", TOP / "dist"))
    if not list(found.glob("hypeman-*.tar.gz")):
        pytest.skip(f"no appliance in {found}: make appliance")
    return found
