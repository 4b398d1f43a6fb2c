"""A server in a process of its own that dies at a chosen write or commit."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from hypeman.egress import protocol
from hypeman.egress.link import EngineLink
from hypeman.store import Store
from tests.images.crash_points import Points


def run_until_killed(
    life: Callable[[], Awaitable[None]], journal: Path, at: int, *more: Callable[[Points], None]
) -> bool:
    """``life`` in a process that dies at point number ``at``; whether it came so far. ``more``: adds other points."""
    pid = os.fork()
    if pid == 0:
        try:
            points = Points(str(journal), at, victims=(os.getpid(),))
            points.install()
            _count_commits(points)
            for add in more:
                add(points)
            trio.run(life)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "undisturbed it fails"
    return False


def _count_commits(points: Points) -> None:
    commit = Store._commit

    def counted(self: Store, batch: list) -> None:  # type: ignore[type-arg]
        points.reach()
        commit(self, batch)
        points.reach()

    Store._commit = counted  # type: ignore[method-assign]


def count_messages(points: Points) -> None:
    """Points for what is sent to an engine: half of a message, and all of it."""
    send = EngineLink._send

    async def counted(
        self: EngineLink, message: protocol.Request, payload: bytearray | None, descriptors: Sequence[int]
    ) -> None:
        if points.is_next():
            head = protocol.encode(
                message, payload=len(payload or b""), descriptors=len(descriptors), version=self.version
            )
            data = head + bytes(payload or b"")
            await self._socket.send(data[: len(data) // 2])
        points.reach()
        await send(self, message, payload, descriptors)
        points.reach()

    EngineLink._send = counted  # type: ignore[method-assign]
