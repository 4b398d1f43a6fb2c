"""The log of an instance as the bytes that ``kubectl logs`` shows, from the server's events.

A container's log is that of one run of its program, as for a kubelet: the server's log has all of them.

A log that is followed ends when its program does, as kubectl expects: the server's own stream continues for as long as
the instance exists, so a second task waits for the end of the run; then what was written up to it is read.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from math import inf

import msgspec
import trio

from hypeman.instances.model.types import InstanceState, LogRun
from hypeman.kube.kubelet.routes import Logs
from hypeman.kube.local import SILENCE_SECONDS, LocalError, LocalRefused, LocalServer
from hypeman.urls import segment

_ALL = 10**9
"""Lines; the server requires a number."""
_WAIT = "300s"
_ANSWER_SECONDS = 330.0
_RETRY_SECONDS = 1.0

Write = Callable[[bytes], Awaitable[None]]


class _Reached(msgspec.Struct, frozen=True):
    state: InstanceState
    timed_out: bool = False


class LineReader:
    """Server-sent events of a log, fed line by line, as bytes of the log. Pure."""

    def __init__(self) -> None:
        self.position = ""
        """Where the last line ended, as the server names it."""
        self._exact: bytes | None = None
        self._ends = True
        self._begins = True
        self._time = b""

    def feed(self, line: str) -> bytes:
        """The bytes that an event's line brings, with its time if there is one, and the newline; often none.

        Raises DecodeError.
        """
        if line.startswith("id: "):
            self.position = line[4:].strip()
        elif line.startswith((": bytes=", ": piece=")):
            self._exact, self._ends = base64.b64decode(line[8:]), line.startswith(": bytes=")
        elif line.startswith(": time="):
            self._time = line[7:].encode() + b" "
        elif line.startswith("data: "):
            return self._line(line[6:])
        return b""

    def _line(self, data: str) -> bytes:
        text = msgspec.json.decode(data, type=str).encode() if self._exact is None else self._exact
        time, end = (self._time if self._begins else b""), (b"\n" if self._ends else b"")
        self._begins, self._exact, self._ends, self._time = self._ends, None, True, b""
        return time + text + end


async def send_log(local: LocalServer, instance_id: str, asked: Logs, write: Write) -> None:
    """Write the log. Raises LocalRefused, LocalUnreachable."""
    path = f"/instances/{segment(instance_id)}/logs"
    query = {"tail": str(_ALL if asked.tail is None else asked.tail), "times": str(asked.timestamps).lower()}
    query["run"] = (LogRun.PREVIOUS if asked.previous else LogRun.CURRENT).value
    if asked.since is not None:
        query["since"] = f"{asked.since}s"
    elif asked.since_time is not None:
        query["since"] = asked.since_time.isoformat()
    copy = _Copy(local, path, write, inf if asked.limit is None else asked.limit)
    if not asked.follow or asked.previous:
        await copy.run(**query)
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy.end_with, instance_id)
        await copy.run(**query, follow="true", positions="true")
        nursery.cancel_scope.cancel()
    try:
        if copy.position and copy.remaining > 0:
            await copy.run(after=copy.position, times=query["times"])
    except LocalRefused:  # deleted meanwhile, and the log with it
        return


class _Copy:
    """From the server to a client. What was read is written whole, also when the program ends meanwhile."""

    def __init__(self, local: LocalServer, path: str, write: Write, limit: float) -> None:
        """``limit`` in bytes."""
        self.remaining = limit
        self._local = local
        self._path = path
        self._write = write
        self._reader = LineReader()
        self._ended = False
        self._reading = trio.CancelScope()

    @property
    def position(self) -> str:
        return self._reader.position

    async def end_with(self, instance_id: str) -> None:
        """End ``run`` when the instance's program ends."""
        await wait_ended(self._local, instance_id)
        self._ended = True
        self._reading.cancel()

    async def run(self, **query: str) -> None:
        """A log that is not there yet is empty; one that is followed is waited for."""
        while True:
            try:
                await self._run(query)
                return
            except LocalRefused as error:
                if error.code != "log_not_found":
                    raise
            if "follow" not in query or self._ended:
                return
            await trio.sleep(_RETRY_SECONDS)

    async def _run(self, query: Mapping[str, str]) -> None:
        silence = None if "follow" in query else SILENCE_SECONDS
        async with self._local.stream(self._path, silence=silence, **query) as response:
            lines = response.aiter_lines()
            try:
                while self.remaining > 0 and (line := await self._next(lines)) is not None:
                    data = self._reader.feed(line)
                    part = data if self.remaining == inf else data[: int(self.remaining)]
                    self.remaining -= len(part)
                    if part:
                        await self._write(part)
            finally:
                await _unwind(lines)

    async def _next(self, lines: AsyncIterator[str]) -> str | None:
        """None at the end of the log, or of a program whose log is followed."""
        if self._ended and self._reading.cancel_called:
            self._reading = trio.CancelScope()  # what is read from here on is what was written before
            return None
        with trio.CancelScope() as self._reading:
            return await anext(lines, None)
        return None


async def _unwind(lines: AsyncIterator[str]) -> None:
    """End an iterator of httpx early: it is made of several generators, and closing the outermost ends only that."""
    with trio.CancelScope() as scope:
        scope.cancel()
        async for _ in lines:
            pass


async def wait_ended(local: LocalServer, instance_id: str) -> None:
    """Until the instance's program has ended, or the instance is gone. Failures of the server are waited out."""
    path = f"/instances/{segment(instance_id)}"
    while True:
        try:
            query = {"state": InstanceState.STOPPED.value, "timeout": _WAIT}
            answer = await local.call("GET", f"{path}/wait", query=query, timeout=_ANSWER_SECONDS)
            reached = msgspec.json.decode(answer, type=_Reached)
            if reached.state is InstanceState.STOPPED:
                return
        except LocalRefused as error:
            if error.http == 404:
                return
        except (LocalError, msgspec.DecodeError):
            pass
        await trio.sleep(_RETRY_SECONDS)
