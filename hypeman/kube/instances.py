"""The node's instances on this host's server, kept up to date: listed again whenever an event says that one changed.

An absent instance is only known to be absent from a list that succeeded; ``refresh`` makes one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import httpx
import trio

from hypeman.instances.model.types import Instance
from hypeman.kube import names
from hypeman.kube.decide import Index, index
from hypeman.kube.local import LocalError, LocalServer

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""The list is read at least so often."""
COLLECT_SECONDS = 0.03
"""Events within this time lead to one list."""
RETRY_SECONDS = 1.0


class Instances:
    def __init__(self, local: LocalServer, node: str, changed: Callable[[], object]) -> None:
        self._local = local
        self._node = node
        self._changed = changed
        self._asked = trio.Event()
        self.all: tuple[Instance, ...] = ()
        self.index: Index = index((), node)
        self.synced = trio.Event()
        self._reading = trio.Lock()

    async def refresh(self) -> None:
        """Read the list. Raises LocalError; then what is known stays as it was."""
        async with self._reading:
            query = {f"tags[{names.NODE}]": self._node}
            found = await self._local.get("/instances", tuple[Instance, ...], query)
        if _comparable(found) != _comparable(self.all):
            self.all = found
            self.index = index(found, self._node)
            self._changed()
        self.synced.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            while True:
                with trio.move_on_after(POLL_SECONDS):
                    await self._asked.wait()
                await trio.sleep(COLLECT_SECONDS)
                self._asked = trio.Event()
                try:
                    await self.refresh()
                except LocalError as error:
                    log.warning("instances: %s", error.message)
                    await trio.sleep(RETRY_SECONDS)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._local.stream("/events", type="instance") as response:
                    self._asked.set()
                    async for line in response.aiter_lines():
                        if line.startswith("data:"):
                            self._asked.set()
            except LocalError as error:
                log.warning("events: %s", error.message)
            except httpx.HTTPError as error:
                log.warning("events: %s", str(error) or type(error).__name__)
            await trio.sleep(RETRY_SECONDS)


def _comparable(found: tuple[Instance, ...]) -> list[tuple[object, ...]]:
    """What decisions depend on; the time in a phase grows with each list."""
    return [
        (each.id, each.name, each.state, each.tags, each.started_at, each.stopped_at, each.exit_code,
         each.exit_message, each.restart_status, each.health_status.status, each.network, each.state_error)
        for each in found
    ]  # fmt: skip
