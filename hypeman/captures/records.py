"""Saved memory and device state of a VM, shared by all instances restored from it.

A capture is a directory published by rename and only then recorded, so a partial one cannot appear
complete. It never changes once recorded; its row lists its holders:

    instance:<id>   in standby on it, or running with its memory mapped privately from it
    snapshot:<id>   kept as a snapshot

The last holder to release it frees it. A restore by the only holder consumes the memory, and with it the capture.
"""

from __future__ import annotations

import msgspec

from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.errors import InternalError
from hypeman.store import Table, Txn


class CaptureRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    holders: tuple[str, ...]
    size_bytes: int
    """Bytes on disk, apart from a plain copy of compressed memory during a restore."""
    memory_bytes: int
    """Size of the uncompressed memory."""
    compression: SnapshotCompressionConfig | None = None
    """Algorithm to compress the memory with; None: leave it uncompressed."""
    compressed_bytes: int = 0
    """Size of the compressed memory; 0 while it is uncompressed."""
    compression_error: str | None = None


CAPTURES: Table[CaptureRow] = Table("captures", CaptureRow)


def of_instance(instance_id: str) -> str:
    return f"instance:{instance_id}"


def of_snapshot(snapshot_id: str) -> str:
    return f"snapshot:{snapshot_id}"


def get(txn: Txn, capture_id: str) -> CaptureRow:
    """The capture's row. Raises InternalError if there is none."""
    row = txn.get(CAPTURES, capture_id)
    if row is None:
        raise InternalError(f"capture {capture_id} is gone")
    return row


def share(txn: Txn, capture_id: str, holder: str) -> None:
    """Add ``holder`` to the capture's holders."""
    row = get(txn, capture_id)
    if holder not in row.holders:
        txn.put(CAPTURES, capture_id, msgspec.structs.replace(row, holders=(*row.holders, holder)))


def let_go(txn: Txn, capture_id: str | None, holder: str) -> None:
    """Remove ``holder``; a capture without holders is removed by ``FreeCapture``."""
    row = txn.get(CAPTURES, capture_id) if capture_id else None
    if row is not None and capture_id is not None:
        holders = tuple(other for other in row.holders if other != holder)
        txn.put(CAPTURES, capture_id, msgspec.structs.replace(row, holders=holders))


def is_shared(txn: Txn, capture_id: str, holder: str) -> bool:
    """Whether it has a holder other than ``holder``."""
    row = txn.get(CAPTURES, capture_id)
    return row is not None and any(other != holder for other in row.holders)
