"""What the story in metal.py does to its host, by name: the appliance there, and a world beyond its uplink.

The world is a network namespace of the host, joined by a veth pair: guests reach it by masquerade, over the
host's default route. Its servers do without Python: busybox's ``nc`` and ``openssl s_server``.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import trustme

from tests import demo
from tests.metal.rig import MetalHost, Result

SLOW = 600
"""Seconds. Everything inside takes 20 to 50 times as long as on metal."""

WORLD, UPLINK = "192.0.2.1", "192.0.2.2"
ORIGIN = "api.example.test"
SECRET = "s3cret-5d1f7a90"
SESSION_PORT = 9000

PUBLISHED_PORT = 8000

NVME = ("1b36", "0010")
"""Vendor and device of QEMU's."""

COUNTING = (
    f"(until nc {WORLD} {SESSION_PORT} -e cat; do sleep 1; done) & "
    "echo published > /tmp/index.html; httpd -f -p 80 -h /tmp & "
    'i=0; while true; do i=$((i+1)); echo "count $i"; sleep 1; done'
)
"""The guest's program: gives back every line of one TCP session with the world, serves a page, and counts."""

SETTINGS = f"""
hypervisor:
  kvm_patience: 120
images:
  insecure_registries: ["{demo.REGISTRY}"]
egress:
  upstream_ca_file: /etc/ssl/world.pem
  allow_private: ["{WORLD}/32"]
"""

CREDENTIALS = {
    "API_KEY": {
        "source": {"env": "REAL"},
        "inject": [{"hosts": [ORIGIN], "as": {"header": "Authorization", "format": "Bearer ${value}"}}],
    }
}

MAKE_WORLD = f"""#!/bin/sh
set -e
ip link set lo up
ip netns add world
ip link add uplink type veth peer name wan netns world
ip address add {UPLINK}/30 dev uplink
ip link set uplink up
ip -n world address add {WORLD}/30 dev wan
ip -n world link set wan up
ip -n world link set lo up
ip route add default via {WORLD}
grep -q {ORIGIN} /etc/hosts || echo "{WORLD} {ORIGIN}" >> /etc/hosts
rm -f /root/say /root/answer
mkfifo /root/say /root/answer
setsid docker-registry serve /root/registry/registry.yml >/root/registry.log 2>&1 </dev/null &
ip netns exec world setsid sh -c 'exec 3<>/root/say; exec busybox nc -l -p {SESSION_PORT} <&3' \\
    >/root/heard 2>&1 </dev/null &
ip netns exec world setsid sh -c 'exec 3<>/root/answer
    exec openssl s_server -quiet -accept 443 -cert /root/origin.pem -key /root/origin.pem <&3' \\
    >>/root/seen 2>/root/origin.log </dev/null &
"""
"""``nc`` takes one connection and no second one: who is heard there is heard over the first session."""

WORLD_UNIT = b"""[Unit]
Description=The world beyond the uplink
Before=hypeman.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/lib/make-world

[Install]
WantedBy=multi-user.target
"""
"""The world is there before the appliance, after each boot of the host."""

FETCH = f"""
: > /root/seen
hypeman exec agent -- /usr/bin/curl -sS --max-time 240 https://{ORIGIN}/ >/root/got 2>&1 & job=$!
until grep -qx "$(printf '\\r')" /root/seen; do kill -0 $job || break; sleep 0.5; done
printf 'HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello' > /root/answer
wait $job
code=$?
cat /root/got
exit $code
"""
"""A request of the guest; the origin writes down what it was sent and answers by hand."""

LEFT = {
    "files": "find /etc /usr /var/lib -xdev -name '*hypeman*' ! -path '/var/lib/dpkg/*'",
    "runtime files": "ls -d /run/hypeman 2>/dev/null || true",
    # those of the rig name ours in their order, which therefore stays known, as not found
    "units": "systemctl list-units --all --plain --no-legend 'hypeman*' | grep -v 'not-found *inactive *dead' || true",
    "processes": "pgrep -af '^/usr/lib/hypeman|^/usr/bin/qemu-system' || true",
    "tables": "nft list tables | grep hypeman || true",
    "links": "ip -o link show | grep -E ' hmu?-' || true",
    "gateway": "ip -o address show dev lo | grep -v -e 127.0.0.1 -e ::1 || true",
    "forwarding": "grep -lx 1 /proc/sys/net/ipv4/conf/*/forwarding /proc/sys/net/ipv4/ip_forward || true",
    "control groups": "find /sys/fs/cgroup -type d -name '*hypeman*'",
    "mounts": "grep hypeman /proc/self/mounts || true",
}
"""What a purged appliance must not leave, and how to look for it."""


class OnMetal:
    """One host, and the appliance on it once that is installed."""

    def __init__(self, host: MetalHost) -> None:
        self.host = host
        self.token = ""

    def make_world(self) -> None:
        self.host.put(
            {"/usr/local/lib/make-world": MAKE_WORLD.encode(), "/etc/systemd/system/world.service": WORLD_UNIT}
        )
        self.host.check("systemctl -q enable --now world")

    def hypeman(self, *arguments: str, timeout: float = SLOW) -> str:
        quoted = " ".join(f"'{argument}'" for argument in arguments)
        return self.host.check(f". /root/token; hypeman {quoted}", timeout=timeout)

    def instance(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.hypeman("--format", "json", "inspect", name)))

    def refused(self, *arguments: str) -> str:
        """What a command says that must fail."""
        quoted = " ".join(f"'{argument}'" for argument in arguments)
        result = self.host.run(f"hypeman {quoted}", timeout=SLOW)
        assert result.code == 1, result
        return result.output

    def run(self, name: str, *options: str) -> None:
        """An instance of the story's image, running."""
        small = ("--memory", "256MB", "--cpus", "1", "--overlay-size", "256MB")
        self.hypeman("run", "--name", name, *small, *options, demo.IMAGE)
        self.wait_for_state(name, "Running")

    def wait_for_state(self, name: str, state: str) -> None:
        """Fails as soon as the instance has ended in another state."""
        self.hypeman("wait", name, "--state", state, "--timeout", f"{SLOW}s", timeout=SLOW + 60)

    def vmms(self) -> set[int]:
        """Process ids of all VMMs; the QEMU that tries KVM at a server's start has no name."""
        return {int(pid) for pid in self.host.run("pgrep -f '^/usr/bin/qemu-system-x86_64 -name'").output.split()}

    def vmm(self) -> int:
        """The process id of the one VMM."""
        pids = self.vmms()
        assert len(pids) == 1, pids
        return pids.pop()

    def count(self, name: str = "counter") -> int:
        counts = re.findall(r"count (\d+)", self.hypeman("logs", "--tail", "5", name))
        return int(counts[-1]) if counts else 0

    def wait_for_count_above(self, mark: int, name: str = "counter") -> None:
        deadline = time.monotonic() + SLOW
        while self.count(name) <= mark:
            assert self.vmms(), f"the VM of {name} has ended"
            assert time.monotonic() < deadline, f"the count of {name} does not go beyond {mark}"
            time.sleep(1)

    def say(self, word: str) -> None:
        """Send ``word`` over the open TCP session and wait until the guest has given it back."""
        self.host.check(f"echo {word} > /root/say")
        self.wait_for(f"the guest gives {word!r} back", f"grep -qx {word} /root/heard", possible=self.vmms)

    def page(self) -> str:
        """What the world gets from the guest's published port."""
        ask = f"ip netns exec world curl -sS --max-time {SLOW} http://{UPLINK}:{PUBLISHED_PORT}/"
        return self.host.check(ask, timeout=SLOW + 60)

    def register_disk(self) -> str:
        """Register the host's NVMe as the device ``disk``; its address."""
        seen = json.loads(self.hypeman("--format", "json", "device", "available"))
        (address,) = (one["pci_address"] for one in seen if (one["vendor_id"], one["device_id"]) == NVME)
        self.hypeman("device", "register", address, "--name", "disk")
        return str(address)

    def read_disk(self, name: str) -> str:
        """The first line of the NVMe that an instance has."""
        read = "until [ -b /dev/nvme0n1 ]; do sleep 1; done; head -n 1 /dev/nvme0n1"
        return self.hypeman("exec", name, "--", "sh", "-c", read).strip()

    def fetch(self) -> str:
        """What the origin saw of an HTTPS request of the guest ``agent``."""
        assert self.host.check(FETCH, timeout=SLOW) == "hello"
        return self.host.check("cat /root/seen")

    def wait_for(
        self, what: str, script: str, timeout: float = SLOW, possible: Callable[[], object] = lambda: True
    ) -> Result:
        """Run ``script`` until it succeeds, while that is ``possible``."""
        deadline = time.monotonic() + timeout
        while True:
            result = self.host.run(script, timeout=timeout)
            if result.code == 0:
                return result
            assert possible(), f"it cannot happen any more: {what}"
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{result.output}"
            time.sleep(0.5)

    def wait_for_device(self, name: str, missing: bool) -> None:
        """Until a device of the appliance is there, or is ``missing``."""
        deadline = time.monotonic() + SLOW
        while json.loads(self.hypeman("--format", "json", "device", "get", name)).get("missing", False) is not missing:
            assert time.monotonic() < deadline, f"not within {SLOW} s: {name} is missing: {missing}"
            time.sleep(0.5)

    def wait_for_server(self) -> None:
        self.wait_for("the server answers", "curl -sf --unix-socket /run/hypeman/hypeman.sock http://localhost/health")

    def install(self, script: str) -> None:
        """Run the installer, which prints no token, mint one, and set up what the story needs."""
        output = self.host.check(script, timeout=SLOW)
        assert not re.search(r"\bey[\w-]+\.", output), f"a token in the installer's output: {output}"
        self.token = self.host.check("hypeman token --user-id admin").strip()
        self.host.put({"/root/token": f"export HYPEMAN_API_KEY={self.token}\n".encode()})  # and not in each command
        self.wait_for_server()

    def configure(self) -> None:
        self.host.put({"/root/settings": SETTINGS.encode()})
        self.host.check("cat /root/settings >> /etc/hypeman/config.yaml; systemctl restart hypeman", timeout=SLOW)
        self.wait_for_server()

    def pull(self) -> None:
        self.hypeman("pull", demo.IMAGE)
        self.wait_for("the image is ready", f"hypeman image get {demo.IMAGE} | grep -q ready")

    def left(self) -> dict[str, str]:
        """What is still there of the appliance, by kind."""
        found = {kind: self.host.check(script).strip() for kind, script in LEFT.items()}
        return {kind: text for kind, text in found.items() if text}

    def diagnosis(self) -> str:
        """What somebody who mends a failed test wants to read."""
        looks = (
            "systemctl status --no-pager --lines 0 hypeman hypeman-vms",
            "timeout 60 hypeman ps --all",
            "ip -o address; ip route; nft list tables",
            "journalctl -u hypeman -u hypeman-vms --no-pager -n 60",
            "for log in /var/lib/hypeman/instances/*/logs/*.log; do echo == $log; tail -n 15 $log; done",
        )
        return "\n".join(f"$ {look}\n{self.host.run(look).output}" for look in looks)


def make_registry(folder: Path) -> None:
    """A registry's directory with the image of the story; the host brings no tools to push one."""
    with demo.started(["docker-registry", "serve", str(demo.write_registry_config(folder))], folder / "log"):
        demo.wait_until("the registry listens", lambda: demo.can_connect(5000))
        demo.push_image(folder, script=COUNTING, files=with_libraries(Path("/usr/bin/curl")))
    config = folder / "registry.yml"
    config.write_text(config.read_text().replace(str(folder), "/root/registry"))


def with_libraries(program: Path) -> Iterable[Path]:
    """A program and what the dynamic loader wants for it."""
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return [program, *(Path(path) for path in sorted(set(re.findall(r"(/\S+) \(0x", told))))]


def make_certificates() -> dict[str, bytes | Path]:
    """The origin's certificate, and the authority that the appliance is set to trust."""
    authority = trustme.CA()
    origin = authority.issue_cert(ORIGIN)
    return {
        "/etc/ssl/world.pem": authority.cert_pem.bytes(),
        "/root/origin.pem": origin.private_key_and_cert_chain_pem.bytes(),
        "/root/credentials.json": json.dumps(CREDENTIALS).encode(),
    }


def newer_version(deb: Path, folder: Path) -> Path:
    """The same package under a higher number: another build, as far as dpkg and systemd can tell."""
    subprocess.run(["dpkg-deb", "-R", deb, folder / "tree"], check=True)
    control = folder / "tree" / "DEBIAN" / "control"
    control.write_text(re.sub(r"^(Version: .*)$", r"\1+1", control.read_text(), flags=re.MULTILINE))
    subprocess.run(
        ["dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "-b", folder / "tree", folder / "newer.deb"], check=True
    )
    return folder / "newer.deb"
