"""The log in the store: rows with consecutive cursors, the oldest of which are dropped.

    events/<cursor>     Event
    event-log/head      EventHead: the retained range and its maximum length

``record`` runs in the transaction that makes the change: both are on disk, or neither is. Cursors are never
reused, since the head only moves forward in the same transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from msgspec import UNSET, Struct

from hypeman.events.types import CursorGone, Datum, Event, EventObject, Kind
from hypeman.store import Table, Txn

DEFAULT_MAX_COUNT = 50_000


class EventHead(Struct, frozen=True):
    first: int = 1
    """Cursor of the oldest retained event; ``last + 1`` if there is none."""
    last: int = 0
    max_count: int = DEFAULT_MAX_COUNT
    """Maximum number of retained events."""


EVENTS: Table[Event] = Table("events", Event)
HEAD: Table[EventHead] = Table("event-log", EventHead)
_HEAD_KEY = "head"


def record(
    txn: Txn,
    kind: Kind,
    action: str,
    id: str,  # noqa: A002 - the event's own word
    *,
    name: str | None = None,
    instance_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    data: Mapping[str, Datum] | None = None,
) -> int:
    """Append an event of type ``<kind>.<action>`` about the object ``id`` and return its cursor.

    Call it in the transaction that makes the change. ``instance_id`` is the instance concerned, if the object is not
    one; ``data`` are further facts, no secrets: entries that are None are left out. The actor is that of the write.
    """
    found = head(txn)
    cursor = found.last + 1
    event = Event(
        cursor=cursor,
        time=datetime.now(UTC),
        type=f"{kind.value}.{action}",
        object=EventObject(kind, id, name or UNSET),
        instance_id=instance_id or UNSET,
        tags=dict(tags) if tags else UNSET,
        actor=txn.actor or UNSET,
        data={key: value for key, value in (data or {}).items() if value is not None} or UNSET,
    )
    txn.put(EVENTS, _key(cursor), event)
    _put_head(txn, found.first, cursor, found.max_count)
    return cursor


def head(txn: Txn) -> EventHead:
    """The range of cursors in the log."""
    return txn.get(HEAD, _HEAD_KEY) or EventHead()


def check_cursor(txn: Txn, cursor: int) -> None:
    """Raise CursorGone unless every event after ``cursor`` is still, or will be, in the log. 0 is always valid: it
    means everything that is retained."""
    found = head(txn)
    if cursor == 0 or found.first - 1 <= cursor <= found.last:
        return
    if cursor > found.last:
        raise CursorGone(f"cursor {cursor} is from another log: the newest here is {found.last}")
    raise CursorGone(f"events after cursor {cursor} are no longer retained: the oldest is {found.first}")


def read_after(txn: Txn, cursor: int, limit: int) -> list[Event]:
    """Up to ``limit`` retained events after ``cursor``, in order."""
    found = head(txn)
    begin = max(cursor + 1, found.first)
    rows = (txn.get(EVENTS, _key(at)) for at in range(begin, min(found.last + 1, begin + limit)))
    return [row for row in rows if row is not None]


def cursor_before(txn: Txn, time: datetime) -> int:
    """The cursor to continue from for events at or after ``time``. Approximate if the clock was set back."""
    found = head(txn)
    low, high = found.first, found.last + 1
    while low < high:
        middle = (low + high) // 2
        row = txn.get(EVENTS, _key(middle))
        if row is not None and row.time < time:
            low = middle + 1
        else:
            high = middle
    return low - 1


def limit_count(txn: Txn, max_count: int) -> None:
    """Retain at most ``max_count`` events from now on."""
    found = head(txn)
    if found.max_count != max_count:
        _put_head(txn, found.first, found.last, max_count)


def drop_older(txn: Txn, time: datetime) -> int:
    """Drop events from before ``time``; returns how many."""
    found = head(txn)
    first = found.first
    while first <= found.last:
        row = txn.get(EVENTS, _key(first))
        if row is not None and row.time >= time:
            break
        txn.delete(EVENTS, _key(first))
        first += 1
    if first != found.first:
        _put_head(txn, first, found.last, found.max_count)
    return first - found.first


def _put_head(txn: Txn, first: int, last: int, max_count: int) -> None:
    while last - first + 1 > max_count:
        txn.delete(EVENTS, _key(first))
        first += 1
    txn.put(HEAD, _HEAD_KEY, EventHead(first, last, max_count))


def _key(cursor: int) -> str:
    return f"{cursor:020}"
