"""What the server records: events and usage."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import trio
from msgspec import UNSET

from hypeman.errors import (
    HypemanError,
)
from hypeman.events.types import Event, EventFilter, EventObject, Kind
from hypeman.metering.types import Query, UsageReport, UsageRow, UsageVerification
from tests.fakes.services.common import NOW


@dataclass
class FakeMetering:
    """Reports what was asked; the ledger has one block with the hash aa…"""

    asked: list[Query] = field(default_factory=list)

    async def report(self, query: Query) -> UsageReport:
        self.asked.append(query)
        row = UsageRow(
            instance_id="i1", instance_name="web", begin=NOW, end=NOW, cpu_seconds=12.5, memory_gb_hours=2.0,
            disk_gb_hours=10.0, network_rx_bytes=5 << 20, network_tx_bytes=0,
        )  # fmt: skip
        return UsageReport(by=query.by, rows=(row,), total=row)

    async def verify(self, number: int = 0, expected: str = "") -> UsageVerification:
        fault = number and expected != "aa" * 32
        return UsageVerification(
            valid=not fault, first=1, last=1, hash="aa" * 32, entries=3,
            fault="it is not the block that was noted" if fault else UNSET, block=number if fault else UNSET,
        )  # fmt: skip


@dataclass
class FakeEvents:
    """What is in ``logged``; followers get it in one batch, then one heartbeat, or ``failure``."""

    logged: list[Event] = field(default_factory=list)
    failure: HypemanError | None = None

    def add(self, kind: Kind, action: str, name: str, **more: Any) -> Event:
        event = Event(
            cursor=self.last + 1, time=datetime.now(UTC), type=f"{kind}.{action}", object=EventObject(kind, name, name),
            **more,
        )  # fmt: skip
        self.logged.append(event)
        return event

    @property
    def last(self) -> int:
        return self.logged[-1].cursor if self.logged else 0

    def cursor_before(self, time: datetime) -> int:
        return sum(event.time < time for event in self.logged)

    async def list(self, cursor: int, wanted: EventFilter, limit: int) -> list[Event]:
        return [event for event in self.logged if event.cursor > cursor and wanted.fits(event)][:limit]

    def follow(self, cursor: int, wanted: EventFilter) -> FakeFollower:
        return FakeFollower(self, cursor, wanted)


@dataclass
class FakeFollower:
    events: FakeEvents
    cursor: int
    wanted: EventFilter
    quiet: bool = False

    def __aiter__(self) -> FakeFollower:
        return self

    async def __anext__(self) -> list[Event]:
        await trio.lowlevel.checkpoint()
        if self.events.failure is not None:
            raise self.events.failure
        cursor, self.cursor = self.cursor, self.events.last
        batch = await self.events.list(cursor, self.wanted, 1000)
        if not batch and self.quiet:
            await trio.sleep_forever()
        self.quiet = not batch
        return batch

    async def aclose(self) -> None:
        pass
