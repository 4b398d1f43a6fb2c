"""Builders (§2.11) and builds (§2.12)."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated

from msgspec import Meta, Struct

from hypeman.builds.types import Build, Builder, BuildForm, CreateBuilderRequest
from hypeman.server.api import SSE_HEADERS, Context, EventStream, Routes, UploadStream
from hypeman.server.events import JsonEvents
from hypeman.server.multipart import read_form
from hypeman.server.routes.queries import TagQuery
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("builds")


class BuildEventsQuery(Struct, frozen=True, kw_only=True):
    follow: Annotated[bool, Meta(description="Until the build is over")] = False
    progress: Annotated[
        bool, Meta(description="Extension: BuildKit's status updates (type progress) instead of log lines made of them")
    ] = False


@routes.get("/builders", Scope.BUILD_READ)
async def list_builders(services: Services, query: TagQuery) -> list[Builder]:
    """All builders, oldest first."""
    return list(await services.builds.list_builders(tags=query.tags))


@routes.post("/builders", Scope.BUILD_WRITE, status=201, fails=(400, 409))
async def create_builder(services: Services, body: CreateBuilderRequest) -> Builder:
    """Make a builder, whose cache is empty."""
    return await services.builds.create_builder(body)


@routes.get("/builders/{id}", Scope.BUILD_READ, fails=(404,))
async def get_builder(services: Services, id: str) -> Builder:
    """One builder."""
    return await services.builds.get_builder(id)


@routes.delete("/builders/{id}", Scope.BUILD_DELETE, fails=(404, 409))
async def delete_builder(services: Services, id: str) -> None:
    """Delete a builder that has no builds, with its cache."""
    await services.builds.delete_builder(id)


@routes.post("/builders/{id}/prune", Scope.BUILD_WRITE, status=202, fails=(404, 409))
async def prune_builder(services: Services, id: str) -> Builder:
    """Empty a builder's cache.

    Returns at once, with the status pruning. Builds that are requested meanwhile wait.
    """
    return await services.builds.prune_builder(id)


@routes.get("/builds", Scope.BUILD_READ)
async def list_builds(services: Services, query: TagQuery) -> list[Build]:
    """All builds, newest first; of the finished ones the last 200."""
    return list(await services.builds.list(tags=query.tags))


@routes.post(
    "/builds",
    Scope.BUILD_WRITE,
    status=202,
    fails=(400, 404, 409),
    unlimited=True,
    form=BuildForm,
)
async def create_build(services: Services, body: UploadStream, context: Context) -> Build:
    """Build an image from a context and a Dockerfile.

    Returns when the context has been received; the build waits in the queue of its builder. The image appears under its
    name when all of it is stored, and can be run without a pull.
    """
    async with aclosing(read_form(body, context.header("Content-Type"))) as parts:
        return await services.builds.create(parts)


@routes.get("/builds/{id}", Scope.BUILD_READ, fails=(404,))
async def get_build(services: Services, id: str) -> Build:
    """One build."""
    return await services.builds.get(id)


@routes.delete("/builds/{id}", Scope.BUILD_DELETE, fails=(404, 409))
async def cancel_build(services: Services, id: str) -> None:
    """Cancel a build that is not over. No image appears."""
    await services.builds.cancel(id)


@routes.get(
    "/builds/{id}/events",
    Scope.BUILD_READ,
    fails=(404,),
    media_type="text/event-stream",
    unlimited=True,
    headers=SSE_HEADERS,
)
async def get_build_events(services: Services, id: str, query: BuildEventsQuery) -> EventStream:
    """The progress of a build from its start, as server-sent events.

    Without follow, the lines so far. With it, also each status, a heartbeat every 30 s, and the end after the final
    status.
    """
    return EventStream(JsonEvents(await services.builds.events(id, follow=query.follow, progress=query.progress)))
