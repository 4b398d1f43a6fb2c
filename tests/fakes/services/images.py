"""Images, and pushes of them."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET

from hypeman.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
)
from hypeman.ids import new_id, tags_match
from hypeman.images.types import CreateImageRequest, Image, ImageStatus, LayerProgress, Progress
from hypeman.registry.names import Code, RegistryFailure
from hypeman.registry.push_types import CreatePushRequest, Push, PushStatus
from tests.fakes.services.common import DIGEST, NOW, Tags, normalized


@dataclass
class FakeImages:
    images: dict[str, Image] = field(default_factory=dict)
    looks: int = 0
    """Looks at an image on its way before it is ready."""
    imported: bytes = b""
    asked: list[CreateImageRequest] = field(default_factory=list)

    async def create(self, request: CreateImageRequest) -> Image:
        self.asked.append(request)
        name = normalized(request.name)
        image = Image(name, DIGEST, ImageStatus.PENDING, NOW, tags=request.tags or UNSET)
        return self.images.setdefault(name, image)

    async def create_named(self, name: str) -> Image:
        return await self.create(CreateImageRequest(name))

    async def list(self, *, tags: Tags) -> Sequence[Image]:
        return [image for image in self.images.values() if tags_match(image.tags or {}, tags)]

    async def get(self, ref: str) -> Image:
        name = normalized(ref)
        if name not in self.images:
            raise NotFound(f"image {name} is not here")
        image = self.images[name]
        if not image.status.is_final:
            order = [ImageStatus.PENDING, ImageStatus.PULLING, ImageStatus.CONVERTING, ImageStatus.READY]
            status = order[order.index(image.status) + 1]
            self.images[name] = msgspec.structs.replace(image, status=status)
        return image

    async def progress(self, ref: str) -> Progress:
        image = await self.get(ref)
        return Progress(image.status, (LayerProgress(DIGEST, 1000, 400),))

    async def tag(self, ref: str, target: str) -> Image:
        image = msgspec.structs.replace(await self.get(ref), name=normalized(target))
        self.images[image.name] = image
        return image

    async def delete(self, ref: str) -> None:
        await self.get(ref)
        del self.images[normalized(ref)]

    async def import_path(self, path: str, *, name: str, tags: Tags, default_name: str) -> Image:
        raise InvalidRequest(f"{path} is not below one of images.import_paths")

    async def import_archive(self, chunks: AsyncIterable[bytes], *, name: str, tags: Tags, default_name: str) -> Image:
        self.imported = b"".join([chunk async for chunk in chunks])
        if not self.imported:
            raise InvalidRequest("the archive is empty", code="invalid_archive")
        name = normalized(name or default_name)
        image = Image(name, DIGEST, ImageStatus.PENDING, NOW, tags=dict(tags) or UNSET)
        self.images[image.name] = image
        return image


class FakePushes:
    """Pushes that are over at once; ``asked`` has the requests."""

    def __init__(self) -> None:
        self.asked: list[CreatePushRequest] = []
        self.pushes: dict[str, Push] = {}

    async def create(self, request: CreatePushRequest) -> Push:
        self.asked.append(request)
        made = Push(
            id=new_id(),
            image=request.image,
            digest="sha256:" + "0" * 64,
            target=request.target,
            status=PushStatus.PUSHED,
            created_at=datetime.now(UTC),
            layers=1,
            bytes=1,
        )
        self.pushes[made.id] = made
        return made

    async def list(self) -> list[Push]:
        return list(reversed(self.pushes.values()))

    async def get(self, push_id: str) -> Push:
        if push_id not in self.pushes:
            raise NotFound(f"there is no push {push_id}")
        return self.pushes[push_id]

    async def cancel(self, push_id: str) -> None:
        push = await self.get(push_id)
        if push.error:
            raise Conflict(f"push {push_id} is over")
        self.pushes[push_id] = msgspec.structs.replace(push, status=PushStatus.FAILED, error="cancelled")


class EmptyRegistry:
    """A registry without content, to which nothing can be pushed."""

    def __getattr__(self, name: str) -> Any:
        raise RegistryFailure(Code.UNAVAILABLE, f"{name}: this server is a fake")
