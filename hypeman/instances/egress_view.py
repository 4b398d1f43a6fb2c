"""What the API tells of the egress path: the CA, policies as stored, and requests as they end.

The last requests of an instance are kept in memory, so that there is something to show to who comes
later; a restart forgets them. The log has all of them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import cast

import trio

from hypeman.egress.service import AuditRecord, Egress
from hypeman.errors import NotFound
from hypeman.instances.board import Board
from hypeman.instances.egress_types import EgressPolicy, EgressRecord, RecordKind
from hypeman.instances.records import InstanceRecord

KEPT = 100
"""Records of one instance."""
MOST_INSTANCES = 256
"""Of which records are kept, those that asked last; with KEPT at most some 15 MB."""


class EgressView:
    def __init__(self, egress: Egress, board: Board) -> None:
        self._egress = egress
        self._board = board
        self._kept: OrderedDict[str, deque[AuditRecord]] = OrderedDict()

    def ca_pem(self) -> bytes:
        return self._egress.ca_pem

    def policy(self, ref: str) -> EgressPolicy:
        record = self._find(ref)
        assert record.spec.egress is not None
        return EgressPolicy(
            instance_id=record.id,
            instance_name=record.name,
            mode=record.spec.egress,
            credentials=record.spec.credentials,
        )

    async def requests(self, ref: str, *, tail: int, follow: bool) -> EgressRecords:
        """The last ``tail`` requests, then, with ``follow``, every new one until the instance is gone."""
        record = self._find(ref)
        stream = EgressRecords(self._board, record)
        if follow:
            await stream.follow(self._egress)
        kept = self._kept.get(record.id, ())  # nothing was awaited since: no record is missed, none comes twice
        stream.start_with(list(kept)[max(0, len(kept) - tail) :])
        return stream

    def keep(self, record: AuditRecord) -> None:
        """For ``Egress.on_audit``."""
        kept = self._kept.get(record.instance)
        if kept is None:
            kept = self._kept[record.instance] = deque(maxlen=KEPT)
            if len(self._kept) > MOST_INSTANCES:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(record.instance)
        kept.append(record)

    def _find(self, ref: str) -> InstanceRecord:
        record = self._board.find(ref)
        if record.spec.egress is None:
            raise NotFound(f"the egress of instance {record.name} is not mediated", code="no_egress_policy")
        return record


class EgressRecords:
    """Records of one instance; ends with the old ones, or with the instance where it is followed."""

    def __init__(self, board: Board, instance: InstanceRecord) -> None:
        self._board = board
        self._instance = instance
        self._old: deque[AuditRecord] = deque()
        self._new: trio.MemoryReceiveChannel[AuditRecord] | None = None
        self._open = AsyncExitStack()

    async def follow(self, egress: Egress) -> None:
        self._new = await self._open.enter_async_context(egress.audit(self._instance.id))

    def start_with(self, records: list[AuditRecord]) -> None:
        self._old.extend(records)

    def __aiter__(self) -> EgressRecords:
        return self

    async def __anext__(self) -> EgressRecord:
        await trio.lowlevel.checkpoint()
        if self._old:
            return _told(self._old.popleft())
        record = await self._next_new() if self._new is not None else None
        if record is None:
            await self.aclose()
            raise StopAsyncIteration
        return _told(record)

    async def aclose(self) -> None:
        """Idempotent."""
        self._new = None
        await self._open.aclose()

    async def _next_new(self) -> AuditRecord | None:
        """None when the instance has gone."""
        assert self._new is not None
        try:
            return self._new.receive_nowait()
        except trio.WouldBlock:
            pass
        record = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_gone, nursery.cancel_scope)
            record = await self._new.receive()
            nursery.cancel_scope.cancel()
        return record

    async def _wait_gone(self, then: trio.CancelScope) -> None:
        known: InstanceRecord | None = self._instance
        while known is not None:
            self._instance, known = known, await self._board.wait_change(known)
        then.cancel()


def _told(record: AuditRecord) -> EgressRecord:
    return EgressRecord(
        time=datetime.fromtimestamp(record.time, UTC),
        kind=cast(RecordKind, record.kind),
        host=record.host,
        port=record.port,
        method=record.method,
        status=record.status,
        reason=record.reason,
        injected=record.injected,
        credentials=record.credentials,
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        ms=round(record.seconds * 1000, 2),
        http=record.http,
    )
