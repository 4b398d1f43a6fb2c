"""The appliance on a bare-metal host without Python: ``make test-metal``.

One sequence on one virtual machine in which KVM, vhost-vsock, cgroup v2 and systemd are real
(``tests/metal``): install the Debian package, boot guests with KVM, kill, restart and upgrade the server
while a guest counts and a TCP session stays open, pass a disk through, pull the host's plug, and the disk's, purge;
then the same from the tarball, without dpkg. After the first test that fails the rest is skipped (``conftest.py``).
The file's name keeps it out of `make test`: it wants a finished ``dist/`` and takes some minutes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.metal.image import build_image, missing
from tests.metal.rig import MetalHost, nvme
from tests.packaging.on_metal import (
    ORIGIN,
    PUBLISHED_PORT,
    SECRET,
    SLOW,
    OnMetal,
    make_certificates,
    make_registry,
    newer_version,
)

pytestmark = pytest.mark.metal  # whose time limit is an hour; the tarball takes four minutes, the power cut six

DIST = Path(__file__).parents[2] / "dist"
MARK = "only-on-the-disk-4f1c"


@pytest.fixture(scope="module")
def nvme_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The medium of an NVMe of the host, with a mark that only its reader can know."""
    disk = tmp_path_factory.mktemp("nvme") / "disk"
    with disk.open("wb") as file:
        file.write(f"{MARK}\n".encode())
        file.truncate(16 << 20)
    return disk


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, nvme_disk: Path) -> Iterator[OnMetal]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("registry")
    make_registry(folder)
    deb, tarball = find("*.deb"), find("*.tar.gz")
    devices = (nvme("nvme", 0, nvme_disk),)
    files = {
        "/root/hypeman.deb": deb,
        "/root/newer.deb": newer_version(deb, tmp_path_factory.mktemp("newer")),
        "/root/hypeman.tar.gz": tarball,
        "/root/registry": folder,
        "/usr/local/bin/docker-registry": Path("/usr/bin/docker-registry"),
        **make_certificates(),
    }
    with MetalHost.boot(build_image(python=False), devices=devices, files=files, memory_mb=4096, cpus=2) as host:
        host.keep_vms()
        made = OnMetal(host)
        made.make_world()
        yield made


def find(pattern: str) -> Path:
    found = sorted(DIST.glob(pattern))
    if not found:
        pytest.skip(f"no dist/{pattern}: make appliance")
    return found[-1]


def test_the_host_has_no_python(appliance: OnMetal) -> None:
    assert appliance.host.run("command -v python3 python").code != 0


def test_the_package_installs_starts_and_prints_no_token(appliance: OnMetal) -> None:
    appliance.install("dpkg -i /root/hypeman.deb")
    appliance.host.check("systemctl is-active hypeman hypeman-vms")
    assert appliance.host.check("stat -c %a /etc/hypeman/config.yaml /var/lib/hypeman").split() == ["600", "711"]


def test_tcp_wants_the_token(appliance: OnMetal) -> None:
    ask = "curl -s -o /dev/null -w %{http_code} http://127.0.0.1:8080/instances"
    assert appliance.host.check(ask) == "401"
    assert appliance.host.check(f"{ask} -H 'authorization: Bearer {appliance.token}'") == "200"


def test_kvm_and_control_groups_are_found(appliance: OnMetal) -> None:
    appliance.configure()
    findings = appliance.host.run("hypeman doctor", timeout=SLOW).output
    assert re.search(r"^ok +kvm:", findings, re.MULTILINE), findings
    assert re.search(r"^ok +control groups:", findings, re.MULTILINE), findings


def test_an_image_is_pulled(appliance: OnMetal) -> None:
    appliance.pull()


def test_an_instance_boots_with_kvm(appliance: OnMetal) -> None:
    wakes = ("--auto-standby-enabled", "--auto-standby-idle-timeout", "1h", "--auto-standby-wake", "all")
    ports = ("--publish", f"{PUBLISHED_PORT}:80")
    appliance.run("counter", "--bandwidth-down", "40mbps", "--bandwidth-up", "20mbps", *ports, *wakes)
    assert "kvm" in appliance.host.check(f"tr '\\0' ' ' < /proc/{appliance.vmm()}/cmdline")


def test_exec_answers(appliance: OnMetal) -> None:
    assert "Linux" in appliance.hypeman("exec", "counter", "--", "uname", "-a")


def test_the_guest_reaches_the_world(appliance: OnMetal) -> None:
    """Through the masquerade, over a session that it opened itself and that stays open from here on."""
    appliance.say("first")


def test_the_world_reaches_its_published_port(appliance: OnMetal) -> None:
    assert appliance.page() == "published\n"


def test_the_gateway_knows_names(appliance: OnMetal) -> None:
    output = appliance.hypeman("exec", "counter", "--", "nslookup", "-type=a", "counter.hypeman.local")
    assert appliance.instance("counter")["network"]["ip"] in output.partition("counter.hypeman.local")[2]


def test_the_host_forwards_for_the_uplink_and_guests_only(appliance: OnMetal) -> None:
    """It was no router before, and is none now."""
    switched = appliance.host.check("cd /proc/sys/net/ipv4; cat ip_forward; grep -lx 1 conf/*/forwarding").split()
    assert switched[0] == "0"
    names = {Path(file).parent.name for file in switched[1:]}
    assert "uplink" in names and all(name.startswith("hm-") for name in names - {"uplink"}), names


def test_its_network_has_the_limits(appliance: OnMetal) -> None:
    """Download on the TAP, upload on the ifb beside it; how exactly they hold is measured in tests/network."""
    queues = appliance.host.check("tc qdisc show | grep tbf")
    (tap,) = re.findall(r"dev hm-\S+ .*rate (\S+)", queues)
    (ifb,) = re.findall(r"dev hmu-\S+ .*rate (\S+)", queues)
    assert (tap, ifb) == ("40Mbit", "20Mbit")


def test_a_deleted_tap_is_replaced_under_the_running_vm(appliance: OnMetal) -> None:
    """Which the unit's filter of system calls has to let the server do."""
    (tap,) = re.findall(r"(hm-\S+?)[:@]", appliance.host.check("ip -o link show type tun"))
    appliance.host.check(f"ip link delete {tap}")
    appliance.say("again")


def test_the_vm_has_a_control_group_with_limits(appliance: OnMetal) -> None:
    group = appliance.host.check(f"cut -d: -f3 /proc/{appliance.vmm()}/cgroup").strip()
    assert group.startswith("/hypeman.slice/hypeman-vms.service/")
    limits = appliance.host.check(f"cd /sys/fs/cgroup{group}; cat cpu.max memory.max").split()
    assert limits[:2] == ["150000", "100000"]
    assert int(limits[2]) == 512 * 1024 * 1024


def test_the_vm_runs_without_privileges(appliance: OnMetal) -> None:
    status = appliance.host.check(f"grep -E '^(Uid|NoNewPrivs|CapEff)' /proc/{appliance.vmm()}/status")
    assert not re.search(r"^Uid:\s+0\b", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)


@pytest.mark.parametrize(
    ("interruption", "resumption"),
    [
        ("systemctl restart hypeman", ""),
        ("systemctl kill -s KILL --kill-whom=main hypeman", ""),
        ("systemctl stop hypeman", "systemctl start hypeman"),
        ("dpkg -i /root/newer.deb", ""),
    ],
    ids=["restart", "crash", "stop", "upgrade"],
)
def test_the_guest_counts_on_and_its_session_stays_open(
    appliance: OnMetal, interruption: str, resumption: str, request: pytest.FixtureRequest
) -> None:
    vmm, mark = appliance.vmm(), appliance.count()
    appliance.host.check(interruption, timeout=SLOW)
    word = request.node.callspec.id
    appliance.say(f"{word}-away" if resumption else f"{word}-at-once")
    if resumption:
        appliance.host.check(resumption, timeout=SLOW)
    appliance.wait_for_server()
    assert appliance.vmm() == vmm
    appliance.wait_for_count_above(mark)
    appliance.say(f"{word}-after")
    assert appliance.instance("counter")["state"] == "Running"
    assert appliance.hypeman("exec", "counter", "--", "echo", "there").strip() == "there"


def test_that_was_an_upgrade(appliance: OnMetal) -> None:
    assert appliance.host.check("dpkg-query -W -f '${Version}' hypeman").endswith("+1")


def test_standby_and_restore(appliance: OnMetal) -> None:
    appliance.hypeman("standby", "counter")
    assert appliance.vmms() == set()
    mark = appliance.count()
    appliance.hypeman("restore", "counter")
    appliance.wait_for_count_above(mark)


def test_a_packet_from_the_world_wakes_it(appliance: OnMetal) -> None:
    appliance.hypeman("standby", "counter")
    assert appliance.vmms() == set()
    assert appliance.page() == "published\n"
    assert appliance.instance("counter")["state"] == "Running"


def test_a_fork_of_the_running_guest_counts_by_itself(appliance: OnMetal) -> None:
    mark = appliance.count()
    appliance.hypeman("fork", "--from-running", "counter", "twin")
    appliance.wait_for_state("twin", "Running")
    assert len(appliance.vmms()) == 2
    addresses = {appliance.instance(name)["network"]["ip"] for name in ("counter", "twin")}
    assert len(addresses) == 2
    for name in ("counter", "twin"):
        appliance.wait_for_count_above(mark, name)
        assert appliance.instance(name)["network"]["ip"] in appliance.hypeman("exec", name, "--", "ip", "address")
    appliance.hypeman("rm", "--force", "twin")


def test_a_device_goes_to_a_guest_and_comes_back(appliance: OnMetal, nvme_disk: Path) -> None:
    """An NVMe of the host: kept over a restart of the server and over stop and start, refused where it must be."""
    address = appliance.register_disk()
    driver = f"basename $(readlink /sys/bus/pci/devices/{address}/driver)"
    appliance.run("owner", "--device", "disk", "--cmd", "sleep", "--cmd", "1000000")
    assert appliance.host.check(driver).strip() == "vfio-pci"
    assert appliance.read_disk("owner") == MARK
    write = "echo written-inside | dd of=/dev/nvme0n1 bs=512 seek=8 conv=sync,fsync"
    appliance.hypeman("exec", "owner", "--", "sh", "-c", write)
    assert nvme_disk.read_bytes()[4096:].startswith(b"written-inside\n")

    assert "attached" in appliance.refused("device", "delete", "disk")
    assert "device" in appliance.refused("standby", "owner")
    appliance.host.check("systemctl restart hypeman", timeout=SLOW)
    appliance.wait_for_server()
    appliance.hypeman("stop", "owner")
    assert appliance.instance("owner")["state"] == "Stopped"
    assert "attached" in appliance.refused("device", "delete", "disk")
    appliance.hypeman("start", "owner")
    appliance.wait_for_state("owner", "Running")
    assert appliance.read_disk("owner") == MARK

    appliance.hypeman("rm", "--force", "owner")
    assert appliance.host.check(driver).strip() == "nvme"
    appliance.wait_for("the host has its disk again", f"head -c {len(MARK)} /dev/nvme0n1 | grep -q {MARK}")
    appliance.hypeman("device", "delete", "disk")


def test_a_power_cut_ends_vms_and_loses_nothing_else(appliance: OnMetal) -> None:
    """Instances in each state, one with the host's disk, and what becomes of them when the host has booted again."""
    for name in ("ended", "stopped", "sleeping"):
        appliance.hypeman("fork", "--from-running", "counter", name)
        appliance.wait_for_state(name, "Running")
    for name, policy in {"counter": "on_failure", "stopped": "always", "sleeping": "always"}.items():
        appliance.hypeman("update", "restart-policy", name, "--policy", policy)
    appliance.hypeman("stop", "stopped")
    mark = appliance.count("sleeping")
    appliance.hypeman("standby", "sleeping")
    appliance.register_disk()
    appliance.run("owner", "--device", "disk", "--restart", "always", "--cmd", "sleep", "--cmd", "1000000")
    assert appliance.read_disk("owner") == MARK
    assert len(appliance.vmms()) == 3

    appliance.host.power_cut()
    appliance.wait_for_server()
    for name in ("counter", "owner"):
        appliance.wait_for_state(name, "Running")
    assert appliance.read_disk("owner") == MARK
    assert appliance.page() == "published\n"
    assert len(appliance.vmms()) == 2
    ended = appliance.instance("ended")
    assert (ended["state"], ended["exit_message"]) == ("Stopped", "the host rebooted while the VM ran")
    stopped = appliance.instance("stopped")
    assert (stopped["state"], stopped["restart_status"]["blocked_reason"]) == ("Stopped", "manual_stop")
    assert appliance.instance("sleeping")["state"] == "Standby"
    appliance.hypeman("restore", "sleeping")
    appliance.wait_for_count_above(mark, "sleeping")
    appliance.hypeman("start", "ended")
    appliance.wait_for_state("ended", "Running")
    for name in ("ended", "stopped", "sleeping"):
        appliance.hypeman("rm", "--force", name)


def test_a_device_that_is_unplugged_is_reported(appliance: OnMetal) -> None:
    """From a running instance: the guest releases it, and keeps running. Its next start says what is missing."""
    vmms = appliance.vmms()
    appliance.host.qmp("device_del", id="nvme")
    appliance.wait_for_device("disk", missing=True)
    events = json.loads(appliance.hypeman("--format", "json", "events", "--no-follow", "--since", "0"))
    assert [event["object"]["name"] for event in events if event["type"] == "device.vanished"] == ["disk"], events
    assert appliance.vmms() == vmms
    assert appliance.hypeman("exec", "owner", "--", "echo", "there").strip() == "there"
    appliance.hypeman("stop", "owner")
    assert re.search("disk.* is missing", appliance.refused("start", "owner"))
    appliance.hypeman("rm", "--force", "owner")
    appliance.hypeman("device", "delete", "disk")


def test_deleting_leaves_nothing_of_the_vm(appliance: OnMetal) -> None:
    appliance.hypeman("rm", "--force", "counter")
    assert appliance.vmms() == set()
    groups = appliance.host.check("ls -d /sys/fs/cgroup/hypeman.slice/hypeman-vms.service/*/").split()
    assert {Path(group).name for group in groups} == {"keeper", "egress-engine"}
    assert appliance.host.check("ls /var/lib/hypeman/instances") == ""
    appliance.wait_for("no link is left", "! ip -o link show | grep ' hm'")


def test_the_credential_is_in_the_request_and_not_in_the_guest(appliance: OnMetal) -> None:
    appliance.run(
        "agent", "--cmd", "sleep", "--cmd", "1000000", "--network-egress-enabled",
        "--env", f"REAL={SECRET}", "--credentials-json", "@/root/credentials.json",
    )  # fmt: skip
    seen = appliance.fetch().lower()
    assert f"host: {ORIGIN}\r\n" in seen
    assert f"authorization: bearer {SECRET}\r\n" in seen
    assert SECRET not in appliance.hypeman("exec", "agent", "--", "env")


def test_purging_leaves_nothing_at_all(appliance: OnMetal) -> None:
    """Not of the guest either that runs at that moment."""
    assert appliance.vmm()
    appliance.host.check("dpkg --purge hypeman", timeout=SLOW)
    assert appliance.left() == {}


def test_the_same_from_the_tarball_without_dpkg(appliance: OnMetal) -> None:
    appliance.host.check("mkdir /root/hidden; mv /usr/bin/dpkg* /usr/bin/apt* /root/hidden/")
    appliance.install("cd /root && tar -xzf hypeman.tar.gz && hypeman-*/install.sh")
    appliance.configure()
    appliance.pull()
    appliance.run("counter")
    vmm, mark = appliance.vmm(), appliance.count()
    appliance.host.check("/root/hypeman-*/install.sh", timeout=SLOW)  # as an upgrade does
    appliance.wait_for_server()
    assert appliance.vmm() == vmm
    appliance.wait_for_count_above(mark)
    appliance.host.check("/usr/share/hypeman/uninstall.sh --purge", timeout=SLOW)
    assert appliance.left() == {}
