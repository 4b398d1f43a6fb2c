"""Client of one guest's agent over any Trio byte stream.

``GuestClient.run`` is started in a nursery by the owner of the instance; it ends with the stream and raises
GuestLost (reconnecting may help) or GuestBroken (the guest violates the protocol: do not retry). All other
methods may be called by any number of tasks concurrently.

Rules:
- One task reads, one task writes. The reader never waits for a consumer: data in flight is bounded by the
  windows of ``protocol.py``.
- Each method releases its session on every exit path, including cancellation: what ran in it is then killed.
- Every wait has a timeout (``limits.py``): each request has one, and while a session is open the agent must
  send something in time, or all sessions end with GuestTimeout.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import TypeVar

import msgspec
import trio

from hypeman.errors import Conflict, HypemanError, InternalError, InUse, InvalidRequest, NotFound, NotSupported
from hypeman.guest import clock, limits
from hypeman.guest.boot import GuestNetwork, GuestVolume, render_network, render_volume
from hypeman.guest.clock import Sample
from hypeman.guest.fields import Fields, FieldWriter, MalformedFields, Tag
from hypeman.guest.limits import LIMITS
from hypeman.guest.protocol import (
    KEY_BYTES,
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
from hypeman.guest.types import (
    CopyEntry,
    CopyToRequest,
    ExecRequest,
    FileKind,
    GuestEvent,
    Metrics,
    PathInfo,
    Ready,
    parse_copy_entry,
    parse_metrics,
    parse_path_info,
)

log = logging.getLogger(__name__)

_READ_BYTES = 262144
_GRANT_BYTES = WINDOW // 4
_BATCH_BYTES = 4 * MAX_PAYLOAD
"""Queued for the stream before a sender lets it be written: fewer writes of more bytes."""
_OUTBOX_BYTES = 4 * WINDOW
"""Senders wait while more bytes than this are queued for the stream."""
_MAX_REPLY = 1024 * 1024
_CLOCK_BEFORE_THAW = 0.8
"""Seconds that a guest stays frozen at most for its clock."""
_CLOCK_AFTER_THAW = 0.2
"""Seconds until the clock of a thawed guest is corrected more exactly: first it does what its client waits for."""
_CLOCK_WITHOUT_THAW = 10.0
"""Seconds until the clock of a restored guest that nobody thaws is corrected; it thaws itself by then."""

_T = TypeVar("_T")


class GuestLost(InternalError):
    """The connection to the guest's agent has ended, or there is none."""


class GuestBroken(InternalError):
    """The guest's agent violates the protocol, or is not the one that we started."""


class GuestError(InternalError):
    """A request reached the guest and failed there; ``errno`` of the guest's kernel, 0 if there is none."""

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class GuestTimeout(HypemanError):
    """The guest did not answer in time; the request may or may not have taken effect."""

    status = 504
    default_code = "guest_timeout"


class VolumeBusy(InUse):
    """A volume cannot be unmounted; ``holders`` are the processes that use it, each as "pid (name)"."""

    def __init__(self, message: str, holders: tuple[str, ...]) -> None:
        super().__init__(message)
        self.holders = holders


class Output(msgspec.Struct, frozen=True):
    """Output of a program; with a terminal everything is standard output."""

    data: bytes
    stderr: bool = False


class ExecResult(msgspec.Struct, frozen=True):
    """A program's result: 128 + signal if killed, 124 on timeout, 127 not found, 126 not executable."""

    exit_code: int
    signal: int = 0
    timed_out: bool = False
    message: str = ""
    """Reason if it could not be started."""


_SMALL = 4096
"""Bytes of a chunk that is joined with others while it waits."""
_MOST_APART = 64
"""With so many chunks waiting, small ones are joined also across one of the other stream."""


class _Joined:
    """Small chunks of one stream that arrived while nobody read."""

    __slots__ = ("data", "stderr")

    def __init__(self, data: bytes, stderr: bool) -> None:
        self.data = bytearray(data)
        self.stderr = stderr


class _Session:
    """Data received for a session and not yet consumed; at most one window.

    A window counts bytes, so a guest may fill it with as many frames of one byte. Their memory is bounded all the same,
    whatever version of the agent the guest claims to have: small chunks that wait are joined.
    """

    def __init__(
        self, client: GuestClient, session_id: int, stall_limit: float = math.inf, *, kept: bool = False
    ) -> None:
        self._client = client
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
            self._client.grant(self.id, self._used)
            self._used = 0
        return Data(self.id, bytes(chunk.data), chunk.stderr) if isinstance(chunk, _Joined) else chunk

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data`` as the window allows. Data for an ended session is discarded."""
        view = memoryview(data)
        while view:
            if self.ended is not None:
                return
            self.check()
            room = min(self._client.window(self.id), MAX_PAYLOAD)
            if not room:
                await self.wait()
                continue
            if isinstance(data, bytes) and len(view) == len(data) <= room:
                await self._client.send(self, data)  # all of it, not copied
                return
            await self._client.send(self, bytes(view[:room]))
            view = view[room:]

    def check(self) -> None:
        """Raise the error that ended this session, if any."""
        self._client.check_alive()
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


class ExecSession:
    """A program running in the guest. Use as an async context manager; leaving it kills what still runs, or, if it
    is kept, leaves it to be resumed within a minute."""

    def __init__(self, client: GuestClient, session: _Session, key: bytes = b"", received: int = 0) -> None:
        """``received``: bytes of a kept program's output that the client had when the program was resumed."""
        self._client = client
        self._session = session
        self.key = key
        """Of a kept program: what ``GuestClient.resume`` wants. Else empty."""
        self._received = self._given = received
        self._ends = False

    @property
    def resumed(self) -> Resumed | None:
        """Of a resumed program: how much of its input the guest has."""
        return self._session.resumed

    def acknowledge(self, received: int) -> None:
        """The client of a kept program has ``received`` bytes of its output since its start. Raises InvalidRequest if
        it cannot have so many."""
        if received > self._given:
            raise InvalidRequest(f"received is {received}, but only {self._given} bytes were sent")
        if received > self._received:
            self._client.grant(self._session.id, received - self._received)
            self._received = received

    async def input_taken(self, above: int) -> int:
        """Wait until a kept program has read more than ``above`` bytes of its input; returns how many it has."""
        while (taken := self._client.taken(self._session.id)) <= above:
            await self._session.wait()
        return taken

    def end(self) -> None:
        """A kept program is not to be resumed: ``aclose`` kills it."""
        self._ends = True

    async def send_stdin(self, data: bytes) -> None:
        """Waits while the program does not read. No-op if the program has ended."""
        await self._session.send(data)

    async def close_stdin(self) -> None:
        """Send end of file; with a terminal, Ctrl-D."""
        self._client.send_end(self._session.id)
        await trio.lowlevel.checkpoint()

    async def resize(self, rows: int, cols: int) -> None:
        """At most 65535 each."""
        self._client.resize(self._session.id, min(rows, 65535), min(cols, 65535))
        await trio.lowlevel.checkpoint()

    async def signal(self, number: int) -> None:
        """Send a signal to the program's process group."""
        self._client.signal(self._session.id, number)
        await trio.lowlevel.checkpoint()

    async def receive(self) -> Output | ExecResult:
        """The next output; after the last, always the result. Raises GuestLost."""
        chunk = await self._session.receive()
        if chunk is not None:
            self._given += len(chunk.data)
            return Output(chunk.data, chunk.stderr)
        ended = self._session.ended
        assert ended is not None
        return ExecResult(ended.exit_code, ended.signal, ended.timed_out, ended.message)

    async def aclose(self) -> None:
        self._close()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> ExecSession:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._client.close(self._session, detach=bool(self.key) and not self._ends)


class CopyIn:
    """A file being copied into the guest. ``finish`` moves it into place; leaving the context without it undoes
    everything."""

    def __init__(self, client: GuestClient, session: _Session) -> None:
        self._client = client
        self._session = session

    async def send(self, data: bytes) -> None:
        """Waits while the guest is busy. Errors of the guest are raised by ``finish``."""
        await self._session.send(data)

    async def finish(self) -> int:
        """Bytes written. Raises InvalidRequest, Conflict, NotFound or GuestError on failure."""
        self._client.send_end(self._session.id)
        reply, error, ended = await self._session.finish()
        self._client.close(self._session)
        _check(error, ended)
        return _parsed(Fields, reply).u64(Tag.SIZE)

    async def aclose(self) -> None:
        self._client.close(self._session)
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> CopyIn:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close(self._session)


class CopyOut:
    """A file or tree being copied out of the guest: each entry, followed for files by the data in chunks, ``size``
    bytes in total.

    Errors of the guest are raised by the iteration: NotFound if the path does not exist, else GuestError.
    """

    def __init__(self, client: GuestClient, request: FieldWriter) -> None:
        self._client = client
        self._request = request
        self._session: _Session | None = None
        self._items: AsyncGenerator[CopyEntry | bytes, None] | None = None

    async def open(self) -> None:
        self._session = await self._client._open(Op.COPY_FROM, self._request)
        self._items = _read_tree(self._session)

    def __aiter__(self) -> CopyOut:
        return self

    async def __anext__(self) -> CopyEntry | bytes:
        assert self._items is not None, "it is open"
        return await self._items.__anext__()

    async def aclose(self) -> None:
        if self._session is not None:
            self._client.close(self._session)
        if self._items is not None:
            await self._items.aclose()

    async def __aenter__(self) -> CopyOut:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class GuestClient:
    """One connection to one agent."""

    def __init__(self, stream: trio.abc.Stream, *, nonce: bytes) -> None:
        self._stream = stream
        self._connection = Connection(nonce)
        self._sessions: dict[int, _Session] = {}
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
        self.last_correction: Sample | None = None
        """How wrong the guest's clock was found to be."""
        self.restored = False
        """Its clock is corrected when it is thawed, and not before: until then it is busy with its identity."""
        self._thawed = trio.Event()
        self._clock_set_at = -math.inf
        """When a request last set the guest's clock, quickly enough for programs to run on."""
        self._clock = trio.Lock()
        """Held during a correction of the guest's clock."""
        self._clock_wanted = trio.Event()
        """Set when the guest's clock must be corrected now."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the connection until it ends; reports started once the greeting is being sent.

        Always raises: GuestLost, GuestBroken, or Cancelled. The stream is closed then.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._watch)
                nursery.start_soon(self._keep_clock)
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

    # Requests

    async def exec(self, request: ExecRequest) -> ExecSession:
        """Start a program. Failure to start is reported in its result (127, 126)."""
        writer = FieldWriter()
        for argument in request.argv:
            writer.text(Tag.ARG, argument)
        for variable in request.env:
            writer.text(Tag.ENV, variable)
        if request.cwd is not None:
            writer.text(Tag.CWD, request.cwd)
        writer.text(Tag.USER, request.user)
        writer.flag(Tag.TTY, request.tty)
        writer.u16(Tag.ROWS, min(request.rows, 65535))
        writer.u16(Tag.COLS, min(request.cols, 65535))
        writer.u64(Tag.TIMEOUT_MS, math.ceil(request.timeout_seconds * 1000))
        key = b""
        if request.keep and await self._can_keep():
            key = secrets.token_bytes(KEY_BYTES)
            writer.add(Tag.SESSION_KEY, key)
        return ExecSession(self, await self._open(Op.EXEC, writer, kept=bool(key)), key)

    async def resume(self, key: bytes, received: int) -> ExecSession:
        """Go on with a kept program, whose client has ``received`` bytes of its output. Raises NotFound if it is not
        there any more, or cannot go on from there."""
        writer = FieldWriter().add(Tag.SESSION_KEY, key).u64(Tag.RECEIVED, received)
        session = await self._open(Op.RESUME, writer, kept=True)
        try:
            with trio.move_on_after(limits.OPEN):
                while session.resumed is None and session.ended is None:
                    await session.wait()
            if session.resumed is None:
                if session.ended is None:
                    raise GuestTimeout(f"the guest did not resume the program within {limits.OPEN:g} s")
                raise NotFound(session.ended.message)
        except BaseException:
            self.close(session, detach=True)
            raise
        return ExecSession(self, session, key, received)

    async def _can_keep(self) -> bool:
        with trio.move_on_after(limits.OPEN):
            await self.wait_greeted()
        return self.keeps

    async def stat(self, path: str, *, follow_links: bool = False) -> PathInfo:
        writer = FieldWriter().text(Tag.PATH, path).flag(Tag.FOLLOW_LINKS, follow_links)
        reply, error, ended = await self._call(Op.STAT, writer)
        if ended.exit_code in _NOT_SUPPORTED:
            _check(error, ended)
        if ended.exit_code:
            return PathInfo(exists=False, error=_error_text(error, ended))
        return _parsed(parse_path_info, reply)

    async def copy_to(self, request: CopyToRequest) -> CopyIn:
        """Begin creating a file, directory or link; always call ``finish`` on the result, even without data."""
        writer = FieldWriter().text(Tag.PATH, request.path).u8(Tag.KIND, request.kind)
        if request.mode is not None:
            writer.u32(Tag.MODE, request.mode)
        if request.uid is not None:
            writer.u32(Tag.UID, request.uid)
        if request.gid is not None:
            writer.u32(Tag.GID, request.gid)
        if request.mtime is not None:
            writer.i64(Tag.MTIME, request.mtime)
        if request.link_target is not None:
            writer.text(Tag.LINK_TARGET, request.link_target)
        return CopyIn(self, await self._open(Op.COPY_TO, writer))

    def copy_from(self, path: str, *, follow_links: bool = False) -> CopyOut:
        """A file or tree. Use as an async context manager, or ``open`` it."""
        return CopyOut(self, FieldWriter().text(Tag.PATH, path).flag(Tag.FOLLOW_LINKS, follow_links))

    async def shutdown(self, *, grace_seconds: float | None = None, signal: int = 0) -> None:
        """Ask the guest to shut down: ``signal`` (0: the image's own) to its program, a forced kill after the grace
        period, power off. Returns when the guest has begun."""
        writer = FieldWriter().u32(Tag.STOP_SIGNAL, signal)
        if grace_seconds is not None:
            writer.u64(Tag.GRACE_MS, math.ceil(grace_seconds * 1000))
        await self._request(Op.SHUTDOWN, writer)

    async def read_clock(self) -> Sample:
        """The guest's clock, compared to the host's."""
        asked = time.time_ns()
        reply = await self._request(Op.CLOCK, None)
        answered = time.time_ns()
        guest = _parsed(Fields, reply).u64(Tag.CLOCK_NS)
        if not 0 < guest < 2**63:
            raise GuestError("the guest did not tell its time")
        return Sample(asked, answered, guest)

    async def correct_clock(self, *, good: int = clock.GOOD) -> Sample:
        """Bring the guest's clock to the host's, and return by how much it was wrong.

        A sample with an uncertainty of ``good`` nanoseconds suffices.

        ``run`` does this by itself: at once, regularly, after a pause (``hold``), and when the host's clock was set or
        the host was suspended. The guest starts its program only after the first time.
        """
        async with self._clock:
            samples = [await self.read_clock()]
            while len(samples) < clock.SAMPLES and samples[-1].uncertainty > good:
                samples.append(await self.read_clock())
            best = clock.most_certain(samples)
            if best.correction or self.last_correction is None:  # the guest waits for the first one
                await self._request(Op.CLOCK, FieldWriter().i64(Tag.CLOCK_DELTA_NS, best.correction))
            self.last_correction = best
            return best

    async def set_identity(
        self,
        *,
        hostname: str,
        machine_id: str = "",
        network: GuestNetwork | None = None,
        entropy: bytes = b"",
        clock_ns: int = 0,
        nonce: bytes | None = None,
    ) -> None:
        """Give a restored or forked guest its own identity; complete when this returns.

        ``network`` replaces MAC, address and route (the link to the guest should be down until then);
        ``nonce`` authenticates the agent from the next connection on.
        """
        writer = FieldWriter().text(Tag.HOSTNAME, hostname).text(Tag.MACHINE_ID, machine_id)
        writer.add(Tag.ENTROPY, entropy).u64(Tag.CLOCK_NS, clock_ns)
        if nonce is not None:
            writer.add(Tag.NONCE, nonce)
        if network is not None:
            render_network(writer, network)
        await self._request(Op.IDENTITY, writer)
        if 0 <= time.time_ns() - clock_ns < clock.QUICK:
            self._clock_set_at = trio.current_time()

    async def mount_volume(self, volume: GuestVolume) -> None:
        """Mount a hot-plugged disk; waits up to 10 s for it to appear."""
        await self._request(Op.MOUNT, FieldWriter().nested(Tag.VOLUME, render_volume(volume)))

    async def unmount_volume(self, path: str) -> None:
        """Unmount; no-op if nothing is mounted there. Raises VolumeBusy with the users; nothing has changed then."""
        reply, error, ended = await self._call(Op.UNMOUNT, FieldWriter().text(Tag.PATH, path))
        holders = tuple(_parsed(Fields, reply).texts(Tag.HOLDER))
        if holders:
            raise VolumeBusy(f"{path} is in use by {', '.join(holders)}", holders)
        _check(error, ended)

    async def online_memory(self) -> int:
        """Bring hot-plugged memory online; returns the guest's total bytes."""
        return _parsed(Fields, await self._request(Op.MEMORY, None)).u64(Tag.MEMORY_TOTAL)

    async def metrics(self) -> Metrics:
        return _parsed(parse_metrics, await self._request(Op.METRICS, None))

    async def warm(self) -> None:
        """Have the guest execute a program of the agent's, so that the first exec is as fast as others. A no-op on an
        agent of an earlier version."""
        await self._call(Op.WARM, None)

    async def freeze(self) -> None:
        """Stop all processes but the agent, for at most 10 s of guest time, so that after a restore or fork
        identity and clock are set before they resume."""
        await self._request(Op.FREEZE, None)

    async def thaw(self) -> None:
        """Let the processes run again, with the clock corrected."""
        if trio.current_time() - self._clock_set_at > _CLOCK_BEFORE_THAW:
            await self._correct_before_thaw()
        await self._request(Op.THAW, None)
        self._thawed.set()

    async def _correct_before_thaw(self) -> None:
        with trio.move_on_after(_CLOCK_BEFORE_THAW):
            try:
                await self.correct_clock(good=clock.QUICK)
            except (GuestError, GuestTimeout, InvalidRequest) as error:  # an agent of an earlier version, or no time
                log.debug("a guest runs on without having its clock corrected: %s", error.message)

    def hold(self, held: bool) -> None:
        """Record that the VM is paused, so no answer is expected, or running again."""
        self._held = held
        self._heard = trio.current_time()
        self._clock_wanted.set()
        self._stir()

    @property
    def held(self) -> bool:
        """Whether the VM is paused by the server."""
        return self._held

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

    async def send(self, session: _Session, data: bytes) -> None:
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

    def close(self, session: _Session, *, detach: bool = False) -> None:
        """Release a session; with ``detach`` its program can be resumed. Idempotent."""
        if self._sessions.pop(session.id, None) is not None:
            if detach:
                self._connection.detach(session.id)
            else:
                self._connection.close(session.id)
            self._slots.release_on_behalf_of(session)
            session.notify()
            self._wake_writer()

    # Inside

    async def _open(self, op: Op, fields: FieldWriter | None, *, kept: bool = False) -> _Session:
        session = _Session(self, 0, LIMITS[op], kept=kept)
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

    async def ping(self) -> None:
        """Return if the agent answers. Raises GuestTimeout if not, GuestLost."""
        await self._request(Op.PING, None)

    async def _call(self, op: Op, fields: FieldWriter | None) -> tuple[bytes, bytes, Ended]:
        session = await self._open(op, fields)
        try:
            with trio.move_on_after(LIMITS[op]) as scope:
                return await session.finish()
        finally:
            self.close(session)
        assert scope.cancelled_caught
        raise GuestTimeout(f"the guest did not finish {op.name.lower()} within {LIMITS[op]:g} s")

    async def _request(self, op: Op, fields: FieldWriter | None) -> bytes:
        reply, error, ended = await self._call(op, fields)
        _check(error, ended)
        return reply

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

    async def _keep_clock(self) -> None:
        """Correct the guest's clock as ``correct_clock`` says."""
        await self._greeted.wait()
        if self.restored:
            with trio.move_on_after(_CLOCK_WITHOUT_THAW):
                await self._thawed.wait()
                await trio.sleep(_CLOCK_AFTER_THAW)
        while self._lost is None:
            if self._held:
                await self._wait_resumed()
                await trio.sleep(_CLOCK_AFTER_THAW)
            self._clock_wanted = trio.Event()
            step = clock.host_step()
            last: Sample | None = None
            try:
                last = await self.correct_clock(good=clock.QUICK if self.last_correction is None else clock.GOOD)
            except GuestTimeout:
                pass  # it may be able to answer later
            except HypemanError as error:
                if self._lost is None:  # an agent of an earlier version
                    log.debug("the clock of a guest is not kept: %s", error.message)
                return
            due = trio.current_time() + clock.next_after(last)
            while trio.current_time() < due and abs(clock.host_step() - step) < clock.STEP:
                with trio.move_on_at(min(due, trio.current_time() + clock.STEP_CHECK)):
                    await self._clock_wanted.wait()
                    break

    async def _wait_resumed(self) -> None:
        while self._held:
            await self._stirred.wait()

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
        else:
            self._clock_wanted.set()
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
                self._tell(event)
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

    def _tell(self, told: Told) -> None:
        if isinstance(told.event, Ready):
            self.ready = told.event
            self._ready.set()
        if told.event is not None:
            try:
                self._events_in.send_nowait(told.event)
            except trio.WouldBlock as error:
                raise ProtocolError("the guest tells more events than there are") from error
            except trio.BrokenResourceError:
                return  # no receiver: not acknowledged either
        self._connection.acknowledge(told)

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


async def _read_tree(session: _Session) -> AsyncGenerator[CopyEntry | bytes, None]:
    """The reply of COPY_FROM: u32 length, entry, then exactly the data that the entry announces."""
    reader = _TreeReader(session)
    while (header := await reader.read_header()) is not None:
        entry = _parsed(parse_copy_entry, header)
        yield entry
        left = entry.size if entry.kind is FileKind.FILE else 0
        while left:
            data = await reader.read_some(left)
            left -= len(data)
            yield data


class _TreeReader:
    """Reads the stream of a tree in exact lengths."""

    _MAX_HEADER = 16384

    def __init__(self, session: _Session) -> None:
        self._session = session
        self._buffer = b""
        self._error: list[bytes] = []

    async def read_header(self) -> bytes | None:
        """The next entry, or None at the end."""
        if not await self._fill(4, may_end=True):
            return None
        length = int.from_bytes(self._take(4), "little")
        if length > self._MAX_HEADER:
            raise GuestBroken("an entry of impossible size")
        await self._fill(length)
        return self._take(length)

    async def read_some(self, limit: int) -> bytes:
        await self._fill(1)
        return self._take(min(limit, len(self._buffer)))

    def _take(self, count: int) -> bytes:
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def _fill(self, count: int, *, may_end: bool = False) -> bool:
        while len(self._buffer) < count:
            chunk = await self._session.receive()
            if chunk is None:
                ended = self._session.ended
                assert ended is not None
                _check(b"".join(self._error), ended)
                if may_end and not self._buffer:
                    return False
                raise GuestBroken("the tree ends in the middle of an entry")
            if chunk.stderr:
                self._error.append(chunk.data)
                if len(self._error) > 64:
                    raise GuestBroken("the guest's error text does not end")
            else:
                self._buffer = self._buffer + chunk.data if self._buffer else chunk.data
        return True


_NOT_THERE = {2, 20}  # Linux ENOENT, ENOTDIR, regardless of the host's numbers
_IN_THE_WAY = {17, 21, 39}  # EEXIST, EISDIR, ENOTEMPTY
_BUSY = 16
_NOT_SUPPORTED = {38, 95}  # ENOSYS, EOPNOTSUPP
_INVALID = {22, 36, 40}  # EINVAL, ENAMETOOLONG, ELOOP


def _error_text(error: bytes, ended: Ended) -> str:
    return error.decode("utf-8", "replace") or ended.message or f"failed with code {ended.exit_code} in the guest"


def _check(error: bytes, ended: Ended) -> None:
    """Raise the exception for a failed guest request."""
    if ended.exit_code == 0:
        return
    text, errno = _error_text(error, ended), ended.exit_code
    if errno in _NOT_THERE:
        raise NotFound(text)
    if errno in _IN_THE_WAY or errno == _BUSY:
        raise Conflict(text)
    if errno in _NOT_SUPPORTED:
        raise NotSupported(text)
    if errno in _INVALID:
        raise InvalidRequest(text)
    raise GuestError(text, errno=errno if errno < 128 else 0)


def _parsed(parse: Callable[[bytes], _T], reply: bytes) -> _T:
    """The parsed reply. Raises GuestBroken if it is malformed."""
    try:
        return parse(reply)
    except MalformedFields as error:
        raise GuestBroken(str(error)) from error
