"""Bandwidth limits, measured by TCP between the host and a guest that is a network stack of its own.

    host TCP ── hm-… ── a thread that copies frames ── eth0 in a namespace ── guest TCP

Segmentation offload is on, as it is with a VMM, so segments of 64 KB come to the queues.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import trio
from msgspec.structs import replace

from hypeman.host.types import shaper_name
from hypeman.network.types import Lease
from tests.network.frames import UDP
from tests.network.lab import GATEWAY, OFFERED, SERVER, Lab, in_namespace, lab, plug_in, sh

R = TypeVar("R")
MBIT = 125_000
"""Bytes per second."""
_TUNSETOFFLOAD, _CSUM_AND_TSO = 0x400454D0, 0x3
_CLONE_NEWNET = 0x40000000
_SETTLE, _WINDOW = 0.5, 1.0
"""Seconds."""
_WINDOWS, _FLOWS = 60, 4
_TOLERANCE = 0.10


class Stack:
    """A network namespace with a guest's interface; ``run`` calls functions inside it."""

    def __init__(self, lab: Lab, lease: Lease, descriptor: int) -> None:
        self._pool = ThreadPoolExecutor(1, initializer=_unshare)
        self._outer = descriptor
        inner = self.run(lambda: plug_in("eth0"))
        lab.add_wire(inner)
        self._inner = inner._fd
        for each in (self._outer, self._inner):
            os.set_blocking(each, False)
            fcntl.ioctl(each, _TUNSETOFFLOAD, _CSUM_AND_TSO)
        self.run(lambda: sh(f"""
            ip link set lo up && ip link set eth0 address {lease.mac} up && ip addr add {lease.ipv4}/32 dev eth0
            ip route add {GATEWAY} dev eth0 && ip route add default via {GATEWAY}"""))  # fmt: skip
        self._stop = threading.Event()
        self._copier = threading.Thread(target=self._copy)
        self._copier.start()

    def run(self, function: Callable[[], R]) -> R:
        return self._pool.submit(function).result()

    def connect(self) -> socket.socket:
        return self.run(lambda: socket.create_connection((GATEWAY, OFFERED.port), timeout=10))

    def close(self) -> None:
        self._stop.set()
        self._copier.join()
        self._pool.shutdown()
        os.close(self._outer)

    def _copy(self) -> None:
        other = {self._outer: self._inner, self._inner: self._outer}
        while not self._stop.is_set():
            for ready in select.select([*other], [], [], 0.1)[0]:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        os.write(other[ready], os.read(ready, 70_000))


def _unshare() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


@contextlib.contextmanager
def connection(lab: Lab, stack: Stack) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(host's end, guest's end)"""
    with lab.listen(GATEWAY, OFFERED.port) as listener:
        listener.setblocking(True)
        guest = stack.connect()
        host, _ = listener.accept()
    with guest, host:
        host.settimeout(10)
        yield host, guest


class Flow:
    """TCP that sends what it can; counts what arrives."""

    def __init__(self, sender: socket.socket, receiver: socket.socket) -> None:
        self.received = 0
        self._ends = sender, receiver
        self._threads = [threading.Thread(target=run) for run in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for end in self._ends:
            end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._ends[0].send(bytes(65536))

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._ends[1].recv(1 << 20):
                self.received += len(data)


def passed(lease: Lease, way: str) -> int:
    """Bytes that came out of the queue of that direction, as the kernel counts them. What TCP hands to
    the receiver comes in leaps, whenever a lost segment has been sent again."""
    link = lease.tap if way == "download" else shaper_name(lease.tap)
    return int(Path(f"/sys/class/net/{link}/statistics/tx_bytes").read_text())


def measure(lab: Lab, stack: Stack, lease: Lease, limits: dict[str, int]) -> None:
    """Let flows run in each direction of ``limits``, and look at them second by second. Several, since one
    alone needs many seconds to come back from a loss when the other direction's queue delays its answers.

    Never is one above its limit (the first half second apart, when the bucket is full), and there is
    a second in which all come up to theirs. When that comes depends on TCP and on how busy the
    machine is; a limit that is too low never lets it come.
    """
    with ExitStack() as ends:
        for way in [*limits] * _FLOWS:
            host, guest = ends.enter_context(connection(lab, stack))
            ends.callback((Flow(host, guest) if way == "download" else Flow(guest, host)).close)
        time.sleep(_SETTLE)
        for _ in range(_WINDOWS):
            before = {way: (passed(lease, way), time.monotonic()) for way in limits}
            time.sleep(_WINDOW)
            rates = {}
            for way, (count, since) in before.items():
                rates[way] = (passed(lease, way) - count) / (time.monotonic() - since)
            reported = ", ".join(f"{way} {rates[way] / MBIT:.1f} of {limits[way] / MBIT:.0f} Mbit/s" for way in limits)
            assert all(rates[way] <= limits[way] * (1 + _TOLERANCE) for way in limits), reported
            if all(rates[way] >= limits[way] * (1 - _TOLERANCE) for way in limits):
                print(reported)
                return
    raise AssertionError(f"below the limit for {_WINDOWS} seconds: {reported}")


async def _with_stack(lab: Lab, lease: Lease, use: Callable[[Stack], None]) -> None:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    await lab.network.attach(lease)
    stack = Stack(lab, lease, await lab.network.open_tap(lease))
    try:
        await trio.to_thread.run_sync(use, stack)
    finally:
        stack.close()


@in_namespace
async def test_limits_hold_in_each_direction_and_together(lab: Lab) -> None:
    """5, 20 and 100 Mbit/s; changed on the living guest, as a restore or fork with other limits does."""
    lease = lab.lease(download_bps=5 * MBIT, upload_bps=5 * MBIT)
    token = trio.lowlevel.current_trio_token()

    def try_all(stack: Stack) -> None:
        for mbit in (5, 20, 100):
            for ways in (("download",), ("upload",), ("download", "upload")):
                rates = {f"{way}_bps": mbit * MBIT if way in ways else 0 for way in ("download", "upload")}
                trio.from_thread.run(lab.network.set_rates, replace(lease, **rates), trio_token=token)
                measure(lab, stack, lease, dict.fromkeys(ways, mbit * MBIT))

    await _with_stack(lab, lease, try_all)


@in_namespace
async def test_one_direction_limited_leaves_the_other_free(lab: Lab) -> None:
    lease = lab.lease(download_bps=5 * MBIT)

    def flow_up(stack: Stack) -> None:
        with connection(lab, stack) as (host, guest):
            flow = Flow(guest, host)
            while flow.received < 10_000_000:  # at 5 Mbit/s the test would run into its time limit
                time.sleep(0.01)
            flow.close()

    await _with_stack(lab, lease, flow_up)


@in_namespace
async def test_a_kernel_without_ifb_cuts_uploads() -> None:
    """Rough, but never far above the limit; and the rules are as they were when the guest has gone."""
    async with lab() as built:
        built.network._can_shape = False
        before = sh("nft -s list ruleset")
        lease = built.lease(upload_bps=20 * MBIT)

        def flow_up(stack: Stack) -> None:
            with connection(built, stack) as (host, guest):
                flow = Flow(guest, host)
                time.sleep(_SETTLE)
                start, before = time.monotonic(), flow.received
                time.sleep(2)
                got = (flow.received - before) / (time.monotonic() - start)
                flow.close()
            print(f"upload {got / MBIT:.1f} of 20 Mbit/s by cutting")
            assert got < 30 * MBIT

        await _with_stack(built, lease, flow_up)
        assert "hmu-" not in sh("ip link")
        await built.network.detach(lease)
        assert sh("nft -s list ruleset") == before


@in_namespace
async def test_counters_are_the_guests(lab: Lab) -> None:
    """Received is what the guest received; a limit in between does not hide or double anything."""
    for limits in ({}, {"upload_bps": 10**6, "download_bps": 10**6}):
        guest = await lab.guest(**limits)
        await guest.expect_pong()
        before = lab.network.counters()[guest.lease.instance_id]
        for _ in range(5):
            guest.send_udp(SERVER, 9, bytes(1000))
        await lab.world.receive_until(lambda seen: seen.protocol == UDP)
        received, sent = (
            now - then for now, then in zip(lab.network.counters()[guest.lease.instance_id], before, strict=True)
        )
        assert (received, sent) == (0, 5 * (14 + 20 + 8 + 1000))
        pong = (await guest.expect_pong())[-1]
        assert lab.network.counters()[guest.lease.instance_id][0] - before[0] == 14 + 20 + len(pong.data)
