"""A guest that stops answering: every request ends by itself, and says that the guest was the reason.

The agent's side of the channel is a program of a few lines that answers only selected requests.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from hypeman.guest import limits
from hypeman.guest.boot import GuestVolume
from hypeman.guest.client import GuestClient
from hypeman.guest.failures import GuestTimeout
from hypeman.guest.limits import LIMITS
from hypeman.guest.programs import ExecResult
from hypeman.guest.protocol import ACK_MAGIC, KEY_BYTES, PROTOCOL_VERSION, SYNC_MAGIC, WINDOW, FrameType, Op
from hypeman.guest.types import CopyToRequest, ExecRequest, FileKind

NONCE = bytes(range(16))


class Agent:
    """Greets; then reads all that it is sent, and answers the operations in ``answers`` with an empty reply."""

    def __init__(self, stream: trio.abc.Stream, answers: set[Op]) -> None:
        self.answers = answers
        self.seen: list[Op] = []
        self._stream = stream
        self._token = b""
        self._unread = b""
        self._unanswered: list[int] = []

    async def run(self) -> None:
        data = b""
        while (begin := data.find(SYNC_MAGIC)) < 0 or len(data) < begin + 28:
            data += await self._stream.receive_some()
        self._token = data[begin + 8 : begin + 24]
        body = ACK_MAGIC + self._token + NONCE + struct.pack("<HH", PROTOCOL_VERSION, 0)
        await self._stream.send_all(body + zlib.crc32(body).to_bytes(4, "little"))
        self._unread = data[begin + 28 :]
        while True:
            while len(self._unread) >= 16:
                _, kind, _flags, length, session = struct.unpack_from("<4sBBHI", self._unread)
                if len(self._unread) < 16 + length:
                    break
                payload, self._unread = self._unread[12 : 12 + length], self._unread[16 + length :]
                if kind == FrameType.OPEN:
                    await self._opened(Op(payload[0]), session)
            self._unread += await self._stream.receive_some()

    async def _opened(self, op: Op, session: int) -> None:
        self.seen.append(op)
        if op in self.answers:
            await self.end(session)
        elif op is Op.PING:
            self._unanswered.append(session)

    async def end(self, session: int) -> None:
        await self._stream.send_all(
            struct.pack("<4sBBHI", self._token[:4], FrameType.EXIT, 0, 0, session) + self._token[4:8]
        )

    async def come_back(self) -> None:
        """Answer the pings that waited, and from now on all of them."""
        self.answers.add(Op.PING)
        for session in self._unanswered:
            await self.end(session)


@asynccontextmanager
async def channel(*answers: Op) -> AsyncIterator[tuple[GuestClient, Agent]]:
    ours, theirs = trio.testing.memory_stream_pair()
    client, agent = GuestClient(ours, nonce=NONCE), Agent(theirs, set(answers))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        await nursery.start(client.run)
        with trio.fail_after(10):
            await client.wait_greeted()
        yield client, agent
        nursery.cancel_scope.cancel()


def is_silent(client: GuestClient) -> bool:
    return client.silent_since is not None


async def _exec(client: GuestClient) -> None:
    async with await client.exec(ExecRequest(argv=("true",))) as session:
        while not isinstance(await session.receive(), ExecResult):
            pass


async def _copy_in(client: GuestClient) -> None:
    async with await client.copy_to(CopyToRequest(path="/a", kind=FileKind.FILE)) as copy:
        await copy.send(bytes(WINDOW + 1))
        await copy.finish()


async def _copy_out(client: GuestClient) -> None:
    async with client.copy_from("/a") as entries:
        async for _ in entries:
            pass


REQUESTS: dict[Op, Callable[[GuestClient], Awaitable[Any]]] = {
    Op.EXEC: _exec,
    Op.STAT: lambda client: client.stat("/"),
    Op.COPY_TO: _copy_in,
    Op.COPY_FROM: _copy_out,
    Op.SHUTDOWN: lambda client: client.shutdown(),
    Op.CLOCK: lambda client: client.read_clock(),
    Op.IDENTITY: lambda client: client.set_identity(hostname="a"),
    Op.MOUNT: lambda client: client.mount_volume(GuestVolume(disk_id="a", path="/a", readonly=False)),
    Op.UNMOUNT: lambda client: client.unmount_volume("/a"),
    Op.MEMORY: lambda client: client.online_memory(),
    Op.METRICS: lambda client: client.metrics(),
    Op.FREEZE: lambda client: client.freeze(),
    Op.THAW: lambda client: client.thaw(),
    Op.RESUME: lambda client: client.resume(bytes(KEY_BYTES), 0),
    Op.WARM: lambda client: client.warm(),
}


def test_every_operation_has_a_limit_and_is_tried_here() -> None:
    assert set(LIMITS) == set(Op)
    assert set(REQUESTS) == set(Op) - {Op.PING}, "the ping is the client's own"
    assert [op for op in Op if math.isinf(LIMITS[op])] == [Op.EXEC, Op.RESUME], "a program may run as long as it likes"


@pytest.mark.parametrize("op", REQUESTS)
async def test_a_guest_that_answers_nothing_ends_every_request(op: Op, autojump_clock: trio.testing.MockClock) -> None:
    async with channel() as (client, agent):
        with trio.fail_after(limits.QUIET + limits.ANSWER + 1), pytest.raises(GuestTimeout) as failed:
            await REQUESTS[op](client)
        assert failed.value.status == 504 and failed.value.code == "guest_timeout"
        assert op in agent.seen


@pytest.mark.parametrize("op", [op for op in REQUESTS if op is not Op.EXEC])
async def test_a_request_that_hangs_in_a_living_guest_ends_at_its_limit(
    op: Op, autojump_clock: trio.testing.MockClock
) -> None:
    async with channel(Op.PING) as (client, _):
        with trio.fail_after(LIMITS[op] + 1), pytest.raises(GuestTimeout):
            await REQUESTS[op](client)
        assert client.silent_since is None


async def test_a_quiet_program_in_a_living_guest_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with channel(Op.PING) as (client, _):
        with trio.move_on_after(3600) as hour:
            await _exec(client)
        assert hour.cancelled_caught and client.silent_since is None


async def test_a_silent_guest_is_refused_immediately_until_it_answers_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    changes: list[bool] = []
    async with channel(Op.STAT) as (client, agent):
        client.silence_changed = lambda: changes.append(is_silent(client))
        await trio.sleep(limits.HEARTBEAT + limits.ANSWER + 1)
        assert is_silent(client) and changes == [True], "it is known without a request"
        before = trio.current_time()
        with pytest.raises(GuestTimeout, match="has not responded since"):
            await client.stat("/")
        assert trio.current_time() == before
        await trio.sleep(86400)
        assert agent.seen == [Op.CLOCK, Op.PING], "one ping waits for it, not one for each heartbeat"
        await agent.come_back()
        await trio.testing.wait_all_tasks_blocked()
        assert not is_silent(client) and changes == [True, False]
        with contextlib.suppress(Exception):  # an empty reply is no answer to stat, but it is one
            await client.stat("/")
        assert agent.seen[-1] is Op.STAT


async def test_a_paused_vm_owes_no_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with channel() as (client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ended_by_silence, client)
            await trio.sleep(limits.QUIET + 1)  # the ping is on its way
            client.hold(True)
            await trio.sleep(3600)
            assert not is_silent(client)
            client.hold(False)
        assert is_silent(client)


async def _ended_by_silence(client: GuestClient) -> None:
    with pytest.raises(GuestTimeout):
        await _exec(client)


async def test_a_guest_that_never_greets(autojump_clock: trio.testing.MockClock) -> None:
    ours, _theirs = trio.testing.memory_stream_pair()
    client = GuestClient(ours, nonce=NONCE)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        with trio.fail_after(limits.OPEN + 1), pytest.raises(GuestTimeout):
            await client.stat("/")
        nursery.cancel_scope.cancel()
