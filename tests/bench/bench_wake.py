"""Wakes from standby by traffic: how many, how many lost, how long the first byte takes; and what scans cost.

Instances are put in standby and asked at once, in turn over HTTP, over raw TCP with data behind the handshake, over
UDP, over SSH (dropbear), and through a WebSocket that was open before; from the host, from the world through published
ports, from a neighbour, and through an ingress (HTTP and WebSocket). A request is lost if it gets no answer or a wrong
one. While the server or a VMM is killed, a reset, an ICMP error or a 5xx is an answer, and a datagram may be sent
again.

The guests here are network namespaces instead of VMs, so that restoring takes no time; packets, rules, TAPs, hm-wake
and engine are real. HYPEMAN_BENCH_WAKES sets the number of requests, HYPEMAN_BENCH_KILLS after how many the server and
a VMM are killed in turn; no more are begun after HYPEMAN_BENCH_SECONDS. ``wake_many`` does the same with 100
instances for ten minutes, ``wake_guests`` with real guests and without kills.

``scan``: what the server spends while a peer that the policy ignores floods an instance in standby.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import trio

from tests.bench.harness import Result, process_cpu_time
from tests.real.appliance import Appliance, short_directory
from tests.real.wakes import (
    POLICY,
    WAYS,
    Place,
    Tally,
    Target,
    Wakes,
    cabled,
    check_agreement,
    socket_in,
)

WAKES = int(os.environ.get("HYPEMAN_BENCH_WAKES", "1000"))
KILLS = int(os.environ.get("HYPEMAN_BENCH_KILLS", "100"))
SECONDS = float(os.environ.get("HYPEMAN_BENCH_SECONDS", "1200"))
GUESTS = 6
SCAN_SECONDS = 10.0

Make = Callable[[Path, int], AbstractAsyncContextManager[tuple[Appliance, list[Target], Path]]]


async def wake_all(make: Make, guests: int, wanted: int, kills_every: int, seconds: float = SECONDS) -> Tally:
    for directory in short_directory("bench"):
        async with make(directory, guests) as (appliance, targets, key):
            tally = await Wakes(appliance, targets, key, wanted=wanted, kills_every=kills_every).run(seconds)
            print("in the end:", await check_agreement(appliance), flush=True)
            return tally
    raise AssertionError("there is a directory")


def results_of(tally: Tally) -> Iterator[Result]:
    yield Result("requests that woke", float(tally.requests), "")
    yield Result("lost", float(len(tally.lost)), "")
    for kind, place in WAYS:
        yield Result(f"{kind} from {place}, answered", float(tally.answered[kind, place]), "")
    for what, count in sorted(tally.kills.items()):
        yield Result(f"kills of the {what}", float(count), "")
    if tally.kills:
        yield Result("requests while something was killed", float(tally.disturbed), "")
        yield Result("of these, peers that received an error", float(tally.reported.total()), "")
        yield Result("datagrams sent again", float(tally.resent), "")
    if tally.restore:
        first, restore = statistics.median(tally.first_byte), statistics.median(tally.restore)
        yield Result("first byte, SSH apart", first * 1000, "ms", "the wake itself", restore * 1000)


async def scan() -> list[Result]:
    for directory in short_directory("bench"):
        async with cabled(directory, 1) as (appliance, (target,), _):
            policy = POLICY | {"ignore_source_cidrs": ["192.0.2.0/24"]}
            await appliance.ask("PATCH", f"/instances/{target.name}", json={"auto_standby": policy})
            await appliance.post(f"/instances/{target.name}/standby")
            peer = target.places["world"]
            idle = await cpu_while(appliance, partial(trio.sleep, SCAN_SECONDS))
            sent: list[int] = []
            spent = await cpu_while(appliance, partial(trio.to_thread.run_sync, flood, peer, sent))
            state = (await appliance.get(f"/instances/{target.name}"))["state"]
            return [
                Result("scan: packets to one in standby, a second", sum(sent) / SCAN_SECONDS, ""),
                Result("scan: CPU of the server", spent * 100, "%", "without", idle * 100),
                Result("scan: woken by it", float(state != "Standby"), "instances"),
            ]
    return []


async def cpu_while(appliance: Appliance, work: Callable[[], Awaitable[object]]) -> float:
    """The share of one CPU that the server uses meanwhile."""
    before, begin = process_cpu_time(appliance.pid), time.monotonic()
    await work()
    return (process_cpu_time(appliance.pid) - before) / (time.monotonic() - begin)


def flood(peer: Place, sent: list[int]) -> None:
    """Send datagrams as fast as they go; adds how many to ``sent``."""
    end = time.monotonic() + SCAN_SECONDS
    with socket_in(peer.namespace, socket.SOCK_DGRAM) as channel:
        while time.monotonic() < end:
            for _ in range(100):
                channel.sendto(b"scan", (peer.address, peer.ports["udp"]))
            sent.append(100)


def run() -> Iterator[Result]:
    yield from trio.run(scan)
    yield from results_of(trio.run(wake_all, cabled, GUESTS, WAKES, KILLS))
