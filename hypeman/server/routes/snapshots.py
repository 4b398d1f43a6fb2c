"""Snapshots (§2.6)."""

from __future__ import annotations

from msgspec import Struct

from hypeman.fields import TagMap
from hypeman.instances.model.snapshot_types import (
    ForkSnapshotRequest,
    SetSnapshotPoolRequest,
    Snapshot,
    SnapshotKind,
    SnapshotPool,
)
from hypeman.instances.model.types import Instance
from hypeman.server.api import Routes
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("snapshots")


class SnapshotQuery(Struct, frozen=True, kw_only=True):
    source_instance_id: str | None = None
    kind: SnapshotKind | None = None
    name: str | None = None
    tags: TagMap = {}


@routes.get("/snapshots", Scope.SNAPSHOT_READ)
async def list_snapshots(services: Services, query: SnapshotQuery) -> list[Snapshot]:
    """All matching snapshots."""
    return list(
        await services.snapshots.list(
            source_instance_id=query.source_instance_id, kind=query.kind, name=query.name, tags=query.tags
        )
    )


@routes.get("/snapshots/{snapshotId}", Scope.SNAPSHOT_READ, fails=(404,))
async def get_snapshot(services: Services, snapshotId: str) -> Snapshot:
    """One snapshot, by id."""
    return await services.snapshots.get(snapshotId)


@routes.delete("/snapshots/{snapshotId}", Scope.SNAPSHOT_DELETE, fails=(404,))
async def delete_snapshot(services: Services, snapshotId: str) -> None:
    """Delete a snapshot; its forks are not affected."""
    await services.snapshots.delete(snapshotId)


@routes.post("/snapshots/{snapshotId}/fork", Scope.SNAPSHOT_WRITE, status=201, fails=(400, 404, 409, 501))
async def fork_snapshot(services: Services, snapshotId: str, body: ForkSnapshotRequest) -> Instance:
    """A new instance from a snapshot; one from its pool if one is ready."""
    return await services.snapshots.fork(snapshotId, body)


@routes.get("/snapshots/{snapshotId}/pool", Scope.SNAPSHOT_READ, fails=(404,))
async def get_snapshot_pool(services: Services, snapshotId: str) -> SnapshotPool:
    """The forks that are kept ready. Extension."""
    return await services.snapshots.get_pool(snapshotId)


@routes.put("/snapshots/{snapshotId}/pool", Scope.SNAPSHOT_WRITE, fails=(400, 404, 409, 501))
async def set_snapshot_pool(services: Services, snapshotId: str, body: SetSnapshotPoolRequest) -> SnapshotPool:
    """Keep forks of a snapshot ready. Extension.

    They are restored and paused, each with memory and an address of the host, and are no instances; a fork of the
    snapshot takes one, which gets its name, time and entropy, and runs. They are made in the background, and give way
    when an instance needs what they hold.
    """
    return await services.snapshots.set_pool(snapshotId, body)


@routes.delete("/snapshots/{snapshotId}/pool", Scope.SNAPSHOT_WRITE, fails=(404,))
async def delete_snapshot_pool(services: Services, snapshotId: str) -> None:
    """Keep no forks of a snapshot any more; those that were kept are gone on return. Extension."""
    await services.snapshots.delete_pool(snapshotId)
