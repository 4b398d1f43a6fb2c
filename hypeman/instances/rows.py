"""The tables of instances and the functions that change them inside a transaction.

    instances/<id>          InstanceRecord: the state and everything a restart needs
    instance-names/<name>   the id; unique because the key is
    instance-numbers/<n>    the id; the smallest free number is assigned
    intents/<id>            the plan in progress, written before its first effect

A record is replaced as a whole, in one transaction with all related changes.
"""

from __future__ import annotations

from hypeman.errors import NameConflict
from hypeman.instances.model.record import InstanceRecord, Intent
from hypeman.store import Table, Txn

INSTANCES: Table[InstanceRecord] = Table("instances", InstanceRecord)
NAMES: Table[str] = Table("instance-names", str)
NUMBERS: Table[str] = Table("instance-numbers", str)
INTENTS: Table[Intent] = Table("intents", Intent)


def check_name_free(txn: Txn, name: str) -> None:
    """Raise NameConflict if an instance has this name."""
    if txn.exists(NAMES, name):
        raise NameConflict(f"an instance named {name!r} exists already")


def insert(txn: Txn, record: InstanceRecord) -> None:
    """Add a new instance and take its name. Raises NameConflict."""
    if not txn.insert(NAMES, record.name, record.id):
        raise NameConflict(f"an instance named {record.name!r} exists already")
    txn.put(NUMBERS, f"{record.number:010}", record.id)
    txn.put(INSTANCES, record.id, record)


def remove(txn: Txn, record: InstanceRecord) -> None:
    txn.delete(NAMES, record.name)
    txn.delete(NUMBERS, f"{record.number:010}")
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
