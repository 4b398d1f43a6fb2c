"""The engine process: it is replaced when it ends, goes on without a server, and is adopted by the next one."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from hypeman._native.egress import BOUNDS as NATIVE_BOUNDS
from hypeman._native.egress import TIMERS as NATIVE_TIMERS
from hypeman.egress import protocol
from hypeman.egress.link import Command, EngineLink, Handlers, end_engines, engine_command
from hypeman.egress.records import read_records
from hypeman.egress.service import TIMERS, Ask, Decide, Egress, Settings, Timeouts
from hypeman.egress.types import AccessAction, AccessRule, EgressAccess
from hypeman.errors import InternalError
from tests.egress.conftest import GUEST, HOST, SECRET, Request, Wire, World, credential, read_response

REQUEST = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


@pytest.fixture
async def engines() -> AsyncGenerator[Path]:
    """Where engines are found; short, since paths of sockets are."""
    with tempfile.TemporaryDirectory(prefix="hme") as directory:
        yield Path(directory)
        with trio.CancelScope(shield=True), trio.move_on_after(20):
            await end_engines(Path(directory))


@asynccontextmanager
async def server(
    directory: Path,
    engines: Path,
    world: World,
    command: Command = engine_command,
    ask: Ask | None = None,
    **changes: Any,
) -> AsyncGenerator[Egress]:
    """One process of the server, as far as the egress path goes; nothing is accepted yet."""
    settings = Settings(address="127.0.0.1", port=0, loops=2, allow=("127.0.0.0/8",),
                        trust_file=world.egress.settings.trust_file, assumed_tls_port=world.origin.port)  # fmt: skip

    async def resolve(name: str) -> list[str]:
        return ["127.0.0.1"]

    settings = msgspec.structs.replace(settings, **changes)
    egress = Egress(settings, directory / "e", resolve=resolve, engines=engines, command=command)
    if ask is not None:  # before an engine is adopted that asks at once
        egress.on_approval_needed(ask)
    async with trio.open_nursery() as nursery:
        await nursery.start(egress.run)
        yield egress
        nursery.cancel_scope.cancel()


async def allow(egress: Egress, secret: str = SECRET, source: str = GUEST, instance: str = "inst-a") -> None:
    await egress.set_policy(instance, source, {"API_KEY": credential(HOST)}, {"REAL_KEY": secret})


async def connect(egress: Egress, world: World, source: str = GUEST) -> Wire:
    tcp = await trio.open_tcp_stream("127.0.0.1", egress.port, local_address=source)
    world.streams.append(tcp)
    trust = ssl.create_default_context(cadata=egress.ca_pem.decode())
    stream = trio.SSLStream(tcp, trust, server_hostname=HOST, https_compatible=True)
    await stream.do_handshake()
    return Wire(stream)


def last_values(world: World, count: int) -> list[str]:
    return [request.all("authorization")[0].removeprefix("Bearer ") for request in world.origin.requests[-count:]]


def test_timers_are_in_the_engines_order() -> None:
    assert (TIMERS, protocol.BOUNDS) == (NATIVE_TIMERS, NATIVE_BOUNDS)
    assert set(TIMERS) == set(Timeouts.__struct_fields__)


async def test_another_engine_after_a_crash(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """All policies are set again before it accepts; new values, too, that are set meanwhile. One line in the log."""
    await world.allow("inst-b", "127.0.1.2", "sk-of-b")
    assert (await world.get())[0] == 200
    first = world.egress.engine_pid
    caplog.clear()
    os.kill(first, signal.SIGKILL)
    await world.allow(secret="sk-new")
    for source in (GUEST, "127.0.1.2"):
        assert (await world.get(source=source))[0] == 200
    assert last_values(world, 2) == ["sk-new", "sk-of-b"]
    assert world.egress.engine_pid not in (0, first)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
        "the engine ended unexpectedly, with its connections; another one runs"
    ]


async def test_a_slow_start_is_waited_for(
    world: World, tmp_path: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first message is more than a socket holds and is not read before Python has started, which takes longer on a
    slow host than any answer may."""
    monkeypatch.setattr("hypeman.egress.link.PATIENCE", 0.2)
    trusted = Path(world.egress.settings.trust_file).read_bytes()
    many = tmp_path / "many.pem"
    many.write_bytes(trusted * (1 + (1 << 20) // len(trusted)))

    def slow(fd: int) -> list[str]:
        return ["/bin/sh", "-c", 'sleep 1; exec "$@"', "sh", *engine_command(fd)]

    async with server(tmp_path, engines, world, slow, trust_file=str(many)) as egress:
        assert egress.engine_pid


async def test_connections_wait_for_the_next_engine(world: World) -> None:
    """The listening sockets stay open: nobody is refused."""
    os.kill(world.egress.engine_pid, signal.SIGKILL)
    waiting = [await world.tcp() for _ in range(4)]
    for wire in waiting:
        assert (await world.ask(await world.tls(over=wire), REQUEST))[0] == 200


async def test_a_removed_policy_does_not_come_back(world: World) -> None:
    os.kill(world.egress.engine_pid, signal.SIGKILL)
    await world.egress.remove("inst-a")
    await world.allow("inst-b", "127.0.1.2")
    with pytest.raises((OSError, EOFError, trio.BrokenResourceError)):
        await world.tls()


async def test_values_are_kept_sealed(world: World) -> None:
    [policy] = world.egress._policies.values()
    assert policy.plain is None and SECRET.encode() not in policy.sealed


async def test_connections_go_on_while_the_server_is_replaced(world: World, tmp_path: Path, engines: Path) -> None:
    """A kept connection and a half-sent upload; the next server adopts the engine, and rotates the value in it."""

    async def late(request: Request, wire: Wire) -> None:
        request.body = await wire.exactly(4)
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + request.body)

    world.origin.answers["/up"] = late
    async with server(tmp_path, engines, world) as first:
        await allow(first)
        await allow(first, source="127.0.1.2", instance="inst-gone")
        await first.accept()
        pid, port = first.engine_pid, first.port
        idle, upload = await connect(first, world), await connect(first, world)
        await upload.send(f"POST /up HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 4\r\n\r\nab".encode())
        while not world.origin.requests:
            await trio.sleep(0.01)
        assert (await world.ask(idle, REQUEST))[0] == 200
    assert (await world.ask(idle, REQUEST))[0] == 200, "with no server at all"
    async with server(tmp_path, engines, world) as second:
        assert (second.engine_pid, second.port) == (pid, port)
        assert (await world.ask(idle, REQUEST))[0] == 200, "before it receives anything"
        await allow(second, "sk-new")
        await second.accept()
        await upload.send(b"cd")
        status, _, body = await read_response(upload)
        assert (status, body) == (200, b"abcd")
        assert (await world.ask(idle, REQUEST))[0] == 200
        assert last_values(world, 1) == ["sk-new"]
        with pytest.raises((OSError, EOFError, trio.BrokenResourceError)):
            await connect(second, world, "127.0.1.2")  # not set again: nobody's any more


async def test_other_settings_take_another_engine(world: World, tmp_path: Path, engines: Path) -> None:
    """The new one takes over the listeners; what the old one has begun is finished there, by new values as well."""
    began, go = trio.Event(), trio.Event()

    async def late(request: Request, wire: Wire) -> None:
        began.set()
        await go.wait()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")

    world.origin.answers["/late"] = late
    async with server(tmp_path, engines, world) as first:
        await allow(first)
        await first.accept()
        old, busy = first.engine_pid, await connect(first, world)
        await busy.send(f"GET /late HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        await began.wait()
    async with server(tmp_path, engines, world, timeouts=Timeouts(idle_up=5)) as second:
        assert second.engine_pid != old
        await allow(second, "sk-new")
        await second.accept()
        assert (await world.ask(await connect(second, world), REQUEST))[0] == 200
        assert sorted(engine.draining for engine in second._engines) == [False, True]
        go.set()
        status, fields, body = await read_response(busy)
        assert (status, fields["connection"], body) == (200, "close", b"late")
        with trio.fail_after(30):
            while len(second._engines) > 1:
                await trio.sleep(0.01)
        assert (await second.statistics()).counters["requests"] == 2, "those of the ended engine count"
    assert len(list(engines.glob("*.sock"))) == 1


async def test_an_upgrade_under_load_loses_nothing(world: World, tmp_path: Path, engines: Path) -> None:
    """Requests, uploads and WebSockets in flight while a new engine takes over: all of them end as they should, and new
    ones are served all the time."""
    go, began = trio.Event(), 0

    async def late(request: Request, wire: Wire) -> None:
        nonlocal began
        began += 1
        await go.wait()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")

    async def upload(request: Request, wire: Wire) -> None:
        nonlocal began
        began += 1
        request.body = await wire.exactly(200_000)
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nup")

    async def echo(request: Request, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        while True:
            await wire.send(await wire.exactly(4))

    world.origin.answers.update({"/late": late, "/up": upload, "/ws": echo})
    upgrade = f"GET /ws HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".encode()
    async with server(tmp_path, engines, world) as first:
        await allow(first)
        await first.accept()
        waiting = [await connect(first, world) for _ in range(40)]
        for wire in waiting:
            await wire.send(f"GET /late HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        uploads = [await connect(first, world) for _ in range(10)]
        for wire in uploads:
            await wire.send(
                f"POST /up HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 200000\r\n\r\n".encode() + bytes(100_000)
            )
        sockets = [await connect(first, world) for _ in range(20)]
        for wire in sockets:
            await wire.send(upgrade)
            assert b" 101 " in await wire.until(b"\r\n\r\n")
        while began < len(waiting) + len(uploads):
            await trio.sleep(0.01)
    async with server(tmp_path, engines, world, timeouts=Timeouts(idle_up=5)) as second:
        await allow(second, "sk-new")
        for turn in range(3):
            if turn == 1:
                await second.accept()
            assert (await world.ask(await connect(second, world), REQUEST))[0] == 200
            for wire in sockets:
                await wire.send(b"%04d" % turn)
                assert await wire.exactly(4) == b"%04d" % turn
        for wire in uploads:
            await wire.send(bytes(100_000))
            status, _, body = await read_response(wire)
            assert (status, body) == (200, b"up")
        go.set()
        for wire in waiting:
            status, _, body = await read_response(wire)
            assert (status, body) == (200, b"late")
        assert len(second._engines) == 2, "the WebSockets are still there"
        for wire in sockets:
            await trio.aclose_forcefully(wire.stream)
        with trio.fail_after(30):
            while len(second._engines) > 1:
                await trio.sleep(0.01)


async def test_an_engine_without_guests_ends_with_the_server(world: World, tmp_path: Path, engines: Path) -> None:
    async with server(tmp_path, engines, world) as only:
        pid = os.pidfd_open(only.engine_pid)
    with trio.fail_after(20):
        await trio.lowlevel.wait_readable(pid)
    os.close(pid)


async def test_records_wait_for_the_next_server(world: World, tmp_path: Path, engines: Path) -> None:
    async with server(tmp_path, engines, world) as first:
        await allow(first)
        await first.accept()
        wire = await connect(first, world)
        assert (await world.ask(wire, REQUEST))[0] == 200  # the name is known, the host connected
    assert (await world.ask(wire, REQUEST.replace(b"GET", b"DELETE")))[0] == 200
    async with server(tmp_path, engines, world) as second, second.audit() as records:
        with trio.fail_after(20):
            while (await records.receive()).method != "DELETE":
                pass


async def test_questions_wait_for_the_next_server(world: World, tmp_path: Path, engines: Path) -> None:
    """A name asked for while there was no server, or no answer before it ended."""
    async with server(tmp_path, engines, world) as first:
        await allow(first)
        await first.accept()
        wire = await connect(first, world)
    await wire.send(REQUEST)
    async with server(tmp_path, engines, world) as second:
        await allow(second)
        await second.accept()
        assert (await read_response(wire))[0] == 200


async def test_held_requests_wait_for_the_next_server(world: World, tmp_path: Path, engines: Path) -> None:
    """A request that was asked about, but not decided, when the server ended."""
    rules = EgressAccess(rules=(AccessRule(action=AccessAction.ASK, name="asks"),))
    credentials, secrets = {"API_KEY": credential(HOST)}, {"REAL_KEY": SECRET}
    asked, heard = trio.open_memory_channel[tuple[protocol.ApprovalNeeded, Decide]](10)

    async def ask(held: protocol.ApprovalNeeded, decide: Decide) -> None:
        asked.send_nowait((held, decide))

    async with server(tmp_path, engines, world, ask=ask) as first:
        await first.set_policy("inst-a", GUEST, credentials, secrets, access=rules)
        await first.accept()
        wire = await connect(first, world)
        await wire.send(REQUEST)
        before, _ = await heard.receive()
    async with server(tmp_path, engines, world, ask=ask) as second:
        await second.set_policy("inst-a", GUEST, credentials, secrets, access=rules)
        await second.accept()
        again, decide = await heard.receive()
        assert again == before
        await decide(True)
        assert (await read_response(wire))[0] == 200


async def test_why_an_engine_does_not_start(tmp_path: Path) -> None:
    """The last line that it said; not only a number."""
    broken = [sys.executable, "-c", "raise SystemExit('the reason')"]
    egress = Egress(Settings(address="127.0.0.1", port=0), tmp_path, command=lambda fd: broken)
    with pytest.raises(InternalError, match="ended with code 1: the reason"):
        await egress.run()


# ── The protocol ─────────────────────────────────────────────────────────────────────────────────


def frames() -> list[bytes]:
    """One of each message of a server, as sent."""
    settings = protocol.EngineSettings(
        uid=1, leaf_cache=1, each=(1,) * 6, total=(1,) * 6,
        clients_each=(1,) * 6, clients_total=(1,) * 6, requests_per_second=0, mints_per_second=1, listen_port=1,
        assumed_tls_port=443, timers_ms=(1,) * len(TIMERS), allow=("10.0.0.0/8",), deny=(),
    )  # fmt: skip
    start = protocol.Start(settings=settings, identity="x", sizes=(1, 1, 1, 1), adoptable=False)
    return [
        protocol.encode(start, payload=4) + b"\0" * 4,
        protocol.encode(protocol.SetPolicy(id=1, source="10.0.0.1", instance="a"), payload=3) + b"abc",
        protocol.encode(protocol.RemovePolicy(id=2, source="10.0.0.1")),
        protocol.encode(protocol.Accept(id=3)),
        protocol.encode(protocol.Drain(id=4, grace_ms=5)),
        protocol.encode(protocol.Count(id=5)),
        protocol.encode(protocol.Answer(token=6, loop=0, addresses=("10.0.0.1",))),
        protocol.encode(protocol.Verdict(token=7, loop=0, allow=True)),
        protocol.encode(protocol.PutSite(id=7, ingress="i"), payload=3) + b"abc",
        protocol.encode(protocol.DropSite(id=8, ingress="i")),
        protocol.encode(protocol.Listen(id=9, port=80)),
        protocol.encode(protocol.Unlisten(id=10, port=80)),
        protocol.encode(protocol.Sockets(id=11, port=80)),
        protocol.encode(protocol.Certify(id=12, name="a.b", sizes=(1, 1)), payload=2) + b"\0\0",
        protocol.encode(protocol.Challenge(id=13, name="a.b", token="t", proof="p", sizes=(1, 1)), payload=2) + b"\0\0",
        protocol.encode(protocol.Place(token=12, loop=0, address="10.0.0.1", exists=True)),
        protocol.encode(protocol.Forget(instances=("a",))),
        protocol.encode(protocol.Forget(instances=("a", "b"), ended=("b",))),
    ]


def decode_all(data: bytes) -> Iterator[protocol.Request]:
    """As a receiver does. Raises ProtocolError."""
    frame = protocol.Frame()
    while data:
        room = frame.room()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        frame.add(count)
        data = data[count:]
        if frame.complete:
            yield protocol.decode_request(frame.message)
            frame = protocol.Frame()


def test_any_bytes_are_messages_or_an_error() -> None:
    """Cut, extended and changed at random, at every place: nothing but messages and ProtocolError comes out."""
    dice = random.Random(16)
    for data in frames():
        assert len(list(decode_all(data))) == 1
        for at in range(len(data)):
            for changed in (
                data[:at],
                data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :],
                data[:at] + dice.randbytes(3) + data[at:],
                data[:at] + data[at + 1 :],
            ):
                with suppress(protocol.ProtocolError):
                    list(decode_all(changed))


@pytest.mark.parametrize("place, value", [(0, 2**31), (0, 0), (4, protocol.MAX_PAYLOAD + 1)])
def test_sizes_are_bounded_before_memory_is_taken(place: int, value: int) -> None:
    data = bytearray(frames()[3])
    data[place : place + 4] = value.to_bytes(4, "little")
    with pytest.raises(protocol.ProtocolError):
        protocol.decode_header(data[: protocol.HEADER_SIZE])


async def test_an_engine_survives_what_is_no_message(world: World, tmp_path: Path, engines: Path) -> None:
    """Only root can reach its socket; a confused program costs the connection to the server, not the traffic."""
    dice = random.Random(17)
    async with server(tmp_path, engines, world) as first:
        await allow(first)
        await first.accept()
        wire, pid = await connect(first, world), first.engine_pid
        assert (await world.ask(wire, REQUEST))[0] == 200
    [path] = engines.glob("*.sock")
    messages = [dice.randbytes(40), *(data[:-1] + b"\xff" for data in frames()), frames()[0], b""]
    for data in messages:
        with socket.socket(socket.AF_UNIX) as confused:
            await trio.to_thread.run_sync(confused.connect, str(path))
            confused.sendall(data)
            confused.shutdown(socket.SHUT_WR)
            confused.settimeout(20)
            with suppress(ConnectionResetError):
                while await trio.to_thread.run_sync(confused.recv, 65536):
                    pass
        assert (await world.ask(wire, REQUEST))[0] == 200
    async with server(tmp_path, engines, world) as second:
        assert second.engine_pid == pid


async def test_what_an_engine_sends_is_not_trusted() -> None:
    """Anything but its messages at the right time ends it: the link says why instead of failing."""

    def read(link: EngineLink, data: bytearray) -> None:
        assert list(read_records(data, ("ok",)))

    hello = protocol.Hello(version=1, identity="x", pid=1, draining=False, locked=True, reasons=("ok",))
    for data in (
        protocol.encode(protocol.Done(id=999)),
        protocol.encode(protocol.Held(id=999)),
        protocol.encode(protocol.Audit(), payload=3) + b"\x30\0\1",
        protocol.encode(protocol.Audit(), payload=60) + b"\x30\0" + bytes(58),
        protocol.encode(hello),
        protocol.encode(protocol.Done(id=1), descriptors=1),
        frames()[3],
        b"\xff" * 40,
    ):
        ours, theirs = socket.socketpair()
        link = EngineLink(ours, None, -1)
        with theirs, trio.fail_after(20):
            theirs.sendall(data)
            assert "protocol" in await link.run(
                Handlers(lambda engine, question: None, lambda engine, asked: None, read, lambda engine, held: None)
            )
        assert link.lost.is_set()


async def test_an_engine_that_does_not_answer_is_replaced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypeman.egress.link.PATIENCE", 0.2)
    stopped = world.egress.engine_pid
    os.kill(stopped, signal.SIGSTOP)
    await world.allow(secret="sk-new")
    assert (await world.get())[0] == 200
    assert (last_values(world, 1), world.egress.engine_pid != stopped) == (["sk-new"], True)
