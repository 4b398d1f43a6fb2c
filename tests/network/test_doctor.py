"""What the doctor finds in given facts. The remedies for firewalls are tried for real in test_mending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from hypeman.config import NetworkConfig
from hypeman.host import network_facts
from hypeman.host.links import Uplink, parse_default_routes, parse_routed
from hypeman.host.network_facts import NetworkFacts, read_routes
from hypeman.network.doctor import examine, find_problems
from hypeman.telemetry.findings import Verdict
from tests.network.lab import in_namespace, sh

HEALTHY = NetworkFacts(
    tun=True,
    privileged=True,
    nft="nftables v1.0.6",
    uplink=Uplink(("eth0",)),
    forwarding={"eth0": True},
    switchable=True,
    routes=(("eth0", "192.168.1.0/24"), ("docker0", "172.17.0.0/16")),
    ruleset=[],
    legacy_rules="",
    missing_modules=(),
)
CONFIG = NetworkConfig(allow_private=False)


def chain(family: str, table: str, name: str, hook: str = "", policy: str = "accept") -> dict[str, Any]:
    base = {"type": "filter", "hook": hook, "prio": 0, "policy": policy} if hook else {}
    return {"chain": {"family": family, "table": table, "name": name, "handle": 1, **base}}


def rule(family: str, table: str, name: str, *expr: dict[str, Any]) -> dict[str, Any]:
    return {"rule": {"family": family, "table": table, "chain": name, "handle": 2, "expr": list(expr)}}


ESTABLISHED = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established"]}}
OUR_TAPS = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "hm-*"}}
OUR_SUBNET = {
    "match": {
        "op": "==",
        "left": {"payload": {"protocol": "ip", "field": "saddr"}},
        "right": {"prefix": {"addr": "10.100.0.0", "len": 16}},
    }
}
ACCEPT, REJECT, COUNTER = {"accept": None}, {"reject": {"type": "icmpx"}}, {"counter": {"packets": 1, "bytes": 1}}


def test_a_healthy_host_has_no_findings() -> None:
    assert find_problems(HEALTHY, CONFIG) == []


@pytest.mark.parametrize(
    ("changes", "verdict", "remedy"),
    [
        ({"tun": False}, Verdict.FAIL, "modprobe tun"),
        ({"nft": "", "ruleset": None}, Verdict.FAIL, "apt-get install nftables"),
        ({"privileged": False, "ruleset": None}, Verdict.FAIL, "run hypeman serve as root"),
        ({"ruleset": None}, Verdict.FAIL, "modprobe nf_tables"),
        ({"uplink": Uplink(), "forwarding": {}}, Verdict.WARN, "ip route add default"),
        ({"forwarding": {"eth0": False}, "switchable": False}, Verdict.FAIL, "net.ipv4.conf.eth0.forwarding=1"),
        ({"missing_modules": ("ifb",)}, Verdict.WARN, "linux-modules-extra"),
        ({"routes": (("vpn0", "10.0.0.0/8"),)}, Verdict.FAIL, "172.30.0.0/16"),
        ({"routes": (("lan0", "10.100.5.0/24"),)}, Verdict.FAIL, "10.101.0.0/16"),
        ({"legacy_rules": "-P INPUT ACCEPT\n-P FORWARD DROP\n"}, Verdict.FAIL, "iptables-legacy -I FORWARD -i hm-+"),
        ({"legacy_rules": "-P FORWARD DROP\n-N DOCKER-USER\n"}, Verdict.FAIL, "legacy -I DOCKER-USER -i hm-+"),
        ({"legacy_rules": "-P INPUT DROP\n"}, Verdict.WARN, "iptables-legacy -I INPUT -i hm-+ -j ACCEPT"),
    ],
)
def test_each_problem_has_its_remedy(changes: dict[str, Any], verdict: Verdict, remedy: str) -> None:
    (finding,) = find_problems(replace(HEALTHY, **changes), CONFIG)
    assert finding.verdict is verdict
    assert remedy in finding.remedy


def test_forwarding_that_the_server_can_switch_on_is_no_problem() -> None:
    assert find_problems(replace(HEALTHY, forwarding={"eth0": False}), CONFIG) == []


def test_legacy_rules_that_let_us_pass_are_no_problem() -> None:
    rules = "-P FORWARD DROP\n-A FORWARD -i hm-+ -j ACCEPT\n"
    assert find_problems(replace(HEALTHY, legacy_rules=rules), CONFIG) == []


@pytest.mark.parametrize(
    ("ruleset", "remedy"),
    [
        ([chain("ip", "filter", "FORWARD", "forward", "drop"), chain("ip", "filter", "DOCKER-USER")], "DOCKER-USER"),
        (
            [
                chain("inet", "firewalld", "filter_FORWARD", "forward"),
                rule("inet", "firewalld", "filter_FORWARD", ESTABLISHED, ACCEPT),
                rule("inet", "firewalld", "filter_FORWARD", COUNTER, REJECT),
            ],
            "firewall-cmd",
        ),
        (
            [chain("ip", "filter", "FORWARD", "forward", "drop"), chain("ip", "filter", "ufw-user-forward")],
            "ufw route allow from 10.100.0.0/16",
        ),
        ([chain("inet", "mine", "fwd", "forward", "drop")], "nft insert rule inet mine fwd"),
        ([chain("inet", "mine", "in", "input", "drop")], "nft insert rule inet mine in iifname"),
    ],
)
def test_firewalls_that_stop_guests(ruleset: list[dict[str, Any]], remedy: str) -> None:
    (finding,) = find_problems(replace(HEALTHY, ruleset=ruleset), CONFIG)
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    "ruleset",
    [
        [chain("inet", "hypeman", "to_world", "forward", "drop")],
        [chain("ip6", "filter", "FORWARD", "forward", "drop")],
        [chain("inet", "mine", "fwd", "forward"), rule("inet", "mine", "fwd", ESTABLISHED, REJECT)],
        [chain("inet", "mine", "out", "output", "drop")],
        [chain("ip", "filter", "F", "forward", "drop"), rule("ip", "filter", "F", OUR_TAPS, COUNTER, ACCEPT)],
        [chain("ip", "filter", "F", "forward", "drop"), rule("ip", "filter", "F", OUR_SUBNET, {"goto": {}})],
    ],
)
def test_firewalls_that_do_not(ruleset: list[dict[str, Any]]) -> None:
    assert find_problems(replace(HEALTHY, ruleset=ruleset), CONFIG) == []


def test_a_firewall_that_refuses_us_by_name_stops_guests() -> None:
    ruleset = [chain("ip", "filter", "F", "forward", "drop"), rule("ip", "filter", "F", OUR_TAPS, REJECT)]
    assert len(find_problems(replace(HEALTHY, ruleset=ruleset), CONFIG)) == 1


ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth1\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
down0\t00000000\t0101A8C0\t0002\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000A8C0\t00000000\t0001\t0\t0\t100\t0000FFFF\t0\t0\t0
hm-a\t0500640A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
"""


def test_routes_are_read() -> None:
    """The best default route leads out, by all its next hops; our own routes are no clash."""
    assert parse_default_routes(ROUTES) == ("eth0", "eth1")
    assert parse_default_routes("Iface\n") == ()
    assert parse_routed(ROUTES) == {"10.100.0.5"}


@in_namespace
def test_the_hosts_own_routes_are_read() -> None:
    """From a real kernel: networks of other links, neither default routes nor ours."""
    sh("ip link add eth0 type veth peer name far && ip link set eth0 up && ip link set far up")
    sh("ip addr add 192.168.7.1/24 dev eth0 && ip route add default via 192.168.7.2")
    sh("ip link add hm-a type veth peer name b && ip link set hm-a up && ip route add 10.100.0.5/32 dev hm-a")
    assert read_routes() == (("eth0", "192.168.7.0/24"),)


def test_open_private_networks_are_reported() -> None:
    (finding,) = find_problems(HEALTHY, NetworkConfig())
    assert (finding.verdict, "network.allow_private" in finding.remedy) == (Verdict.WARN, True)


async def test_a_program_that_does_not_end_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its silence is not taken for an empty answer: without rules there would be no other firewall."""
    nft = tmp_path / "nft"
    nft.write_text("#!/bin/sh\nexec sleep 60\n")
    nft.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(network_facts, "SECONDS", 0.2)
    [finding] = await examine(CONFIG)
    assert finding.verdict is Verdict.FAIL and "nft --version did not end within 0.2 s" in finding.message
