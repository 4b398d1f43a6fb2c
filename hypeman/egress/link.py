"""The server's side of one engine process: start it or find it again, talk to it, notice its end.

A call raises ``EngineLost`` when the process has ended, does not answer within ``PATIENCE`` or does not follow the
protocol; in the last two cases it is killed. Nothing that an engine sends is trusted: it is bounded and decoded
strictly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman.egress import protocol, wire
from hypeman.egress.protocol import ProtocolError
from hypeman.errors import InternalError
from hypeman.host.descriptors import passing
from hypeman.host.own_program import own_command
from hypeman.host.processes import own_environment
from hypeman.host.safe_open import open_log

PATIENCE = 10.0
"""Seconds for an answer. An engine answers in microseconds; it may be starved on a busy host."""
START_PATIENCE = 120.0
"""Seconds for a new engine to take its first message and to say hello, as Python has to start first: 0.2 s on metal, a
hundred times that on an emulated or starved host."""

Command = Callable[[int], list[str]]
engine_command: Command = partial(own_command, "engine", "hypeman.egress.engine")
"""The command line that starts an engine on a descriptor."""


class EngineLost(Exception):
    """There is no engine behind this connection any more."""


class EngineFailed(InternalError):
    """An engine cannot be started."""


class Handlers(msgspec.Struct, frozen=True):
    """What is done with messages that an engine sends on its own."""

    question: Callable[[EngineLink, protocol.Question], None]
    locate: Callable[[EngineLink, protocol.Locate], None]
    records: Callable[[EngineLink, bytearray], None]
    """Raises ValueError if they are none."""
    approval: Callable[[EngineLink, protocol.ApprovalNeeded], None]


class EngineLink:
    """One engine. ``run`` must run for calls to be answered."""

    def __init__(self, sock: socket.socket, path: Path | None, pidfd: int) -> None:
        """``path``: where servers find it."""
        sock.setblocking(False)
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._path = path
        self._pidfd = pidfd
        self._receiver = wire.Receiver()
        self._sending = trio.Lock()
        self._ending = trio.Lock()
        self._replies: dict[int, trio.MemorySendChannel[protocol.Report]] = {}
        self._last_id = 0
        self._sockets_held: dict[int, list[socket.socket]] = {}
        """Sockets that came with an answer, by its number."""
        self.version = protocol.VERSION
        """Of the protocol, that it speaks."""
        self.hello: protocol.Hello | None = None
        self.listeners: list[socket.socket] = []
        """Copies of the sockets on which it listens."""
        self.draining = False
        self.lost = trio.Event()
        """It has ended."""
        self.code: int | None = None
        """Its exit code (minus the signal) once it is lost, if it was our child."""
        self.counted: protocol.Counters | None = None
        """What it counted last."""

    @property
    def pid(self) -> int:
        """0 before it said hello."""
        return self.hello.pid if self.hello else 0

    # ── Begin and end ────────────────────────────────────────────────────────────────────────────

    async def greet(self, patience: float) -> protocol.Hello:
        """Wait for its first message. Raises EngineLost, or EngineFailed with what it says; it is killed then."""
        try:
            with trio.fail_after(patience):
                report, _, descriptors = await self._receive()
        except (EOFError, OSError, ProtocolError, trio.TooSlowError) as error:
            await self.kill()
            late = f"it did not say hello within {patience:.0f} s"
            raise EngineLost(late if isinstance(error, trio.TooSlowError) else str(error)) from None
        self.listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for listener in self.listeners:
            listener.setblocking(False)  # it is the engine's as well; dup() would make it blocking again
        if not isinstance(report, protocol.Hello):
            await self.kill()
            message = report.message if isinstance(report, protocol.Failed) else "it says something else than hello"
            raise EngineFailed(f"the engine cannot be started: {message}")
        self.hello, self.draining = report, report.draining
        self.version = report.version
        return report

    async def run(self, handlers: Handlers) -> str:
        """Pass on what it sends; returns when it has ended, with what it did wrong, if anything.

        May be called again after it was cancelled.
        """
        wrong = ""
        try:
            while True:
                report, payload, descriptors = await self._receive()
                if isinstance(report, protocol.Held) and report.id in self._replies:
                    self._sockets_held[report.id] = [socket.socket(fileno=descriptor) for descriptor in descriptors]
                else:
                    wire.close_all(descriptors)
                match report:
                    case protocol.Question():
                        handlers.question(self, report)
                    case protocol.ApprovalNeeded():
                        handlers.approval(self, report)
                    case protocol.Locate():
                        handlers.locate(self, report)
                    case protocol.Audit():
                        handlers.records(self, payload)
                    case protocol.Counters(id=0):
                        self.counted = report
                    case protocol.Done() | protocol.Refused() | protocol.Counters() | protocol.Held():
                        waiting = self._replies.pop(report.id, None)
                        if waiting is None:
                            raise ProtocolError("an answer to nothing")
                        waiting.send_nowait(report)
                    case _:
                        raise ProtocolError("a message at the wrong time")
        except (EOFError, OSError, trio.ClosedResourceError):
            pass
        except (ProtocolError, ValueError) as error:
            wrong = f"it does not follow the protocol ({error})"
        await self.kill()  # an engine without a connection must not keep running
        return wrong

    async def kill(self) -> None:
        """End it, if it has not ended, and wait until it has; ``lost`` is set then. Idempotent."""
        with trio.CancelScope(shield=True):
            async with self._ending:
                self._signal()
                if self._pidfd >= 0:
                    await trio.lowlevel.wait_readable(self._pidfd)
                    self._reap()
                self._end()

    def _end(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self.lost.set()
        for waiting in self._replies.values():
            waiting.close()
        self._replies.clear()
        self.close()

    def close(self) -> None:
        """Leave it running without a server, if it supports that."""
        self._socket.close()
        self._receiver.close()
        for each in (*self.listeners, *(one for held in self._sockets_held.values() for one in held)):
            each.close()
        self.listeners = []
        self._sockets_held.clear()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            if ended is not None:
                self.code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _signal(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    # ── Calls ────────────────────────────────────────────────────────────────────────────────────

    async def set_policy(self, source: str, instance: str, snapshot: Callable[[], bytearray | None]) -> None:
        """In force when this returns. ``snapshot`` is asked when it is this call's turn and returns a policy, which is
        wiped, or None if there is no longer one to be set. Raises EngineLost; InternalError if it is refused."""

        async def send(number: int) -> bool:
            data = snapshot()
            if data is None:
                return False
            try:
                await self._write(protocol.SetPolicy(id=number, source=source, instance=instance), data)
            finally:
                _wipe(data)
            return True

        await self._call(send)

    async def remove_policy(self, source: str) -> None:
        await self._ask(lambda number: protocol.RemovePolicy(id=number, source=source))

    async def accept(self) -> None:
        await self._ask(lambda number: protocol.Accept(id=number))

    async def drain(self, grace: float) -> None:
        """``grace`` in seconds."""
        self.draining = True
        milliseconds = min(2**32 - 1, round(grace * 1000))
        await self._ask(lambda number: protocol.Drain(id=number, grace_ms=milliseconds))

    @property
    def has_sites(self) -> bool:
        """It can carry ingresses; calls about them need that."""
        return self.version >= protocol.SITES

    async def put_site(self, ingress: str, routes: bytes) -> None:
        """In force when this returns. Raises EngineLost; InternalError if it is refused."""
        await self._ask(lambda number: protocol.PutSite(id=number, ingress=ingress), bytearray(routes))

    async def drop_site(self, ingress: str) -> None:
        await self._ask(lambda number: protocol.DropSite(id=number, ingress=ingress))

    async def listen(self, port: int, sockets: Sequence[socket.socket]) -> None:
        await self._ask(lambda number: protocol.Listen(id=number, port=port), sockets=sockets)

    async def unlisten(self, port: int) -> None:
        await self._ask(lambda number: protocol.Unlisten(id=number, port=port))

    async def sockets(self, port: int) -> list[socket.socket]:
        """Copies of those on which it takes clients for the port."""
        report = await self._ask(lambda number: protocol.Sockets(id=number, port=port))
        if not isinstance(report, protocol.Held):
            await self.kill()
            raise EngineLost
        held = self._sockets_held.pop(report.id, [])
        for each in held:
            each.setblocking(False)  # as in greet
        return held

    async def certify(self, name: str, chain: str, key: str) -> None:
        """Empty texts: it has none. Raises EngineLost; InternalError if they are no certificate with its key."""
        await self._ask_with_pem(lambda number, sizes: protocol.Certify(id=number, name=name, sizes=sizes), chain, key)

    async def challenge(self, name: str, token: str, proof: str, chain: str, key: str) -> None:
        """Empty texts: there is none of that kind. Raises as ``certify``."""
        await self._ask_with_pem(
            lambda number, sizes: protocol.Challenge(id=number, name=name, token=token, proof=proof, sizes=sizes),
            chain,
            key,
        )

    async def place(self, asked: protocol.Locate, find: Callable[[str], tuple[str, bool]]) -> None:
        """Answer with what ``find`` returns when it is this answer's turn, so that no later change is overtaken. No-op
        if it is lost."""

        def make() -> protocol.Place:
            address, exists = find(asked.instance)
            return protocol.Place(token=asked.token, loop=asked.loop, address=address, exists=exists)

        await self._post(make)

    async def forget(self, instances: Sequence[str], ended: Sequence[str]) -> None:
        """No-op if it is lost."""
        known = tuple(ended) if self.version >= protocol.ENDED else ()
        await self._post(lambda: protocol.Forget(instances=tuple(instances), ended=known))

    async def count(self) -> protocol.Counters:
        counted = await self._ask(lambda number: protocol.Count(id=number))
        if not isinstance(counted, protocol.Counters):
            await self.kill()
            raise EngineLost
        self.counted = counted
        return counted

    async def answer(self, question: protocol.Question, addresses: Sequence[str]) -> None:
        """No-op if it is lost."""
        answer = protocol.Answer(token=question.token, loop=question.loop, addresses=tuple(addresses[:16]))
        await self._post(lambda: answer)

    async def decide(self, held: protocol.ApprovalNeeded, *, allow: bool) -> None:
        """No-op if it is lost."""
        verdict = protocol.Verdict(token=held.token, loop=held.loop, allow=allow)
        await self._post(lambda: verdict)

    async def start(self, message: protocol.Start, payload: bytearray, descriptors: Sequence[int]) -> None:
        """Its first message, more than a socket holds: the rest goes when the process has begun to read. If this fails
        or is cancelled, half of it may be sent, and the engine must be killed. Raises EngineLost."""
        async with self._sending:
            try:
                with trio.fail_after(START_PATIENCE):
                    await self._send(message, payload, descriptors)
            except trio.TooSlowError:
                raise EngineLost(f"it did not begin within {START_PATIENCE:.0f} s") from None

    async def _post(self, make: Callable[[], protocol.Request]) -> None:
        """Send a message that has no reply; ``make`` is called when it is its turn. No-op if the engine is lost."""
        with contextlib.suppress(EngineLost):
            async with self._sending:
                await self._write(make())

    async def _ask(
        self,
        make: Callable[[int], protocol.Request],
        payload: bytearray | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> protocol.Report | None:
        async def send(number: int) -> bool:
            await self._write(make(number), payload, [each.fileno() for each in sockets])
            return True

        return await self._call(send)

    async def _ask_with_pem(
        self, make: Callable[[int, tuple[int, int]], protocol.Request], chain: str, key: str
    ) -> None:
        """``make`` gets the sizes of the two texts, which are the payload."""

        async def send(number: int) -> bool:
            payload, sizes = _pem(chain, key)
            try:
                await self._write(make(number, sizes), payload)
            finally:
                _wipe(payload)
            return True

        await self._call(send)

    async def _call(self, send: Callable[[int], Awaitable[bool]]) -> protocol.Report | None:
        answered, reply = trio.open_memory_channel[protocol.Report](1)
        try:
            async with self._sending:
                if self.lost.is_set():
                    raise EngineLost
                self._last_id += 1
                number = self._last_id
                self._replies[number] = answered
                if not await send(number):
                    del self._replies[number]
                    return None
            with trio.fail_after(PATIENCE):
                report = await reply.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise EngineLost from None
        except trio.TooSlowError:
            self._signal()
            raise EngineLost from None
        if isinstance(report, protocol.Refused):
            raise InternalError(f"the engine refused it: {report.message}")
        return report

    async def _write(
        self, message: protocol.Request, payload: bytearray | None = None, descriptors: Sequence[int] = ()
    ) -> None:
        """Shielded, so that no frame is cut. Raises EngineLost."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + PATIENCE) as patience:
            await self._send(message, payload, descriptors)
        if patience.cancelled_caught:
            self._signal()  # half a frame is the end of the connection
            raise EngineLost

    async def _send(self, message: protocol.Request, payload: bytearray | None, descriptors: Sequence[int]) -> None:
        size = len(payload or b"")
        parts = [memoryview(protocol.encode(message, payload=size, descriptors=len(descriptors), version=self.version))]
        if payload:
            parts.append(memoryview(payload))
        rights = passing(descriptors)
        while parts:
            try:
                sent = await self._socket.sendmsg(parts, rights, socket.MSG_NOSIGNAL)
            except (OSError, trio.ClosedResourceError):
                raise EngineLost from None
            rights = []
            while parts and sent >= len(parts[0]):
                sent -= len(parts[0])
                parts.pop(0)
            if parts:
                parts[0] = parts[0][sent:]

    async def _receive(self) -> tuple[protocol.Report, bytearray, list[int]]:
        """Loses nothing when cancelled."""
        while not self._receiver.complete:
            got, ancillary, flags, _ = await self._socket.recvmsg_into(
                [self._receiver.room()], wire.ANCILLARY, wire.FLAGS
            )
            self._receiver.take(got, ancillary, flags)
        frame, descriptors = self._receiver.finish()
        header = frame.header
        assert header is not None
        try:
            # Hello keeps its form, so that an engine of another version is recognized.
            report = protocol.decode_report(frame.message)
            if header.version != self.version and not isinstance(report, protocol.Hello):
                raise ProtocolError(f"version {header.version}")
            wire.check_descriptors(frame, descriptors)
        except ProtocolError:
            wire.close_all(descriptors)
            raise
        return report, frame.payload, descriptors


async def start_engine(
    message: protocol.Start,
    payload: bytearray,
    listeners: Sequence[socket.socket],
    path: Path | None,
    *,
    log: Path | None,
    group: str = "",
    command: Command = engine_command,
) -> EngineLink:
    """Start an engine and wait until it is ready. ``payload`` is wiped. Raises EngineFailed.

    Servers find it at ``path``; without one it ends with the connection. ``log`` receives its standard error, which is
    empty unless it crashes. ``group`` is the directory of a control group to put it into.
    """
    with contextlib.ExitStack() as opened:
        opened.callback(_wipe, payload)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        opened.enter_context(theirs)
        try:
            finder = opened.enter_context(open_finder(path)) if path is not None else None
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            errors = open_log(log, flags) if log is not None else os.memfd_create("engine-errors")
            opened.callback(os.close, errors)
            before = os.fstat(errors).st_size
            begin = partial(
                subprocess.Popen, command(theirs.fileno()), pass_fds=(theirs.fileno(),), env=own_environment(), cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip
            with trio.CancelScope(shield=True):  # a few ms
                process = await trio.to_thread.run_sync(begin)
            process.returncode = 0  # from here on it is watched and reaped through the pidfd, not by Popen
            link = EngineLink(ours, path, os.pidfd_open(process.pid))
        except OSError as error:
            ours.close()
            raise EngineFailed(f"the engine cannot be started: {error.strerror or error}") from None
        theirs.close()
        try:
            if group:
                await trio.to_thread.run_sync(Path(group, "cgroup.procs").write_text, str(process.pid))
            passed = [*([finder.fileno()] if finder else []), *(listener.fileno() for listener in listeners)]
            await link.start(message, payload, passed)
            await link.greet(START_PATIENCE)
        except EngineLost as error:
            await link.kill()
            last = os.pread(errors, 4000, max(before, os.fstat(errors).st_size - 4000)).decode(errors="replace").strip()
            why = last.splitlines()[-1] if last else str(error) or "it printed nothing"
            raise EngineFailed(f"the engine cannot be started: it ended with code {link.code}: {why}") from None
        except BaseException as error:
            await link.kill()
            if isinstance(error, OSError):
                raise EngineFailed(f"the engine cannot be put into {group}: {error.strerror}") from None
            raise
    return link


# ── Engines that run already ─────────────────────────────────────────────────────────────────────


def open_finder(path: Path) -> socket.socket:
    """The socket at ``path`` on which an engine will listen for servers."""
    finder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        finder.bind(str(path))
        os.chmod(path, 0o600)
    except BaseException:
        finder.close()
        raise
    return finder


async def find_engines(directory: Path) -> list[EngineLink]:
    """The engines whose sockets are in ``directory``, greeted; the sockets of those that have ended are removed.

    One that does not answer, or speaks another version of the protocol and so cannot get policies, is ended.
    """
    found = []
    for path in _sockets_in(directory):
        link = await _find_engine(path)
        if link is None:
            path.unlink(missing_ok=True)
        else:
            found.append(link)
    return found


def _sockets_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.sock") if stat.S_ISSOCK(path.lstat().st_mode))


async def end_engines(directory: Path) -> None:
    """End all engines that outlived their server."""
    for link in await find_engines(directory):
        await link.kill()


async def _find_engine(path: Path) -> EngineLink | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        pid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        link = EngineLink(sock, path, os.pidfd_open(pid))
    except OSError:
        sock.close()
        return None
    try:
        hello = await link.greet(PATIENCE)
    except (EngineLost, EngineFailed):
        return None
    if hello.version not in protocol.SPOKEN:
        await link.kill()
        return None
    return link


def _pem(chain: str, key: str) -> tuple[bytearray, tuple[int, int]]:
    first, second = chain.encode() + b"\0", key.encode() + b"\0"
    return bytearray(first + second), (len(first), len(second))


def _wipe(data: bytearray) -> None:
    data[:] = bytes(len(data))
