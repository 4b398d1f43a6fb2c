"""Measures what instances use, and keeps the ledger.

Every ``interval`` seconds each instance is sampled: counters of its VMM since the last sample, and the time for which
it held memory and disk. When a VMM ends, its last counters are read before they are gone (``count``). The sums of the
current hour are rows that are replaced; with the first sample of the next hour they become a block of the ledger. After
``hourly_days``, the hours of a day become one block; after ``max_days`` the oldest blocks are dropped.

A server that is restarted continues: counters belong to VMMs, which live on. What a crash can lose is the CPU time and
traffic since the last sample of VMMs that ended before the next server read them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple, Protocol

import msgspec
import trio
from msgspec import UNSET

from hypeman.errors import InvalidRequest
from hypeman.host.periodic import repeat
from hypeman.instances.model.record import InstanceRecord
from hypeman.metering import rows
from hypeman.metering.chain import Block, Entry, Usage, find_fault, hash_entries, hash_of, merge_entries
from hypeman.metering.rows import OPEN, HeadRow, OpenRow
from hypeman.metering.types import Query, UsageBy, UsageReport, UsageRow, UsageVerification
from hypeman.resources.accounting import HOLDINGS, Holding
from hypeman.store import Store, Txn

HOUR, DAY = 3600, 86400
_GB_HOUR = 2**30 * HOUR

_log = logging.getLogger(__name__)


class Traffic(Protocol):
    """Bytes that guests received and sent; each call is fast and does not raise."""

    def of_all(self) -> Mapping[str, tuple[int, int]]: ...
    def of_instance(self, instance_id: str) -> tuple[int, int]: ...


class Counted(NamedTuple):
    """Counters of one VMM and its guest, since it was launched."""

    cpu_seconds: float
    rx_bytes: int
    tx_bytes: int


class Metering:
    """``run`` in a nursery."""

    def __init__(
        self,
        store: Store,
        records: Callable[[], Iterable[InstanceRecord]],
        traffic: Traffic,
        cpu_seconds: Callable[[InstanceRecord], float],
        *,
        interval: float,
        hourly_days: int,
        max_days: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``cpu_seconds``: of the VMM of a record that has a handle, also of one that has just ended; fast, from any
        thread."""
        self._store = store
        self._records = records
        self._traffic = traffic
        self._cpu_seconds = cpu_seconds
        self._interval = interval
        self._hourly = hourly_days * DAY
        self._max = max_days * DAY
        self._now = now
        self._open: dict[str, OpenRow] = {}
        self._sampled = 0
        """When all instances were last sampled; 0: never."""
        self._closing = False
        self._steady = trio.Lock()
        """Held while the chain may change, or must not."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._open = dict(self._store.read(lambda txn: list(txn.scan(OPEN))))
        self._sampled = self._store.read(rows.head).sampled
        task_status.started()
        # after a failure the next sample has it all
        await repeat(self.sample, interval=self._interval, what="recording of usage")

    async def sample(self) -> None:
        """Bring the current period up to date, and close it if its hour is over."""
        async with self._steady:
            await self._sample()

    async def _sample(self) -> None:
        records, before = {record.id: record for record in self._records()}, dict(self._open)
        counted = await self._count(records)
        holdings = dict(self._store.read(lambda txn: list(txn.scan(HOLDINGS))))
        now = int(self._now())
        for instance_id, record in records.items():
            if self._open.get(instance_id) is not before.get(instance_id):
                continue  # ``count`` was later, and has counted more than was read here
            holding = holdings.get(instance_id, Holding())
            self._open[instance_id] = self._account(record, holding, counted.get(instance_id), now)
        for instance_id in self._open.keys() - records.keys():
            self._open[instance_id] = msgspec.structs.replace(self._open[instance_id], gone=True)
        over = self._sampled and now // HOUR != self._sampled // HOUR
        self._sampled = now
        await self._keep(close=bool(over))
        if over:
            await self._roll_up(now)

    async def _count(self, records: Mapping[str, InstanceRecord]) -> dict[str, Counted]:
        """The counters of those that have a VMM."""
        living = [record for record in records.values() if record.handle is not None]
        traffic = self._traffic.of_all()
        seconds = await trio.to_thread.run_sync(lambda: [self._cpu_seconds(record) for record in living])
        return {
            record.id: Counted(used, *traffic.get(record.id, (0, 0)))
            for record, used in zip(living, seconds, strict=True)
        }

    def count(self, record: InstanceRecord) -> None:
        """Read the counters of a VMM that is about to end or has just ended. Does not block or raise."""
        holding = self._store.read(lambda txn: txn.get(HOLDINGS, record.id)) or Holding()
        counted = Counted(self._cpu_seconds(record), *self._traffic.of_instance(record.id)) if record.handle else None
        row = self._open[record.id] = self._account(record, holding, counted, int(self._now()))
        if not self._closing:  # the next sample writes what has changed meanwhile
            self._store.write_soon(lambda txn: txn.put(OPEN, record.id, row))

    def _account(self, record: InstanceRecord, holding: Holding, counted: Counted | None, now: int) -> OpenRow:
        """The instance's row with what was used until ``now``."""
        created = int(record.created_at.timestamp())
        known = self._open.get(record.id) or _new_row(record, max(created, self._sampled) if self._sampled else now)
        before = known.entry
        now = max(now, before.end)  # a clock that was set back
        usage = Usage(disk_byte_seconds=holding.disk * (now - before.end))
        if counted is None or record.handle is None:
            life, cpu_us, rx, tx = "", 0, 0, 0
        else:
            life = f"{record.handle.boot_id}:{record.handle.pid}:{record.handle.start_time}"
            cpu_us, rx, tx = round(counted.cpu_seconds * 1e6), counted.rx_bytes, counted.tx_bytes
            begun = int(record.started_at.timestamp()) if record.started_at is not None else before.end
            since = before.end if life == known.life else max(before.end, min(begun, now))
            usage += Usage(
                cpu_us=_grown(known.cpu_us if life == known.life else 0, cpu_us),
                memory_byte_seconds=holding.memory * (now - since),
                rx_bytes=_grown(known.rx_bytes if life == known.life else 0, rx),
                tx_bytes=_grown(known.tx_bytes if life == known.life else 0, tx),
            )
        entry = msgspec.structs.replace(
            before, name=record.name, tags=record.spec.tags, end=now, usage=before.usage + usage
        )
        return OpenRow(entry, life, cpu_us, rx, tx)

    async def _keep(self, *, close: bool) -> None:
        """Write the current period down; with ``close`` it becomes a block, and the next one begins."""
        current = dict(self._open)
        sampled = self._sampled

        def write(txn: Txn) -> None:
            if close:
                used = [row.entry for row in current.values() if row.entry.usage != Usage()]
                rows.append(txn, "hour", sorted(used, key=lambda entry: entry.instance))
            for instance_id, row in current.items():
                if close and row.gone:
                    txn.delete(OPEN, instance_id)
                else:
                    txn.put(OPEN, instance_id, row.after(row) if close else row)
            rows.put_head(txn, msgspec.structs.replace(rows.head(txn), sampled=sampled))

        self._closing = close
        try:
            await self._store.write(write)
        finally:
            self._closing = False
        if close:
            self._open = {
                instance_id: row.after(current[instance_id]) if instance_id in current else row
                for instance_id, row in self._open.items()
                if not row.gone
            }

    async def _roll_up(self, now: int) -> None:
        """Days whose hours are old enough become one block each; blocks that are too old are dropped."""
        while (hours := self._store.read(lambda txn: _next_day(txn, now - self._hourly))) is not None:
            await self._store.write(partial(_roll_up_day, day=hours))
        while self._store.read(lambda txn: _is_old(txn, now - self._max)):
            await self._store.write(rows.drop_first)

    # Reading

    async def report(self, query: Query) -> UsageReport:
        """What was used, by ``query.by``. Periods count whole, by their begin. Raises InvalidRequest."""
        if (query.by is UsageBy.TAG) != bool(query.tag):
            raise InvalidRequest("by=tag and the tag's key belong together: by=tag&tag=team")
        groups: dict[str, Entry] = {}
        total: Entry | None = None
        async with self._steady:
            async for entry in self._entries(query):
                key = _group(entry, query)
                groups[key] = _added(groups.get(key), entry)
                total = _added(total, entry)
        found = tuple(_row(key, entry, query.by) for key, entry in sorted(groups.items()))
        return UsageReport(by=query.by, rows=found, total=_row("", total, None))

    async def verify(self, number: int = 0, expected: str = "") -> UsageVerification:
        """Check every block that is kept, and that block ``number`` has the hash ``expected`` if one is given."""
        async with self._steady:
            return await self._verify(number, expected)

    async def _verify(self, number: int, expected: str) -> UsageVerification:
        row = self._store.read(rows.head)
        if number and not row.first <= number <= row.last:
            return _verified(row, 0, "it is not kept", number)
        blocks = [block async for block in self._blocks(row)]
        replaced = {at for day in blocks if day.kind == "day" for at in range(day.first, day.last + 1)}
        before, checked = row.before_first, 0
        for at, block in enumerate(blocks, row.first):
            entries = self._read_entries(block)
            rolled_up = block.kind == "hour" and block.number in replaced and not entries
            if fault := find_fault(block, at, before, None if rolled_up else entries):
                return _verified(row, checked, fault, at)
            before = hash_of(block)
            checked += len(entries)
            if at == number and before != expected:
                return _verified(row, checked, "it is not the block that was noted", at)
            await trio.lowlevel.checkpoint()
        if before != row.hash or len(blocks) != row.last - row.first + 1:
            return _verified(row, checked, "a block is missing", row.last)
        return _verified(row, checked)

    async def _blocks(self, row: HeadRow) -> AsyncIterator[Block]:
        for at in range(row.first, row.last + 1):
            if (block := self._store.read(partial(rows.block, number=at))) is not None:
                yield block
            await trio.lowlevel.checkpoint()

    def _read_entries(self, block: Block) -> list[Entry]:
        return self._store.read(partial(rows.entries_of, number=block.number))

    async def _entries(self, query: Query) -> AsyncIterator[Entry]:
        async for block in self._blocks(self._store.read(rows.head)):
            if query.since <= block.end and block.begin < query.until:
                for entry in self._read_entries(block):
                    if query.wants(entry):
                        yield entry
        for row in list(self._open.values()):
            if row.entry.usage != Usage() and query.wants(row.entry):
                yield row.entry


def _new_row(record: InstanceRecord, begin: int) -> OpenRow:
    return OpenRow(Entry(record.id, record.name, begin, begin, Usage(), record.spec.tags))


def _grown(before: int, now: int) -> int:
    """How much a counter has counted; one that is lower than before was reset."""
    return now - before if now >= before else now


def _next_day(txn: Txn, until: float) -> tuple[list[Block], int] | None:
    """The hours' blocks of the oldest day that ended before ``until`` and was not rolled up, and the number up to which
    was looked; None if there is none."""
    row = rows.head(txn)
    found: list[Block] = []
    for at in range(max(row.first, row.rolled_until + 1), row.last + 1):
        block = rows.block(txn, at)
        if block is None or block.kind == "day":
            continue
        day = block.begin // DAY
        if found and day != found[0].begin // DAY:
            return found, at - 1
        if (day + 1) * DAY > until:
            return None
        found.append(block)
    return None  # the day may not be over


def _roll_up_day(txn: Txn, day: tuple[list[Block], int]) -> None:
    """Replace the entries of a day's hours by one block. Those of a day that was tampered with stay as they are."""
    blocks, looked = day
    entries: list[Entry] = []
    for block in blocks:
        of_block = rows.entries_of(txn, block.number)
        if hash_entries(of_block) != block.entries_hash:
            _log.error("usage: block %d of the ledger is not as it was written; its day is kept by hours", block.number)
            break
        entries += of_block
    else:
        rows.append(txn, "day", merge_entries(entries), first=blocks[0].number, last=blocks[-1].number)
        for block in blocks:
            rows.drop_entries(txn, block.number)
    rows.put_head(txn, msgspec.structs.replace(rows.head(txn), rolled_until=looked))


def _is_old(txn: Txn, until: float) -> bool:
    """Whether the oldest block is to be dropped. The last one stays: the next follows it."""
    row = rows.head(txn)
    block = rows.block(txn, row.first)
    return block is not None and row.first < row.last and block.end < until


def _verified(row: HeadRow, checked: int, fault: str = "", block: int = 0) -> UsageVerification:
    return UsageVerification(
        valid=not fault,
        first=row.first,
        last=row.last,
        hash=row.hash,
        entries=checked,
        fault=fault or UNSET,
        block=block if fault else UNSET,
    )


def _group(entry: Entry, query: Query) -> str:
    match query.by:
        case UsageBy.INSTANCE:
            return entry.instance
        case UsageBy.TAG:
            return entry.tags.get(query.tag, "")
        case UsageBy.DAY:
            return datetime.fromtimestamp(entry.begin, UTC).strftime("%Y-%m-%d")


def _added(known: Entry | None, entry: Entry) -> Entry:
    """Both, of whatever instances, with the newest name."""
    if known is None:
        return entry
    begin, end = min(known.begin, entry.begin), max(known.end, entry.end)
    name = entry.name if entry.end >= known.end else known.name
    return msgspec.structs.replace(known, name=name, begin=begin, end=end, usage=known.usage + entry.usage)


def _row(key: str, entry: Entry | None, by: UsageBy | None) -> UsageRow:
    usage = entry.usage if entry is not None else Usage()
    return UsageRow(
        instance_id=key if by is UsageBy.INSTANCE else UNSET,
        instance_name=entry.name if by is UsageBy.INSTANCE and entry is not None else UNSET,
        value=key if by is UsageBy.TAG else UNSET,
        day=key if by is UsageBy.DAY else UNSET,
        begin=datetime.fromtimestamp(entry.begin, UTC) if entry is not None else None,
        end=datetime.fromtimestamp(entry.end, UTC) if entry is not None else None,
        cpu_seconds=round(usage.cpu_us / 1e6, 3),
        memory_gb_hours=round(usage.memory_byte_seconds / _GB_HOUR, 6),
        disk_gb_hours=round(usage.disk_byte_seconds / _GB_HOUR, 6),
        network_rx_bytes=usage.rx_bytes,
        network_tx_bytes=usage.tx_bytes,
    )
