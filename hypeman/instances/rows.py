"""The tables of instances and the functions that change them inside a transaction.

    instances/<id>          InstanceRecord: the state and everything a restart needs
    instance-names/<name>   the id; unique because the key is
    instance-numbers/<n>    the id; the smallest free number is assigned
    intents/<id>            the plan in progress, written before its first effect
    snapshots/<id>          SnapshotRow, written when the snapshot is whole
    snapshot-pools/<id>     PoolRow: how many forks of the snapshot are kept
    pool-members/<id>       MemberRow of such a fork, written before its first effect; <id> will be the instance's

A record is replaced as a whole, in one transaction with all related changes.
"""

from __future__ import annotations

from hypeman.errors import Conflict, NameConflict, NotFound
from hypeman.instances.model.record import InstanceRecord, Intent, MemberRow, PoolRow, SnapshotRow
from hypeman.store import Table, Txn

INSTANCES: Table[InstanceRecord] = Table("instances", InstanceRecord)
NAMES: Table[str] = Table("instance-names", str)
NUMBERS: Table[str] = Table("instance-numbers", str)
INTENTS: Table[Intent] = Table("intents", Intent)
SNAPSHOTS: Table[SnapshotRow] = Table("snapshots", SnapshotRow)
POOLS: Table[PoolRow] = Table("snapshot-pools", PoolRow)
MEMBERS: Table[MemberRow] = Table("pool-members", MemberRow)


def check_name_free(txn: Txn, name: str) -> None:
    """Raise NameConflict if an instance has this name."""
    if txn.exists(NAMES, name):
        raise NameConflict(f"an instance named {name!r} already exists")


def insert(txn: Txn, record: InstanceRecord) -> None:
    """Add a new instance and take its name. Raises NameConflict."""
    if not txn.insert(NAMES, record.name, record.id):
        raise NameConflict(f"an instance named {record.name!r} already exists")
    take_number(txn, record)
    txn.put(INSTANCES, record.id, record)


def take_number(txn: Txn, record: InstanceRecord) -> None:
    txn.put(NUMBERS, f"{record.number:010}", record.id)


def return_number(txn: Txn, record: InstanceRecord) -> None:
    """Give the record's number back."""
    txn.delete(NUMBERS, f"{record.number:010}")


def remove(txn: Txn, record: InstanceRecord) -> None:
    txn.delete(NAMES, record.name)
    return_number(txn, record)
    txn.delete(INSTANCES, record.id)
    txn.delete(INTENTS, record.id)


def free_number(txn: Txn) -> int:
    """The smallest number, starting at 1, that no existing instance has."""
    expected = 1
    for key in txn.keys(NUMBERS):
        if int(key) != expected:
            break
        expected += 1
    return expected


def find_snapshot(txn: Txn, snapshot: str) -> SnapshotRow:
    """The snapshot with this id. Raises NotFound."""
    row = txn.get(SNAPSHOTS, snapshot) if 0 < len(snapshot) <= 64 and snapshot.isascii() else None
    if row is None:
        raise NotFound(f"no snapshot {snapshot[:80]!r}")
    return row


def check_snapshot_name_free(txn: Txn, source_id: str, name: str | None) -> None:
    """Raise Conflict if a snapshot of that instance has this name."""
    if name and any(row.source.id == source_id and row.name == name for _, row in txn.scan(SNAPSHOTS)):
        raise Conflict(f"this instance has a snapshot named {name!r} already")
