"""Volumes and their attachments as rows; the functions run inside the caller's transaction.

    volumes/<id>                          VolumeRecord
    volume-attachments/<volume>/<instance>  Attachment

Read-write is exclusive; any number of read-only attachments may coexist. The rows are written and removed
in the transaction that changes the instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from hypeman import events
from hypeman.errors import Ambiguous, Conflict, NotFound
from hypeman.events.types import Datum
from hypeman.ids import Tags
from hypeman.store import Table, Txn


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    size_gb: int
    created_at: datetime
    tags: Tags = {}


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    volume_id: str
    instance_id: str
    mount_path: str
    readonly: bool


VOLUMES: Table[VolumeRecord] = Table("volumes", VolumeRecord)
ATTACHMENTS: Table[Attachment] = Table("volume-attachments", Attachment)


def find_volume(txn: Txn, reference: str) -> VolumeRecord:
    """The volume with this id, else the only one with this name. Raises NotFound or Ambiguous."""
    if not 0 < len(reference.encode()) <= 256:
        raise NotFound(f"no volume {reference[:60]!r}")
    record = txn.get(VOLUMES, reference)
    if record is not None:
        return record
    named = [record for _, record in txn.scan(VOLUMES) if record.name == reference]
    if len(named) > 1:
        raise Ambiguous(f"{len(named)} volumes are named {reference!r}; use an id")
    if not named:
        raise NotFound(f"no volume {reference!r}")
    return named[0]


def attachments_of(txn: Txn, volume_id: str) -> list[Attachment]:
    return [row for _, row in txn.scan(ATTACHMENTS, f"{volume_id}/")]


def attach(txn: Txn, attachment: Attachment) -> None:
    """Record that an instance uses a volume. Raises NotFound, or Conflict if it cannot be shared."""
    volume = txn.get(VOLUMES, attachment.volume_id)
    if volume is None:
        raise NotFound(f"no volume {attachment.volume_id!r}")
    for other in attachments_of(txn, volume.id):
        if other.instance_id == attachment.instance_id:
            raise Conflict(f"volume {volume.id!r} is attached to this instance already")
        if not (other.readonly and attachment.readonly):
            mode = "read-only" if other.readonly else "read-write"
            raise Conflict(f"volume {volume.id!r} is attached {mode} to instance {other.instance_id}")
    txn.put(ATTACHMENTS, f"{attachment.volume_id}/{attachment.instance_id}", attachment)
    data: dict[str, Datum] = {"mount_path": attachment.mount_path, "readonly": attachment.readonly}
    note(txn, volume, "attached", data, attachment.instance_id)


def detach(txn: Txn, volume_id: str, instance_id: str) -> bool:
    """Remove an attachment; returns whether there was one."""
    removed = txn.delete(ATTACHMENTS, f"{volume_id}/{instance_id}")
    volume = txn.get(VOLUMES, volume_id)
    if removed and volume is not None:
        note(txn, volume, "detached", {}, instance_id)
    return removed


def note(
    txn: Txn, volume: VolumeRecord, action: str, data: Mapping[str, Datum] | None = None, instance_id: str = ""
) -> None:
    """Record an event about ``volume``."""
    events.record(
        txn,
        events.Kind.VOLUME,
        action,
        volume.id,
        name=volume.name,
        instance_id=instance_id,
        tags=volume.tags,
        data=data,
    )
