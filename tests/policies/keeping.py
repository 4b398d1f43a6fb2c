"""Instances on a host in memory, their policies, and a clock that jumps to the next deadline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import trio
import trio.testing

from hypeman.config import Config
from hypeman.events.log import read_after
from hypeman.guest.types import Exited
from hypeman.host.conntrack import Connection
from hypeman.hypervisor.interface import ExitReason
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import InstanceState
from hypeman.instances.service import Instances
from hypeman.instances.snapshots import Snapshots
from hypeman.policies.service import Policies
from tests.instances.fake_world import Lab

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)


class Threads:
    """Counts the threads that work: the clock must not move meanwhile."""

    def __init__(self) -> None:
        self.count = 0
        self.one_ended = trio.Event()

    async def run_sync(self, *arguments: Any, **options: Any) -> Any:
        """In place of ``trio.to_thread.run_sync``."""
        self.count += 1
        try:
            return await _run_sync(*arguments, **options)
        finally:
            self.count -= 1
            self.one_ended.set()
            self.one_ended = trio.Event()


_run_sync = trio.to_thread.run_sync


class FakeConnections:
    """The kernel's list of connections, and its events."""

    def __init__(self) -> None:
        self.known: set[Connection] = set()
        self._events: list[Connection] = []
        self._more = trio.Event()
        self.fails: OSError | None = None
        self.dropped = False
        self.listed: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint
        """What happens between the reading of the list and its return."""

    def listen(self) -> None:
        if self.fails is not None:
            raise self.fails

    def open(
        self,
        server: str,
        port: int = 80,
        *,
        source: str = "192.0.2.1",
        source_port: int = 40000,
        wanted: int = 0,
        udp: bool = False,
    ) -> Connection:
        made = Connection(source, source_port, server, port, True, wanted or port, udp)
        self.known.add(made)
        self._tell(made)
        return made

    def close(self, connection: Connection) -> None:
        self.known.discard(connection)
        self._tell(connection._replace(open=False))

    def drop_events(self) -> None:
        self.dropped = True
        self._more.set()

    def _tell(self, connection: Connection) -> None:
        self._events.append(connection)
        self._more.set()

    async def list(self, server: str = "", *, client: str = "") -> Sequence[Connection]:
        await trio.lowlevel.checkpoint()
        found = [each for each in self.known if server in ("", each.server) and client in ("", each.source)]
        await self.listed()
        return found

    async def wait_events(self) -> Sequence[Connection] | None:
        await self._more.wait()
        self._more = trio.Event()
        events, self._events = self._events, []
        dropped, self.dropped = self.dropped, False
        return None if dropped else events


class ClockedLab(Lab):
    clock: trio.testing.MockClock
    threads: Threads
    connections: FakeConnections
    offset = 0.0
    """Seconds by which the host's clock was set."""


class Kept:
    """Running instances with their policies."""

    def __init__(self, lab: ClockedLab, instances: Instances, policies: Policies, snapshots: Snapshots) -> None:
        self.lab = lab
        self.instances = instances
        self.policies = policies
        self.snapshots = snapshots

    def record(self, name: str = "one") -> InstanceRecord:
        return self.instances.board.find(name)

    def events(self, *actions: str) -> list[tuple[str, dict[str, Any]]]:
        """Logged events of instances with one of these actions: the action and its data."""
        logged = self.lab.store.read(lambda txn: read_after(txn, 0, 10_000))
        found = [(event.type.removeprefix("instance."), event.data or {}) for event in logged]
        return [(action, data) for action, data in found if action in actions]

    async def quiet(self) -> None:
        """Wait until nothing can happen before the clock moves: all tasks wait, and no thread works."""
        while True:
            await trio.testing.wait_all_tasks_blocked()
            if not self.lab.threads.count:
                return
            await self.lab.threads.one_ended.wait()

    async def sleep(self, seconds: float) -> None:
        """Let time pass, step by step."""
        clock = self.lab.clock
        end = clock.current_time() + seconds
        while (left := end - clock.current_time()) > 0:
            await self.quiet()
            clock.jump(min(left, 2.5))
        await self.quiet()

    async def until(self, condition: Callable[[], bool], seconds: float = 10_000) -> None:
        """Let time pass until ``condition``, at most ``seconds``."""
        end = self.lab.clock.current_time() + seconds
        await self.quiet()
        while not condition():
            assert self.lab.clock.current_time() < end, "it did not happen"
            await self.sleep(0.5)

    async def until_state(self, state: InstanceState, name: str = "one", *, boots: int | None = None) -> None:
        await self.until(lambda: self.record(name).state is state and boots in (None, self.record(name).boots))

    async def end(self, code: int, name: str = "one") -> None:
        """The workload ends with ``code``, and the guest with it."""
        guest = self.lab.guests[self.record(name).id]
        guest.tell(Exited(code, 0))
        await self.quiet()
        guest._process.end(ExitReason.POWEROFF)
        await self.until_state(InstanceState.STOPPED, name)


@asynccontextmanager
async def keeping(lab: ClockedLab) -> AsyncIterator[Kept]:
    """A server, until the block ends."""
    config = Config(data_dir=str(lab.paths.data_dir), run_dir=str(lab.paths.run_dir))
    async with lab.running() as instances, trio.open_nursery() as nursery:
        snapshots = lab.snapshots(instances)
        policies = Policies(
            instances=instances,
            store=lab.store,
            config=config,
            snapshots=snapshots,
            network=lab.network,  # type: ignore[arg-type]  # the part of it that is used
            connections=lab.connections,  # type: ignore[arg-type]  # the part of it that is used
            now=lab.now,
        )
        await nursery.start(policies.run)
        yield Kept(lab, instances, policies, snapshots)
        nursery.cancel_scope.cancel()
