"""Images (§2.2). ``{name}`` is a reference, percent-encoded into one segment."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from hypeman.fields import TagMap
from hypeman.images.types import CreateImageRequest, Image, Progress, TagImageRequest
from hypeman.server.api import Routes, UploadStream
from hypeman.server.routes.queries import TagQuery
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("images")


class ImportQuery(Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(description="Reference that the image gets; without it, the one in the archive")] = ""
    default_name: Annotated[str, Meta(description="The same, for an archive that does not say")] = ""
    path: Annotated[
        str, Meta(description="Archive or OCI layout on the server, below images.import_paths; then there is no body")
    ] = ""
    tags: TagMap = {}


@routes.get("/images", Scope.IMAGE_READ)
async def list_images(services: Services, query: TagQuery) -> list[Image]:
    """All images, including those being pulled."""
    return list(await services.images.list(tags=query.tags))


@routes.post("/images", Scope.IMAGE_WRITE, status=202, fails=(400, 404, 409, 429, 502))
async def create_image(services: Services, body: CreateImageRequest) -> Image:
    """Pull an image and make a root disk of it.

    Returns at once; the image's status shows the progress. An existing image is not pulled again.
    """
    return await services.images.create(body)


@routes.post("/images/import", Scope.IMAGE_WRITE, status=202, fails=(400, 409), unlimited=True)
async def import_image(services: Services, query: ImportQuery, body: UploadStream) -> Image:
    """Make an image from an archive: OCI layout or docker save, as a tar.

    The body is the archive itself (application/x-tar). Beyond the contract of the original.
    """
    naming = {"name": query.name, "default_name": query.default_name}
    if query.path:
        return await services.images.import_path(query.path, tags=query.tags, **naming)
    return await services.images.import_archive(body, tags=query.tags, **naming)


@routes.get("/images/{name}/progress", Scope.IMAGE_READ, fails=(400, 404))
async def get_image_progress(services: Services, name: str) -> Progress:
    """Progress of a pull, per layer. Extension of the original's contract."""
    return await services.images.progress(name)


@routes.post("/images/{name}/tag", Scope.IMAGE_WRITE, fails=(400, 404))
async def tag_image(services: Services, name: str, body: TagImageRequest) -> Image:
    """Give an image another name, without pulling it again."""
    return await services.images.tag(name, body.target)


@routes.get("/images/{name}", Scope.IMAGE_READ, fails=(400, 404))
async def get_image(services: Services, name: str) -> Image:
    """One image."""
    return await services.images.get(name)


@routes.delete("/images/{name}", Scope.IMAGE_DELETE, fails=(400, 404, 409))
async def delete_image(services: Services, name: str) -> None:
    """Delete an image that no instance uses."""
    await services.images.delete(name)
