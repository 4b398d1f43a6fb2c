"""500 TAPs: made, counted, removed; and what a change of rules costs. In a network namespace of its own.

Peers: a sweep of sysfs in Python, pyroute2's dump, ``ip -s -j link``; pyroute2 making the same TAP
(without rules); the nft program making the same change of elements.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import trio
from pyroute2 import IPRoute

from hypeman._native.tapstats import TapStats
from hypeman.config import NetworkConfig
from hypeman.host.links import Links
from hypeman.host.rules import Rules
from hypeman.network import ruleset
from hypeman.network.addressing import Subnet, mac_of
from hypeman.network.service import Network
from hypeman.network.types import EgressMode, Lease
from tests.bench.harness import Result, compare

TAPS = 500
_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
SUBNET = Subnet.parse("10.100.0.0/16")


def run() -> list[Result]:
    if os.geteuid() != 0:
        print("network: requires root for a network namespace")
        return []
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET | _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run("mount --make-rprivate / && mount -t sysfs sysfs /sys && ip link set lo up", shell=True, check=True)
    return trio.run(_run)


async def _run() -> list[Result]:
    links, rules = Links(), Rules()
    network = Network(NetworkConfig(), links=links, rules=rules, egress_port=18080)
    await network.start([])
    results = [await _attach(network), await _attach_limited(network)]
    leases = [_lease(number) for number in range(TAPS)]
    for lease in leases:
        await network.attach(lease)
    results += [*_sweeps(), await _elements(rules, leases[0]), await _remove(network, leases)]
    network.aclose()
    links.close()
    rules.close()
    return results


def _lease(number: int, *, limit: int = 0) -> Lease:
    return Lease(
        instance_id=f"{number:04}bench",
        cid=number + 3,
        ipv4=SUBNET.address(number),
        mac=mac_of(SUBNET.offset(number)),
        tap=f"hm-bench{number}",
        egress_mode=EgressMode.ALL,
        download_bps=limit,
        upload_bps=limit,
    )


async def _attach(network: Network) -> Result:
    """One TAP with address, route, neighbour and rules, against pyroute2 without the rules."""
    lease, ours, theirs = _lease(0), [], []
    with IPRoute() as ip:
        for _ in range(30):
            begin = time.perf_counter()
            await network.attach(lease)
            ours.append(time.perf_counter() - begin)
            await network.detach(lease)
            begin = time.perf_counter()
            index = _pyroute2_tap(ip, lease)
            theirs.append(time.perf_counter() - begin)
            ip.link("del", index=index)
    return Result("network.attach", _median(ours), "ms", "pyroute2, links only", _median(theirs))


async def _attach_limited(network: Network) -> Result:
    lease, times = _lease(0, limit=10**7), []
    for _ in range(30):
        begin = time.perf_counter()
        await network.attach(lease)
        times.append(time.perf_counter() - begin)
        await network.detach(lease)
    return Result("network.attach_with_limits", _median(times), "ms")


def _pyroute2_tap(ip: Any, lease: Lease) -> int:
    ip.link("add", ifname=lease.tap, kind="tuntap", mode="tap")
    (index,) = ip.link_lookup(ifname=lease.tap)
    ip.link("set", index=index, mtu=1500, address=SUBNET.gateway_mac, state="up")
    ip.route("add", dst=f"{lease.ipv4}/32", oif=index, scope="link", prefsrc=str(SUBNET.gateway))
    ip.neigh("add", dst=lease.ipv4, lladdr=lease.mac, ifindex=index, state="permanent")
    return int(index)


def _sweeps() -> list[Result]:
    stats = TapStats()
    names = [name for name in os.listdir("/sys/class/net") if name.startswith("hm-")]

    def sysfs() -> dict[str, tuple[int, int]]:
        return {name: (_number(name, "rx_bytes"), _number(name, "tx_bytes")) for name in names}

    def by_ip() -> Any:
        return json.loads(subprocess.run(["ip", "-s", "-j", "link"], capture_output=True, check=True).stdout)

    ours = _milliseconds(stats.sweep, repeat=20)
    with IPRoute() as ip:
        peers: dict[str, tuple[str, Callable[[], Any]]] = {
            "sysfs": ("sysfs in Python", sysfs),
            "pyroute2": ("pyroute2 dump", lambda: list(ip.get_links())),
            "ip": ("ip -s -j link", by_ip),
        }
        results = [
            compare(f"network.sweep_{TAPS}_taps.vs_{key}", "ms", ours, name, _milliseconds(peer))
            for key, (name, peer) in peers.items()
        ]
    stats.close()
    return results


def _number(name: str, counter: str) -> int:
    with open(f"/sys/class/net/{name}/statistics/{counter}") as file:
        return int(file.read())


async def _elements(rules: Rules, lease: Lease) -> Result:
    """Close and open one guest among 500."""
    elements = ruleset.lease_elements(lease)
    text = "".join(
        f"{verb} element {element.family} hypeman {element.set} {{ {' . '.join(element.key)} }}\n"
        for verb in ("delete", "add")
        for element in elements
    )
    ours, theirs = [], []
    for _ in range(30):
        begin = time.perf_counter()
        await rules.change(remove=elements, add=elements)
        ours.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        await rules.load(text)
        theirs.append(time.perf_counter() - begin)
    return Result("network.change_elements", _median(ours), "ms", "nft -f", _median(theirs))


async def _remove(network: Network, leases: list[Lease]) -> Result:
    """All at once, per TAP, against one at a time."""
    alone, rest = leases[:10], leases[10:]
    begin = time.perf_counter()
    for lease in alone:
        await network.detach(lease)
    one = (time.perf_counter() - begin) / len(alone)
    begin = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for lease in rest:
            nursery.start_soon(network.detach, lease)
    together = (time.perf_counter() - begin) / len(rest)
    return Result("network.detach_together_per_tap", together * 1e3, "ms", "one at a time", one * 1e3)


def _milliseconds(function: Callable[[], Any], *, repeat: int = 1) -> Callable[[], float]:
    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(repeat):
            function()
        return (time.perf_counter() - begin) * 1e3 / repeat

    return measure


def _median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2] * 1e3
