"""New values are in force when set_policy returns, on living connections too; slow peers hold up only themselves."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import trio

from hypeman.egress.policy import Unmatched
from hypeman.egress.records import AuditRecord
from tests.egress.conftest import GUEST, HOST, SECRET, Request, Wire, World, credential, resident

H = f"Host: {HOST}\r\n"


async def test_rotation_under_load(world: World) -> None:
    """Clients note which value was the newest when they asked: no request leaves with an older one or a mixture."""
    current = 0
    done = False
    wrong: list[tuple[int, str]] = []
    count = 0
    both = {"A": credential(HOST), "B": credential(HOST, header="X-Key", template="${value}", env="OTHER_KEY")}

    async def answer(request: Request, wire: Wire) -> None:
        said = (request.all("authorization")[0] + "|" + request.all("x-key")[0]).encode()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

    world.origin.answers["/r"] = answer

    async def put(number: int) -> None:
        value = f"sk-{number:06}"
        await world.egress.set_policy("inst-a", GUEST, both, {"REAL_KEY": value, "OTHER_KEY": value})

    async def load() -> None:
        nonlocal count
        wire = await world.tls()
        while not done:
            newest = current
            _, _, body = await world.ask(wire, f"GET /r HTTP/1.1\r\n{H}\r\n".encode())
            one, other = body.decode().removeprefix("Bearer ").split("|")
            count += 1
            if one != other or int(one[3:]) < newest:
                wrong.append((newest, body.decode()))

    await put(0)
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(load)
        for number in range(1, 60):
            await put(number)
            current = number
            enough = count + 5
            while count < enough:
                await trio.sleep(0.001)
        done = True
    assert wrong == []


async def test_revocation_under_load(world: World) -> None:
    """What is asked after the rule is gone leaves without the value, on connections that had it a moment ago."""
    revoked = done = False
    answers: list[tuple[bool, bool]] = []

    async def answer(request: Request, wire: Wire) -> None:
        said = b"yes" if request.all("authorization") else b"no"
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

    world.origin.answers["/r"] = answer

    async def load() -> None:
        wire = await world.tls()
        while not done:
            before = revoked
            _, _, body = await world.ask(wire, f"GET /r HTTP/1.1\r\n{H}\r\n".encode())
            answers.append((before and revoked, body == b"yes"))

    async def wait_answers(count: int) -> None:
        enough = len(answers) + count
        while len(answers) < enough:
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(load)
        for _ in range(10):
            revoked = False
            await world.allow()
            await wait_answers(20)
            await world.egress.set_policy("inst-a", GUEST, {}, {}, Unmatched.INSPECT)
            revoked = True
            await wait_answers(20)
        done = True
    assert {has for while_revoked, has in answers if while_revoked} == {False}
    assert True in {has for while_revoked, has in answers if not while_revoked}


async def test_rotation_while_the_host_is_dialled(world: World) -> None:
    """Decided under the old value, written after the new one was set: the new one leaves."""
    release = trio.Event()

    async def late(name: str) -> list[str]:
        await release.wait()
        return ["127.0.0.1"]

    world.egress._resolver._resolve = late
    wire = await world.tls()
    await wire.send(f"GET / HTTP/1.1\r\n{H}\r\n".encode())
    while not (await world.egress.statistics()).counters["upstream_opened"]:
        await trio.sleep(0.01)
    await world.allow(secret="sk-new")
    release.set()
    await wire.until(b"\r\n\r\n")
    assert world.origin.requests[0].all("authorization") == ["Bearer sk-new"]


async def test_rule_taken_away_on_a_living_connection(world: World) -> None:
    wire = await world.tls()
    await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode())
    await world.egress.set_policy("inst-a", GUEST, {}, {}, Unmatched.DENY)
    assert (await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode()))[0] == 403
    await world.egress.set_policy("inst-a", GUEST, {}, {}, Unmatched.PASS)
    await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode())
    assert [len(request.all("authorization")) for request in world.origin.requests] == [1, 0]


async def test_slow_reader(world: World) -> None:
    """A client that reads nothing: the host is stopped after a few hundred KB, others are served, memory stays."""
    sent = 0

    async def answer(request: Request, wire: Wire) -> bool:
        nonlocal sent
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            await wire.send(bytes(65536))
            sent += 65536

    world.origin.answers["/flood"] = answer
    before = resident(world.egress)
    wire = await world.tls()
    await wire.send(f"GET /flood HTTP/1.1\r\n{H}\r\n".encode())
    last = -1
    while sent != last:
        last = sent
        await trio.sleep(0.3)
        assert (await world.get())[0] == 200
    assert sent < 30 << 20  # what the kernel's socket buffers take
    assert resident(world.egress) - before < 20 << 20


async def test_slow_host(world: World) -> None:
    """The same upwards: a host that reads nothing stops the client."""

    async def answer(request: Request, wire: Wire) -> bool:
        await trio.sleep_forever()

    world.origin.answers["/stuck"] = answer
    before = resident(world.egress)
    wire = await world.tls()
    sent = 0
    with trio.move_on_after(2):
        await wire.send(f"POST /stuck HTTP/1.1\r\n{H}Content-Length: 1000000000\r\n\r\n".encode())
        while True:
            await wire.send(bytes(65536))
            sent += 65536
    assert sent < 30 << 20
    assert (await world.get())[0] == 200
    assert resident(world.egress) - before < 20 << 20


async def test_streaming_with_flat_memory(world: World) -> None:
    """128 MB through one connection; what the process holds does not grow with it."""
    size = 128 << 20
    piece = bytes(1 << 20)

    async def answer(request: Request, wire: Wire) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // len(piece)):
            await wire.send(piece)

    world.origin.answers["/big"] = answer
    wire = await world.tls()
    await wire.send(f"GET /big HTTP/1.1\r\n{H}\r\n".encode())
    await wire.until(b"\r\n\r\n")
    got, before, most = len(wire.data), resident(world.egress), 0
    while got < size:
        data = await wire.stream.receive_some(1 << 20)
        assert data
        got += len(data)
        most = max(most, resident(world.egress) - before)
    assert most < 16 << 20


async def test_the_value_appears_nowhere(world: World, capfd: object) -> None:
    """Not in records, statistics, reprs or on the output."""
    records: list[AuditRecord] = []
    world.egress.on_audit(records.append)
    await world.get("/path?query=1", fields="X: y\r\n")
    while len(records) < 1:
        await trio.sleep(0.01)
    said = "".join(map(repr, (records, world.egress, world.egress.settings, (await world.egress.statistics()),
                              world.egress.authority, world.egress.sealer)))  # fmt: skip
    out, err = capfd.readouterr()  # type: ignore[attr-defined]
    assert SECRET not in said + out + err
    assert "query" not in said
    assert "path" not in repr(records)
    assert (records[0].credentials, records[0].injected, records[0].status) == (("API_KEY",), True, 200)


async def test_audit_of_one_instance(world: World) -> None:
    await world.allow("inst-b", "127.0.1.2")
    async with world.egress.audit("inst-b") as records:
        await world.get()
        await world.get(source="127.0.1.2")
        record = await records.receive()
    assert (record.instance, record.method, record.host, record.status, record.kind) == (
        "inst-b", "GET", HOST, 200, "request",
    )  # fmt: skip
    assert record.seconds > 0


async def test_not_dumpable(world: World) -> None:
    """Memory that holds credentials is not for core files, here, where they pass through, or in the engine."""
    get_dumpable = 3
    assert ctypes.CDLL(None).prctl(get_dumpable, 0, 0, 0, 0) == 0
    assert os.stat(f"/proc/{world.egress.engine_pid}/maps").st_uid == 0, "of a dumpable process they are its user's"


async def test_several_loops(make_world: Any) -> None:
    """Connections spread over the threads; each sees the same rules at the same time."""
    async with make_world(loops=3) as world:
        await world.allow()
        wires = [await world.tls() for _ in range(24)]
        for wire in wires:
            assert (await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode()))[0] == 200
        assert 1 < world.origin.connections <= 24
        await world.allow(secret="sk-new")
        before = len(world.origin.requests)
        for wire in wires:
            await world.ask(wire, f"GET / HTTP/1.1\r\n{H}\r\n".encode())
        assert {request.all("authorization")[0] for request in world.origin.requests[before:]} == {"Bearer sk-new"}
