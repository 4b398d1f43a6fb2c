"""The QMP client against a scripted QEMU: who reads, who waits, and what is left when one of them gives up."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hypeman.hypervisor.interface import VmmBroken, VmmGone
from hypeman.hypervisor.qemu.client import QmpClient, QmpRefused
from tests.hypervisor.test_qmp import GREETING


class Qemu:
    """The other end of one connection."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ready = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        self._listener = trio.socket.socket(trio.socket.AF_UNIX)
        await self._listener.bind(self._path)
        self._listener.listen()
        task_status.started()
        connection, _ = await self._listener.accept()
        self._stream = trio.SocketStream(connection)
        self._lines = self._read_lines()
        await self.send(GREETING)
        command = await self.command()
        assert command["execute"] == "qmp_capabilities"
        await self.answer(command)
        self._ready.set()

    async def _read_lines(self) -> AsyncIterator[dict[str, Any]]:
        pending = b""
        async for data in self._stream:
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                yield json.loads(line)

    async def command(self) -> dict[str, Any]:
        return await anext(self._lines)

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def answer(self, command: dict[str, Any], value: object = None) -> None:
        await self.send(json.dumps({"return": value or {}, "id": command["id"]}).encode() + b"\n")

    async def event(self, name: str, **data: object) -> None:
        await self.send(json.dumps({"event": name, "data": data}).encode() + b"\n")

    async def hang_up(self) -> None:
        await self._stream.aclose()

    def close(self) -> None:
        self._listener.close()
        self._stream.socket.close()


@pytest.fixture
async def pair(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[tuple[QmpClient, Qemu]]:
    qemu = Qemu(str(tmp_path / "qmp"))
    await nursery.start(qemu.run)
    client = await QmpClient.connect(str(tmp_path / "qmp"))
    assert client.version == "7.2.22"
    yield client, qemu
    client.close()
    qemu.close()


async def test_answers_find_those_who_asked_in_any_order(pair: tuple[QmpClient, Qemu]) -> None:
    client, qemu = pair
    answers = {}

    async def ask(name: str) -> None:
        answers[name] = await client.execute(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "a")
        first = await qemu.command()
        nursery.start_soon(ask, "b")
        second = await qemu.command()
        await qemu.event("RESUME")
        await qemu.answer(second, "to b" if second["execute"] == "b" else "to a")
        await qemu.answer(first, "to a" if first["execute"] == "a" else "to b")
    assert answers == {"a": "to a", "b": "to b"}


async def test_a_refusal_carries_qemus_words(pair: tuple[QmpClient, Qemu]) -> None:
    client, qemu = pair
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(QmpRefused, match="device_del: Device 'x' not found"):
                await client.execute("device_del", {"id": "x"})

        nursery.start_soon(ask)
        command = await qemu.command()
        assert command["arguments"] == {"id": "x"}
        error = {"class": "DeviceNotFound", "desc": "Device 'x' not found"}
        await qemu.send(json.dumps({"error": error, "id": command["id"]}).encode() + b"\n")


async def test_who_reads_may_be_cancelled_and_the_others_read_on(pair: tuple[QmpClient, Qemu]) -> None:
    client, qemu = pair
    seen = []

    async def wait(name: str) -> None:
        seen.append((await client.wait_event(lambda event: event.name == name)).name)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as doomed:
                doomed.start_soon(wait, "NEVER")  # it reads for all
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(wait, "SHUTDOWN")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await qemu.event("SHUTDOWN", guest=True)
    assert seen == ["SHUTDOWN"]


async def test_the_answer_to_a_cancelled_command_is_ignored(pair: tuple[QmpClient, Qemu]) -> None:
    client, qemu = pair
    with trio.move_on_after(0.05):
        await client.execute("slow")
    late = await qemu.command()
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            assert await client.execute("next") == "mine"

        nursery.start_soon(ask)
        command = await qemu.command()
        await qemu.answer(late, "late")
        await qemu.answer(command, "mine")


async def test_events_are_counted_so_that_an_old_one_is_not_taken_for_a_new_one(pair: tuple[QmpClient, Qemu]) -> None:
    client, qemu = pair
    await qemu.event("DEVICE_DELETED", device="d")
    await client.wait_event(lambda event: event.name == "DEVICE_DELETED")
    since = client.event_count
    with trio.move_on_after(0.05) as scope:
        await client.wait_event(lambda event: event.name == "DEVICE_DELETED", since=since)
    assert scope.cancelled_caught
    await qemu.event("DEVICE_DELETED", device="d")
    with trio.fail_after(10):
        await client.wait_event(lambda event: event.name == "DEVICE_DELETED", since=since)


async def test_the_end_of_qemu_wakes_all(pair: tuple[QmpClient, Qemu]) -> None:
    client, qemu = pair
    ended = []

    async def ask() -> None:
        with pytest.raises(VmmGone):
            await client.execute("query-status")
        ended.append("command")

    async def listen() -> None:
        await client.wait_closed()
        ended.append("listener")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(listen)
        await qemu.command()
        await qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
        await qemu.hang_up()
    assert sorted(ended) == ["command", "listener"]
    assert client.find_event(lambda event: event.name == "SHUTDOWN") is not None, "its last words were heard"
    with pytest.raises(VmmGone):
        await client.execute("query-status")


async def test_malformed_data_breaks_the_connection_for_good(pair: tuple[QmpClient, Qemu]) -> None:
    client, qemu = pair
    await qemu.send(b"hello\n")
    with pytest.raises(VmmBroken, match="malformed data"):
        await client.execute("query-status")
    with pytest.raises(VmmGone, match="malformed data"):
        await client.execute("query-status")


async def test_silence_has_a_limit(pair: tuple[QmpClient, Qemu]) -> None:
    client, _ = pair
    with pytest.raises(VmmBroken, match=r"did not answer query-status within 0\.05 s"):
        await client.execute("query-status", timeout=0.05)


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(VmmGone):
        await QmpClient.connect(str(tmp_path / "none"))


@pytest.mark.parametrize("said", [b"", GREETING])
async def test_the_first_answer_has_a_limit_of_its_own(tmp_path: Path, said: bytes) -> None:
    """A QEMU that still pins its guest's memory has greeted, or not even that."""
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        async with trio.open_nursery() as nursery:

            async def greet() -> None:
                connection, _ = await listener.accept()
                with connection:
                    await connection.send(said)
                    await trio.sleep_forever()

            nursery.start_soon(greet)
            with pytest.raises(VmmBroken):
                await QmpClient.connect(str(tmp_path / "qmp"), timeout=0.05)
            nursery.cancel_scope.cancel()
