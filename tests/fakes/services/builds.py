"""Builds and builders."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec

from hypeman.builds.types import (
    Build,
    Builder,
    BuilderStatus,
    BuildEvent,
    BuildEventType,
    BuildStatus,
    CreateBuilderRequest,
)
from hypeman.errors import (
    NotFound,
)
from hypeman.ids import new_id
from tests.fakes.services.common import NOW, Tags


class FakeBuilds:
    """Builds that stay queued, or are ready with ``outcome`` at once; ``fields`` has what was sent last."""

    def __init__(self) -> None:
        self.builders: dict[str, Builder] = {}
        self.builds: dict[str, Build] = {}
        self.fields: dict[str, bytes] = {}
        self.outcome: dict[str, str] = {}

    async def list_builders(self, *, tags: Tags) -> Sequence[Builder]:
        return list(self.builders.values())

    async def get_builder(self, builder_id: str) -> Builder:
        if builder_id not in self.builders:
            raise NotFound(f"there is no builder {builder_id}")
        return self.builders[builder_id]

    async def create_builder(self, request: CreateBuilderRequest) -> Builder:
        made = Builder(
            id=request.id or new_id(),
            disk_size_gb=request.disk_size_gb or 10,
            status=BuilderStatus.READY,
            created_at=NOW,
        )
        self.builders[made.id] = made
        return made

    async def delete_builder(self, builder_id: str) -> None:
        await self.get_builder(builder_id)
        del self.builders[builder_id]

    async def prune_builder(self, builder_id: str) -> Builder:
        return msgspec.structs.replace(await self.get_builder(builder_id), status=BuilderStatus.PRUNING)

    async def list(self, *, tags: Tags) -> Sequence[Build]:
        return list(self.builds.values())

    async def get(self, build_id: str) -> Build:
        if build_id not in self.builds:
            raise NotFound(f"there is no build {build_id}")
        return self.builds[build_id]

    async def create(self, parts: AsyncIterator[tuple[str, bytes]]) -> Build:
        self.fields = {}
        async for name, piece in parts:
            self.fields[name] = self.fields.get(name, b"") + piece
        made = Build(id=new_id(), status=BuildStatus.QUEUED, created_at=NOW, queue_position=1)
        if self.outcome:
            made = msgspec.structs.replace(made, status=BuildStatus.READY, queue_position=None, **self.outcome)
        self.builds[made.id] = made
        return made

    async def cancel(self, build_id: str) -> None:
        await self.get(build_id)
        self.builds[build_id] = msgspec.structs.replace(self.builds[build_id], status=BuildStatus.CANCELLED)

    async def events(self, build_id: str, *, follow: bool, progress: bool) -> FakeBuildEvents:
        await self.get(build_id)
        return FakeBuildEvents(follow)


class FakeBuildEvents:
    """One line, and, for who follows, the end."""

    def __init__(self, follow: bool) -> None:
        self._left = [BuildEvent(type=BuildEventType.LOG, timestamp=NOW, content="#1 FROM scratch")]
        if follow:
            self._left.append(BuildEvent(type=BuildEventType.STATUS, timestamp=NOW, status=BuildStatus.READY))

    def __aiter__(self) -> AsyncIterator[BuildEvent]:
        return self

    async def __anext__(self) -> BuildEvent:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop(0)

    async def aclose(self) -> None:
        self._left.clear()
