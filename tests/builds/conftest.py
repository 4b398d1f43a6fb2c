"""Builds on a real store, with a worker that is a fake."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from hypeman.builds.service import Builds, Settings
from hypeman.builds.types import Build, Builder, BuildEvent, BuildProvenance, BuildStatus
from hypeman.builds.work import Job, Report, Result
from hypeman.errors import HypemanError
from hypeman.host.files import Files
from hypeman.paths import Paths
from hypeman.store import Store

CONTEXT = gzip.compress(b"a tar")
DIGEST = "sha256:" + "1" * 64


@dataclass
class FakeWorker:
    """A build waits until ``finish``; what is left of one, and of caches, is in ``left`` and ``caches``."""

    begun: list[str] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    outcomes: dict[str, Result | Exception] = field(default_factory=dict)
    changed: trio.Event = field(default_factory=trio.Event)
    left: set[str] = field(default_factory=set)
    """Builds whose VM exists."""
    caches: dict[str, int] = field(default_factory=dict)
    """Builder and how often its cache was made."""
    full: HypemanError | None = None
    """Raised when a cache is to be made."""
    stuck: bool = False
    """VMs cannot be removed."""
    holds: trio.Event | None = None
    """``remove_cache`` waits for it."""

    async def build(self, job: Job, report: Report) -> Result:
        self.begun.append(job.build_id)
        self.jobs[job.build_id] = job
        self.reports[job.build_id] = report
        self.left.add(job.build_id)
        await report.vm(f"vm-{job.build_id}")
        self._tell()
        while job.build_id not in self.outcomes:
            await self.changed.wait()
        outcome = self.outcomes[job.build_id]
        if isinstance(outcome, Exception):
            raise outcome
        await report.pushing()
        report.publishing()
        return outcome

    def finish(self, build_id: str, outcome: Result | Exception | None = None) -> None:
        name = f"docker.io/builds/{build_id}:latest"
        self.outcomes[build_id] = outcome or Result(DIGEST, name, BuildProvenance(buildkit_version="fake"))
        self._tell()

    def _tell(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    async def wait_begun(self, build_id: str) -> None:
        with trio.fail_after(10):
            while build_id not in self.begun:
                await self.changed.wait()

    async def clean(self, build_id: str) -> None:
        if self.stuck:
            raise HypemanError("the VM does not end")
        self.left.discard(build_id)

    async def clean_all(self, builders: Collection[str]) -> None:
        self.left.clear()
        self.caches = {name: made for name, made in self.caches.items() if name in builders}

    async def make_cache(self, builder: Builder) -> None:
        if self.full is not None:
            raise self.full
        self.caches[builder.id] = self.caches.get(builder.id, 0) + 1

    async def remove_cache(self, builder_id: str) -> None:
        if self.holds is not None:
            await self.holds.wait()


async def form(**fields: Any) -> AsyncGenerator[tuple[str, bytes]]:
    """The fields of a request; what is no text is sent as JSON."""
    for name, value in {"source": CONTEXT, **fields}.items():
        data = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
        yield name, b""
        for at in range(0, len(data), 7):
            yield name, data[at : at + 7]


class Bench:
    """One data directory, and servers on it one after another."""

    def __init__(self, store: Store, paths: Paths) -> None:
        self.store = store
        self.paths = paths
        self.worker = FakeWorker()
        self.settings = Settings()
        self.room = sys.maxsize

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Builds]:
        """A server, killed at the end of the block: nothing that it does afterwards is written."""
        builds = Builds(
            store=self.store,
            paths=self.paths,
            files=Files(),
            worker=self.worker,
            settings=self.settings,
            room=lambda: self.room,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(builds.run)
            yield builds
            nursery.cancel_scope.cancel()

    def restarted(self) -> None:
        """What only lived in the old server is gone."""
        left, caches = self.worker.left, self.worker.caches
        self.worker = FakeWorker(left=left, caches=caches)


@pytest.fixture
def bench(store: Store, paths: Paths) -> Bench:
    return Bench(store, paths)


async def ended(builds: Builds, build: Build) -> Build:
    """The build, once it is over."""
    return await until(builds, build, lambda found: found.status.is_final)


async def until(builds: Builds, build: Build, condition: Callable[[Build], bool]) -> Build:
    with trio.fail_after(10):
        while not condition(found := await builds.get(build.id)):
            await trio.sleep(0.005)
    return found


async def read_all(builds: Builds, build: Build, *, follow: bool = True, progress: bool = False) -> list[BuildEvent]:
    stream = await builds.events(build.id, follow=follow, progress=progress)
    with trio.fail_after(10):
        found = [event async for event in stream]
    await stream.aclose()
    return found


def statuses(events: list[BuildEvent]) -> list[BuildStatus]:
    return [event.status for event in events if isinstance(event.status, BuildStatus)]


def lines(events: list[BuildEvent]) -> list[str]:
    return [event.content for event in events if isinstance(event.content, str)]
