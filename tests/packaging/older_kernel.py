"""The oldest kernel that is promised, with the systemd and the QEMU of its time: ``make test-metal`` names this file.

Debian 11 with Linux 5.10 on a virtual bare-metal host. KVM is the emulated one, so nothing here is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.metal.image import build_image, missing
from tests.metal.rig import MetalHost
from tests.packaging.on_metal import SLOW
from tests.packaging.roots import dist
from tests.real.appliance import busybox_archive

pytestmark = pytest.mark.metal

SETTINGS = b"hypervisor: {accelerator: tcg}\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalHost]:
    if reason := missing():
        pytest.skip(reason)
    hello = tmp_path_factory.mktemp("image") / "hello.tar"
    hello.write_bytes(busybox_archive())
    [package] = dist().glob("hypeman_*.deb")
    files: dict[str, bytes | Path] = {
        "/root/hypeman.deb": package,
        "/root/hello.tar": hello,
        "/etc/hypeman/config.d/50-test.yaml": SETTINGS,
    }
    with MetalHost.boot(build_image(suite="bullseye", python=False), files=files, memory_mb=4096, cpus=2) as booted:
        yield booted


def test_linux_5_10_runs_the_server_and_an_instance(host: MetalHost) -> None:
    assert host.check("uname -r").startswith("5.10.") and "2.31" in host.check("getconf GNU_LIBC_VERSION")
    host.check("dpkg -i /root/hypeman.deb", timeout=SLOW)
    host.check("systemctl is-active hypeman hypeman-vms")
    server = host.check("systemctl show --property MainPID --value hypeman").strip()
    assert host.check(f"cat /proc/{server}/comm").strip() == "hypeman"
    found = host.run("hypeman --format json doctor", timeout=SLOW).output
    findings = {finding["name"]: finding for finding in json.loads(found[found.index("[") :])}
    assert findings["kernel"]["verdict"] == "ok" and "Linux 6.1" in findings["kernel"]["message"]
    host.check("hypeman image import --name localhost/hello:1 /root/hello.tar", timeout=SLOW)
    host.check("hypeman run -d --name web --memory 128MB --cpus 1 --overlay-size 1GB localhost/hello:1", timeout=SLOW)
    host.check("hypeman wait web --state Running --timeout 20m", timeout=2 * SLOW)
    assert "exec works" in host.check("hypeman exec web -- echo exec works", timeout=SLOW)
    host.check("hypeman rm --force web && dpkg -P hypeman", timeout=SLOW)
