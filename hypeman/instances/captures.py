"""Saved memory and devices of a VM, shared by all who come back from it.

A capture is a directory published by rename and only then recorded, so a torn one can not look
whole. It never changes once recorded; who needs it is in its row:

    instance:<id>   in standby on it, or running with its memory mapped privately from it
    snapshot:<id>   kept for itself

The last holder to go frees it. A holder that is alone takes its memory with it on restore, and the capture is used up.
"""

from __future__ import annotations

import msgspec

from hypeman.errors import InternalError
from hypeman.instances.types import SnapshotCompressionConfig
from hypeman.store import Table, Txn


class CaptureRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    holders: tuple[str, ...]
    size_bytes: int
    """Bytes on disk when it was made."""
    memory_bytes: int
    """Of the plain memory."""
    compression: SnapshotCompressionConfig | None = None
    """What the memory is to be compressed with; None: stays as it is."""
    compressed_bytes: int = 0
    """Size of the compressed memory; 0 while it is not."""
    compression_error: str | None = None


CAPTURES: Table[CaptureRow] = Table("captures", CaptureRow)


def of_instance(instance_id: str) -> str:
    return f"instance:{instance_id}"


def of_snapshot(snapshot_id: str) -> str:
    return f"snapshot:{snapshot_id}"


def share(txn: Txn, capture_id: str, holder: str) -> None:
    """Let ``holder`` need the capture too."""
    row = txn.get(CAPTURES, capture_id)
    if row is None:
        raise InternalError(f"capture {capture_id} is gone")
    if holder not in row.holders:
        txn.put(CAPTURES, capture_id, msgspec.structs.replace(row, holders=(*row.holders, holder)))


def let_go(txn: Txn, capture_id: str | None, holder: str) -> None:
    """``holder`` no longer needs it; a capture without holders is collected by ``FreeCapture``."""
    row = txn.get(CAPTURES, capture_id) if capture_id else None
    if row is not None and capture_id is not None:
        holders = tuple(other for other in row.holders if other != holder)
        txn.put(CAPTURES, capture_id, msgspec.structs.replace(row, holders=holders))


def is_shared(txn: Txn, capture_id: str, holder: str) -> bool:
    """Whether somebody beside ``holder`` needs it."""
    row = txn.get(CAPTURES, capture_id)
    return row is not None and any(other != holder for other in row.holders)
