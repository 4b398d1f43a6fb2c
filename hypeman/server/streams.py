"""The WebSockets: exec (§3.1) and cp (§3.2).

Before the upgrade a failure is an ordinary response with a status; after it failures are reported in
the stream. When the client disconnects, the handler is cancelled and what it opened is closed: an
exec's program is killed, unless it is kept (``kept_exec.py``), a partially copied file discarded.

One extension of the contract: an empty BINARY message is the end of stdin. The original cannot
express this and treats such a message as zero bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import msgspec
import trio
from msgspec import UNSET, Struct, UnsetType

from hypeman._native import wsmask
from hypeman.errors import HypemanError
from hypeman.guest.programs import ExecSession, Output
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.types import CopyEntry, FileKind
from hypeman.server import examples
from hypeman.server.api import Message, WebSocketRoute
from hypeman.server.errors import UNEXPECTED, shown_message, told_error
from hypeman.server.kept_exec import KeptExec
from hypeman.server.messages import Resize, Socket, chunks
from hypeman.server.services import Services
from hypeman.telemetry import metrics
from hypeman.tokens import Scope

_FAILED_TO_RUN = 127
_STDOUT, _STDERR = b"\1", b"\2"
_CLOSE_SECONDS = 5.0
_COME_BACK = 1012
"""RFC 6455 §7.4, IANA: service restart."""


class _Closable(Protocol):
    async def aclose(self) -> None: ...


class TtyMessage(Struct, frozen=True):
    """What a text message may contain besides stdin, with a TTY."""

    resize: Resize


class StreamError(Struct, frozen=True, tag="error", tag_field="type"):
    message: str
    path: str | UnsetType = UNSET


class CopyResult(Struct, frozen=True, tag="result", tag_field="type"):
    success: bool
    error: str | UnsetType = UNSET
    bytes_written: int | UnsetType = UNSET


class CopyHeader(Struct, frozen=True, tag="header", tag_field="type"):
    """Of an entry; its bytes follow, then a CopyEnd."""

    path: str
    mode: int
    is_dir: bool
    is_symlink: bool
    link_target: str
    size: int
    mtime: int
    uid: int
    gid: int


class CopyEnd(Struct, frozen=True, tag="end", tag_field="type"):
    final: bool = False


class ExecEnd(Struct, frozen=True, rename="camel"):
    exit_code: int


class ExecError(Struct, frozen=True):
    """Why the first message was refused."""

    error: str


wsmask.install()
_json = msgspec.json.Encoder()
_log = logging.getLogger(__name__)
_Request = TypeVar("_Request")
_Open = TypeVar("_Open", bound=_Closable)


async def exec_session(services: Services, socket: Socket, ref: str) -> None:
    """One program in the guest, its output, and its exit code."""
    async with services.policies.using(ref, "exec"):
        await _exec(services, socket, ref)


async def _exec(services: Services, socket: Socket, ref: str) -> None:
    reference = await _running(services, ref)
    request = await _first_message(socket, ExecRequest, lambda message: _json.encode(ExecError(message)))
    if request is None:
        return
    started = time.perf_counter()
    exit_code, status = _FAILED_TO_RUN, "error"
    try:
        async with _closing(await services.instances.exec(reference, request)) as session:
            if session.key:
                kept = KeptExec(socket, session)
                code = await kept.run()
                if code is not None or kept.left:
                    exit_code, status = code or 0, "success"
                await socket.close(1000 if status == "success" else _COME_BACK)
                return
            exit_code = await _run(socket, session, tty=request.tty, separate=request.separate)
            status = "success"
    except Exception as error:
        message = shown_message(_told(error))
        if request.resume is not None:
            await _send_json(socket, ExecError(message))
            await socket.close(1000)
            return
        await _send_error(socket, message, request.separate)
    finally:
        metrics.exec_sessions.labels(status, str(exit_code)).inc()
        metrics.exec_seconds.observe(time.perf_counter() - started)
    await _send_json(socket, ExecEnd(exit_code))
    await socket.close(1000)


async def _run(socket: Socket, session: ExecSession, *, tty: bool, separate: bool) -> int:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_feed, socket, session, tty)
        while isinstance(received := await session.receive(), Output):
            mark = (_STDERR if received.stderr else _STDOUT) if separate else b""
            for chunk in chunks(received.data):
                await socket.send(mark + chunk)
            metrics.exec_bytes_sent.inc(len(received.data))
        nursery.cancel_scope.cancel()
    if received.message:  # it could not be started
        await _send_error(socket, received.message, separate)
    return received.exit_code


async def _send_error(socket: Socket, message: str, separate: bool) -> None:
    await socket.send((_STDERR if separate else b"") + f"Error: {message}\r\n".encode())


async def _feed(socket: Socket, session: ExecSession, tty: bool) -> None:
    """Forward the client's input to the program until either one ends."""
    try:
        while True:
            message = await socket.receive()
            if not message and not isinstance(message, str):
                await session.close_stdin()
            elif isinstance(message, bytes):
                metrics.exec_bytes_received.inc(len(message))
                await session.send_stdin(message)
            elif tty and (size := _resize_in(message)) is not None:
                await session.resize(size.rows, size.cols)
            elif message:
                await session.send_stdin(message.encode())
    except HypemanError:
        pass  # the program has ended or closed its stdin; its output and exit code still follow


def _resize_in(message: str) -> Resize | None:
    try:
        return msgspec.json.decode(message, type=TtyMessage).resize
    except msgspec.DecodeError:
        return None


async def copy_session(services: Services, socket: Socket, ref: str) -> None:
    """One file, directory or link into the guest, or one tree out of it."""
    async with services.policies.using(ref, "cp"):
        await _copy(services, socket, ref)


async def _copy(services: Services, socket: Socket, ref: str) -> None:
    reference = await _running(services, ref)
    request = await _first_message(socket, CpRequest, lambda message: _json.encode(StreamError(message)))
    if request is None:
        return
    direction = "from" if request.direction == "from" else "to"
    started = time.perf_counter()
    status = "error"
    try:
        copy = _copy_out if direction == "from" else _copy_in
        status = "success" if await copy(services, socket, reference, request) else "error"
    except Exception as error:
        await _send_json(socket, StreamError(shown_message(_told(error)), request.guest_path))
    finally:
        metrics.cp_sessions.labels(direction, status).inc()
        metrics.cp_seconds.labels(direction).observe(time.perf_counter() - started)
    await socket.close(1000)


async def _copy_in(services: Services, socket: Socket, reference: str, request: CpRequest) -> bool:
    try:
        async with _closing(await services.instances.copy_to(reference, request)) as copy:
            while not isinstance(message := await socket.receive(), str):
                if message:
                    await copy.send(message)
                    metrics.cp_bytes.labels("to").inc(len(message))
            _check_end(message)
            written = await copy.finish()
    except Exception as error:
        await _send_json(socket, CopyResult(False, shown_message(_told(error))))
        # A client that is still sending would lose this response if we closed now.
        with trio.move_on_after(_CLOSE_SECONDS):
            while not isinstance(await socket.receive(), str):
                pass
        return False
    await _send_json(socket, CopyResult(True, bytes_written=written))
    return True


def _check_end(message: str) -> None:
    try:
        msgspec.json.decode(message, type=CopyEnd)
    except msgspec.DecodeError:
        raise HypemanError('a text message must be {"type":"end"}') from None


async def _copy_out(services: Services, socket: Socket, reference: str, request: CpRequest) -> bool:
    async with _closing(await services.instances.copy_from(reference, request)) as copy:
        begun = False
        async for item in copy:
            if isinstance(item, bytes):
                for chunk in chunks(item):
                    await socket.send(chunk)
                metrics.cp_bytes.labels("from").inc(len(item))
                continue
            if begun:  # only now is it known that the entry before was not the last
                await _send_json(socket, CopyEnd(final=False))
            begun = True
            await _send_json(socket, _header(item))
        if begun:
            await _send_json(socket, CopyEnd(final=True))
    return True


def _header(entry: CopyEntry) -> CopyHeader:
    return CopyHeader(
        path=entry.path,
        mode=entry.mode,
        is_dir=entry.kind is FileKind.DIR,
        is_symlink=entry.kind is FileKind.SYMLINK,
        link_target=entry.link_target or "",
        size=entry.size if entry.kind is FileKind.FILE else 0,
        mtime=entry.mtime,
        uid=entry.uid,
        gid=entry.gid,
    )


async def _running(services: Services, reference: str) -> str:
    """The id of the instance if it runs; before the upgrade, so that a refusal has a status."""
    return await services.instances.check_running(reference)


async def _first_message(socket: Socket, wanted: type[_Request], say: Callable[[str], bytes]) -> _Request | None:
    """The request that opens the stream; None if it is invalid, which was reported to the client."""
    message = await socket.receive()
    try:
        if not isinstance(message, str):
            raise msgspec.DecodeError("the first message must be text")
        return msgspec.json.decode(message, type=wanted)
    except (msgspec.DecodeError, RecursionError) as error:
        await socket.send(say(f"bad request: {error}").decode())
        await socket.close(1000)
        return None


@asynccontextmanager
async def _closing(opened: _Open) -> AsyncIterator[_Open]:
    """Closes also on cancellation: what was opened must not outlive its client."""
    try:
        yield opened
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_SECONDS):
            await opened.aclose()


def _told(error: Exception) -> HypemanError:
    """The error to report in the stream; for a bug, without details."""
    reported = error if isinstance(error, HypemanError) else told_error(error)
    if reported is None:
        _log.error("unexpected failure", exc_info=error)
        return HypemanError(UNEXPECTED.body.message)
    return reported


async def _send_json(socket: Socket, message: Any) -> None:
    await socket.send(_json.encode(message).decode())


WEBSOCKETS = (
    WebSocketRoute(
        path="/instances/{id}/exec",
        name="exec_in_instance",
        tag="instances",
        scope=Scope.INSTANCE_WRITE,
        handler=exec_session,
        summary="Run a program in a running instance.",
        description="A WebSocket: the first message is the request, then the program's input and output follow. After "
        "the exit code the server closes the connection. A client that disconnects ends the program.",
        receives=(
            Message("text", "The request", ExecRequest, examples.EXEC),
            Message("binary", "Input of the program; an empty message ends it (extension)"),
            Message("text", "Input of the program as well, unless it is a change of the terminal's size"),
            Message("text", "With tty: the new size of the terminal", TtyMessage, TtyMessage(Resize(24, 80))),
        ),
        sends=(
            Message("binary", "Output of the program, stdout and stderr in one; or `Error: …` if it cannot be started"),
            Message("text", "The end: 128 + signal of a killed program, 124 after the timeout", ExecEnd, ExecEnd(0)),
            Message("text", "The first message is malformed", ExecError, ExecError("bad request: …")),
        ),
    ),
    WebSocketRoute(
        path="/instances/{id}/cp",
        name="copy_in_instance",
        tag="instances",
        scope=Scope.INSTANCE_WRITE,
        handler=copy_session,
        summary="Copy into or out of a running instance.",
        description="A WebSocket: the first message is the request. `to` copies one file, directory or link into the "
        "guest: the client sends its bytes and then an end, the server answers with a result. `from` copies a tree out "
        "of it: for each entry a header, its bytes and an end.",
        receives=(
            Message("text", "The request", CpRequest, examples.COPY),
            Message("binary", "Bytes of the file"),
            Message("text", "End of the bytes", CopyEnd, CopyEnd()),
        ),
        sends=(
            Message("text", "Result of a copy into the guest", CopyResult, CopyResult(True, bytes_written=6)),
            Message("text", "Header of an entry that is copied out", CopyHeader, CopyHeader(
                path="etc/motd", mode=0o644, is_dir=False, is_symlink=False, link_target="", size=6, mtime=1767323045,
                uid=0, gid=0,
            )),
            Message("binary", "Bytes of an entry, at most 32 KiB each"),
            Message("text", "End of an entry; final after the last one", CopyEnd, CopyEnd(final=True)),
            Message("text", "A failure", StreamError, StreamError("no such file or directory", "/etc/motd")),
        ),
    ),
)  # fmt: skip
