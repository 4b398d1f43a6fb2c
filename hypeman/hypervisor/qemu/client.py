"""QMP over a Trio stream: commands, descriptors, events.

It has no task of its own: one of the waiting tasks reads the socket for all, and passes this role on when
it has its result. So a connection needs no nursery, and nothing is lost when a waiting task is cancelled.
Some task should always wait (``wait_exit`` does), or events accumulate in the socket.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import trio

from hypeman.host.descriptors import passing
from hypeman.hypervisor.interface import VmmBroken, VmmGone
from hypeman.hypervisor.qmp import Greeting, Happened, Message, QmpCodec, QmpError, Refused, Returned, command

_T = TypeVar("_T")

_TIME_LIMIT = 30.0
"""Seconds for one answer. QEMU answers in 0.1 ms; on a swapping host it can take a thousand times as long."""
_KEPT_EVENTS = 256


class QmpRefused(VmmBroken):
    """QEMU rejected a command."""


class QmpClient:
    """One QMP connection; QEMU serves one at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._codec = QmpCodec()
        self._last_id = 0
        self._greeting: Greeting | None = None
        self._asked: set[int] = set()
        self._answers: dict[int, Returned | Refused] = {}
        self._events: deque[Happened] = deque(maxlen=_KEPT_EVENTS)
        self._event_count = 0
        self._ended: str = ""
        self._sending = trio.Lock()
        self._reading = False
        self._progress = trio.Event()

    @classmethod
    async def connect(cls, path: str, *, timeout: float = _TIME_LIMIT) -> QmpClient:
        """Connect to the socket at ``path`` and negotiate capabilities.

        Raises VmmGone if there is no listener, VmmBroken if there is no answer within ``timeout`` seconds.
        """
        client = cls(await connect_unix(path))
        try:
            with trio.fail_after(timeout):
                await client._until(lambda: client._greeting)
            await client.execute("qmp_capabilities", timeout=timeout)
        except trio.TooSlowError:
            client.close()
            raise VmmBroken("QEMU does not answer on its QMP socket") from None
        except BaseException:
            client.close()
            raise
        return client

    @property
    def version(self) -> str:
        assert self._greeting is not None
        return self._greeting.version

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float = _TIME_LIMIT,
    ) -> Any:
        """Return QEMU's answer. Raises QmpRefused, VmmGone, VmmBroken (also on timeout)."""
        self._last_id += 1
        number = self._last_id
        self._asked.add(number)
        answer: Returned | Refused | None = None
        try:
            with trio.fail_after(timeout):
                await self._send(command(name, arguments, number=number), fds)
                answer = await self._until(lambda: self._answers.pop(number, None))
        except trio.TooSlowError:
            raise VmmBroken(f"QEMU did not answer {name} within {timeout:g} s") from None
        finally:
            self._asked.discard(number)
        assert answer is not None
        if isinstance(answer, Refused):
            raise QmpRefused(f"QEMU refused {name}: {answer.description}")
        return answer.value

    async def wait_event(self, matches: Callable[[Happened], bool], *, since: int = 0) -> Happened:
        """The first event that matches among those numbered from ``since`` (``event_count``) on."""
        event = await self._until(lambda: self.find_event(matches, since=since))
        assert event is not None
        return event

    def find_event(self, matches: Callable[[Happened], bool], *, since: int = 0) -> Happened | None:
        first = self._event_count - len(self._events)
        return next((e for n, e in enumerate(self._events, first) if n >= since and matches(e)), None)

    @property
    def event_count(self) -> int:
        """Number of events received so far."""
        return self._event_count

    async def wait_closed(self) -> None:
        """Read until QEMU closes the connection; earlier events can still be queried afterwards."""
        await self._until(lambda: None, or_closed=True)

    def close(self) -> None:
        self._end("the QMP connection was closed by us")
        self._stream.socket.close()
        self._wake()

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        sent = 0
        async with self._sending:
            if self._ended:
                raise VmmGone(f"QEMU: {self._ended}")
            try:
                sent = await self._stream.socket.sendmsg([data], passing(fds))
                while sent < len(data):  # never observed: a command is far smaller than the socket buffer
                    sent += await self._stream.socket.send(data[sent:])
            except (OSError, trio.ClosedResourceError):
                self._end("the QMP connection was lost")
                raise VmmGone("QEMU closed its QMP socket") from None
            except trio.Cancelled:
                if sent:
                    self._end("a command was cut off in the middle")
                raise

    async def _until(self, answer: Callable[[], _T | None], *, or_closed: bool = False) -> _T | None:
        """``answer()`` once it is not None; meanwhile one task reads the socket for all."""
        while (found := answer()) is None:
            if self._ended:
                if or_closed:
                    return None
                raise VmmGone(f"QEMU: {self._ended}")
            if self._reading:
                await self._progress.wait()
                continue
            self._reading = True
            try:
                await self._read_once()
            finally:
                self._reading = False
                self._wake()
        return found

    async def _read_once(self) -> None:
        try:
            data = await self._stream.receive_some(65536)
            messages = self._codec.receive_data(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._end("the QMP connection was lost")
            return
        except QmpError as error:
            self._end(f"malformed data on the QMP connection: {error}")
            raise VmmBroken(f"QEMU sent malformed data: {error}") from None
        if not data:
            self._end("QEMU closed the QMP connection")
        for message in messages:
            self._take(message)

    def _take(self, message: Message) -> None:
        if isinstance(message, Happened):
            self._events.append(message)
            self._event_count += 1
        elif isinstance(message, Greeting):
            self._greeting = message
        elif message.id in self._asked:  # else the waiting task was cancelled
            self._asked.discard(message.id)
            self._answers[message.id] = message

    def _end(self, why: str) -> None:
        self._ended = self._ended or why

    def _wake(self) -> None:
        self._progress.set()
        self._progress = trio.Event()


async def connect_unix(path: str) -> trio.SocketStream:
    """A stream to the listening socket at ``path``; VmmGone if there is no listener."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        raise VmmGone(f"nothing listens on {path}") from None
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)
