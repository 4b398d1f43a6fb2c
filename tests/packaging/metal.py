"""The appliance on a bare-metal host without Python: ``make test-metal``.

One story, told in order on one virtual machine in which KVM, vhost-vsock, cgroup v2 and systemd are real
(``tests/metal``): install the Debian package, boot a guest with KVM, kill, restart and upgrade the server
while the guest counts, purge; then the same from the tarball. The file's name keeps it out of `make test`:
it wants a finished ``dist/`` and takes some minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import demo
from tests.metal.image import build_image, missing
from tests.metal.rig import MetalHost, Result

DIST = Path(__file__).parents[2] / "dist"
COUNTING = 'i=0; while true; do i=$((i+1)); echo "count $i"; sleep 1; done'
VMM = "^/usr/bin/qemu-system-x86_64 -name"
SLOW = 300
"""Seconds. Everything inside takes 20 to 50 times as long as on metal."""

PURGED = ("/etc/hypeman", "/var/lib/hypeman", "/run/hypeman", "/usr/lib/hypeman", "/usr/bin/hypeman")


class Appliance:
    """What the tests do to the host, by name."""

    def __init__(self, host: MetalHost) -> None:
        self.host = host
        self.token = ""

    def hypeman(self, *arguments: str, timeout: float = SLOW) -> str:
        quoted = " ".join(f"'{argument}'" for argument in arguments)
        return self.host.check(f"HYPEMAN_API_KEY={self.token} hypeman {quoted}", timeout=timeout)

    def instance(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.hypeman("--format", "json", "inspect", name)))

    def vmm(self) -> int:
        """The process id of the one VMM; the QEMU that tries KVM at a server's start has no name."""
        pids = self.host.check(f"pgrep -f '{VMM}'").split()
        assert len(pids) == 1, pids
        return int(pids[0])

    def count(self) -> int:
        counts = re.findall(r"count (\d+)", self.hypeman("logs", "--tail", "5", "counter"))
        return int(counts[-1]) if counts else 0

    def wait_for(self, what: str, script: str, timeout: float = SLOW) -> Result:
        """Run ``script`` until it succeeds."""
        deadline = time.monotonic() + timeout
        while True:
            result = self.host.run(script, timeout=timeout)
            if result.code == 0:
                return result
            if time.monotonic() > deadline:
                journal = self.host.run("journalctl -u hypeman -n 80 --no-pager").output
                raise AssertionError(f"not within {timeout} s: {what}\n{result.output}\n{journal}")
            time.sleep(0.5)

    def wait_for_server(self) -> None:
        self.wait_for("the server answers", "curl -sf --unix-socket /run/hypeman/hypeman.sock http://localhost/health")

    def wait_for_count_above(self, mark: int) -> None:
        deadline = time.monotonic() + SLOW
        while self.count() <= mark:
            assert time.monotonic() < deadline, f"the guest's count does not go beyond {mark}"
            time.sleep(1)


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("registry")
    make_registry(folder)
    deb, tarball = find("*.deb"), find("*.tar.gz")
    with MetalHost.boot(build_image(python=False), memory_mb=4096) as host:
        host.put(
            {
                "/root/hypeman.deb": deb,
                "/root/newer.deb": newer_version(deb, tmp_path_factory.mktemp("newer")),
                "/root/hypeman.tar.gz": tarball,
                "/root/registry": folder,
                "/usr/local/bin/docker-registry": Path("/usr/bin/docker-registry"),
            }
        )
        host.check(
            "ip link set lo up; setsid docker-registry serve /root/registry/registry.yml >/dev/null 2>&1 </dev/null &"
        )
        yield Appliance(host)


def find(pattern: str) -> Path:
    found = sorted(DIST.glob(pattern))
    if not found:
        pytest.skip(f"no dist/{pattern}: make appliance")
    return found[-1]


def make_registry(folder: Path) -> None:
    """A registry's directory with one image that counts for ever; the host brings no tools to push one."""
    demo.SCRIPT = COUNTING
    with demo.started(["docker-registry", "serve", str(demo.write_registry_config(folder))], folder / "log"):
        demo.wait_until("the registry listens", lambda: demo.can_connect(5000))
        demo.push_image(folder)
    config = folder / "registry.yml"
    config.write_text(config.read_text().replace(str(folder), "/root/registry"))


def newer_version(deb: Path, folder: Path) -> Path:
    """The same package under a higher number: another build, as far as dpkg and systemd can tell."""
    subprocess.run(["dpkg-deb", "-R", deb, folder / "tree"], check=True)
    control = folder / "tree" / "DEBIAN" / "control"
    control.write_text(re.sub(r"^(Version: .*)$", r"\1+1", control.read_text(), flags=re.MULTILINE))
    subprocess.run(
        ["dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "-b", folder / "tree", folder / "newer.deb"], check=True
    )
    return folder / "newer.deb"


def test_the_host_has_no_python(appliance: Appliance) -> None:
    assert appliance.host.run("command -v python3 python").code != 0


def test_the_package_installs_starts_and_gives_a_token(appliance: Appliance) -> None:
    said = appliance.host.check("dpkg -i /root/hypeman.deb", timeout=SLOW)
    token = re.search(r"^ +(ey\S+)$", said, re.MULTILINE)
    assert token, said
    appliance.token = token[1]
    appliance.host.check("systemctl is-active hypeman hypeman-vms")
    appliance.wait_for_server()
    assert appliance.host.check("stat -c %a /etc/hypeman/config.yaml /var/lib/hypeman").split() == ["600", "711"]


def test_tcp_wants_the_token(appliance: Appliance) -> None:
    ask = "curl -s -o /dev/null -w %{http_code} http://127.0.0.1:8080/instances"
    assert appliance.host.check(ask) == "401"
    assert appliance.host.check(f"{ask} -H 'authorization: Bearer {appliance.token}'") == "200"


def test_the_doctor_finds_kvm_and_control_groups(appliance: Appliance) -> None:
    findings = appliance.host.run("hypeman doctor", timeout=SLOW).output
    assert re.search(r"^ok +kvm:", findings, re.MULTILINE), findings
    assert re.search(r"^ok +control groups:", findings, re.MULTILINE), findings


def test_an_image_is_pulled(appliance: Appliance) -> None:
    appliance.host.check(
        """printf '\\nimages:\\n  insecure_registries: ["127.0.0.1:5000"]\\n' >> /etc/hypeman/config.yaml"""
    )
    appliance.host.check("systemctl restart hypeman", timeout=SLOW)
    appliance.wait_for_server()
    appliance.hypeman("pull", demo.IMAGE)
    appliance.wait_for("the image is ready", f"hypeman image get {demo.IMAGE} | grep -q ready")


def test_an_instance_boots_with_kvm(appliance: Appliance) -> None:
    appliance.hypeman(
        "run", "--name", "counter", "--memory", "256MB", "--cpus", "1", "--overlay-size", "256MB", demo.IMAGE
    )
    appliance.hypeman("wait", "counter", "--state", "Running", "--timeout", f"{SLOW}s", timeout=SLOW + 30)
    assert "kvm" in appliance.host.check(f"tr '\\0' ' ' < /proc/{appliance.vmm()}/cmdline")


def test_exec_answers(appliance: Appliance) -> None:
    assert "Linux" in appliance.hypeman("exec", "counter", "--", "uname", "-a")


def test_the_vm_has_a_control_group_with_limits(appliance: Appliance) -> None:
    group = appliance.host.check(f"cut -d: -f3 /proc/{appliance.vmm()}/cgroup").strip()
    assert group.startswith("/hypeman.slice/hypeman-vms.service/")
    limits = appliance.host.check(f"cd /sys/fs/cgroup{group}; cat cpu.max memory.max").split()
    assert limits[:2] == ["150000", "100000"]
    assert int(limits[2]) == 512 * 1024 * 1024


def test_the_vm_runs_without_privileges(appliance: Appliance) -> None:
    status = appliance.host.check(f"grep -E '^(Uid|NoNewPrivs|CapEff)' /proc/{appliance.vmm()}/status")
    assert not re.search(r"^Uid:\s+0\b", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)


@pytest.mark.parametrize(
    "interruption",
    [
        "systemctl restart hypeman",
        "systemctl kill -s KILL --kill-whom=main hypeman",
        "systemctl stop hypeman; sleep 3; systemctl start hypeman",
        "dpkg -i /root/newer.deb",
    ],
    ids=["restart", "crash", "stop", "upgrade"],
)
def test_the_guest_counts_on(appliance: Appliance, interruption: str) -> None:
    vmm, mark = appliance.vmm(), appliance.count()
    appliance.host.check(interruption, timeout=SLOW)
    appliance.wait_for_server()
    assert appliance.vmm() == vmm
    appliance.wait_for_count_above(mark)
    assert appliance.instance("counter")["state"] == "Running"
    assert appliance.hypeman("exec", "counter", "--", "echo", "there").strip() == "there"


def test_standby_and_restore(appliance: Appliance) -> None:
    appliance.hypeman("standby", "counter")
    assert appliance.host.run(f"pgrep -f '{VMM}'").code != 0
    mark = appliance.count()
    appliance.hypeman("restore", "counter")
    appliance.wait_for_count_above(mark)


def test_deleting_leaves_nothing_of_the_vm(appliance: Appliance) -> None:
    appliance.hypeman("rm", "--force", "counter")
    assert appliance.host.run(f"pgrep -f '{VMM}'").code != 0
    assert (
        appliance.host.check("find /sys/fs/cgroup/hypeman.slice/hypeman-vms.service -mindepth 1 -type d ! -name keeper")
        == ""
    )
    assert appliance.host.check("ls /var/lib/hypeman/instances") == ""
    assert "hype" not in appliance.host.check("ip -o link show type tun")


def test_purging_leaves_nothing_at_all(appliance: Appliance) -> None:
    appliance.host.check("dpkg --purge hypeman", timeout=SLOW)
    assert_all_gone(appliance.host)


def test_the_same_from_the_tarball(appliance: Appliance) -> None:
    said = appliance.host.check("cd /root && tar -xzf hypeman.tar.gz && hypeman-*/install.sh", timeout=SLOW)
    assert re.search(r"^ +ey\S+$", said, re.MULTILINE), said
    appliance.wait_for_server()
    appliance.host.check("/root/hypeman-*/install.sh", timeout=SLOW)  # as an upgrade does
    appliance.wait_for_server()
    appliance.host.check("/usr/share/hypeman/uninstall.sh --purge", timeout=SLOW)
    assert_all_gone(appliance.host)


def assert_all_gone(host: MetalHost) -> None:
    assert host.check(f"ls -d {' '.join(PURGED)} 2>/dev/null || true") == ""
    assert host.check("systemctl list-units --all --plain --no-legend 'hypeman*'") == ""
    assert host.check("pgrep -af '^/usr/lib/hypeman|^/usr/bin/qemu-system' || true") == ""
    assert "hypeman" not in host.check("nft list tables")
    assert host.check("find /etc /usr/lib/systemd /usr/share -xdev -name '*hypeman*'") == ""
