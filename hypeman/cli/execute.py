"""``exec``: runs a program in a guest as if it were local.

One loop over standard input, the socket and window size changes; standard input is not read while
earlier input is still unsent. With a terminal all keys are forwarded, including Ctrl-C, and the
terminal is always restored. Exit codes: the program's own; 130 if interrupted locally; 255 if the
connection broke; 1 if the server refused.

The program outlives a connection that breaks, as when the server is upgraded: another one is made, and both sides go
on where they were (``hypeman/server/kept_exec.py`` has the messages).
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socket import socket, socketpair
from typing import TYPE_CHECKING, Any

import click
import msgspec

from hypeman.cli.client import COME_BACK_SECONDS, RETRY_SECONDS, ApiError, Unreachable
from hypeman.cli.instances import instance_argument, path_of
from hypeman.cli.session import Session, complain, environment, present, reports

if TYPE_CHECKING:
    from hypeman.cli.websocket import WebSocket

_READ = 32 * 1024
DETACHED = "exec INSTANCE -- sh -c 'PROGRAM >/dev/null 2>&1 &' leaves it running"
_INTERRUPTED = 130
_BROKEN = 255
_CAPTURE_SECONDS = 10
_ACKNOWLEDGE = 32 * 1024
"""Bytes of output after which the server learns that they have arrived; the guest keeps at most 128 KiB."""
_MAIN = "main"
_LEAVE_KEYS = b"\x10\x11"
"""Ctrl-P Ctrl-Q."""
_LEAVE_SECONDS = 5.0
_UNREAD = 1024 * 1024
"""Bytes of input that are kept here until the program has read them."""


@click.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Forward standard input; without it, it is not read.")
@click.option("-t", "--tty", "wants_tty", is_flag=True, help="Allocate a terminal, even if there is none here.")
@click.option("--it", "both", is_flag=True, help="-i -t")
@click.option("-T", "--no-tty", is_flag=True, help="Without a terminal.")
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Without a value: taken from this shell.")
@click.option("-w", "--workdir", "--cwd", "cwd", help="Working directory in the guest.")
@click.option("-u", "--user", help="A name or number, and a group after a colon; default: root.")
@click.option("--timeout", type=click.IntRange(0), help="Seconds; then it is killed and the exit code is 124.")
@click.option("--wait-for-agent", type=click.IntRange(0), help="Seconds to wait for a guest that is still booting.")
@instance_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@reports
def execute(
    session: Session,
    instance: str,
    command: tuple[str, ...],
    interactive: bool,
    wants_tty: bool,
    both: bool,
    no_tty: bool,
    env: tuple[str, ...],
    cwd: str | None,
    user: str | None,
    timeout: int | None,
    wait_for_agent: int | None,
) -> None:
    """Run COMMAND in an instance; without one, a shell.

    Has a terminal when both ends are one, unless -T says otherwise.
    """
    if instance.startswith("-"):  # options of the program are left alone, so click took it for INSTANCE
        instead = {"-d": DETACHED, "--detach": DETACHED, "--privileged": "root in a VM has every capability there"}
        raise click.UsageError(
            f"No such option: {instance}" + (f": {instead[instance]}" if instance in instead else "")
        )
    if command[:1] == ("--",):
        command = command[1:]
    on_terminal = has_terminals() and sys.stdin.isatty() and sys.stdout.isatty()
    tty = not no_tty and (wants_tty or both or on_terminal)
    if tty and not has_terminals():
        raise click.UsageError("exec with a terminal is not supported on this system; use -T")
    request = present(
        command=command, env=environment(env), cwd=cwd, user=user, timeout=timeout, wait_for_agent=wait_for_agent
    )
    wants_stdin = interactive or both or tty
    raise SystemExit(_run(session, instance, request, tty=tty, wants_stdin=wants_stdin))


def capture(session: Session, instance: str, command: tuple[str, ...]) -> tuple[int | None, str]:
    """Exit code and output of ``command`` in an instance; no code if the stream broke, as when the VM has ended."""
    from hypeman.cli.websocket import open_stream

    output = b""
    stream = open_stream(session.client, path_of(instance), "exec")
    try:
        stream.send(msgspec.json.encode({"command": command, "timeout": _CAPTURE_SECONDS}).decode())
        while (message := stream.receive()) is not None:
            if isinstance(message, str):
                return _exit_code_in(message), output.decode(errors="replace")
            output += message
    except Unreachable:
        pass
    finally:
        stream.close()
    return None, output.decode(errors="replace")


def run_program(
    session: Session,
    instance: str,
    command: tuple[str, ...],
    *,
    tty: bool,
    stdin: bool = True,
    wait_for_agent: int = 0,
    main: bool = False,
) -> int:
    """Run ``command`` in an instance as if it were local; returns its exit code. ``main``: it is the program of an idle
    instance, which ends with it; raises Left if it was left running."""
    if tty and not has_terminals():
        raise click.UsageError("a terminal is not supported on this system; use -i")
    request: dict[str, Any] = present(command=command, wait_for_agent=wait_for_agent or None, main=main or None)
    return _run(session, instance, request, tty=tty, wants_stdin=stdin, may_leave=main)


def attach_to_main(session: Session, instance: str) -> int | None:
    """Come back to the program of an idle instance: its exit code, or None if there is no such program. Raises Left if
    it was left running."""
    first = _connector(session, instance)({**_main_from_now(), "keep": True})
    try:
        running = Exec(first, _connector(session, instance), tty=False, wants_stdin=True, may_leave=True)
        try:
            running.come_in()
        except Unreachable:
            first.close()
            return None
        with raw_terminal(running.tty and sys.stdin.isatty()):
            return running.run(interrupt_leaves=True)
    except KeyboardInterrupt:
        running.leave()
        raise Left from None
    except Unreachable as error:
        complain(str(error))
        return _BROKEN


def _main_from_now() -> dict[str, Any]:
    return {"resume": {"session": _MAIN, "received": None}}


def _connector(session: Session, instance: str) -> Callable[[dict[str, Any]], WebSocket]:
    """Makes a stream whose first message is the argument."""
    from hypeman.cli.websocket import open_stream  # importing wsproto takes longer than most commands

    def connect(first: dict[str, Any]) -> WebSocket:
        stream = open_stream(session.client, path_of(instance), "exec")
        stream.send(msgspec.json.encode(first).decode())
        return stream

    return connect


def _run(
    session: Session,
    instance: str,
    request: dict[str, Any],
    *,
    tty: bool,
    wants_stdin: bool,
    may_leave: bool = False,
) -> int:
    if tty:
        size = window_size()
        request |= {"tty": True, **({"rows": size[0], "cols": size[1]} if size else {})}
    connect = _connector(session, instance)
    try:
        first = connect(request | {"keep": True})
        running = Exec(first, connect, tty=tty, wants_stdin=wants_stdin, may_leave=may_leave)
        with raw_terminal(tty and sys.stdin.isatty()), interrupted_by_signals():
            return running.run()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Unreachable as error:
        complain(str(error))
        return _BROKEN


class Left(Exception):
    """The user has left the program, which runs on."""


class _Gone(Unreachable):
    """The server refuses to resume the program; retrying is pointless."""


class Exec:
    """The I/O loop. ``run`` returns the exit code and ends the program if it is interrupted."""

    def __init__(
        self,
        stream: WebSocket,
        connect: Callable[[dict[str, Any]], WebSocket],
        *,
        tty: bool,
        wants_stdin: bool,
        may_leave: bool = False,
    ) -> None:
        """``connect`` makes another stream, whose first message is its argument. ``may_leave``: with a terminal, Ctrl-P
        Ctrl-Q leaves the program running."""
        self._socket = stream
        self._connect = connect
        self.tty = tty
        self._may_leave = may_leave
        self._held = False
        """Ctrl-P was typed, and what comes next says what it meant."""
        self._session = ""
        """Names the program if it can be resumed."""
        self._may_be_kept = True
        """The server has not shown yet that it does not keep programs."""
        self._received = self._acknowledged = 0
        """Bytes of output; how many of them the server knows of."""
        self._unread = bytearray()
        """Input that the program may not have read: from byte ``_read`` on."""
        self._read = 0
        self._outgoing = bytearray()
        self._stdin: int | socket | None = selectable_stdin() if wants_stdin else None
        self._stdin_ended = not wants_stdin
        if not wants_stdin:
            self._outgoing += stream.encode(b"")

    def come_in(self) -> None:
        """Go on with the program of an idle instance from now on. Raises Unreachable if there is none."""
        self._session = _MAIN
        self._resume()

    def leave(self) -> None:
        """Leave the program running; returns when the server knows."""
        self._session = ""
        with suppress(OSError, Unreachable):
            self._socket.socket.setblocking(True)
            self._socket.socket.settimeout(_LEAVE_SECONDS)
            self._socket.socket.sendall(self._outgoing + self._socket.encode('{"leave":true}'))
            while not self._socket.closed:
                self._socket.receive_some()

    def run(self, *, interrupt_leaves: bool = False) -> int:
        """``interrupt_leaves``: Ctrl-C leaves the program as Ctrl-P Ctrl-Q does; else it ends the program."""
        # a socket pair, since Windows can select on sockets only, and macOS has no pipe2
        reading, writing = socketpair()
        with reading, writing, on_resize(lambda: writing.send(b"!")):
            reading.setblocking(False)
            writing.setblocking(False)
            try:
                while True:
                    try:
                        return self._run_connected(reading)
                    except Left:
                        self.leave()
                        raise
                    except KeyboardInterrupt:
                        if not interrupt_leaves:
                            raise
                        self.leave()
                        raise Left from None
                    except _Gone:
                        raise
                    except Unreachable:
                        if not self._session:
                            raise
                    self._socket.close()
                    self._come_back()
            finally:
                self._say_done()
                self._socket.close()

    def _run_connected(self, resized: socket) -> int:
        self._socket.socket.setblocking(False)
        while (code := self._take_messages()) is None:
            if self._socket.closed:
                raise Unreachable("the connection ended before the program did")
            self._step(resized)
        return code

    def _say_done(self) -> None:
        """Best effort: without it the guest keeps the program for a minute."""
        if self._session and not self._socket.closed:
            with suppress(OSError, Unreachable):
                self._socket.socket.setblocking(True)
                self._socket.socket.settimeout(1.0)
                self._socket.socket.sendall(self._outgoing + self._socket.encode('{"done":true}'))

    def _come_back(self) -> None:
        """Go on with the program over another connection. Raises Unreachable."""
        until = time.monotonic() + COME_BACK_SECONDS
        while True:
            try:
                first: dict[str, Any] = {"resume": {"session": self._session, "received": self._received}}
                self._socket = self._connect(first | {"keep": True})
                self._resume()
                return
            except _Gone:
                raise
            except (ApiError, Unreachable) as error:
                if isinstance(error, ApiError) and error.status < 500:
                    raise _Gone(f"the program cannot be resumed: {error.message}") from None
                if time.monotonic() > until:
                    raise
                time.sleep(RETRY_SECONDS)

    def _resume(self) -> None:
        message = self._socket.receive()
        if not isinstance(message, str):
            raise Unreachable("the connection ended before the program was resumed")
        reply: Any = msgspec.json.decode(message)
        if "input" not in reply:
            raise _Gone(f"the program cannot be resumed: {reply.get('error', message)}")
        self._forget_input(reply["input"])
        self._received = reply.get("output", self._received)
        self.tty = reply.get("tty", self.tty)
        if reply["input_ended"]:
            self._stdin = None
        self._acknowledged = self._received
        self._outgoing = bytearray(self._socket.encode(bytes(self._unread)) if self._unread else b"")
        if self._stdin_ended and not reply["input_ended"]:
            self._outgoing += self._socket.encode(b"")
        self._resize()

    def _step(self, resized: socket) -> None:
        """Wait for an event and handle it."""
        # Each step has its own selector: a regular file as standard input is always ready and cannot be
        # polled, so it is read whenever there is room.
        with selectors.SelectSelector() as selector:
            selector.register(resized, selectors.EVENT_READ)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
            selector.register(self._socket.socket, events)
            if self._stdin is not None and not self._outgoing and not (self._session and len(self._unread) >= _UNREAD):
                selector.register(self._stdin, selectors.EVENT_READ)
            ready = {key.fileobj: mask for key, mask in selector.select()}
        if resized in ready:
            resized.recv(100)
            self._resize()
        mask = ready.get(self._socket.socket, 0)
        if mask & selectors.EVENT_READ:
            self._socket.receive_some()
        if self._socket.closed:
            return
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if self._stdin is not None and self._stdin in ready:
            self._read_stdin(self._stdin)

    def _read_stdin(self, source: int | socket) -> None:
        try:
            data = source.recv(_READ) if isinstance(source, socket) else os.read(source, _READ)
        except OSError:
            data = b""  # the terminal has gone
        if self._may_leave and self.tty and data:
            data, leaves = self._without_keys(data)
            if data:
                self._outgoing += self._socket.encode(data)
            if leaves:
                raise Left
            if not data:
                return
        else:
            self._outgoing += self._socket.encode(data)  # an empty message means end of input
        if self._may_be_kept:
            self._unread += data
            if not self._session and len(self._unread) > _UNREAD:
                self._not_kept()  # what is sent first would have arrived long ago
        if not data:
            self._stdin = None
            self._stdin_ended = True
        self._flush()

    def _without_keys(self, data: bytes) -> tuple[bytes, bool]:
        """What was typed without Docker's keys for leaving, and whether they were among it."""
        if self._held:
            data = _LEAVE_KEYS[:1] + data
        before, keys, _ = data.partition(_LEAVE_KEYS)
        self._held = not keys and data.endswith(_LEAVE_KEYS[:1])
        return (data[:-1] if self._held else before), bool(keys)

    def _flush(self) -> None:
        try:
            sent = self._socket.socket.send(self._outgoing)
        except BlockingIOError:
            return
        except OSError as error:
            # Messages sent before the server closed must still be read.
            self._outgoing.clear()
            if not self._session:
                self._stdin = None
            if isinstance(error, BrokenPipeError | ConnectionResetError):
                return
            raise Unreachable(f"the stream broke: {error.strerror}") from None
        del self._outgoing[:sent]

    def _resize(self) -> None:
        size = window_size()
        if self.tty and size:
            message = {"resize": {"rows": size[0], "cols": size[1]}}
            self._outgoing += self._socket.encode(msgspec.json.encode(message).decode())

    def _take_messages(self) -> int | None:
        """Print received output; returns the exit code if it was received."""
        while self._socket.messages:
            message = self._socket.messages.popleft()
            if isinstance(message, str):
                if (code := self._take_text(message)) is not None:
                    return code
                continue
            if not self._session:
                self._not_kept()
            _write_all(sys.stdout.fileno(), message)
            self._received += len(message)
            if self._session and self._received - self._acknowledged >= _ACKNOWLEDGE:
                self._acknowledged = self._received
                self._outgoing += self._socket.encode(msgspec.json.encode({"received": self._received}).decode())
        return None

    def _take_text(self, message: str) -> int | None:
        """The exit code, if that is what it says."""
        try:
            reply = msgspec.json.decode(message, type=dict[str, Any])
        except msgspec.DecodeError:
            return _exit_code_in(message)
        if "session" in reply and self._may_be_kept:
            self._session = str(reply["session"])
        elif "input" in reply:
            self._forget_input(int(reply["input"]))
        else:
            return _exit_code_in(message)
        return None

    def _not_kept(self) -> None:
        self._may_be_kept = False
        self._unread.clear()

    def _forget_input(self, read: int) -> None:
        del self._unread[: max(0, read - self._read)]
        self._read = max(read, self._read)


def _exit_code_in(message: str) -> int:
    try:
        last: Any = msgspec.json.decode(message)
    except msgspec.DecodeError:
        raise Unreachable(f"the server sent what is not part of an exec: {message!r}") from None
    if isinstance(last, dict) and isinstance(last.get("exitCode"), int):
        if last.get("error"):
            complain(str(last["error"]))
        return int(last["exitCode"]) & 0xFF
    reason = last.get("error", message) if isinstance(last, dict) else message
    raise Unreachable(f"the server ended the exec: {reason}")


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def window_size() -> tuple[int, int] | None:
    """Rows and columns of the local terminal, if there is one."""
    for stream in (sys.stdout, sys.stdin, sys.stderr):
        try:
            size = os.get_terminal_size(stream.fileno())
        except (OSError, ValueError):
            continue
        if size.lines and size.columns:
            return size.lines, size.columns
    return None


def has_terminals() -> bool:
    """Whether this system has POSIX terminals: Windows does not."""
    return os.name == "posix"


def selectable_stdin() -> int | socket:
    """Standard input in a form that ``select`` accepts. Windows selects on sockets only, so there a thread copies
    it into one."""
    fd = sys.stdin.fileno()
    if os.name == "posix":
        return fd
    ours, copy = socketpair()

    def pump() -> None:
        with copy:
            while data := os.read(fd, _READ):
                copy.sendall(data)

    threading.Thread(target=pump, name="stdin", daemon=True).start()
    return ours


@contextmanager
def on_resize(call: Callable[[], object]) -> Iterator[None]:
    """Within the block, ``call`` whenever the window changes its size, where the system reports that."""
    if not hasattr(signal, "SIGWINCH"):
        yield
        return
    before = signal.signal(signal.SIGWINCH, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Within the block a hangup or a request to terminate raises KeyboardInterrupt: the program is ended, too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [(number, signal.signal(number, interrupt)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    """Raw mode within the block: keys are passed through unchanged."""
    if not wanted:
        yield
        return
    import termios
    import tty as terminals

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    terminals.setraw(fd, termios.TCSADRAIN)  # keeps type-ahead
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def leave_keys() -> Iterator[None]:
    """Within the block Ctrl-P Ctrl-Q, typed in a terminal, raises Left; nothing else that is typed has an effect but
    Ctrl-C and its like."""
    if not has_terminals() or not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    import termios
    import tty as terminals

    fd, typed = sys.stdin.fileno(), bytearray()

    def watch() -> None:
        while data := os.read(fd, _READ):
            typed.extend(data)
            del typed[: -len(_LEAVE_KEYS)]
            if typed == _LEAVE_KEYS:
                os.kill(os.getpid(), signal.SIGINT)

    before = termios.tcgetattr(fd)
    terminals.setcbreak(fd, termios.TCSADRAIN)
    plain = termios.tcgetattr(fd)
    plain[0] &= ~termios.IXON  # Ctrl-Q is for us
    termios.tcsetattr(fd, termios.TCSADRAIN, plain)
    threading.Thread(target=watch, name="keys", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if typed == _LEAVE_KEYS:
            raise Left from None
        raise
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
