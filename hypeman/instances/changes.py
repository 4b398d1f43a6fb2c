"""Which events a change of an instance or a snapshot is; called in the transaction that makes the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypeman import events
from hypeman.events.types import Datum
from hypeman.instances.model.record import InstanceRecord, SnapshotRow
from hypeman.instances.model.types import InstanceState
from hypeman.instances.model.view import shown_error
from hypeman.store import Txn


def note_created(txn: Txn, record: InstanceRecord, origin: Mapping[str, Datum]) -> None:
    """``origin`` says what it was made from, besides its image."""
    _note(txn, record, "created", {"image": record.spec.image, "state": record.state.value, **origin})


def note_changed(txn: Txn, before: InstanceRecord, after: InstanceRecord) -> None:
    """Nothing unless state or name differ."""
    if before.name != after.name:
        _note(txn, after, "renamed", {"before": before.name})
    if before.state is after.state:
        return
    data: dict[str, Datum] = {"from": before.state.value, "to": after.state.value}
    if after.state in (InstanceState.SHUTDOWN, InstanceState.STOPPED):
        data |= {"exit_code": after.exit_code, "exit_message": after.exit_message}
    if after.state is InstanceState.UNKNOWN:
        data["error"] = shown_error(after)
    _note(txn, after, "state_changed", data)


def note_updated(txn: Txn, record: InstanceRecord, fields: Sequence[str]) -> None:
    """``fields`` are the names of the changed fields."""
    _note(txn, record, "updated", {"fields": ",".join(fields)})


def note_deleted(txn: Txn, record: InstanceRecord) -> None:
    _note(txn, record, "deleted", {"state": record.state.value})


def _note(txn: Txn, record: InstanceRecord, action: str, data: Mapping[str, Datum]) -> None:
    events.record(txn, events.Kind.INSTANCE, action, record.id, name=record.name, tags=record.spec.tags, data=data)


def note_pool(txn: Txn, row: SnapshotRow, size: int) -> None:
    """The size of a snapshot's pool was changed; 0: there is none any more."""
    events.record(
        txn,
        events.Kind.SNAPSHOT,
        "pool_set",
        row.id,
        name=row.name,
        instance_id=row.source.id,
        tags=row.tags,
        data={"size": size},
    )


def note_snapshot(txn: Txn, row: SnapshotRow, action: str) -> None:
    """``action``: created, restored, deleted."""
    events.record(
        txn,
        events.Kind.SNAPSHOT,
        action,
        row.id,
        name=row.name,
        instance_id=row.source.id,
        tags=row.tags,
        data={"kind": row.kind.value, "size_bytes": row.size_bytes, "scheduled": bool(row.schedule) or None},
    )
