"""The node's instances on this host's server, kept up to date: listed again whenever an event says that one changed.

An absent instance is only known to be absent from a list that succeeded; ``refresh`` makes one. And what the node does
to one instance, in a way that may be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import httpx
import trio

from hypeman.errors import cause_of
from hypeman.instances.model.types import Instance, StopInstanceRequest
from hypeman.instances.model.validate import MAX_GRACE
from hypeman.kube import names
from hypeman.kube.decide import Index, index
from hypeman.kube.local import REQUEST_SECONDS, LocalError, LocalRefused, LocalServer

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""The list is read at least so often."""
COLLECT_SECONDS = 0.03
"""Events within this time lead to one list."""
RETRY_SECONDS = 1.0


class Instances:
    def __init__(self, local: LocalServer, node: str, changed: Callable[[Sequence[Instance]], object]) -> None:
        """``changed`` is called with those that appeared, changed or went."""
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
        if changed := differences(self.all, found):
            self.all = found
            self.index = index(found, self._node)
            self._changed(changed)
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
                log.warning("events: %s", cause_of(error))
            await trio.sleep(RETRY_SECONDS)


def differences(before: Sequence[Instance], after: Sequence[Instance]) -> tuple[Instance, ...]:
    """Those that only one of the lists has; and both versions of those that have changed. Pure."""
    old, new = {each.id: _comparable(each) for each in before}, {each.id: _comparable(each) for each in after}
    return tuple(each for each in (*before, *after) if old.get(each.id) != new.get(each.id))


def _comparable(each: Instance) -> tuple[object, ...]:
    """What decisions depend on; the time in a phase grows with each list."""
    return (
        each.id, each.name, each.state, each.tags, each.started_at, each.stopped_at, each.exit_code,
        each.exit_message, each.restart_status, each.health_status.status, each.network, each.state_error,
    )  # fmt: skip


# ── Changes ─────────────────────────────────────────────────────────────────────────────────────


async def change_instance(
    local: LocalServer, instance: Instance, verb: str, body: object = None, *, timeout: float = REQUEST_SECONDS
) -> None:
    """Raises LocalError, but not if it is gone or in another state: what was known was out of date."""
    try:
        await local.call("POST", f"/instances/{instance.id}/{verb}", body, timeout=timeout)
    except LocalRefused as error:
        if error.http != 404 and error.code != "invalid_state":
            raise


async def stop_instance(local: LocalServer, instance: Instance, grace: int | None = None) -> None:
    """``grace`` in seconds, at most what the server permits; None: its default. Raises LocalError."""
    if grace is None:
        await change_instance(local, instance, "stop")
        return
    grace = min(grace, int(MAX_GRACE))
    body = StopInstanceRequest(grace=f"{grace}s")
    await change_instance(local, instance, "stop", body, timeout=grace + 30.0)


async def save_or_stop(
    local: LocalServer, instance: Instance, grace: int | None = None, *, must_end: bool = False
) -> str:
    """Standby; where the VMM has none, a stop. With ``must_end`` also where it fails.

    Returns why the memory was not saved, or nothing. Raises LocalError.
    """
    try:
        await change_instance(local, instance, "standby")
        return ""
    except LocalRefused as error:
        if error.http != 501 and not must_end:
            raise
        problem = error.message
    await stop_instance(local, instance, grace)
    return problem


async def remove_instance(local: LocalServer, instance: Instance) -> None:
    """Raises LocalError, but not if it is gone."""
    try:
        await local.call("DELETE", f"/instances/{instance.id}", query={"graceful_shutdown": "false"})
    except LocalRefused as error:
        if error.http != 404:
            raise
