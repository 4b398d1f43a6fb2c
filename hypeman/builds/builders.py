"""Builders: their records and caches.

The record is written before the cache is made or emptied and says so (``pruning``, ``deleting``): a server that was
killed meanwhile continues when it starts. What a builder is busy with is known from the builds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta

import msgspec
import trio
from msgspec import UNSET

from hypeman.actor import acting
from hypeman.builds.records import (
    BUILDERS,
    BuildRow,
    all_builds,
    find_builder,
    note_builder,
    put_builder,
    set_builder_status,
)
from hypeman.builds.types import Builder, BuilderStatus, BuildStatus, CreateBuilderRequest
from hypeman.builds.work import Worker
from hypeman.errors import AlreadyExists, Conflict, HypemanError, InsufficientResources, InvalidRequest
from hypeman.host.periodic import repeat
from hypeman.ids import check_tags, new_id, tags_match
from hypeman.store.store import Store
from hypeman.store.tables import Txn

log = logging.getLogger(__name__)

_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,54}")
"""Short enough for the cache's volume to be named after it."""
_REAP_SECONDS = 300.0
MAX_BUILDERS = 1000


class Builders:
    """One per server; ``Builds`` owns it."""

    def __init__(
        self,
        *,
        store: Store,
        worker: Worker,
        disk_size_gb: int,
        idle: float,
        active: Callable[[str], str | None],
        changed: Callable[[], None],
        now: Callable[[], datetime],
    ) -> None:
        """``idle``: seconds after which an unused builder is removed; 0: never. ``active``: the build that holds a
        builder; ``changed`` is called when a builder has become ready."""
        self._store = store
        self._worker = worker
        self._disk_size_gb = disk_size_gb
        self._idle = idle
        self._active = active
        self._changed = changed
        self._now = now
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Continue what was interrupted, then remove idle builders, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for builder in self._store.read(lambda txn: [row.builder for _, row in txn.scan(BUILDERS)]):
                if builder.status is BuilderStatus.PRUNING:
                    self._start(self._prune, builder)
                elif builder.status is BuilderStatus.DELETING:
                    self._start(self._remove, builder)
            await repeat(self.reap, interval=_REAP_SECONDS, what="removal of idle builders")

    async def list(self, *, tags: Mapping[str, str]) -> Sequence[Builder]:
        """Oldest first."""

        def read(txn: Txn) -> list[Builder]:
            builds = all_builds(txn)
            found = [row.builder for _, row in txn.scan(BUILDERS)]
            return [self._view(one, builds) for one in found if tags_match(one.tags or {}, tags)]

        return sorted(self._store.read(read), key=lambda one: (one.created_at, one.id))

    async def get(self, builder_id: str) -> Builder:
        """Raises NotFound."""
        return self._store.read(lambda txn: self._view(find_builder(txn, builder_id), all_builds(txn)))

    async def create(self, request: CreateBuilderRequest) -> Builder:
        """Raises InvalidRequest, AlreadyExists, Conflict ``quota_exceeded``."""
        builder_id = request.id or new_id()
        if not _ID.fullmatch(builder_id):
            raise InvalidRequest(
                f"id {builder_id[:80]!r} must be 1 to 55 letters, digits, '_', '.' and '-', starting with a letter "
                "or digit"
            )
        if request.name is not None and "\0" in request.name:
            raise InvalidRequest("name must not contain NUL")
        builder = Builder(
            id=builder_id,
            name=request.name or UNSET,
            disk_size_gb=request.disk_size_gb or self._disk_size_gb,
            status=BuilderStatus.READY,
            created_at=self._now(),
            tags=check_tags(request.tags) or UNSET,
        )

        def insert(txn: Txn) -> None:
            if txn.exists(BUILDERS, builder.id):
                raise AlreadyExists(f"a builder with id {builder.id!r} already exists")
            if sum(1 for _ in txn.keys(BUILDERS)) >= MAX_BUILDERS:
                raise Conflict(f"there are already {MAX_BUILDERS} builders", code="quota_exceeded")
            put_builder(txn, builder)
            note_builder(txn, builder, "created")

        await self._store.write(insert)
        try:
            await self._worker.make_cache(builder)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self._store.write(lambda txn: _delete(txn, builder))
            if isinstance(error, InsufficientResources):
                raise Conflict(error.message, code="quota_exceeded") from None
            raise
        return builder

    async def delete(self, builder_id: str) -> None:
        """Raises NotFound; Conflict while it has builds."""
        builder = await self._store.write(lambda txn: self._claim(txn, builder_id, BuilderStatus.DELETING))
        await self._finish(self._remove, builder)

    async def prune(self, builder_id: str) -> Builder:
        """Begin to empty its cache. Raises NotFound; Conflict while it has builds."""
        builder = await self._store.write(lambda txn: self._claim(txn, builder_id, BuilderStatus.PRUNING))
        self._start(self._prune, builder)
        return builder

    async def reap(self) -> None:
        """Remove builders that have been unused for ``idle`` seconds."""
        if not self._idle:
            return
        oldest = self._now() - timedelta(seconds=self._idle)
        for builder in await self.list(tags={}):
            used = builder.last_used_at or builder.created_at
            if builder.status is BuilderStatus.READY and not builder.queued_builds and used < oldest:
                try:
                    with acting(None):
                        await self.delete(builder.id)
                except HypemanError as error:  # used or removed meanwhile
                    log.info("idle builder %s is kept: %s", builder.id, error.message)
                else:
                    log.info("removed builder %s, unused since %s", builder.id, used.isoformat())

    # Working

    def _claim(self, txn: Txn, builder_id: str, status: BuilderStatus) -> Builder:
        builder = self._view(find_builder(txn, builder_id), all_builds(txn))
        if builder.active_build_id or builder.queued_builds:
            raise Conflict(f"builder {builder.id!r} has builds", retryable=True)
        if builder.status in (BuilderStatus.PRUNING, BuilderStatus.DELETING):
            raise Conflict(f"builder {builder.id!r} is {builder.status.value}", retryable=True)
        claimed = msgspec.structs.replace(builder, status=status)
        put_builder(txn, claimed)
        return claimed

    def _start(self, work: Callable[[Builder], Awaitable[None]], builder: Builder) -> None:
        assert self._nursery is not None, "it runs"
        self._nursery.start_soon(self._guarded, work, builder)

    async def _finish(self, work: Callable[[Builder], Awaitable[None]], builder: Builder) -> None:
        """Carry out ``work``, also if the caller leaves meanwhile. Raises what it raises."""
        outcome: list[BaseException] = []
        done = trio.Event()

        async def carry_out(which: Builder) -> None:
            try:
                await work(which)
            except HypemanError as error:
                outcome.append(error)
                raise
            finally:
                done.set()

        self._start(carry_out, builder)
        await done.wait()
        if outcome:
            raise outcome[0]

    async def _guarded(self, work: Callable[[Builder], Awaitable[None]], builder: Builder) -> None:
        with acting(None):
            try:
                await work(builder)
            except HypemanError as error:
                log.error("builder %s: %s", builder.id, error.message)
                await self._store.write(lambda txn: set_builder_status(txn, builder.id, BuilderStatus.ERROR))

    async def _remove(self, builder: Builder) -> None:
        await self._worker.remove_cache(builder.id)
        await self._store.write(lambda txn: _delete(txn, builder))

    async def _prune(self, builder: Builder) -> None:
        await self._worker.remove_cache(builder.id)
        await self._worker.make_cache(builder)

        def ready(txn: Txn) -> None:
            set_builder_status(txn, builder.id, BuilderStatus.READY)
            note_builder(txn, builder, "pruned")

        await self._store.write(ready)
        self._changed()

    def _view(self, builder: Builder, builds: Sequence[BuildRow]) -> Builder:
        """``builds``: all, oldest first."""
        queued = tuple(
            row.build.id
            for row in builds
            if row.build.builder_id == builder.id and row.build.status is BuildStatus.QUEUED
        )
        return msgspec.structs.replace(builder, queued_builds=queued, active_build_id=self._active(builder.id))


def _delete(txn: Txn, builder: Builder) -> None:
    if txn.delete(BUILDERS, builder.id):
        note_builder(txn, builder, "deleted")
