"""Carries out idle.py: puts idle instances in standby, a bounded number at a time, and answers the API.

Before an instance is put in standby, its connections are read from the kernel's list once more, and again afterwards:
one that was opened in between wakes it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial

import msgspec
import trio

from hypeman.errors import Conflict, HypemanError, InvalidState, NotFound
from hypeman.instances.model.policies import StandbyRules, standby_rules
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import AutoStandbyStatus, InstanceState, LastWake, StandbyInstanceRequest, WakeOn
from hypeman.network.leases import get_lease
from hypeman.policies import rows
from hypeman.policies.activity import Activity
from hypeman.policies.controller import Context
from hypeman.policies.idle import Facts, Memory, Verdict, decide
from hypeman.telemetry import metrics
from hypeman.units import format_duration

log = logging.getLogger(__name__)

TRACKED, TRACKED_WITH_UDP = "conntrack_events_v4_tcp", "conntrack_events_v4_tcp_udp"
"""What clients are told of how activity is observed."""


class Sleeper:
    """The auto-standby policies of all instances."""

    def __init__(
        self, context: Context, activity: Activity, *, most: int, missed: Callable[[InstanceRecord], object]
    ) -> None:
        """``most`` at a time; ``missed`` wakes an instance that was put in standby under an open connection."""
        self._context = context
        self.activity = activity
        self._missed = missed
        self._limiter = trio.CapacityLimiter(most)
        self._memories: dict[str, Memory] = {}
        self._requested: set[str] = set()
        self._stored: dict[str, Memory] = {}
        self._storing: set[str] = set()

    def load(self, memories: Mapping[str, Memory]) -> None:
        self._memories = dict(memories)
        self._stored = dict(memories)

    def forget(self, instance_id: str) -> None:
        self.activity.forget(instance_id)
        self._memories.pop(instance_id, None)
        self._stored.pop(instance_id, None)

    # The loop

    def look(self, record: InstanceRecord, now: datetime) -> datetime | None:
        """Decide about an instance; returns when to look again."""
        rules = standby_rules(record.spec.auto_standby)
        if rules.enabled and record.state is InstanceState.RUNNING and (address := self._address(record)):
            self.activity.watch(record.id, address, rules)
        else:
            self.activity.unwatch(record.id)
        verdict = self._verdict(record, rules, now)
        self._remember(record.id, verdict.memory)
        if verdict.ready:
            self._requested.add(record.id)
            self._context.spawn(self._put_in_standby, record)
        return verdict.due if verdict.due is not None and verdict.due > now else None

    async def _put_in_standby(self, record: InstanceRecord) -> None:
        try:
            async with self._limiter:
                await self.activity.relist(record.id)
                current = self._context.instances.board.get(record.id)
                if current is None or not self._is_still_idle(current):
                    return
                self._context.journal(record.id, "auto-standby: idle")
                await self._context.instances.standby(record.id, StandbyInstanceRequest())
                await self._wake_if_connected(record)
            metrics.auto_standbys.labels("success").inc()
        except (InvalidState, NotFound):
            metrics.auto_standbys.labels("superseded").inc()
        except HypemanError as error:
            metrics.auto_standbys.labels("error").inc()
            log.warning("instance %s cannot enter standby by itself: %s", record.id, error)
            self._context.journal(record.id, f"auto-standby failed: {error}")
            self._hold(record, self._context.now())  # tried again after another idle timeout
        finally:
            self._requested.discard(record.id)
            self._context.again(record.id)

    async def _wake_if_connected(self, record: InstanceRecord) -> None:
        """One that was connected to between the last look and its pause owes an answer, and no packet would wake it."""
        rules, address = standby_rules(record.spec.auto_standby), self._address(record)
        if rules.wake is not WakeOn.NONE and address and await self.activity.has_open(address, rules):
            self._missed(record)

    def _is_still_idle(self, record: InstanceRecord) -> bool:
        rules = standby_rules(record.spec.auto_standby)
        verdict = self._verdict(record, rules, self._context.now())
        return verdict.due is not None and verdict.due <= self._context.now()

    # The API

    def status(self, record: InstanceRecord, last_wake: LastWake | None) -> AutoStandbyStatus:
        now = self._context.now()
        rules = standby_rules(record.spec.auto_standby)
        verdict = self._verdict(record, rules, now)
        counting = verdict.due is not None
        inbound, outbound = self.activity.open_connections(record.id)
        left = (verdict.due - now).total_seconds() if verdict.due is not None else 0.0
        return AutoStandbyStatus(
            supported=self._is_supported(record),
            configured=record.spec.auto_standby is not None,
            enabled=rules.enabled,
            eligible=verdict.eligible,
            active_inbound_connections=inbound,
            status=verdict.state,
            reason=verdict.reason,
            idle_timeout=format_duration(rules.idle_timeout) if record.spec.auto_standby is not None else None,
            idle_since=verdict.memory.idle_since,
            last_inbound_activity_at=self.activity.last(record.id),
            next_standby_at=verdict.due,
            hold_until=verdict.memory.hold_until,
            countdown_remaining=format_duration(max(0.0, round(left, 3))) if counting else None,
            active_outbound_connections=outbound,
            active_sessions=self.activity.sessions(record.id),
            tracking_mode=TRACKED_WITH_UDP if rules.count_udp else TRACKED,
            wake=rules.wake,
            last_wake=last_wake,
        )

    def hold(self, record: InstanceRecord) -> None:
        """Keep the instance running for one idle timeout from now. Raises Conflict if it is in standby."""
        if record.state is InstanceState.STANDBY:
            raise Conflict(f"instance {record.name!r} is in standby; restore it first", code="instance_in_standby")
        self._hold(record, self._context.now())
        self._context.again(record.id)

    @asynccontextmanager
    async def session(self, instance_id: str) -> AsyncIterator[None]:
        async with self.activity.session(instance_id):
            yield

    # Inside

    def _hold(self, record: InstanceRecord, now: datetime) -> None:
        rules = standby_rules(record.spec.auto_standby)
        if rules.enabled:
            until = now + timedelta(seconds=rules.idle_timeout)
            memory = self._memories.get(record.id, Memory())
            self._remember(record.id, msgspec.structs.replace(memory, hold_until=until))

    def _verdict(self, record: InstanceRecord, rules: StandbyRules, now: datetime) -> Verdict:
        inbound, outbound = self.activity.open_connections(record.id)
        facts = Facts(
            state=record.state,
            running_since=record.phases.since,
            configured=record.spec.auto_standby is not None,
            supported=self._is_supported(record),
            network=record.spec.network,
            address=bool(self._address(record)) if rules.enabled else True,
            vgpu=bool(record.spec.gpu_profile),
            devices=bool(record.spec.devices),
            connections=inbound,
            outbound=outbound,
            sessions=self.activity.sessions(record.id),
            last_activity_at=self.activity.last(record.id),
            observed=self.activity.observed,
            requested=record.id in self._requested,
        )
        return decide(rules, self._memories.get(record.id, Memory()), facts, now)

    def _is_supported(self, record: InstanceRecord) -> bool:
        return self._context.instances.machine.capabilities(record).standby and not record.spec.skip_guest_agent

    def _address(self, record: InstanceRecord) -> str:
        lease = self._context.store.read(lambda txn: get_lease(txn, record.id))
        return lease.ipv4 if lease is not None else ""

    def _remember(self, instance_id: str, memory: Memory) -> None:
        """Keep what is remembered, and have it stored."""
        self._memories[instance_id] = memory
        if memory != self._stored.get(instance_id, Memory()) and instance_id not in self._storing:
            self._storing.add(instance_id)
            self._context.spawn(self._store, instance_id)

    async def _store(self, instance_id: str) -> None:
        try:
            while (memory := self._memories.get(instance_id)) is not None:
                if memory == self._stored.get(instance_id, Memory()):
                    return
                await self._context.store.write(partial(rows.put, table=rows.IDLE, instance_id=instance_id, row=memory))
                self._stored[instance_id] = memory
        except HypemanError as error:
            log.warning("the idle time of instance %s cannot be stored: %s", instance_id, error)
        finally:
            self._storing.discard(instance_id)
