"""The egress path in the API: the CA, stored policies, and completed requests.

The last requests of an instance are kept in memory for later readers and lost on restart. The audit
log has all of them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Protocol, cast

import trio
from msgspec import UNSET

from hypeman.egress.approvals import Approvals
from hypeman.egress.learning import Seen
from hypeman.egress.records import AuditRecord
from hypeman.egress.rules import check_url
from hypeman.egress.service import Egress
from hypeman.egress.types import (
    AccessDefault,
    EgressApproval,
    EgressCheck,
    EgressPolicy,
    EgressProposal,
    EgressRecord,
    RecordKind,
    Ruling,
)

MAX_RECORDS = 100
"""Records kept per instance."""
MAX_INSTANCES = 256
"""Number of most recent instances whose records are kept; with MAX_RECORDS about 15 MB at most."""


class Guests(Protocol):
    """The instances behind the guests."""

    def policy(self, ref: str) -> EgressPolicy:
        """Policy of the instance ``ref``. Raises NotFound if there is none or its egress is not mediated."""
        ...

    async def wait_deleted(self, instance_id: str) -> None: ...
    def web_only(self, instance_id: str) -> bool:
        """Whether the proxy is the guest's only TCP egress."""
        ...


class _Kept:
    """What is remembered of one instance."""

    def __init__(self) -> None:
        self.records: deque[AuditRecord] = deque(maxlen=MAX_RECORDS)
        self.seen = Seen()


class EgressView:
    def __init__(self, egress: Egress, guests: Guests, approvals: Approvals) -> None:
        self._egress = egress
        self._guests = guests
        self._approvals = approvals
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def ca_pem(self) -> bytes:
        return self._egress.ca_pem

    def policy(self, ref: str) -> EgressPolicy:
        return self._guests.policy(ref)

    def check(self, ref: str, url: str, method: str) -> EgressCheck:
        """What the rules say of a request. Raises InvalidRequest."""
        found = self._guests.policy(ref)
        access = found.access if found.access is not UNSET else None
        web_only = self._guests.web_only(found.instance_id)
        return check_url(access, url, method, datetime.now(UTC), web_only=web_only)

    def proposal(self, ref: str) -> EgressProposal:
        kept = self._kept.get(self._guests.policy(ref).instance_id)
        seen = kept.seen if kept is not None else Seen()
        return EgressProposal(
            requests=seen.requests, complete=seen.complete, default=AccessDefault.DENY, rules=seen.rules()
        )

    def approvals(self, ref: str | None = None) -> list[EgressApproval]:
        return self._approvals.pending(None if ref is None else self._guests.policy(ref).instance_id)

    async def decide(self, ref: str, approval: str, *, allow: bool, seconds: float) -> EgressApproval:
        instance_id = self._guests.policy(ref).instance_id
        return await self._approvals.decide(instance_id, approval, allow=allow, seconds=seconds)

    async def requests(self, ref: str, *, tail: int, follow: bool) -> EgressRecords:
        """The last ``tail`` requests; with ``follow``, then every new one until the instance is deleted."""
        instance_id = self._guests.policy(ref).instance_id
        stream = EgressRecords(self._guests, instance_id)
        if follow:
            await stream.follow(self._egress)
        # No await after the subscription: no record is missed or duplicated.
        kept = self._kept.get(instance_id)
        records = list(kept.records) if kept is not None else []
        stream.start_with(records[max(0, len(records) - tail) :])
        return stream

    def keep(self, record: AuditRecord) -> None:
        """For ``Egress.on_audit``."""
        kept = self._kept.get(record.instance)
        if kept is None:
            kept = self._kept[record.instance] = _Kept()
            if len(self._kept) > MAX_INSTANCES:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(record.instance)
        kept.seen.add(record)
        kept.records.append(record)


class EgressRecords:
    """Records of one instance: the kept ones and, when following, new ones until it is deleted."""

    def __init__(self, guests: Guests, instance_id: str) -> None:
        self._guests = guests
        self._instance_id = instance_id
        self._old: deque[AuditRecord] = deque()
        self._new: trio.MemoryReceiveChannel[AuditRecord] | None = None
        self._open = AsyncExitStack()

    async def follow(self, egress: Egress) -> None:
        self._new = await self._open.enter_async_context(egress.audit(self._instance_id))

    def start_with(self, records: list[AuditRecord]) -> None:
        self._old.extend(records)

    def __aiter__(self) -> EgressRecords:
        return self

    async def __anext__(self) -> EgressRecord:
        await trio.lowlevel.checkpoint()
        if self._old:
            return _shown(self._old.popleft())
        record = await self._next_new() if self._new is not None else None
        if record is None:
            await self.aclose()
            raise StopAsyncIteration
        return _shown(record)

    async def aclose(self) -> None:
        """Idempotent."""
        self._new = None
        await self._open.aclose()

    async def _next_new(self) -> AuditRecord | None:
        """None when the instance has been deleted."""
        assert self._new is not None
        try:
            return self._new.receive_nowait()
        except trio.WouldBlock:
            pass
        record = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_deleted, nursery.cancel_scope)
            record = await self._new.receive()
            nursery.cancel_scope.cancel()
        return record

    async def _cancel_when_deleted(self, scope: trio.CancelScope) -> None:
        await self._guests.wait_deleted(self._instance_id)
        scope.cancel()


def _shown(record: AuditRecord) -> EgressRecord:
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
        decision=cast(Ruling, record.decision) if record.decision else UNSET,
        rule=record.rule or UNSET,
        target=record.target or UNSET,
    )
