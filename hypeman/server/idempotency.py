"""``Idempotency-Key``: a POST that is repeated with the same key is carried out once.

    first call          the row is written, the work runs in a task of its own, the response is stored
    repeated meanwhile  waits for that work and gets its response
    repeated later      gets the stored response, with ``Idempotency-Replayed: true``
    another request     with the same key and caller: 422

- Only success is stored. After a failure the same key may be tried again.
- The work outlives its client and the time limit (504); an upload does not, since its body comes from the client.
- If the server was killed before the response was stored, the event log says whether the work was done, since events
  are written in the transaction of the change, and name the call; also what the next server finishes or undoes of it
  is logged so. Then the object, as it is now, is the response, else the call is carried out now.
- At most MAX_ROWS are kept, the newest, for MAX_AGE.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import trio

from hypeman.actor import current_actor, set_actor
from hypeman.errors import HypemanError, InvalidRequest
from hypeman.events import log
from hypeman.events.types import Event, Kind
from hypeman.ids import new_id
from hypeman.instances.model.types import InstanceState
from hypeman.server.api import Operation
from hypeman.server.exchange import Reply, failed, failure_from
from hypeman.server.services import Services
from hypeman.store import Store, Table, Txn

HEADER = "Idempotency-Key"
MAX_ROWS = 10_000
MAX_AGE = timedelta(days=1)
MAX_STORED = 256 * 1024
"""Bytes of a response that is stored; a larger one is not, and the call then not repeatable."""
_MADE = (".created", ".registered", ".tagged")
_UP = frozenset({InstanceState.CREATED, InstanceState.INITIALIZING, InstanceState.RUNNING})
_STATES: Mapping[str, frozenset[InstanceState]] = {
    "start_instance": _UP,
    "restore_instance": _UP,
    "stop_instance": frozenset({InstanceState.STOPPED}),
    "standby_instance": frozenset({InstanceState.STANDBY}),
}
"""Operations that change an instance's state, and the states that it is in afterwards."""
_CHANGES: Mapping[str, tuple[str, str]] = {
    "attach_volume": ("volume.attached", "volume.detached"),
    "restore_snapshot": ("snapshot.restored", ""),
}
"""Operations that change an instance otherwise: the event of the change, and that of its being taken back. A hold, a
reclaim and a prune are the same when repeated."""
_KEY = re.compile(r"[\x21-\x7e]{1,255}")

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode

Work = Callable[[], Awaitable[Reply]]


class KeyReused(HypemanError):
    """The key was used for another request."""

    status = 422
    retryable = False
    default_code = "idempotency_key_reused"


class CallRow(msgspec.Struct, frozen=True):
    call: str
    """Unique id of the call; its events have it as their actor's ``call``."""
    request: str
    """Digest of method, path, query and body."""
    time: datetime
    sequence: int
    cursor: int
    """The newest event before the call."""
    reply: Reply | None = None
    """None while it is carried out, or if the server was killed before it was stored."""


class _Sequence(msgspec.Struct, frozen=True):
    first: int = 1
    last: int = 0


CALLS: Table[CallRow] = Table("idempotent-calls", CallRow)
ORDER: Table[str] = Table("idempotent-order", str)
SEQUENCE: Table[_Sequence] = Table("idempotent-sequence", _Sequence)
_ALL = "all"


class _Running:
    __slots__ = ("done", "reply", "request")

    def __init__(self, request: str) -> None:
        self.request = request
        self.done = trio.Event()
        self.reply: Reply | None = None


class Calls:
    """Calls with a key, of one server. ``run`` in a nursery."""

    def __init__(self, store: Store, services: Services) -> None:
        self._store = store
        self._services = services
        self._running: dict[str, _Running] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def once(
        self, subject: str, key: str, request: bytes, operation: Operation, work: Work, *, detached: bool
    ) -> Reply:
        """The response of ``work``, which carries out ``operation`` unless it was before.

        ``request`` identifies what is asked. Raises InvalidRequest
        ``invalid_idempotency_key``, KeyReused.
        """
        if not _KEY.fullmatch(key):
            raise InvalidRequest(
                f"{HEADER} must have 1 to 255 visible ASCII characters", code="invalid_idempotency_key"
            )
        name = hashlib.sha256(f"{subject}\0{key}".encode()).hexdigest()
        wanted = hashlib.sha256(request).hexdigest()
        running = self._running.get(name)
        if running is None:
            running = self._running[name] = _Running(wanted)
            if detached:
                assert self._nursery is not None, "the service does not run"
                self._nursery.start_soon(self._carry_out, name, running, operation, work)
            else:
                await self._carry_out(name, running, operation, work)
        elif running.request != wanted:
            raise _reused(key)
        await running.done.wait()
        if running.reply is None:
            raise _reused(key)
        return running.reply

    async def _carry_out(self, name: str, running: _Running, operation: Operation, work: Work) -> None:
        try:
            running.reply = await self._reply(name, running.request, operation, work)
        except Exception as error:  # of the store
            running.reply = failed(failure_from(error))
        finally:
            del self._running[name]
            running.done.set()

    async def _reply(self, name: str, request: str, operation: Operation, work: Work) -> Reply | None:
        """None if the key was used for another request."""
        row = await self._store.write(lambda txn: _begin(txn, name, request))
        if row.request != request:
            return None
        if row.reply is not None:
            return _replayed(row.reply)
        reply = await self._done_before(row, operation)
        if reply is None:
            actor = current_actor()
            set_actor(msgspec.structs.replace(actor, call=row.call) if actor is not None else None)
            reply = await work()
        if reply.status < 300 and len(reply.content) <= MAX_STORED:
            stored = reply
            await self._store.write(lambda txn: _finish(txn, name, row, stored))
        else:
            await self._store.write(lambda txn: _forget(txn, name, row))
        return reply

    async def _done_before(self, row: CallRow, operation: Operation) -> Reply | None:
        """The response to a call that was done before the server was killed; None if it was not."""
        events = self._store.read(lambda txn: _events_of(txn, row))
        made = next((event for event in events if event.type.endswith(_MADE)), None)
        if made is None:
            about = changed_by(operation.name, events)
        elif self._store.read(lambda txn: _is_rolled_back(txn, made)):
            about = None
        else:
            about = (made.object.kind, made.object.id)
        if about is None:
            return None
        _log.info("a repeated call is answered with %s %s", *about)
        try:
            return Reply(operation.status, _encode(await self._object(*about)))
        except HypemanError as error:
            return failed(failure_from(error))

    async def _object(self, kind: Kind, identifier: str) -> object:
        services = self._services
        match kind:
            case Kind.INSTANCE:
                return await services.instances.get(identifier)
            case Kind.SNAPSHOT:
                return await services.snapshots.get(identifier)
            case Kind.VOLUME:
                return await services.volumes.get(identifier)
            case Kind.IMAGE:
                return await services.images.get(identifier)
            case Kind.DEVICE:
                return services.devices.get(identifier)
            case Kind.INGRESS:
                return await services.ingresses.get(identifier)
            case Kind.PUSH:
                return await services.pushes.get(identifier)
            case Kind.BUILD:
                return await services.builds.get(identifier)
            case Kind.BUILDER:
                return await services.builds.get_builder(identifier)
        raise InvalidRequest(f"the {kind} that this call made cannot be shown again; see the list")


def changed_by(operation: str, events: Sequence[Event]) -> tuple[Kind, str] | None:
    """The object that ``operation`` has changed, by the events of one call of it; None if it has not, or if the change
    was taken back. Pure."""
    if (states := _STATES.get(operation)) is not None:
        changes = [event for event in events if event.type == "instance.state_changed"]
        if changes and (changes[-1].data or {}).get("to") in states:
            return Kind.INSTANCE, changes[-1].object.id
    elif (pair := _CHANGES.get(operation)) is not None:
        changes = [event for event in events if event.type in pair]
        if changes and changes[-1].type == pair[0] and changes[-1].instance_id:
            return Kind.INSTANCE, changes[-1].instance_id
    return None


def _reused(key: str) -> KeyReused:
    return KeyReused(f"{HEADER} {key[:80]!r} was used for another request")


def _replayed(reply: Reply) -> Reply:
    return msgspec.structs.replace(reply, headers={**reply.headers, "Idempotency-Replayed": "true"})


def _begin(txn: Txn, name: str, request: str) -> CallRow:
    """The row of the call, a new one if there is none; drops old ones."""
    now = datetime.now(UTC)
    sequence = txn.get(SEQUENCE, _ALL) or _Sequence()
    first = sequence.first
    while first <= sequence.last:
        old_name = txn.get(ORDER, _position(first))
        old = txn.get(CALLS, old_name) if old_name is not None else None
        if old is not None and old.sequence == first:
            if sequence.last - first + 1 < MAX_ROWS and old.time > now - MAX_AGE:
                break
            txn.delete(CALLS, str(old_name))
        txn.delete(ORDER, _position(first))
        first += 1
    row, last = txn.get(CALLS, name), sequence.last
    if row is None:
        last += 1
        row = CallRow(new_id(), request, now, last, log.head(txn).last)
        txn.put(CALLS, name, row)
        txn.put(ORDER, _position(last), name)
    txn.put(SEQUENCE, _ALL, _Sequence(first, last))
    return row


def _finish(txn: Txn, name: str, row: CallRow, reply: Reply) -> None:
    if (found := txn.get(CALLS, name)) is not None and found.call == row.call:
        txn.put(CALLS, name, msgspec.structs.replace(row, reply=reply))


def _forget(txn: Txn, name: str, row: CallRow) -> None:
    if (found := txn.get(CALLS, name)) is not None and found.call == row.call:
        txn.delete(CALLS, name)


def _events_of(txn: Txn, row: CallRow) -> list[Event]:
    last = log.head(txn).last
    found = log.read_after(txn, row.cursor, last - row.cursor)
    return [event for event in found if event.actor and event.actor.call == row.call]


def _is_rolled_back(txn: Txn, made: Event) -> bool:
    """Whether the object was removed by the server itself, since making it had not been finished."""
    later = log.read_after(txn, made.cursor, log.head(txn).last - made.cursor)
    return any(
        event.object.id == made.object.id and event.type.endswith(".deleted")
        and (not event.actor or (made.actor and event.actor.call == made.actor.call))
        for event in later
    )  # fmt: skip


def _position(sequence: int) -> str:
    return f"{sequence:020}"
