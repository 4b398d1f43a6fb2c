"""Pushes of images to other registries (§2.13)."""

from __future__ import annotations

from hypeman.registry.push_types import CreatePushRequest, Push
from hypeman.server.api import Routes
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("pushes")


@routes.get("/pushes", Scope.IMAGE_READ)
async def list_pushes(services: Services) -> list[Push]:
    """All pushes, newest first; of the finished ones the last 200."""
    return list(await services.pushes.list())


@routes.post(
    "/pushes",
    Scope.IMAGE_WRITE,
    status=202,
    fails=(400, 404, 409),
    headers={"Retry-After": "2"},
    location="/pushes/{id}",
)
async def create_push(services: Services, body: CreatePushRequest) -> Push:
    """Push an image to another registry.

    Returns at once; the push's status shows the progress. Without credentials the server's own login is used.
    """
    return await services.pushes.create(body)


@routes.get("/pushes/{id}", Scope.IMAGE_READ, fails=(404,))
async def get_push(services: Services, id: str) -> Push:
    """One push."""
    return await services.pushes.get(id)


@routes.delete("/pushes/{id}", Scope.IMAGE_WRITE, fails=(404, 409))
async def cancel_push(services: Services, id: str) -> None:
    """Cancel a push that is not over.

    Its status becomes failed, its error cancelled. What was sent stays at the other registry, without a name.
    """
    await services.pushes.cancel(id)
