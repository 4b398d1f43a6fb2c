"""A host with an uplink and guests, in a network namespace of its own, for one test.

    world ── up0 (a TAP) ── [ the kernel under test: routes, rules, queues ] ── hm-… ── guests

Both ends are descriptors of TAPs in the test's hands, so a test sends any frame and sees every frame.
``@in_namespace`` runs a test in a fresh process inside fresh network and mount namespaces: the
namespace of a process with worker threads cannot be changed from inside.

A packet that must *not* arrive is followed by a legal one on the same way (``marker``); when that is
there, the other one would have been too. No test waits for time to pass.
"""

from __future__ import annotations

import fcntl
import importlib.util
import inspect
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from hypeman.config import NetworkConfig
from hypeman.host.links import Links
from hypeman.host.rules import Rules
from hypeman.network.addressing import mac_of
from hypeman.network.service import Network
from hypeman.network.types import EgressMode, HostPort, Lease
from tests.network import frames
from tests.network.frames import ARP, ICMP, IPV4, TCP, UDP, Seen

GATEWAY = "10.100.0.1"
GATEWAY_MAC = "02:00:00:00:00:01"
HOST = "192.0.2.1"
"""The host's address on the uplink."""
ROUTER = "192.0.2.2"
ROUTER_MAC = "02:ff:00:00:00:02"
SERVER = "203.0.113.9"
"""Somebody in the world."""
EGRESS_PORT = 18080
ENGINE_UID = 510000
ENGINE_ALLOWED = ("127.0.0.7/32",)
OFFERED = HostPort("tcp", 5300)
_DEADLINE = 10
_VNET_HEADER = 10
VIRTIO_1_HEADER = 12
_INSIDE = "HYPEMAN_TEST_INSIDE_NAMESPACE"


def in_namespace(test: Callable[..., Awaitable[None] | None]) -> Callable[[], None]:
    """Run ``test`` in namespaces of its own; skip without root. An async one gets a Lab, if it takes one."""

    if _INSIDE in os.environ:  # where pytest, which is slow to import, is not wanted
        return SimpleNamespace(inside=test)  # type: ignore[return-value]
    import pytest

    @pytest.mark.real
    def run() -> None:
        if os.geteuid() != 0:
            pytest.skip("requires root for a network namespace")
        command = ["unshare", "--net", "--mount", sys.executable, "-W", "error", "-m", "tests.network.lab"]
        result = subprocess.run(
            [*command, inspect.getfile(test), test.__name__],
            env=os.environ | {_INSIDE: "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if result.returncode:
            pytest.fail(result.stdout[-4000:] + result.stderr[-8000:], pytrace=False)
        if result.stdout:
            print(result.stdout)

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    return run  # not functools.wraps: through __wrapped__ pytest would look for the fixtures of the test itself


def sh(command: str, *, check: bool = True) -> str:
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    if check and result.returncode:
        raise AssertionError(f"{command}: {result.stderr}")
    return result.stdout


async def wait_until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(_DEADLINE):
        while not condition():
            await trio.sleep(0.01)


class Wire:
    """One end of a cable: frames out and in."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        self.header = _VNET_HEADER
        os.set_blocking(descriptor, False)

    def send_frame(self, frame: bytes) -> None:
        os.write(self._fd, b"\0" * self.header + frame)

    async def receive(self) -> Seen:
        """The next frame, or TooSlowError."""
        with trio.fail_after(_DEADLINE):
            while True:
                try:
                    return frames.read(os.read(self._fd, 70000)[self.header :])
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._fd)

    async def receive_until(self, wanted: Callable[[Seen], bool]) -> list[Seen]:
        """Everything up to and with the first frame that is wanted."""
        seen = [await self.receive()]
        while not wanted(seen[-1]):
            seen.append(await self.receive())
        return seen

    async def expect(self, wanted: Callable[[Seen], bool]) -> Seen:
        return (await self.receive_until(wanted))[-1]

    def close(self) -> None:
        os.close(self._fd)


class Guest(Wire):
    """A guest that does what it likes with its cable."""

    def __init__(self, lease: Lease, descriptor: int) -> None:
        super().__init__(descriptor)
        self.lease = lease

    def send_ipv4(self, packet: bytes, *, source_mac: str = "") -> None:
        self.send_frame(frames.ethernet(GATEWAY_MAC, source_mac or self.lease.mac, IPV4, packet))

    def send_udp(self, to: str, port: int, data: bytes = b"", *, source: str = "", source_port: int = 4000) -> None:
        source = source or self.lease.ipv4
        self.send_ipv4(frames.ipv4(source, to, UDP, frames.udp(source, to, source_port, port, data)))

    def send_tcp(self, to: str, port: int, flags: int = frames.SYN, *, source_port: int = 4000, **more: Any) -> None:
        segment = frames.tcp(self.lease.ipv4, to, source_port, port, flags, **more)
        self.send_ipv4(frames.ipv4(self.lease.ipv4, to, TCP, segment))

    def ping(self, to: str, *, source: str = "") -> None:
        self.send_ipv4(frames.ipv4(source or self.lease.ipv4, to, ICMP, frames.echo_request()))

    def send_arp(self, target: str, *, sender: str = "", sender_mac: str = "", source_mac: str = "") -> None:
        claim = frames.arp(1, sender_mac or self.lease.mac, sender or self.lease.ipv4, target)
        self.send_frame(frames.ethernet(frames.BROADCAST, source_mac or self.lease.mac, ARP, claim))

    async def expect_reset(self, port: int) -> Seen:
        return await self.expect(lambda seen: seen.protocol == TCP and seen.source_port == port and is_reset(seen))

    async def expect_pong(self) -> list[Seen]:
        """Ping the gateway; all that came until it answered."""
        self.ping(GATEWAY)
        return await self.receive_until(lambda seen: seen.protocol == ICMP and seen.flags == 0)


def is_reset(seen: Seen) -> bool:
    return bool(seen.flags & frames.RST)


class Lab:
    def __init__(self, network: Network, links: Links, rules: Rules, world: Wire) -> None:
        self.network = network
        self.links = links
        self.rules = rules
        self.world = world
        self._count = 0
        self._wires: list[Wire] = [world]

    def lease(self, **changes: Any) -> Lease:
        self._count += 1
        offset = self._count + 1
        fields: dict[str, Any] = {
            "instance_id": f"instance{self._count}",
            "cid": offset,
            "ipv4": f"10.100.0.{offset}",
            "mac": mac_of(offset),
            "tap": f"hm-guest{self._count}",
        }
        return Lease(**(fields | changes))

    async def guest(self, **changes: Any) -> Guest:
        """A guest whose cable is plugged in."""
        lease = self.lease(**changes)
        await self.network.attach(lease)
        return await self.plug(lease)

    async def plug(self, lease: Lease) -> Guest:
        guest = Guest(lease, await self.network.open_tap(lease))
        self.add_wire(guest)
        # The kernel drops what it has for the guest until its link watcher has seen the plug.
        await wait_until(lambda: sh(f"cat /sys/class/net/{lease.tap}/operstate") == "up\n")
        return guest

    def add_wire(self, wire: Wire) -> Wire:
        """Close ``wire`` at the end of the test."""
        self._wires.append(wire)
        return wire

    def unplug(self, wire: Wire) -> None:
        self._wires.remove(wire)
        wire.close()

    async def mediated(self, mode: EgressMode = EgressMode.ALL) -> Guest:
        return await self.guest(egress_mode=mode)

    async def world_sees(self, guest: Guest, data: bytes = b"marker") -> list[Seen]:
        """Send a legal datagram from ``guest`` to the world; all that arrived there until it did."""
        guest.send_udp(SERVER, 9, data)
        return await self.world.receive_until(lambda seen: seen.protocol == UDP and seen.data == data)

    def from_world(self, packet: bytes) -> None:
        """Let an IPv4 packet arrive at the uplink."""
        uplink = Path("/sys/class/net/up0/address").read_text().strip()
        self.world.send_frame(frames.ethernet(uplink, ROUTER_MAC, IPV4, packet))

    def listen(self, address: str, port: int) -> socket.socket:
        """A TCP server of the host."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        listener.setblocking(False)
        return listener

    def close(self) -> None:
        for wire in self._wires:
            wire.close()


def plug_in(name: str) -> Wire:
    """A TAP that lives as long as its wire."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000 | 0x4000))
    return Wire(descriptor)


def set_up_uplink(name: str = "up0") -> Wire:
    wire = plug_in(name)
    sh(f"sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1")
    sh(f"ip addr add {HOST}/24 dev {name} && ip link set {name} up")
    sh(f"ip neigh add {ROUTER} lladdr {ROUTER_MAC} dev {name}")
    sh(f"ip route add default via {ROUTER}")
    return wire


@asynccontextmanager
async def lab(*, uplink: bool = True, **config: Any) -> AsyncIterator[Lab]:
    sh("ip link set lo up")
    world = set_up_uplink() if uplink else plug_in("nowhere")
    links, rules = Links(), Rules()
    network = Network(
        NetworkConfig(**config),
        links=links,
        rules=rules,
        egress_port=EGRESS_PORT,
        engine_uid=ENGINE_UID,
        engine_allowed=ENGINE_ALLOWED,
        offered=[OFFERED],
    )
    await network.start([])
    built = Lab(network, links, rules, world)
    try:
        yield built
    finally:
        built.close()
        network.aclose()
        links.close()
        rules.close()


async def _run_inside(test: Callable[..., Awaitable[None]]) -> None:
    if not inspect.signature(test).parameters:
        await test()
        return
    async with lab() as built:
        await test(built)


def main(file: str, name: str) -> None:
    # /sys shows the namespace that mounted it; /run keeps what a server notes for its namespace
    sh("mount --make-rprivate / && mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # so that frames keep their order
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    test = getattr(module, name).inside
    if inspect.iscoroutinefunction(test):
        trio.run(_run_inside, test)
    else:
        test()


if __name__ == "__main__":
    main(*sys.argv[1:])
