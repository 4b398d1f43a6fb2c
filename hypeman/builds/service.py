"""Builds: accepted, queued, run by a worker, and recorded until their end.

    request ──► files published ──► record (queued) ──► building ──► pushing ──► ready
                                       │                   └───────────┴───────► failed
                                       └───────────────────┴───────────┴───────► cancelled

- The queue is the records: oldest first, one build at a time per builder, ``at_once`` in all. A restart changes nothing
  about the order.
- A build that a restart interrupts begins again, with the cache that it had made by then; it fails if it had secrets of
  its caller, which are in memory only, or after three interruptions.
- The image appears when everything of it is stored, and the build is ready after that. Until then it can be cancelled.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import trio
from msgspec import UNSET

from hypeman.actor import acting
from hypeman.builds.builders import Builders
from hypeman.builds.journal import BuildEvents, Journal
from hypeman.builds.receiving import Receiver
from hypeman.builds.records import (
    BUILDERS,
    BUILDS,
    BuildRow,
    all_builds,
    find_build,
    find_builder,
    note_build,
    put_builder,
    trim,
)
from hypeman.builds.request import Borrowed, Parsed, parse_fields
from hypeman.builds.types import Build, Builder, BuilderStatus, BuildStatus, CreateBuilderRequest
from hypeman.builds.work import DOCKERFILE, JOURNAL, SOURCE, BuildFailed, Job, Result, Worker
from hypeman.errors import Conflict, HypemanError, InvalidRequest, NotFound
from hypeman.host.files import Files
from hypeman.ids import new_id, tags_match
from hypeman.images.reference import parse_reference
from hypeman.paths import Paths
from hypeman.store.store import Store
from hypeman.store.tables import Txn
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)

MAX_QUEUED = 100
MAX_TIMEOUT = 24 * 3600
"""Seconds that a build may request: it holds one of few places."""
_ATTEMPTS = 3
_CLEAN_SECONDS = 120.0
_CLEAN_RETRY = 2.0


class Settings(msgspec.Struct, frozen=True):
    at_once: int = 2
    timeout: int = 600
    """Seconds, for builds that do not say."""
    disk_size_gb: int = 20
    max_source: int = 4 << 30
    max_sources: int = 20 << 30
    secrets_dir: str = ""
    builder_idle: float = 0.0
    max_cpus: int = 16
    max_memory: int = 32 << 30


class _Running:
    """An attempt that is under way."""

    def __init__(self, builder_id: str | None) -> None:
        self.builder_id = builder_id
        self.scope = trio.CancelScope()
        self.publishing = False


class Builds:
    """One per server. ``run``, started in a nursery, does the work."""

    def __init__(
        self,
        *,
        store: Store,
        paths: Paths,
        files: Files,
        worker: Worker,
        settings: Settings,
        room: Callable[[], int] = lambda: sys.maxsize,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``room``: bytes that contexts may have, from what the disk has free."""
        self._store = store
        self._paths = paths
        self._files = files
        self._worker = worker
        self._settings = settings
        self._now = now
        self._borrowed: dict[str, Borrowed] = {}
        self._journals: dict[str, Journal] = {}
        self._running: dict[str, _Running] = {}
        self._changed = trio.Event()
        self._receiver = Receiver(max_source=settings.max_source, max_sources=settings.max_sources, room=room)
        self.builders = Builders(
            store=store,
            worker=worker,
            disk_size_gb=settings.disk_size_gb,
            idle=settings.builder_idle,
            active=self._active,
            changed=self._look,
            now=now,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Settle what an earlier server left, then work until cancelled."""
        try:
            await self._settle()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._schedule)
                nursery.start_soon(self.builders.run)
                task_status.started()
        finally:
            for journal in self._journals.values():
                journal.close()

    # ── The API: builders ────────────────────────────────────────────────────────────────────────

    async def list_builders(self, *, tags: Mapping[str, str]) -> Sequence[Builder]:
        return await self.builders.list(tags=tags)

    async def get_builder(self, builder_id: str) -> Builder:
        return await self.builders.get(builder_id)

    async def create_builder(self, request: CreateBuilderRequest) -> Builder:
        return await self.builders.create(request)

    async def delete_builder(self, builder_id: str) -> None:
        await self.builders.delete(builder_id)

    async def prune_builder(self, builder_id: str) -> Builder:
        return await self.builders.prune(builder_id)

    # ── The API: builds ──────────────────────────────────────────────────────────────────────────

    async def list(self, *, tags: Mapping[str, str]) -> Sequence[Build]:
        """Newest first."""

        def read(txn: Txn) -> list[Build]:
            rows = all_builds(txn)
            positions = _positions(rows)
            found = [row.build for row in rows if tags_match(row.build.tags or {}, tags)]
            return [_view(build, positions) for build in reversed(found)]

        return self._store.read(read)

    async def get(self, build_id: str) -> Build:
        """Raises NotFound."""

        def read(txn: Txn) -> Build:
            build = find_build(txn, build_id).build
            return _view(build, _positions(all_builds(txn)) if build.status is BuildStatus.QUEUED else {})

        return self._store.read(read)

    async def events(self, build_id: str, *, follow: bool, progress: bool) -> BuildEvents:
        """From the begin of the build. Raises NotFound."""
        self._store.read(lambda txn: find_build(txn, build_id))
        path = self._paths.build(build_id) / JOURNAL
        if not await trio.to_thread.run_sync(path.exists):
            raise NotFound(f"build {build_id} no longer has a journal")

        def final() -> BuildStatus | None:
            row = self._store.read(lambda txn: txn.get(BUILDS, build_id))
            return row.build.status if row is not None and row.build.status.is_final else None

        return BuildEvents(path, lambda: self._journals.get(build_id), final, follow=follow, progress=progress)

    async def create(self, parts: AsyncIterator[tuple[str, bytes]]) -> Build:
        """Receive a form, field by field in pieces, and queue its build.

        Raises InvalidRequest (``invalid_request``, ``invalid_source``), NotFound, Conflict, InsufficientResources.
        """
        build_id = new_id()
        side = self._paths.tmp / f"build-{build_id}"
        await self._files.make_dir(side)
        final = self._paths.build(build_id)
        published = False
        try:
            fields, source_hash = await self._receiver.receive(parts, build_id, side / SOURCE)
            parsed = parse_fields(fields)
            self._check(parsed)
            if parsed.dockerfile:
                await self._files.write(side / DOCKERFILE, parsed.dockerfile)
            build = Build(
                id=build_id,
                status=BuildStatus.QUEUED,
                created_at=self._now(),
                builder_id=parsed.builder_id or None,
                tags=parsed.tags or UNSET,
            )
            row = BuildRow(build, parsed.spec, bool(parsed.borrowed), source_hash=source_hash)
            await self._files.make_dir(self._paths.builds)
            await self._files.publish(side, final)
            published = True
            self._borrowed[build_id] = parsed.borrowed
            gone = await self._store.write(lambda txn: self._insert(txn, row))
        except BaseException:
            self._borrowed.pop(build_id, None)
            self._receiver.forget(build_id)
            with trio.CancelScope(shield=True):
                await self._files.remove(final if published else side)
            raise
        with trio.CancelScope(shield=True):
            self._open_journal(build_id).status(BuildStatus.QUEUED)
            for old in gone:
                await self._files.remove(self._paths.build(old))
        self._look()
        return await self.get(build_id)

    async def cancel(self, build_id: str) -> None:
        """Raises NotFound; Conflict if it is over, or its image is just appearing."""
        row = self._store.read(lambda txn: find_build(txn, build_id))
        running = self._running.get(build_id)
        stopped = False
        if running is not None and not row.build.status.is_final:
            if running.publishing:
                raise Conflict(f"build {build_id} is complete; its image is being stored")
            stopped = not running.scope.cancel_called
            running.scope.cancel()

        def write(txn: Txn) -> None:
            row = find_build(txn, build_id)
            if row.build.status is BuildStatus.CANCELLED and stopped:
                return  # recorded by its attempt
            if row.build.status.is_final:
                raise Conflict(f"build {build_id} is {row.build.status.value}")
            self._put_end(txn, row, status=BuildStatus.CANCELLED)

        with trio.CancelScope(shield=True):
            await self._store.write(write)
            await self._closed(build_id, BuildStatus.CANCELLED)
        self._look()

    def _check(self, parsed: Parsed) -> None:
        """What depends on this server. Raises InvalidRequest."""
        spec, settings = parsed.spec, self._settings
        if spec.cpus > settings.max_cpus:
            raise InvalidRequest(f"cpus is {spec.cpus}; at most {settings.max_cpus} are allowed")
        if not 256 <= spec.memory_mb <= settings.max_memory >> 20:
            raise InvalidRequest(f"memory_mb is {spec.memory_mb}; it must be 256 to {settings.max_memory >> 20}")
        if spec.timeout > max(MAX_TIMEOUT, settings.timeout):
            raise InvalidRequest(f"timeout_seconds is {spec.timeout}, at most {MAX_TIMEOUT} are allowed")
        for name in parsed.from_server:
            if not settings.secrets_dir or not Path(settings.secrets_dir, name).is_file():
                raise InvalidRequest(f"secret {name} has no value, and build.secrets_dir has no file of that name")

    def _insert(self, txn: Txn, row: BuildRow) -> Sequence[str]:
        """Raises NotFound, Conflict. Returns ids of builds that were dropped."""
        build = row.build
        if build.builder_id is not None:
            builder = find_builder(txn, build.builder_id)
            if builder.status is BuilderStatus.DELETING:
                raise Conflict(f"builder {builder.id!r} is being deleted")
        if sum(not other.build.status.is_final for other in all_builds(txn)) >= MAX_QUEUED:
            raise Conflict(f"{MAX_QUEUED} builds are already waiting", retryable=True)
        txn.put(BUILDS, build.id, row)
        note_build(txn, build, "created")
        return trim(txn)

    # ── The queue ────────────────────────────────────────────────────────────────────────────────

    def _look(self) -> None:
        """Something has changed that may let a build begin."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _active(self, builder_id: str) -> str | None:
        """The build that holds a builder's cache; also one that is over, until its VM is gone."""
        return next((name for name, running in self._running.items() if running.builder_id == builder_id), None)

    async def _settle(self) -> None:
        """Queue again what was interrupted, and remove files of no build."""

        def settle(txn: Txn) -> list[BuildRow]:
            for row in all_builds(txn):
                if row.build.status.is_final:
                    continue
                if row.borrowed:
                    error = (
                        "interrupted by a restart of the server, and its secrets were not kept; start the build again"
                    )
                    self._put_end(txn, row, status=BuildStatus.FAILED, error=error)
                elif row.build.status is not BuildStatus.QUEUED:
                    if row.attempts >= _ATTEMPTS:
                        error = f"interrupted by a restart of the server {row.attempts} times"
                        self._put_end(txn, row, status=BuildStatus.FAILED, error=error)
                    else:
                        build = msgspec.structs.replace(row.build, status=BuildStatus.QUEUED, builder_instance_id=None)
                        txn.put(BUILDS, build.id, msgspec.structs.replace(row, build=build))
            return all_builds(txn)

        before = {row.build.id: row.build.status for row in self._store.read(all_builds)}
        rows = await self._store.write(settle)
        for row in rows:
            build = row.build
            if not self._paths.build(build.id).is_dir():
                continue
            if before[build.id].is_final:
                await self._drop_source(build.id)  # the old server may not have come to it
                continue
            journal = self._open_journal(build.id)
            if build.status is BuildStatus.FAILED:
                journal.log(build.error or "")
                await self._closed(build.id, build.status)
            elif before[build.id] is not BuildStatus.QUEUED:
                journal.log("the server was restarted; the build begins again")
                journal.status(BuildStatus.QUEUED)
            if not build.status.is_final:
                self._remember_source(build.id)
        known = {row.build.id for row in rows}
        if self._paths.builds.is_dir():
            for directory in self._paths.builds.iterdir():
                if directory.name not in known:
                    await self._files.remove(directory)

    def _remember_source(self, build_id: str) -> None:
        with suppress(FileNotFoundError):  # the build fails, and says so
            self._receiver.remember(build_id, (self._paths.build(build_id) / SOURCE).stat().st_size)

    async def _schedule(self) -> None:
        while True:
            try:
                builders = self._store.read(lambda txn: set(txn.keys(BUILDERS)))
                await self._worker.clean_all(builders)
                break
            except HypemanError as error:
                log.error("VMs of earlier builds cannot be removed yet: %s", error.message)
                await trio.sleep(_CLEAN_RETRY)
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._changed
                for row in self._startable():
                    await self._begin(row, nursery)
                await changed.wait()

    def _startable(self) -> Sequence[BuildRow]:
        """Queued builds that can begin now, oldest first."""

        def read(txn: Txn) -> list[BuildRow]:
            free = self._settings.at_once - len(self._running)
            busy = {running.builder_id for running in self._running.values()}
            found: list[BuildRow] = []
            for row in all_builds(txn):
                builder_id = row.build.builder_id
                if row.build.status is not BuildStatus.QUEUED or len(found) >= free:
                    continue
                if builder_id is not None:
                    builder = txn.get(BUILDERS, builder_id)
                    if builder_id in busy or (builder is not None and builder.builder.status is BuilderStatus.PRUNING):
                        continue
                    busy.add(builder_id)
                found.append(row)
            return found

        return self._store.read(read)

    async def _begin(self, row: BuildRow, nursery: trio.Nursery) -> None:
        build_id = row.build.id
        now = self._now()

        def write(txn: Txn) -> BuildRow | None:
            found = txn.get(BUILDS, build_id)
            if found is None or found.build.status is not BuildStatus.QUEUED:
                return None  # cancelled meanwhile
            build = msgspec.structs.replace(found.build, status=BuildStatus.BUILDING, started_at=now)
            begun = msgspec.structs.replace(found, build=build, attempts=found.attempts + 1)
            txn.put(BUILDS, build_id, begun)
            if build.builder_id is not None and (known := txn.get(BUILDERS, build.builder_id)) is not None:
                put_builder(txn, msgspec.structs.replace(known.builder, last_used_at=now))
            return begun

        running = self._running[build_id] = _Running(row.build.builder_id)
        try:
            begun = await self._store.write(write)
        except BaseException:
            del self._running[build_id]
            raise
        if begun is None:
            del self._running[build_id]
            self._look()
            return
        self._tell(build_id, BuildStatus.BUILDING)
        nursery.start_soon(self._attempt, begun, running)

    async def _attempt(self, row: BuildRow, running: _Running) -> None:
        """Run a build to its end. Cancelled from outside, the server stops, and the next one settles it."""
        build_id = row.build.id
        status, error, result = BuildStatus.FAILED, "", None
        timeout = row.spec.timeout or self._settings.timeout
        started = trio.current_time()
        with acting(None):
            limit = trio.CancelScope(deadline=trio.current_time() + timeout)
            try:
                with running.scope, limit:
                    result = await self._worker.build(self._job(row), _Report(self, build_id, running))
                    status = BuildStatus.READY
            except BuildFailed as failure:
                error = str(failure)
            except HypemanError as failure:
                error = failure.message
            except OSError as failure:
                error = f"the context cannot be read: {failure.strerror}"
            except Exception:
                log.exception("build %s failed", build_id)
                error = "internal error; the cause is in the server's log"
            if result is None and not error:
                if running.scope.cancelled_caught:
                    status = BuildStatus.CANCELLED
                else:
                    error = f"not finished within {timeout} s (timeout_seconds)"
            with trio.CancelScope(shield=True):
                await self._end(row, status, error, result)
                metrics.builds.labels(status.value).inc()
                metrics.build_seconds.labels(status.value).observe(trio.current_time() - started)
                await self._clean(build_id)
                self._running.pop(build_id, None)
                self._look()

    def _job(self, row: BuildRow) -> Job:
        build = row.build
        borrowed = self._borrowed.get(build.id, Borrowed())
        own: dict[str, bytes] = {}
        for name, _ in row.spec.secrets:
            if name not in borrowed.secrets:
                try:
                    own[name] = Path(self._settings.secrets_dir, name).read_bytes()
                except OSError as error:
                    raise BuildFailed(f"secret {name} cannot be read on the server: {error.strerror}") from None
        builder = None
        if build.builder_id is not None:
            builder = self._store.read(lambda txn: find_builder(txn, build.builder_id or ""))
        return Job(
            build_id=build.id,
            spec=row.spec,
            images=row.spec.images or (str(parse_reference(f"builds/{build.id}")),),
            directory=self._paths.build(build.id),
            borrowed=borrowed,
            secrets={**own, **borrowed.secrets},
            builder=builder,
            source_hash=row.source_hash,
        )

    async def _clean(self, build_id: str) -> None:
        """Bounded: what cannot be removed now is removed by the next start."""
        with trio.move_on_after(_CLEAN_SECONDS) as scope:
            while True:
                try:
                    await self._worker.clean(build_id)
                    return
                except HypemanError as error:
                    log.warning("the VM of build %s cannot be removed yet: %s", build_id, error.message)
                await trio.sleep(_CLEAN_RETRY)
        if scope.cancelled_caught:
            log.error("the VM of build %s is left; the next start removes it", build_id)

    # ── Records ──────────────────────────────────────────────────────────────────────────────────

    async def _change(self, build_id: str, **fields: object) -> None:
        """Of a build that is not over."""

        def write(txn: Txn) -> None:
            row = txn.get(BUILDS, build_id)
            if row is not None and not row.build.status.is_final:
                build = msgspec.structs.replace(row.build, **fields)
                txn.put(BUILDS, build_id, msgspec.structs.replace(row, build=build))

        await self._store.write(write)

    def _put_end(self, txn: Txn, row: BuildRow, *, status: BuildStatus, **fields: object) -> None:
        now = self._now()
        begun = row.build.started_at
        duration = None if begun is None else max(0, math.floor((now - begun).total_seconds() * 1000))
        build = msgspec.structs.replace(row.build, status=status, completed_at=now, duration_ms=duration, **fields)
        txn.put(BUILDS, build.id, msgspec.structs.replace(row, build=build))
        note_build(txn, build, status.value)

    async def _end(self, row: BuildRow, status: BuildStatus, error: str, result: Result | None) -> None:
        build_id = row.build.id
        fields: dict[str, object] = {}
        if result is not None:
            fields = {"image_digest": result.digest, "image_ref": result.ref, "provenance": result.provenance}
        elif status is BuildStatus.FAILED:
            fields = {"error": error[:2000]}
            log.info("build %s failed: %s", build_id, error[:2000])

        def write(txn: Txn) -> bool:
            found = txn.get(BUILDS, build_id)
            if found is None or found.build.status.is_final:
                return False
            self._put_end(txn, found, status=status, **fields)
            return True

        if await self._store.write(write):
            journal = self._journals.get(build_id)
            if journal is not None and error:
                journal.log(f"ERROR: {error}")
            await self._closed(build_id, status)

    async def _closed(self, build_id: str, status: BuildStatus) -> None:
        """After the record: the last event, and what is no longer needed."""
        journal = self._journals.pop(build_id, None)
        if journal is not None:
            journal.status(status)
            journal.close()
        self._borrowed.pop(build_id, None)
        await self._drop_source(build_id)

    async def _drop_source(self, build_id: str) -> None:
        directory = self._paths.build(build_id)
        for name in (SOURCE, DOCKERFILE):
            await self._files.remove(directory / name)
        self._receiver.forget(build_id)

    def _open_journal(self, build_id: str) -> Journal:
        journal = self._journals[build_id] = Journal(self._paths.build(build_id) / JOURNAL, self._now)
        return journal

    def _tell(self, build_id: str, status: BuildStatus) -> None:
        journal = self._journals.get(build_id)
        if journal is not None:
            journal.status(status)

    def statistics(self) -> dict[str, int]:
        """Builds running and waiting."""
        rows = self._store.read(all_builds)
        queued = sum(row.build.status is BuildStatus.QUEUED for row in rows)
        return {"active": len(self._running), "queued": queued}


class _Report:
    """Implements ``Report`` for one attempt."""

    def __init__(self, builds: Builds, build_id: str, running: _Running) -> None:
        self._builds = builds
        self._build_id = build_id
        self._running = running

    def log(self, text: str) -> None:
        if (journal := self._builds._journals.get(self._build_id)) is not None:
            journal.log(text)

    def progress(self, line: bytes) -> None:
        if (journal := self._builds._journals.get(self._build_id)) is not None:
            journal.progress(line)

    async def vm(self, instance_id: str) -> None:
        await self._builds._change(self._build_id, builder_instance_id=instance_id)

    async def pushing(self) -> None:
        await self._builds._change(self._build_id, status=BuildStatus.PUSHING)
        self._builds._tell(self._build_id, BuildStatus.PUSHING)

    def publishing(self) -> None:
        self._running.publishing = True


def _positions(rows: Sequence[BuildRow]) -> dict[str, int]:
    queued = [row.build.id for row in rows if row.build.status is BuildStatus.QUEUED]
    return {build_id: position for position, build_id in enumerate(queued, 1)}


def _view(build: Build, positions: Mapping[str, int]) -> Build:
    position = positions.get(build.id)
    return build if position is None else msgspec.structs.replace(build, queue_position=position)
