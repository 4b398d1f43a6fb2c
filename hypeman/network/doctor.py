"""Problems of the host's network and commands to fix them. ``examine`` reads the host; ``find_problems`` is pure.

The main case is another firewall. Our ``accept`` ends only our own chains: every other chain at the
same hook still applies, and one with ``policy drop`` (Docker's FORWARD, a custom ``inet filter``) or
a final ``reject`` (firewalld) silently cuts guests off. We never change such rules; the finding
says what their owner can add.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from typing import Any

import trio

from hypeman.config import NetworkConfig
from hypeman.host.files import HostError
from hypeman.host.network_facts import NetworkFacts, gather
from hypeman.host.types import TABLE, TAP_PREFIX
from hypeman.network.addressing import Subnet
from hypeman.telemetry.findings import Finding, Verdict

_CANDIDATES = [f"10.{second}.0.0/16" for second in range(100, 200)] + [f"172.{second}.0.0/16" for second in (30, 31)]
_END = ({"drop"}, {"reject"})


async def examine(config: NetworkConfig) -> list[Finding]:
    """Check the host. Needs no running server."""
    try:
        facts = await trio.to_thread.run_sync(gather, config.uplink)
    except HostError as error:
        return [
            _fails(
                f"the network cannot be examined: {error.message}", "run that command by hand to see what it waits for"
            )
        ]
    return find_problems(facts, config)


def find_problems(facts: NetworkFacts, config: NetworkConfig) -> list[Finding]:
    """Findings, failures first."""
    subnet = Subnet.parse(config.subnet_cidr, config.gateway)
    findings = [*_tools(facts), *_uplink(facts, config), *_clashes(facts, subnet)]
    findings += _firewalls(facts.ruleset or [], subnet)
    findings += _legacy_firewall(facts.legacy_rules)
    findings += _private(config)
    return sorted(findings, key=lambda finding: finding.verdict is not Verdict.FAIL)


def _fails(message: str, remedy: str) -> Finding:
    return Finding(name="network", verdict=Verdict.FAIL, message=message, remedy=remedy)


def _warns(message: str, remedy: str) -> Finding:
    return Finding(name="network", verdict=Verdict.WARN, message=message, remedy=remedy)


def _tools(facts: NetworkFacts) -> Iterable[Finding]:
    if not facts.tun:
        yield _fails("/dev/net/tun is missing: no guest can have a network", "modprobe tun")
    if not facts.nft:
        yield _fails("nft is not installed: guests would not be fenced", "apt-get install nftables")
    if not facts.privileged:
        yield _fails("no right to change the network (CAP_NET_ADMIN)", "run hypeman serve as root")
    if facts.nft and facts.privileged and facts.ruleset is None:
        yield _fails("nft cannot list the rules: the kernel lacks nf_tables", "modprobe nf_tables")
    if facts.missing_modules:
        names = " ".join(facts.missing_modules)
        yield _warns(
            f"this kernel was installed without {names}: bandwidth limits, published ports or names may be missing",
            "apt-get install linux-modules-extra-$(uname -r), or dnf install kernel-modules-extra",
        )


def _uplink(facts: NetworkFacts, config: NetworkConfig) -> Iterable[Finding]:
    if not facts.uplink.names:
        yield _warns(
            "no uplink: there is no default route, so guests reach only this host",
            "ip route add default via ROUTER, or set network.uplink",
        )
    for name, forwards in facts.forwarding.items():
        if not forwards and not facts.switchable:
            yield _fails(
                f"packets that come in by {name} are not forwarded, and /proc/sys is read-only",
                f"sysctl -w net.ipv4.conf.{name}.forwarding=1",
            )


def _clashes(facts: NetworkFacts, subnet: Subnet) -> Iterable[Finding]:
    networks = [(name, ipaddress.IPv4Network(network)) for name, network in facts.routes]
    free = next(
        (text for text in _CANDIDATES if not any(ipaddress.IPv4Network(text).overlaps(each) for _, each in networks)),
        "a subnet that is free",
    )
    for name, network in networks:
        if network.overlaps(subnet.network):
            yield _fails(
                f"network.subnet_cidr {subnet.network} clashes with {network} on {name}",
                f"set network.subnet_cidr to {free}",
            )


def _private(config: NetworkConfig) -> Iterable[Finding]:
    if config.allow_private:
        yield _warns(
            "guests reach private networks behind the uplink, and services of the cloud provider there",
            "set network.allow_private to false unless guests need them",
        )


def _firewalls(objects: list[dict[str, Any]], subnet: Subnet) -> Iterable[Finding]:
    chains = [each["chain"] for each in objects if "chain" in each]
    rules = [each["rule"] for each in objects if "rule" in each]
    for chain in chains:
        if chain.get("type") != "filter" or chain.get("hook") not in ("forward", "input"):
            continue
        if chain["table"] == TABLE or chain["family"] not in ("ip", "inet"):
            continue
        here = [rule for rule in rules if (rule["family"], rule["table"]) == (chain["family"], chain["table"])]
        last = next((rule for rule in reversed(here) if rule["chain"] == chain["name"]), None)
        if chain.get("policy") != "drop" and not (last and _ends_all(last)):
            continue
        if any(_lets_guests_pass(rule, subnet) for rule in here):
            continue
        yield _blocked(chain, {each["name"] for each in chains if each["table"] == chain["table"]}, subnet)


def _ends_all(rule: dict[str, Any]) -> bool:
    """Whether the rule refuses every packet."""
    statements = [statement for statement in rule["expr"] if not {"counter", "log"} & statement.keys()]
    return len(statements) == 1 and statements[0].keys() in _END


def _lets_guests_pass(rule: dict[str, Any], subnet: Subnet) -> bool:
    """Whether the rule is meant for us: it names our TAPs or our subnet and does not refuse."""
    text = json.dumps(rule["expr"])
    names_us = f'"{TAP_PREFIX}' in text or f'"{subnet.network.network_address}"' in text
    return names_us and not any({"drop", "reject"} & statement.keys() for statement in rule["expr"])


def _blocked(chain: dict[str, Any], names: set[str], subnet: Subnet) -> Finding:
    where = f"{chain['family']} {chain['table']} {chain['name']}"
    if chain["hook"] == "forward":
        message = f"the firewall chain {where} drops what guests send to the world"
    else:
        message = f"the firewall chain {where} drops what guests send to this host (DNS and the egress proxy)"
    return (_fails if chain["hook"] == "forward" else _warns)(message, _remedy(chain, names, subnet))


def _remedy(chain: dict[str, Any], names: set[str], subnet: Subnet) -> str:
    forward = chain["hook"] == "forward"
    if "DOCKER-USER" in names and forward:
        return iptables_remedy("iptables", "DOCKER-USER")
    if chain["table"] == "firewalld":
        # a zone by source, since zones do not support interface patterns
        return f"firewall-cmd --permanent --zone=trusted --add-source={subnet.network} && firewall-cmd --reload"
    if any(name.startswith("ufw-") for name in names):
        return f"ufw route allow from {subnet.network}" if forward else f"ufw allow from {subnet.network}"
    target = f"{chain['family']} {chain['table']} {chain['name']}"
    remedy = f"nft insert rule {target} iifname '\"{TAP_PREFIX}*\"' accept"
    if forward:
        remedy += f" && nft insert rule {target} oifname '\"{TAP_PREFIX}*\"' ct state established,related accept"
    return remedy


def iptables_remedy(program: str, chain: str) -> str:
    return (
        f"{program} -I {chain} -i {TAP_PREFIX}+ -j ACCEPT && "
        f"{program} -I {chain} -o {TAP_PREFIX}+ -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    )


def _legacy_firewall(rules: str) -> Iterable[Finding]:
    lines = rules.splitlines()
    if any(f"-i {TAP_PREFIX}" in line and line.endswith("-j ACCEPT") for line in lines):
        return
    if "-P FORWARD DROP" in lines:
        chain = "DOCKER-USER" if "-N DOCKER-USER" in lines else "FORWARD"
        yield _fails(
            "the policy of FORWARD in iptables-legacy drops what guests send to the world",
            iptables_remedy("iptables-legacy", chain),
        )
    if "-P INPUT DROP" in lines:
        yield _warns(
            "the policy of INPUT in iptables-legacy drops what guests send to this host (DNS and the egress proxy)",
            f"iptables-legacy -I INPUT -i {TAP_PREFIX}+ -j ACCEPT",
        )
