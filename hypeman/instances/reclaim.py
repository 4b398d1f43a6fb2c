"""Memory that running guests temporarily lend to the host through balloons: ``POST /resources/memory/reclaim``.

An order says how much all guests together lend and until when; it replaces the previous order.
Each lends in proportion to what it can spare above its floor. Loans are known only here: a starting server
returns everything, and a VM gets its memory back before it is saved, so no saved state contains a loan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta

import msgspec
import trio
from msgspec import UNSET

from hypeman.config import ReclaimConfig
from hypeman.errors import HypemanError, InvalidRequest
from hypeman.host import facts
from hypeman.hypervisor.interface import VmmGone
from hypeman.instances.machine.live import Live
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import InstanceState
from hypeman.resources.types import MemoryReclaimAction, MemoryReclaimRequest, MemoryReclaimResponse
from hypeman.units import MIB, parse_duration

USUAL_HOLD = 300.0
MOST_HOLD = 3600.0
"""Seconds."""
PRESSURE = 0.10
"""Available host memory below this counts as pressure."""
PAUSE = 10.0
"""Seconds until the return of memory to a VMM is retried."""

log = logging.getLogger(__name__)


class Lender(msgspec.Struct, frozen=True):
    """One running instance and what it could lend."""

    record: InstanceRecord
    live: Live
    assigned: int
    floor: int
    able: bool
    trouble: str = ""
    """Why it cannot lend."""

    @property
    def spare(self) -> int:
        """Limited to less than the memory that the guest booted with, in whole MiB."""
        most = min(self.assigned - self.floor, self.record.spec.memory_bytes - MIB)
        return max(0, most // MIB * MIB) if self.able else 0


def shares(wanted: int, spare: Sequence[int]) -> list[int]:
    """Each one's share of ``wanted`` bytes, in proportion to what it can spare: whole MiB, in total never more than
    ``wanted``, and short by more than a MiB only if all give what they can."""
    total = sum(spare)
    wanted = min(wanted, total) // MIB * MIB
    parts = [each * wanted // total // MIB * MIB if total else 0 for each in spare]
    for index, each in enumerate(spare):
        if sum(parts) < wanted and parts[index] < each:
            parts[index] += MIB
    return parts


class Reclaim:
    """Carries out reclaim orders. ``run`` in a nursery."""

    def __init__(
        self,
        config: ReclaimConfig,
        *,
        records: Callable[[], Iterator[InstanceRecord]],
        live: Mapping[str, Live],
        now: Callable[[], datetime],
    ) -> None:
        self._config = config
        self._floor = config.floor
        self._records = records
        self._live = live
        self._now = now
        self._until: datetime | None = now()
        self._changed = trio.Event()
        self._one_order = trio.Lock()

    async def run(self) -> None:
        """Return loans when they expire, starting with those left by an earlier server."""
        while True:
            self._changed = trio.Event()
            left = float("inf") if self._until is None else (self._until - self._now()).total_seconds()
            with trio.move_on_after(max(0.0, left)) as waiting:
                await self._changed.wait()
            if waiting.cancelled_caught:
                await self._give_back()

    async def order(self, request: MemoryReclaimRequest) -> MemoryReclaimResponse:
        """Raises InvalidRequest."""
        if not self._config.enabled:
            raise InvalidRequest("this server takes no memory from guests (reclaim.enabled)", code="feature_disabled")
        if request.reclaim_bytes < 0:
            raise InvalidRequest("reclaim_bytes must not be negative", code="bad_request")
        hold = USUAL_HOLD if request.hold_for is None else parse_duration(request.hold_for, code="bad_request")
        if hold > MOST_HOLD:
            raise InvalidRequest(f"hold_for may be up to {MOST_HOLD / 3600:g}h", code="bad_request")
        async with self._one_order:
            lenders = await self._lenders()
            planned = shares(request.reclaim_bytes, [lender.spare for lender in lenders])
            if not request.dry_run:
                log.info("guests lend %d bytes for %g s; reason: %s", sum(planned), hold, request.reason or "none")
                self._until = self._now() + timedelta(seconds=hold if request.reclaim_bytes else 0)
                self._changed.set()
            actions: list[MemoryReclaimAction] = []
            async with trio.open_nursery() as nursery:
                for lender, size in zip(lenders, planned, strict=True):
                    nursery.start_soon(self._act, lender, size, request.dry_run, actions)
            until = self._until
        available = facts.available_memory_bytes()
        return MemoryReclaimResponse(
            requested_reclaim_bytes=request.reclaim_bytes,
            planned_reclaim_bytes=sum(planned),
            applied_reclaim_bytes=sum(action.applied_reclaim_bytes for action in actions),
            host_available_bytes=available,
            host_pressure_state="pressure" if available < PRESSURE * facts.memory_bytes() else "healthy",
            actions=tuple(sorted(actions, key=lambda action: action.instance_name)),
            hold_until=until if until is not None and until > self._now() else UNSET,
        )

    async def _lenders(self) -> list[Lender]:
        found = []
        for record in list(self._records()):
            live = self._live.get(record.id)
            if record.state is not InstanceState.RUNNING or live is None:
                continue
            assigned = record.spec.memory_bytes + record.spec.hotplug_bytes
            floor = min(assigned, max(self._floor, assigned * self._config.floor_percent // 100))
            able, trouble = False, ""
            try:
                able = await live.vmm.can_lend()
            except VmmGone:
                continue
            except HypemanError as error:
                trouble = error.message
            found.append(Lender(record, live, assigned, floor, able, trouble))
        return found

    async def _act(self, lender: Lender, size: int, dry_run: bool, actions: list[MemoryReclaimAction]) -> None:
        live, before = lender.live, lender.live.lent or 0
        status, trouble = self._outlook(lender, size, dry_run), lender.trouble
        if status == "applied":
            try:
                await live.lend(size)
            except VmmGone:
                return
            except HypemanError as error:
                status, trouble = "error", error.message
        lent = live.lent or 0
        actions.append(
            MemoryReclaimAction(
                instance_id=lender.record.id,
                instance_name=lender.record.name,
                hypervisor=lender.record.spec.hypervisor.value,
                status=status,
                assigned_memory_bytes=lender.assigned,
                protected_floor_bytes=lender.floor,
                previous_target_guest_memory_bytes=lender.assigned - before,
                planned_target_guest_memory_bytes=lender.assigned - size,
                target_guest_memory_bytes=lender.assigned - lent,
                applied_reclaim_bytes=lent,
                error=trouble or UNSET,
            )
        )

    def _outlook(self, lender: Lender, size: int, dry_run: bool) -> str:
        """The expected outcome if nothing fails."""
        if lender.trouble:
            return "error"
        if not lender.able:
            return "unsupported"
        if dry_run:
            return "planned"
        return "unchanged" if lender.live.lent == size else "applied"

    async def _give_back(self) -> None:
        async with self._one_order:
            for live in [live for live in self._live.values() if live.lent != 0]:
                await live.end_loan()
            again = any(live.lent != 0 for live in self._live.values())
            self._until = self._now() + timedelta(seconds=PAUSE) if again else None
