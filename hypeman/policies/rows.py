"""What the policies remember in the store, by instance. Rows of deleted instances are removed.

restart-memories      Memory of restarts (restart.py)
snapshot-schedules    Schedule (schedule.py)
    idle-memories         Memory of activity (idle.py)
    last-wakes            LastWake
"""

from __future__ import annotations

from typing import Any, TypeVar

from hypeman.instances.model.types import LastWake
from hypeman.instances.rows import INSTANCES
from hypeman.policies import idle
from hypeman.policies.restart import Memory
from hypeman.policies.schedule import Schedule
from hypeman.store import Table, Txn

T = TypeVar("T")

RESTARTS: Table[Memory] = Table("restart-memories", Memory)
IDLE: Table[idle.Memory] = Table("idle-memories", idle.Memory)
WAKES: Table[LastWake] = Table("last-wakes", LastWake)
SCHEDULES: Table[Schedule] = Table("snapshot-schedules", Schedule)

ALL: tuple[Table[Any], ...] = (RESTARTS, SCHEDULES, IDLE, WAKES)


def put(txn: Txn, table: Table[T], instance_id: str, row: T) -> None:
    """Write a row, unless the instance was deleted meanwhile."""
    if txn.exists(INSTANCES, instance_id):
        txn.put(table, instance_id, row)


def forget(txn: Txn, instance_id: str) -> None:
    """Remove all rows of an instance."""
    for table in ALL:
        txn.delete(table, instance_id)


def remembered(txn: Txn) -> set[str]:
    """Instances that have a row."""
    return {key for table in ALL for key in txn.keys(table)}
