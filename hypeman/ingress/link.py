"""The server's side of one ingress worker: start it, talk to it, notice its end.

A call raises ``WorkerLost`` when the process has ended, does not answer within ``PATIENCE`` or does not follow the
protocol; in the last two cases it is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from functools import partial

import trio

from hypeman.host.descriptors import passing
from hypeman.host.own_program import own_command
from hypeman.host.processes import own_environment
from hypeman.ingress import protocol
from hypeman.ingress.protocol import ProtocolError

PATIENCE = 10.0
_START_PATIENCE = 60.0

Command = Callable[[int], list[str]]
worker_command: Command = partial(own_command, "ingress", "hypeman.ingress.worker")
"""The command line that starts a worker on a descriptor."""


class WorkerLost(Exception):
    """There is no worker behind this connection any more."""


class WorkerLink:
    """One worker. ``run`` must run for calls to be answered."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[str]) -> None:
        sock.setblocking(False)
        self._socket = trio.socket.from_stdlib_socket(sock)
        self.pid = process.pid
        process.returncode = 0  # from here on it is watched and reaped through the pidfd, not by Popen
        self._pidfd = os.pidfd_open(process.pid)
        self._sending = trio.Lock()
        self._done: dict[int, trio.Event] = {}
        self._last_id = 0
        self.lost = trio.Event()

    async def greet(self, uid: int) -> None:
        """Raises WorkerLost."""
        try:
            with trio.fail_after(_START_PATIENCE):
                await self._send(protocol.Start(uid))
                report = await self._receive()
        except (OSError, EOFError, ProtocolError, trio.TooSlowError) as error:
            raise WorkerLost(str(error)) from None
        if not isinstance(report, protocol.Ready):
            raise WorkerLost("it says something else than ready")

    async def run(self, ask: Callable[[protocol.Ask], protocol.Target], logged: Callable[[protocol.Log], None]) -> None:
        """Serve its messages until it has ended or is killed for a wrong one."""
        try:
            while True:
                match await self._receive():
                    case protocol.Done(id=number):
                        if (waiting := self._done.pop(number, None)) is not None:
                            waiting.set()
                    case protocol.Ask() as asked:
                        with trio.fail_after(PATIENCE):
                            await self._send(ask(asked))
                    case protocol.Log() as batch:
                        logged(batch)
                    case _:
                        raise ProtocolError("ready twice")
        except (OSError, EOFError, ProtocolError, trio.TooSlowError, trio.ClosedResourceError):
            pass
        finally:
            await self.kill()

    async def call(self, make: Callable[[int], protocol.Request], sockets: Sequence[socket.socket] = ()) -> None:
        """Send a message and wait until it is carried out. Raises WorkerLost."""
        self._last_id += 1
        number = self._last_id
        done = self._done[number] = trio.Event()
        try:
            if self.lost.is_set():
                raise WorkerLost
            with trio.fail_after(PATIENCE):
                await self._send(make(number), sockets)
                await done.wait()
        except (trio.TooSlowError, OSError, trio.ClosedResourceError):
            self._signal()
            raise WorkerLost from None
        finally:
            self._done.pop(number, None)
        if self.lost.is_set():
            raise WorkerLost

    async def kill(self) -> None:
        """End it and wait until it has ended. Idempotent."""
        with trio.CancelScope(shield=True):
            self._signal()
            if self._pidfd >= 0:
                await trio.lowlevel.wait_readable(self._pidfd)
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - does not wait
                os.close(self._pidfd)
                self._pidfd = -1
        self.lost.set()
        self._socket.close()
        for waiting in self._done.values():
            waiting.set()

    def _signal(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _send(self, message: protocol.Request, sockets: Sequence[socket.socket] = ()) -> None:
        rights = passing([each.fileno() for each in sockets])
        async with self._sending:
            await self._socket.sendmsg([protocol.encode(message)], rights, socket.MSG_NOSIGNAL)

    async def _receive(self) -> protocol.Report:
        data = await self._socket.recv(protocol.MAX_MESSAGE + 1)
        if not data:
            raise EOFError
        return protocol.decode_report(data)


async def start_worker(uid: int, command: Command = worker_command) -> WorkerLink:
    """Start a worker and wait until it is confined and ready. Raises WorkerLost or OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    begin = partial(
        subprocess.Popen, command(theirs.fileno()), pass_fds=(theirs.fileno(),), env=own_environment(), cwd="/",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    with theirs:
        try:
            with trio.CancelScope(shield=True):  # a few ms
                link = WorkerLink(ours, await trio.to_thread.run_sync(begin))
        except OSError:
            ours.close()
            raise
    try:
        await link.greet(uid)
    except BaseException:
        await link.kill()
        raise
    return link
