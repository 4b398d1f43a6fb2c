"""Wakes from standby by traffic: how many, how many lost, how long the first byte takes; and what scans cost.

Instances are put in standby and asked at once, in turn over HTTP, over raw TCP with data behind the handshake, over
UDP, over SSH (dropbear), and through a WebSocket that was open before; from the host, from the world through published
ports, from a neighbour, and through an ingress (HTTP and WebSocket). A request is lost if it gets no answer or a wrong
one. While the server or a VMM is killed, a reset, an ICMP error or a 5xx is an answer, and a datagram may be sent
again.

``namespaces``: a real server with real packets, rules, TAPs, hm-wake and engine, whose guests are network namespaces
    instead of VMs: restoring takes no time. HYPEMAN_BENCH_WAKES sets their number, HYPEMAN_BENCH_KILLS after how many
    the server and a VMM are killed in turn.
``guests``: the same with real guests and without kills. HYPEMAN_BENCH_REAL_WAKES sets their number.

``hundred``: as ``namespaces``, with 100 instances that wake and enter standby all the time. Then states, VMMs, links,
    routes, addresses, memory and captures have to agree.

Of each kind no more are begun after HYPEMAN_BENCH_SECONDS.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from tests.bench.harness import Result
from tests.real.appliance import Appliance, short_directory
from tests.real.wakes import WAYS, Tally, Target, Wakes, cabled, check_agreement, real

WAKES = int(os.environ.get("HYPEMAN_BENCH_WAKES", "1000"))
KILLS = int(os.environ.get("HYPEMAN_BENCH_KILLS", "100"))
REAL_WAKES = int(os.environ.get("HYPEMAN_BENCH_REAL_WAKES", "34"))
SECONDS = float(os.environ.get("HYPEMAN_BENCH_SECONDS", "1200"))
GUESTS, REAL_GUESTS = 6, 2

Make = Callable[[Path, int], AbstractAsyncContextManager[tuple[Appliance, list[Target], Path]]]


async def wake_all(make: Make, guests: int, wanted: int, kills_every: int) -> Tally:
    for directory in short_directory("bench"):
        async with make(directory, guests) as (appliance, targets, key):
            tally = await Wakes(appliance, targets, key, wanted=wanted, kills_every=kills_every).run(SECONDS)
            print("in the end:", await check_agreement(appliance), flush=True)
            return tally
    raise AssertionError("there is a directory")


def told(name: str, tally: Tally) -> Iterator[Result]:
    for line in tally.lost:
        print("lost:", line)
    yield Result(f"{name}: requests that woke", float(tally.requests), "")
    yield Result(f"{name}: lost", float(len(tally.lost)), "")
    for kind, place in WAYS:
        yield Result(f"{name}: {kind} from {place}, answered", float(tally.answered[kind, place]), "")
    for what, count in sorted(tally.kills.items()):
        yield Result(f"{name}: kills of the {what}", float(count), "")
    if tally.kills:
        yield Result(f"{name}: requests while something was killed", float(tally.disturbed), "")
        yield Result(f"{name}: of these, peers that were told there is no answer", float(tally.reported.total()), "")
        yield Result(f"{name}: datagrams sent again", float(tally.resent), "")
    if tally.restore:
        first, restore = statistics.median(tally.first_byte), statistics.median(tally.restore)
        yield Result(f"{name}: first byte, SSH apart", first * 1000, "ms", "the wake itself", restore * 1000)


def run() -> Iterator[Result]:
    yield from told("namespaces", trio.run(wake_all, cabled, GUESTS, WAKES, KILLS))
    yield from told("hundred", trio.run(wake_all, cabled, 100, WAKES, KILLS))
    yield from told("guests", trio.run(wake_all, real, REAL_GUESTS, REAL_WAKES, 0))
