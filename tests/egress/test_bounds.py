"""What one instance holds is bounded, flat, given back, and costs another instance nothing.

HYPEMAN_FLOOD (24) is the number of connections of the flood: with 120, and 4,096 descriptors, it is the case that took
640 MB and the connections of others before there were bounds.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import h2.errors
import h2.events
import pytest
import trio

from hypeman.egress.policy import Unmatched
from hypeman.egress.service import Bounds, Limits
from tests.egress.conftest import GUEST, HOST, Request, Wire, World, credential, resident
from tests.egress.test_connect import RESET
from tests.egress.test_http2 import Peer, client

H = f"Host: {HOST}\r\n"
OTHER = "127.0.1.2"
FLOOD = int(os.environ.get("HYPEMAN_FLOOD", "24"))
STREAMS = 100
EACH = Bounds(connections=FLOOD + 4, upstreams=64, streams=10 * STREAMS, handshakes=8, descriptors=200, bytes=8 << 20)


@asynccontextmanager
async def bounded(make_world: Any, **changes: Any) -> AsyncGenerator[World]:
    async with make_world(limits=Limits(each=changes.pop("each", EACH), **changes)) as world:
        await world.allow()
        await world.allow("inst-b", OTHER, "sk-of-b")
        yield world


def reset(wire: Wire) -> None:
    """Closes with RST: closing as usual would leave a request time to be answered."""
    tls: Any = wire.stream
    tls.transport_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    tls.transport_stream.socket.close()


async def stuck(request: Request, wire: Wire) -> bool:
    await trio.sleep_forever()


async def flood(world: World) -> Peer:
    """A connection with as many streams as it may have, each sending a body that its host never reads."""
    peer = await client(world)
    streams = []
    for _ in range(STREAMS):
        streams.append(await peer.ask(("content-length", str(1 << 20)), method="POST", path="/stuck", end=False))
    with trio.move_on_after(0.3):
        while True:
            for stream in streams:
                try:
                    room = min(peer.http.local_flow_control_window(stream), peer.http.max_outbound_frame_size)
                    if room > 0:
                        peer.http.send_data(stream, b"x" * room)
                except Exception:  # h2 has no common class for "this stream was reset"
                    continue
            await peer.flush()
            if not await peer.pump():
                break
    return peer


async def test_a_flood_is_flat_and_costs_others_nothing(make_world: Any) -> None:
    async with bounded(make_world) as world:
        world.origin.answers["/stuck"] = stuck
        assert (await world.get(source=OTHER))[0] == 200
        before, answered = resident(world.egress), 0
        flooding = trio.Event()

        async def other() -> None:
            nonlocal answered
            while not flooding.is_set():
                assert (await world.get(source=OTHER))[0] == 200
                answered += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            peers = [await flood(world) for _ in range(FLOOD)]
            flooding.set()
        told = await world.egress.statistics()
        assert told.largest["streams"][0] == "inst-a" and told.largest["streams"][1] <= told.in_use["streams"]
        grown = resident(world.egress) - before
        print(f"{FLOOD} connections: {grown >> 20} MB more, {told.in_use}, refused {told.limited}")
        for bound in ("upstreams", "streams", "descriptors"):
            assert told.in_use[bound] <= getattr(EACH, bound) + 8  # the other instance's
        assert told.limited["upstreams"] > 0
        assert told.in_use["bytes"] < EACH.bytes + (EACH.streams + EACH.connections) * (20 << 10)
        assert grown < 64 << 20
        assert answered > 0
        for peer in peers:
            await trio.aclose_forcefully(peer.wire.stream)
        with trio.fail_after(60):
            while (left := (await world.egress.statistics()).in_use)["streams"] or left["upstreams"] > 2:
                await trio.sleep(0.02)
        assert (left["handshakes"], left["bytes"] < 1 << 20) == (0, True)


async def test_too_many_upstreams_are_a_readable_denial(make_world: Any) -> None:
    """503 that says so; when one is free again, requests go on. Idle connections make room."""
    async with bounded(make_world, each=Bounds(upstreams=2)) as world:
        world.origin.answers["/stuck"] = stuck
        busy = [await world.tls() for _ in range(2)]
        for number, wire in enumerate(busy):
            await wire.send(f"GET /stuck HTTP/1.1\r\n{H}\r\n".encode())
            while len(world.origin.requests) <= number:
                await trio.sleep(0.01)
        status, fields, body = await world.get()
        assert (status, fields["x-hypeman-egress"], fields["retry-after"]) == (503, "too_many_at_once", "1")
        assert b"too_many_at_once" in body
        assert (await world.get(source=OTHER))[0] == 200
        reset(busy[0])
        while (await world.egress.statistics()).in_use["upstreams"] > 2:  # one of them the other instance's
            await trio.sleep(0.01)
        assert (await world.get())[0] == 200
        await world.allow(K=credential(HOST, "other.test"))
        assert (await world.get(name="other.test"))[0] == 200, "the idle one was closed for it"


async def test_streams_are_bounded(make_world: Any) -> None:
    """One too many is refused unread, in HTTP/2 so that clients may try again, in HTTP/1 with a reason."""
    async with bounded(make_world, each=Bounds(streams=2)) as world:
        world.origin.answers["/stuck"] = stuck
        peer = await client(world)
        for _ in range(3):
            last = await peer.ask(path="/stuck")
        assert (await peer.answer(last))[0] == 0
        [refused] = peer.of(last, h2.events.StreamReset)
        assert refused.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
        assert (await world.get())[1]["x-hypeman-egress"] == "too_many_at_once"
        assert (await world.get(source=OTHER))[0] == 200
        reset(peer.wire)
        while (await world.egress.statistics()).in_use["streams"]:
            await trio.sleep(0.01)
        assert (await world.get())[0] == 200


async def test_connections_passed_through_are_bounded(make_world: Any) -> None:
    """They hold six descriptors each; one too many is refused in TLS."""
    async with bounded(make_world, each=Bounds(upstreams=1)) as world:
        await world.egress.set_policy("inst-a", GUEST, {}, {}, Unmatched.PASS)
        world.guest_trust.load_verify_locations(world.egress.settings.trust_file)
        await world.tls()
        status, fields, _ = await world.get()
        assert (status, fields["x-hypeman-egress"]) == (503, "too_many_at_once")


async def test_handshakes_are_bounded(make_world: Any) -> None:
    """Clients that begin TLS and say no more: others of the same instance wait for none of them to time out."""
    async with bounded(make_world, each=Bounds(handshakes=2)) as world:
        hello = await _hello(world)
        half = [await world.tcp() for _ in range(2)]
        for wire in half:
            await wire.send(hello)
        while (await world.egress.statistics()).in_use["handshakes"] < 2:
            await trio.sleep(0.01)
        with pytest.raises(RESET):
            await world.tls()
        assert (await world.get(source=OTHER))[0] == 200
        await trio.aclose_forcefully(half[0].stream)
        while (await world.egress.statistics()).in_use["handshakes"] > 1:
            await trio.sleep(0.01)
        assert (await world.get())[0] == 200


async def _hello(world: World) -> bytes:
    """The first bytes of a client."""
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = world.guest_trust.wrap_bio(into, out, server_hostname=HOST)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


async def test_idle_connections_to_a_host_are_bounded(make_world: Any) -> None:
    """Two hundred requests at once leave POOL_PER_KEY connections behind."""
    async with bounded(make_world, each=Bounds()) as world:
        go = trio.Event()

        async def together(request: Request, wire: Wire) -> None:
            await go.wait()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        world.origin.answers["/"] = together
        wires = [await world.tls() for _ in range(200)]
        for wire in wires:
            await wire.send(f"GET / HTTP/1.1\r\n{H}\r\n".encode())
        while len(world.origin.requests) < len(wires):
            await trio.sleep(0.01)
        go.set()
        for wire in wires:
            await wire.until(b"\r\n\r\n")
        with trio.fail_after(30):
            while (await world.egress.statistics()).in_use["upstreams"] > 128:
                await trio.sleep(0.01)
        assert (await world.egress.statistics()).in_use["upstreams"] == 128


async def test_an_instance_gets_half_at_most(make_world: Any) -> None:
    total = Bounds(connections=8)
    async with bounded(make_world, each=Bounds(connections=100), total=total) as world:
        for _ in range(4):
            await world.tls()
        with pytest.raises(RESET):
            await world.tls()
        assert (await world.get(source=OTHER))[0] == 200
        assert (await world.egress.statistics()).limited["connections"] == 1
