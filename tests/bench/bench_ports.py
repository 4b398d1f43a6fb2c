"""Published ports: bytes per second and CPU through one, against the plain DNAT rule of a host without us; and what a
change costs when a thousand are published. In network namespaces of its own.

    client ── veth ── [ the kernel under test ] ── veth ── guest

The guest's end is a veth with the name of a TAP: the rules see the same packets, and no VMM's copying hides their cost.
"""

from __future__ import annotations

import ctypes
import os
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import trio

from hypeman.config import NetworkConfig
from hypeman.host.links import Links
from hypeman.host.rules import Rules
from hypeman.network import ruleset
from hypeman.network.addressing import Subnet
from hypeman.network.service import Network
from hypeman.network.types import Lease, PortMapping
from tests.bench.harness import Result, compare

R = TypeVar("R")

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_SUBNET = Subnet.parse("10.100.0.0/16")
_GUEST, _GUEST_MAC, _HOST, _CLIENT = "10.100.0.2", "02:00:00:00:00:02", "192.0.2.1", "192.0.2.2"
_WEB = PortMapping(host_port=8080, guest_port=80)
_BYTES = 768 << 20
_CHUNK = bytes(1 << 20)
_PLAIN = f"""
table ip plain {{
    chain arrivals {{ type nat hook prerouting priority dstnat; tcp dport 8080 dnat to {_GUEST}:80; }}
    chain departures {{ type nat hook postrouting priority srcnat; ip saddr 10.100.0.0/16 oifname "up0" masquerade; }}
}}
"""


class _Elsewhere:
    """A thread in a namespace of its own, at the other end of a veth."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.tid = self.run(self._leave)

    def run(self, work: Callable[..., R], *arguments: object) -> R:
        return self._thread.submit(work, *arguments).result()

    @staticmethod
    def _leave() -> int:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        return threading.get_native_id()

    def close(self) -> None:
        self._thread.shutdown()


def run() -> list[Result]:
    if os.geteuid() != 0:
        print("ports: requires root for network namespaces")
        return []
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET | _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _sh("mount --make-rprivate / && mount -t sysfs sysfs /sys && ip link set lo up")
    guest, client = _Elsewhere(), _Elsewhere()
    try:
        _connect("up0", client, f"ip addr add {_CLIENT}/24 dev eth0")
        _connect(
            "hm-guest",
            guest,
            f"ip link set eth0 address {_GUEST_MAC} && ip addr add {_GUEST}/32 dev eth0 && "
            f"ip route add {_SUBNET.gateway} dev eth0 && ip route add default via {_SUBNET.gateway}",
        )
        _sh(f"ip addr add {_HOST}/24 dev up0 && ip addr add {_SUBNET.gateway}/32 dev lo")
        _sh(f"ip route add {_GUEST} dev hm-guest src {_SUBNET.gateway}")
        for name in ("up0", "hm-guest"):
            _sh(f"sysctl -qw net.ipv4.conf.{name}.forwarding=1")
        return [*_throughput(guest, client), *trio.run(_changes)]
    finally:
        guest.close()
        client.close()


def _sh(command: str, *, text: str = "") -> None:
    subprocess.run(command, shell=True, check=True, input=text, text=True)


def _connect(name: str, other: _Elsewhere, command: str) -> None:
    _sh(f"ip link add {name} type veth peer name eth0 netns {other.tid} && ip link set {name} up")
    other.run(_sh, f"ip link set lo up && ip link set eth0 up && {command}")


def _throughput(guest: _Elsewhere, client: _Elsewhere) -> list[Result]:
    """Paired rounds; one pass gives both figures."""
    listener = guest.run(socket.create_server, (_GUEST, 80))
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    cpu: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(10):
        for kind in ("ours", "plain") if number % 2 else ("plain", "ours"):
            _load(kind)
            spent, used = _transfer(listener, client)
            if number:  # the first one warms up
                seconds[kind].append(spent)
                cpu[kind].append(used)
    listener.close()
    gigabits = {kind: _BYTES * 8 / 1e9 / statistics.median(values) for kind, values in seconds.items()}
    rates = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["plain"], strict=True)]
    costs = [ours / theirs for ours, theirs in zip(cpu["ours"], cpu["plain"], strict=True)]
    per_gigabyte = {kind: statistics.median(values) * 1e9 / _BYTES for kind, values in cpu.items()}
    rate, cost = statistics.median(rates), statistics.median(costs)
    return [
        Result("ports.throughput", gigabits["ours"], "Gbit/s", "plain DNAT", gigabits["plain"], rate),
        Result("ports.cpu", per_gigabyte["ours"], "s/GB", "plain DNAT", per_gigabyte["plain"], cost),
    ]


def _load(kind: str) -> None:
    _sh("nft flush ruleset")
    if kind == "plain":
        _sh("nft -f -", text=_PLAIN)
        return
    lease = Lease(instance_id="bench", cid=3, ipv4=_GUEST, mac=_GUEST_MAC, tap="hm-guest", ports=(_WEB,))
    _sh(
        "nft -f -",
        text=ruleset.render_ruleset(ruleset.RuleFacts(subnet=_SUBNET, uplinks=("up0",), forwarding=("up0",)), [lease]),
    )


def _transfer(listener: socket.socket, client: _Elsewhere) -> tuple[float, float]:
    """Wall and CPU seconds (of this process: packets are handled in the context of their sender) for a download."""
    receiving = client.run(socket.create_connection, (_HOST, 8080))
    sending, _ = listener.accept()

    def send() -> None:
        for _ in range(_BYTES // len(_CHUNK)):
            sending.sendall(_CHUNK)
        sending.close()

    begin, cpu = time.perf_counter(), time.process_time()
    thread = threading.Thread(target=send)
    thread.start()
    buffer = bytearray(1 << 20)
    while receiving.recv_into(buffer):
        pass
    thread.join()
    spent = time.perf_counter() - begin, time.process_time() - cpu
    receiving.close()
    return spent


async def _changes() -> list[Result]:
    """One port more and one less, of an instance that has one, and of one that has a thousand."""
    links, rules = Links(), Rules()
    network = Network(NetworkConfig(), links=links, rules=rules)
    await network.start([])
    leases = {
        kind: Lease(instance_id=kind, cid=number, ipv4=_SUBNET.address(number), mac=f"02:00:00:00:01:{number:02x}",
                    tap=f"hm-{kind}", ports=ports)
        for number, (kind, ports) in enumerate({
            "one": (PortMapping(host_port=1001, guest_port=1),),
            "many": (PortMapping(host_port=20000, guest_port=1000, count=1000),),
        }.items(), 10)
    }  # fmt: skip
    for lease in leases.values():
        await network.attach(lease)
    cost = {kind: await _change(network, lease) for kind, lease in leases.items()}
    network.aclose()
    links.close()
    rules.close()
    return [compare("ports.change_of_1000", "ms", lambda: cost["many"], "the same of 1", lambda: cost["one"], rounds=1)]


async def _change(network: Network, lease: Lease) -> float:
    from msgspec.structs import replace

    more = replace(lease, ports=(*lease.ports, PortMapping(host_port=9000 + lease.cid, guest_port=9)))
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        await network.set_ports(more)
        await network.set_ports(lease)
        times.append((time.perf_counter() - begin) * 500)
    return statistics.median(times)
