"""The connection to one guest's agent over any Trio byte stream, and the sessions on it.

Rules:
- One task reads, one task writes. The reader never waits for a consumer: data in flight is bounded by the
  windows of ``protocol.py``.
- Every wait has a timeout (``limits.py``): each request has one, and while a session is open the agent must
  send something in time, or all sessions end with GuestTimeout.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

import trio

from hypeman.errors import HypemanError, InvalidRequest
from hypeman.guest import limits
from hypeman.guest.failures import GuestBroken, GuestLost, GuestTimeout, check
from hypeman.guest.fields import FieldWriter, MalformedFields
from hypeman.guest.limits import LIMITS
from hypeman.guest.protocol import (
    MAX_PAYLOAD,
    MAX_SESSIONS,
    WINDOW,
    Connection,
    Credit,
    Data,
    Ended,
    Greeted,
    Op,
    ProtocolError,
    Resumed,
    Told,
)
from hypeman.guest.types import GuestEvent, Ready

_READ_BYTES = 262144
_GRANT_BYTES = WINDOW // 4
_BATCH_BYTES = 4 * MAX_PAYLOAD
"""Queued for the stream before a sender lets it be written: fewer writes of more bytes."""
_OUTBOX_BYTES = 4 * WINDOW
"""Senders wait while more bytes than this are queued for the stream."""
_MAX_REPLY = 1024 * 1024
_SMALL = 4096
"""Bytes of a chunk that is joined with others while it waits."""
_MOST_APART = 64
"""With so many chunks waiting, small ones are joined also across one of the other stream."""


class _Joined:
    """Small chunks of one stream that arrived while there was no reader."""

    __slots__ = ("data", "stderr")

    def __init__(self, data: bytes, stderr: bool) -> None:
        self.data = bytearray(data)
        self.stderr = stderr


class Session:
    """Data received for a session and not yet consumed; at most one window.

    A window counts bytes, so a guest may fill it with as many frames of one byte. Their memory is bounded all the same,
    whatever version of the agent the guest claims to have: small chunks that wait are joined.
    """

    def __init__(self, channel: Channel, session_id: int, stall_limit: float = math.inf, *, kept: bool = False) -> None:
        self._channel = channel
        self.kept = kept
        """The guest keeps its output until the client of the API has it; ``ExecSession.acknowledge`` grants."""
        self.resumed: Resumed | None = None
        self._stall_limit = stall_limit
        """Timeout in seconds of each wait in ``receive`` and ``send``."""
        self.id = session_id
        self.failure: GuestTimeout | None = None
        """Why it ended, if not ended by the guest."""
        self.chunks: deque[Data | _Joined] = deque()
        self.ended: Ended | None = None
        self._waiters = trio.lowlevel.ParkingLot()
        self._used = 0

    def notify(self) -> None:
        self._waiters.unpark_all()

    def put(self, chunk: Data) -> None:
        """Add what has arrived."""
        if len(chunk.data) >= _SMALL:
            self.chunks.append(chunk)
            return
        for back in (1, 2) if len(self.chunks) > _MOST_APART else (1,):
            waiting = self.chunks[-back] if len(self.chunks) >= back else None
            if waiting is None or waiting.stderr != chunk.stderr:
                continue
            if not isinstance(waiting, _Joined) or len(waiting.data) >= MAX_PAYLOAD:
                break  # not before what came before it
            waiting.data += chunk.data
            return
        self.chunks.append(_Joined(chunk.data, chunk.stderr))

    async def receive(self) -> Data | None:
        """The next chunk, or None after the last; ``ended`` is then set. Raises GuestLost, GuestTimeout.

        Other tasks run only while this waits: at most one window is consumed before it does.
        """
        while not self.chunks:
            if self.ended is not None:
                await trio.lowlevel.checkpoint()
                return None
            await self.wait()
        chunk = self.chunks.popleft()
        self._used += len(chunk.data)
        if self._used >= _GRANT_BYTES and not self.kept:
            self._channel.grant(self.id, self._used)
            self._used = 0
        return Data(self.id, bytes(chunk.data), chunk.stderr) if isinstance(chunk, _Joined) else chunk

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data`` as the window allows. Data for an ended session is discarded."""
        view = memoryview(data)
        while view:
            if self.ended is not None:
                return
            self.check()
            room = min(self._channel.window(self.id), MAX_PAYLOAD)
            if not room:
                await self.wait()
                continue
            if isinstance(data, bytes) and len(view) == len(data) <= room:
                await self._channel.send(self, data)  # all of it, not copied
                return
            await self._channel.send(self, bytes(view[:room]))
            view = view[room:]

    def check(self) -> None:
        """Raise the error that ended this session, if any."""
        self._channel.check_alive()
        if self.failure is not None:
            raise self.failure

    async def wait(self) -> None:
        """Wait for any news. Raises as ``receive`` does."""
        self.check()
        with trio.move_on_after(self._stall_limit) as scope:
            await self._waiters.park()
        if scope.cancelled_caught:
            raise GuestTimeout(f"the guest made no progress for {self._stall_limit:g} s")

    async def finish(self) -> tuple[bytes, bytes, Ended]:
        """The remaining data, as reply and error text. Raises GuestBroken for an endless reply."""
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        size = 0
        while (chunk := await self.receive()) is not None:
            size += len(chunk.data)
            if size > _MAX_REPLY:
                raise GuestBroken("the guest's reply does not end")
            parts[chunk.stderr].append(chunk.data)
        assert self.ended is not None
        return b"".join(parts[0]), b"".join(parts[1]), self.ended


class Channel:
    """One connection to one agent."""

    def __init__(self, stream: trio.abc.Stream, *, nonce: bytes) -> None:
        self._stream = stream
        self._connection = Connection(nonce)
        self._sessions: dict[int, Session] = {}
        self._slots = trio.CapacityLimiter(MAX_SESSIONS - 1)  # one is reserved for the ping
        self._events_in, self.events = trio.open_memory_channel[GuestEvent](16)
        self._greeted = trio.Event()
        self._ready = trio.Event()
        self._lost: HypemanError | None = None
        self._outbox_filled = trio.Event()
        self._outbox_drained = trio.Event()
        self._outbox_bytes = 0
        self.ready: Ready | None = None
        """The guest's boot report, once received."""
        self.no_agent = False
        """The guest serves no exec, copy or stat."""
        self.keeps = False
        """The guest's agent keeps programs whose connection is lost."""
        self.silent_since: datetime | None = None
        """When an unresponsive guest last sent anything (UTC); None while it answers."""
        self.silence_changed: Callable[[], object] = lambda: None
        """Called when ``silent_since`` changes."""
        self._heard = self._asked = trio.current_time()
        """When the last bytes arrived, and when the first of the open sessions was opened."""
        self._heard_at = datetime.now(UTC)
        self._reads = 0
        self._held = False
        self._stirred = trio.Event()
        """Set when bytes arrive or what is expected of the guest changes."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the connection until it ends; reports started once the greeting is being sent.

        Always raises: GuestLost, GuestBroken, or Cancelled. The stream is closed then.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._watch)
                nursery.start_soon(self.run_beside)
                task_status.started()
                await self._read()
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as group:
            self._fail(GuestLost(f"the connection to the guest broke: {group.exceptions[0]}"))
        except* (ProtocolError, MalformedFields) as group:
            self._fail(GuestBroken(str(group.exceptions[0])))
        finally:
            self._fail(GuestLost("the connection to the guest has ended"))
            self._events_in.close()
            await trio.aclose_forcefully(self._stream)
        assert self._lost is not None
        raise self._lost

    async def run_beside(self) -> None:
        """What a subclass does while there is a connection."""

    async def wait_greeted(self) -> None:
        """Wait until the agent is authenticated. Raises GuestLost or GuestBroken."""
        await self._greeted.wait()
        self.check_alive()

    async def wait_ready(self) -> Ready:
        """Wait until the guest is set up. Raises GuestLost or GuestBroken."""
        await self._ready.wait()
        if self.ready is None:
            self.check_alive()
        assert self.ready is not None
        return self.ready

    def hold(self, held: bool) -> None:
        """Record that the VM is paused, so no answer is expected, or running again."""
        self._held = held
        self._heard = trio.current_time()
        self._stir()

    @property
    def held(self) -> bool:
        """Whether the VM is paused by the server."""
        return self._held

    # Requests

    async def open(self, op: Op, fields: FieldWriter | None, *, kept: bool = False) -> Session:
        """Begin a request; the caller closes the session. Raises GuestLost, GuestTimeout, InvalidRequest."""
        session = Session(self, 0, LIMITS[op], kept=kept)
        with trio.move_on_after(limits.OPEN) as scope:
            await self.wait_greeted()
            self._check_responds()
            await self._slots.acquire_on_behalf_of(session)
        if scope.cancelled_caught:
            raise GuestTimeout(f"the guest took no request for {limits.OPEN:g} s")
        try:
            self.check_alive()
            self._check_responds()
            session.id = self._connection.open(op, fields, kept=kept)
        except BaseException as error:
            self._slots.release_on_behalf_of(session)
            if isinstance(error, ValueError):
                raise InvalidRequest(str(error)) from error
            raise
        if not self._sessions:
            self._asked = trio.current_time()
            self._stir()
        self._sessions[session.id] = session
        self._wake_writer()
        return session

    async def call(self, op: Op, fields: FieldWriter | None) -> tuple[bytes, bytes, Ended]:
        """A whole request: its reply, the agent's error text, and how it ended. Raises as ``open``, and GuestBroken."""
        session = await self.open(op, fields)
        try:
            with trio.move_on_after(LIMITS[op]) as scope:
                return await session.finish()
        finally:
            self.close(session)
        assert scope.cancelled_caught
        raise GuestTimeout(f"the guest did not finish {op.name.lower()} within {LIMITS[op]:g} s")

    async def request(self, op: Op, fields: FieldWriter | None) -> bytes:
        """A whole request that must succeed: its reply. Raises as ``call``, and what ``check`` raises."""
        reply, error, ended = await self.call(op, fields)
        check(error, ended)
        return reply

    async def ping(self) -> None:
        """Return if the agent answers. Raises GuestTimeout if not, GuestLost."""
        await self.request(Op.PING, None)

    # For sessions

    def check_alive(self) -> None:
        if self._lost is not None:
            raise self._lost

    def window(self, session: int) -> int:
        return self._connection.window(session)

    def taken(self, session: int) -> int:
        return self._connection.taken(session)

    def grant(self, session: int, count: int) -> None:
        self._connection.grant(session, count)
        self._wake_writer()

    async def send(self, session: Session, data: bytes) -> None:
        while self._outbox_bytes > _OUTBOX_BYTES:
            await self._outbox_drained.wait()
            session.check()
        if self._connection.is_open(session.id):
            self._connection.send(session.id, data[: self._connection.window(session.id)])
            self._outbox_bytes += len(data)
        self._wake_writer()
        if self._outbox_bytes >= _BATCH_BYTES:
            await trio.lowlevel.checkpoint()

    def send_end(self, session: int) -> None:
        if self._connection.is_open(session):
            self._connection.send_end(session)
            self._wake_writer()

    def signal(self, session: int, number: int) -> None:
        if self._connection.is_open(session):
            self._connection.signal(session, number)
            self._wake_writer()

    def resize(self, session: int, rows: int, cols: int) -> None:
        if self._connection.is_open(session):
            self._connection.resize(session, rows, cols)
            self._wake_writer()

    def close(self, session: Session, *, detach: bool = False, stays: bool = False) -> None:
        """Release a session; with ``detach`` its program can be resumed (``Connection.detach``). Idempotent."""
        if self._sessions.pop(session.id, None) is not None:
            if detach:
                self._connection.detach(session.id, stays=stays)
            else:
                self._connection.close(session.id)
            self._slots.release_on_behalf_of(session)
            session.notify()
            self._wake_writer()

    # Inside

    async def _write(self) -> None:
        while True:
            data = self._connection.data_to_send()
            if not data:
                self._outbox_filled = trio.Event()
                await self._outbox_filled.wait()
                continue
            self._outbox_bytes = 0
            await self._stream.send_all(data)
            self._outbox_drained.set()
            self._outbox_drained = trio.Event()

    def _wake_writer(self) -> None:
        self._outbox_filled.set()

    async def _watch(self) -> None:
        """Ping a guest that sends nothing; detect that it is silent, and that it answers again.

        There is one ping at a time, so nothing accumulates for a guest that does not read.
        """
        await self._greeted.wait()
        self._heard = trio.current_time()
        while True:
            due = max(self._heard, self._asked) + limits.QUIET if self._sessions else self._heard + limits.HEARTBEAT
            if self._held or trio.current_time() < due:
                with trio.move_on_at(math.inf if self._held else due):
                    await self._stirred.wait()
                continue
            before = self._reads
            ping = self._connection.open(Op.PING)
            self._wake_writer()
            if not await self._is_heard_after(before):
                self._set_silent(self._heard_at)
                while self._reads == before:
                    await self._stirred.wait()
                self._set_silent(None)
            self._connection.close(ping)

    async def _is_heard_after(self, before: int) -> bool:
        """Whether another read succeeds within ANSWER seconds in which the VM is not paused."""
        while self._reads == before:
            with trio.move_on_after(math.inf if self._held else limits.ANSWER) as scope:
                held = self._held
                while self._reads == before and self._held == held:
                    await self._stirred.wait()
            if scope.cancelled_caught:
                return False
        return True

    def _set_silent(self, since: datetime | None) -> None:
        self.silent_since = since
        if since is not None:
            for session in self._sessions.values():
                session.failure = _silent(since)
                session.notify()
            self._outbox_drained.set()  # senders find their session failed
            self._outbox_drained = trio.Event()
        self.silence_changed()

    def _check_responds(self) -> None:
        if self.silent_since is not None:
            raise _silent(self.silent_since)

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = trio.Event()

    async def _read(self) -> None:
        while data := await self._stream.receive_some(_READ_BYTES):
            self._heard, self._heard_at = trio.current_time(), datetime.now(UTC)
            self._reads += 1
            self._stir()
            for event in self._connection.receive(bytes(data)):
                self._take(event)
            self._wake_writer()

    def _take(self, event: Greeted | Data | Credit | Resumed | Ended | Told) -> None:
        match event:
            case Greeted():
                self.no_agent = event.no_agent
                self.keeps = event.keeps
                self._greeted.set()
            case Told():
                self._handle_event(event)
            case Data() | Credit() | Resumed() | Ended():
                session = self._sessions.get(event.session)
                if session is None:
                    return
                if isinstance(event, Data):
                    session.put(event)
                elif isinstance(event, Resumed):
                    session.resumed = event
                elif isinstance(event, Ended):
                    session.ended = event
                session.notify()

    def _handle_event(self, received: Told) -> None:
        if isinstance(received.event, Ready):
            self.ready = received.event
            self._ready.set()
        if received.event is not None:
            try:
                self._events_in.send_nowait(received.event)
            except trio.WouldBlock as error:
                raise ProtocolError("the guest sent more events than exist") from error
            except trio.BrokenResourceError:
                return  # no receiver: not acknowledged either
        self._connection.acknowledge(received)

    def _fail(self, error: HypemanError) -> None:
        """End the connection: all waiters get ``error``. The first error is kept."""
        if self._lost is not None:
            return
        self._lost = error
        self._greeted.set()
        self._ready.set()
        self._outbox_drained.set()
        for session in self._sessions.values():
            session.notify()


def _silent(since: datetime) -> GuestTimeout:
    return GuestTimeout(f"the guest has not responded since {since:%Y-%m-%dT%H:%M:%SZ}")
