"""The store's tables of images, written only by this package.

image_names     normalised reference → its current digest, and the pending one
images          digest → the image, independent of its names
image_pins      digest/holder → the holder uses the image
image_holders   holder → the digest it uses
"""

from __future__ import annotations

from datetime import datetime

from msgspec import UNSET, Struct

from hypeman.images.types import Image, ImageConfig, ImageStatus
from hypeman.store.tables import Table, Txn


class NameRow(Struct, frozen=True):
    """A name. Several may refer to one image."""

    digest: str
    created_at: datetime
    tags: dict[str, str] = {}
    wanted: str = ""
    """Digest that replaces ``digest`` when it is ready; until then ``digest`` stays usable."""


class ImageRow(Struct, frozen=True):
    digest: str
    status: ImageStatus
    created_at: datetime
    source: str
    """``registry/repository`` that it is pulled from; empty for an imported image."""
    platform: str = ""
    borrowed: bool = False
    """Pulled with a login from the request, which is not stored: cannot be resumed."""
    error: str = ""
    transient: bool = False
    """It failed because this host lacked something, such as disk space. If its bytes are here, it is built
    again."""
    fs: str = ""
    size: int = 0
    """Bytes of the root disk."""
    config: ImageConfig = ImageConfig()


class PinRow(Struct, frozen=True):
    pass


class HolderRow(Struct, frozen=True):
    digest: str


NAMES: Table[NameRow] = Table("image_names", NameRow)
IMAGES: Table[ImageRow] = Table("images", ImageRow)
PINS: Table[PinRow] = Table("image_pins", PinRow)
HOLDERS: Table[HolderRow] = Table("image_holders", HolderRow)


def is_pinned(txn: Txn, digest: str) -> bool:
    return any(True for _ in txn.keys(PINS, f"{digest}/"))


def named_digests(txn: Txn) -> set[str]:
    """All current and pending digests of names."""
    found: set[str] = set()
    for _, row in txn.scan(NAMES):
        found |= {row.digest, row.wanted}
    return found - {""}


def view(name: str, naming: NameRow, row: ImageRow, position: int | None) -> Image:
    """The image as shown by the API; ``position`` in the queue, 1 for the next."""
    ready = row.status is ImageStatus.READY
    return Image(
        name=name,
        digest=row.digest,
        status=row.status,
        created_at=naming.created_at,
        platform=row.platform or UNSET,
        queue_position=position if row.status is ImageStatus.PENDING else None,
        error=row.error or None if row.status is ImageStatus.FAILED else None,
        size_bytes=row.size if ready else None,
        entrypoint=row.config.entrypoint or None if ready else None,
        cmd=row.config.cmd or None if ready else None,
        working_dir=row.config.working_dir or None if ready else None,
        env=row.config.env or UNSET if ready else UNSET,
        tags=naming.tags or UNSET,
    )
