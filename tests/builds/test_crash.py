"""SIGKILL at every write and commit of two builds on one builder: the next server ends what was accepted, its queue
goes on, and nothing is left beside it. The machine of a build is a fake whose state is files, so that it outlives a
server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from functools import partial
from pathlib import Path

import trio

from hypeman.builds.records import BUILDERS, BUILDS
from hypeman.builds.service import Builds, Settings
from hypeman.builds.types import Builder, BuildProvenance, BuildStatus, CreateBuilderRequest
from hypeman.builds.work import DOCKERFILE, JOURNAL, SOURCE, Job, Report, Result
from hypeman.host.files import Files
from hypeman.paths import Paths
from hypeman.store import Store
from tests.builds.conftest import DIGEST, form, read_all, statuses
from tests.crash import run_until_killed

Story = Callable[[Builds], Awaitable[None]]


class FilesWorker:
    """VMs, caches and images are files of these directories."""

    def __init__(self, root: Path) -> None:
        self.vms, self.caches, self.images = (root / name for name in ("vms", "caches", "images"))
        for path in (self.vms, self.caches, self.images):
            path.mkdir(parents=True, exist_ok=True)

    async def build(self, job: Job, report: Report) -> Result:
        assert job.builder is not None and job.source.exists()
        await self.make_cache(job.builder)  # as the real one does
        cache = self.caches / job.builder.id
        assert {path.name for path in self.images.iterdir()} <= set(cache.read_text().split()), "the cache is lost"
        assert not list(self.vms.iterdir()), "another VM has the cache"
        (self.vms / job.build_id).touch()
        with cache.open("a") as file:
            file.write(f"{job.build_id}\n")
        await report.vm(f"vm-{job.build_id}")
        report.log("a step")
        await report.pushing()
        report.publishing()
        (self.images / job.build_id).touch()
        return Result(DIGEST, job.images[0], BuildProvenance())

    async def clean(self, build_id: str) -> None:
        (self.vms / build_id).unlink(missing_ok=True)

    async def clean_all(self, builders: Collection[str]) -> None:
        for path in (*self.vms.iterdir(), *(path for path in self.caches.iterdir() if path.name not in builders)):
            path.unlink()

    async def make_cache(self, builder: Builder) -> None:
        (self.caches / builder.id).touch()

    async def remove_cache(self, builder_id: str) -> None:
        (self.caches / builder_id).unlink(missing_ok=True)


async def live(paths: Paths, story: Story) -> None:
    store = Store.open(paths.store)
    worker = FilesWorker(paths.data_dir / "machine")
    builds = Builds(store=store, paths=paths, files=Files(), worker=worker, settings=Settings())
    await Files().remove(paths.tmp)  # as each start of the server does
    await Files().make_dir(paths.tmp)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await nursery.start(builds.run)
        with trio.fail_after(60):
            await story(builds)
        nursery.cancel_scope.cancel()
    store.close()


async def two_builds(builds: Builds) -> None:
    if not await builds.list_builders(tags={}):
        await builds.create_builder(CreateBuilderRequest(id="b"))
    for _ in range(2):
        await builds.create(form(builder_id="b", dockerfile="FROM scratch"))
    await all_ready(builds)


async def all_ready(builds: Builds) -> None:
    while not all(build.status.is_final for build in await builds.list(tags={})) or builds.statistics()["active"]:
        await trio.sleep(0.005)
    for build in await builds.list(tags={}):
        assert statuses(await read_all(builds, build))[-1] is build.status is BuildStatus.READY


def test_killed_at_every_write(tmp_path: Path) -> None:
    at, reached = 0, True
    while reached:
        at += 1
        paths = Paths(tmp_path / f"data-{at}", tmp_path / "run")
        reached = run_until_killed(partial(live, paths, two_builds), tmp_path / f"journal-{at}", at)
        try:
            trio.run(live, paths, all_ready)
            check(paths)
            trio.run(live, paths, two_builds)
            check(paths)
        except BaseException as error:
            error.add_note(f"killed at point {at}")
            raise
    assert at > 25


def check(paths: Paths) -> None:
    """Of a server that has ended what it had to do."""
    store = Store.open(paths.store)
    builds, builders = store.read(lambda txn: (dict(txn.scan(BUILDS)), list(txn.keys(BUILDERS))))
    store.close()
    machine = FilesWorker(paths.data_dir / "machine")
    names = {name: {path.name for path in getattr(machine, name).iterdir()} for name in ("vms", "images")}
    assert names == {"vms": set(), "images": set(builds)}
    assert {path.name for path in machine.caches.iterdir()} <= set(builders)
    directories = {path.name: {each.name for each in path.iterdir()} for path in paths.builds.glob("*")}
    assert directories == {build_id: {JOURNAL} for build_id in builds}, f"no {SOURCE}, no {DOCKERFILE}"
    assert not list(paths.tmp.iterdir())
