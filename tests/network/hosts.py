"""Hosts with a network stack of their own, behind the cables of a lab: guests, and the world.

    lab's wire (a TAP of the kernel under test) ── frames carried over ── a TAP in another namespace

A thread that has left for a namespace of its own makes sockets there, which any thread may then use.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from tests.network.lab import GATEWAY, ROUTER, ROUTER_MAC, Guest, Lab, Wire, plug_in

R = TypeVar("R")
_CLONE_NEWNET = 0x40000000
_SECONDS = 10.0


class Host:
    """A machine at the other end of ``wire``."""

    def __init__(self, wire: Wire, *, mac: str, commands: tuple[str, ...]) -> None:
        self._wire = wire
        self._thread = ThreadPoolExecutor(1)
        self._cable = self.inside(self._set_up, mac, commands)
        self._stop_reading, self._stop = os.pipe()
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()

    def inside(self, work: Callable[..., R], *arguments: object) -> R:
        """Run ``work`` in the host's namespace."""
        return self._thread.submit(work, *arguments).result(_SECONDS)

    def sh(self, command: str) -> str:
        def run() -> str:
            return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout

        return self.inside(run)

    def make_socket(self, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
        made = self.inside(socket.socket, family, kind)
        made.settimeout(_SECONDS)
        return made

    def serve(self, port: int, *, kind: int = socket.SOCK_STREAM, address: str = "0.0.0.0") -> socket.socket:
        """A server's socket."""
        server = self.make_socket(kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        if kind == socket.SOCK_STREAM:
            server.listen()
        return server

    def connect(self, address: str, port: int) -> socket.socket:
        client = self.make_socket(family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        client.connect((address, port))
        return client

    def close(self) -> None:
        os.write(self._stop, b"x")
        self._carrier.join(_SECONDS)
        self._cable.close()
        self._thread.shutdown()
        os.close(self._stop)
        os.close(self._stop_reading)

    def _set_up(self, mac: str, commands: tuple[str, ...]) -> Wire:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        cable = plug_in("eth0")
        for command in (f"ip link set eth0 address {mac} up", "ip link set lo up", *commands):
            subprocess.run(command, shell=True, check=True)
        return cable

    def _carry(self) -> None:
        ends = {self._wire._fd: self._cable._fd, self._cable._fd: self._wire._fd}
        while True:
            ready, _, _ = select.select([*ends, self._stop_reading], [], [])
            if self._stop_reading in ready:
                return
            for source in ready:
                try:
                    os.write(ends[source], os.read(source, 70000))
                except OSError:  # nothing there after all; a link that is down
                    continue


@contextmanager
def guest_host(guest: Guest) -> Iterator[Host]:
    """A guest as the agent configures it."""
    commands = (
        f"ip addr add {guest.lease.ipv4}/32 dev eth0",
        f"ip route add {GATEWAY} dev eth0",
        f"ip route add default via {GATEWAY}",
    )
    host = Host(guest, mac=guest.lease.mac, commands=commands)
    try:
        yield host
    finally:
        host.close()


@contextmanager
def world_host(lab: Lab) -> Iterator[Host]:
    """The router that the uplink leads to, which also plays everyone else in the world."""
    with ExitStack() as stack:
        host = Host(lab.world, mac=ROUTER_MAC, commands=(f"ip addr add {ROUTER}/24 dev eth0",))
        stack.callback(host.close)
        yield host
