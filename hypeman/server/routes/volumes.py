"""Disks that outlive instances (§2.7)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from hypeman.fields import TagMap
from hypeman.server.api import Routes, UploadStream
from hypeman.server.routes.queries import TagQuery
from hypeman.server.services import Services
from hypeman.tokens import Scope
from hypeman.volumes.types import CreateVolumeRequest, Gigabytes, Volume

routes = Routes("volumes")


class ArchiveQuery(Struct, frozen=True, kw_only=True):
    name: str
    size_gb: Gigabytes
    id: Annotated[str | None, Meta(description="Chosen by the caller; default: a new one")] = None
    tags: TagMap = {}


@routes.get("/volumes", Scope.VOLUME_READ)
async def list_volumes(services: Services, query: TagQuery) -> list[Volume]:
    """All volumes."""
    return list(await services.volumes.list(tags=query.tags))


@routes.post("/volumes", Scope.VOLUME_WRITE, status=201, fails=(400, 409))
async def create_volume(services: Services, body: CreateVolumeRequest) -> Volume:
    """Make an empty volume."""
    return await services.volumes.create(body)


@routes.post("/volumes/from-archive", Scope.VOLUME_WRITE, status=201, fails=(400, 409), unlimited=True)
async def create_volume_from_archive(services: Services, query: ArchiveQuery, body: UploadStream) -> Volume:
    """Make a volume and fill it from a tar.gz.

    The body is the archive itself (application/gzip).
    """
    wanted = CreateVolumeRequest(name=query.name, size_gb=query.size_gb, id=query.id, tags=query.tags)
    return await services.volumes.create_from_archive(wanted, body)


@routes.get("/volumes/{id}", Scope.VOLUME_READ, fails=(404, 409))
async def get_volume(services: Services, id: str) -> Volume:
    """One volume, by id or name."""
    return await services.volumes.get(id)


@routes.delete("/volumes/{id}", Scope.VOLUME_DELETE, fails=(404, 409))
async def delete_volume(services: Services, id: str) -> None:
    """Delete a volume that is not in use."""
    await services.volumes.delete(id)
