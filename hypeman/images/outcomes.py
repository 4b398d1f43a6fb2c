"""How the making of images ends in the store: rows, the names that follow, and their events. In transactions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hypeman import events
from hypeman.errors import (
    InvalidRequest,
    NotFound,
)
from hypeman.images.archive import Imported
from hypeman.images.disks import Stored
from hypeman.images.records import (
    IMAGES,
    NAMES,
    ImageRow,
    NameRow,
)
from hypeman.images.reference import Reference, parse_reference
from hypeman.images.types import ImageStatus
from hypeman.store.tables import Txn


def find_image(txn: Txn, ref: Reference) -> tuple[str, NameRow, ImageRow]:
    """The name's rows. A digest is also found under any other name of the same repository."""
    naming = txn.get(NAMES, str(ref))
    if naming is not None and (row := txn.get(IMAGES, naming.digest)) is not None:
        return str(ref), naming, row
    if ref.digest and (row := txn.get(IMAGES, ref.digest)) is not None:
        for name, found in txn.scan(NAMES, f"{ref.registry}/{ref.repository}"):
            same = (other := parse_reference(name)).registry == ref.registry and other.repository == ref.repository
            if same and ref.digest in (found.digest, found.wanted):
                return name, found, row
    raise NotFound(f"there is no image {ref}")


def is_retried(row: ImageRow) -> bool:
    return row.status is ImageStatus.FAILED and row.transient and not row.source


def settle_image(txn: Txn, digest: str, stored: Stored | None, error: str, transient: bool) -> None:
    row = txn.get(IMAGES, digest)
    if row is None:
        return  # deleted meanwhile; its orphaned disk is collected
    if stored is not None:
        make_ready(txn, row, stored)
    else:
        fail_image(txn, row, error, transient)


def make_ready(txn: Txn, row: ImageRow, stored: Stored) -> None:
    ready = msgspec.structs.replace(
        row, status=ImageStatus.READY, error="", fs=stored.fs, size=stored.size, platform=stored.platform,
        config=stored.config,
    )  # fmt: skip
    txn.put(IMAGES, row.digest, ready)
    repoint(txn, ready, "ready")


def fail_image(txn: Txn, row: ImageRow, error: str, transient: bool = False) -> None:
    failed = msgspec.structs.replace(row, status=ImageStatus.FAILED, error=error[:2000], transient=transient)
    txn.put(IMAGES, row.digest, failed)
    repoint(txn, failed, "failed")


def repoint(txn: Txn, row: ImageRow, outcome: str) -> None:
    """Names waiting for the image ``row`` now refer to it if it is ready, or keep their previous image; they keep
    waiting for one that is made again."""
    for name, naming in list(txn.scan(NAMES)):
        if row.digest not in (naming.digest, naming.wanted):
            continue
        if naming.wanted == row.digest and not is_retried(row):
            target = row.digest if row.status is ImageStatus.READY else naming.digest
            naming = msgspec.structs.replace(naming, digest=target, wanted="")
            txn.put(NAMES, name, naming)
        note_change(txn, name, naming, row, outcome)


def note_change(txn: Txn, name: str, naming: NameRow, row: ImageRow, action: str) -> None:
    events.record(
        txn,
        events.Kind.IMAGE,
        action,
        name,
        name=name,
        tags=naming.tags,
        data={"digest": row.digest, "status": row.status.value, "error": row.error or None},
    )


def named_images(found: Sequence[Imported], wanted: Reference | None, default: str) -> list[tuple[Reference, Imported]]:
    """The images of an archive to record, with their names. Raises InvalidRequest."""
    if wanted is not None and len(found) == 1:
        return [(wanted, found[0])]
    named = [(parse_reference(name), image) for image in found for name in image.names]
    if wanted is not None:
        if fitting := [(name, image) for name, image in named if str(name) == str(wanted)]:
            return fitting[:1]
        offered = ", ".join(str(name) for name, _ in named) or "none of them has a name"
        raise InvalidRequest(f"the archive has {len(found)} images, but not {wanted}: {offered[:500]}")
    if not named and default and len(found) == 1:
        return [(parse_reference(default), found[0])]
    if not named:
        raise InvalidRequest("the archive does not name its image; give a name", code="invalid_name")
    return named
