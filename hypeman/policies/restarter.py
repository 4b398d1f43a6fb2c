"""Carries out restart.py: stores what is remembered, then starts and stops instances, a bounded number at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime

import trio

from hypeman.errors import HypemanError, InvalidState, NotFound
from hypeman.events.types import Datum
from hypeman.instances.model.policies import restart_rules
from hypeman.instances.model.record import InstanceRecord, StopCause
from hypeman.instances.model.types import HealthState, InstanceHealthStatus
from hypeman.policies import rows
from hypeman.policies.controller import Context, note
from hypeman.policies.restart import UP, Action, Decision, Facts, Memory, decide, restart_status
from hypeman.store import Txn
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)


class Restarter:
    """The restart policies of all instances."""

    def __init__(
        self, context: Context, *, most: int, health: Callable[[InstanceRecord], InstanceHealthStatus]
    ) -> None:
        self._context = context
        self._limiter = trio.CapacityLimiter(most)
        self._health = health
        self._memories: dict[str, Memory] = {}
        self._busy: set[str] = set()
        self._up: dict[str, bool] = {}
        """Whether an instance was up when it was last looked at."""

    def load(self, memories: Mapping[str, Memory]) -> None:
        self._memories = dict(memories)

    def forget(self, instance_id: str) -> None:
        self._memories.pop(instance_id, None)
        self._up.pop(instance_id, None)

    def look(self, record: InstanceRecord, now: datetime) -> datetime | None:
        """Decide about an instance; returns when to look again."""
        was_up, self._up[record.id] = self._up.get(record.id), record.state in UP
        if record.id in self._busy:
            return None  # it is looked at again when that is done
        rules = restart_rules(record.spec.restart_policy)
        memory = known = self._memories.get(record.id, Memory())
        if was_up is False and record.state in UP:
            memory = Memory()  # started by a command: earlier attempts do not count
        decision = decide(rules, memory, self._facts(record), now)
        if decision.memory != known or decision.action is not Action.NONE:
            self._busy.add(record.id)
            self._context.spawn(self._carry_out, record, decision)
        return decision.look_at

    def details(self, record: InstanceRecord) -> Mapping[str, object]:
        """Fields of the Instance that clients see."""
        if record.spec.restart_policy is None:
            return {}
        memory = self._memories.get(record.id, Memory())
        rules = restart_rules(record.spec.restart_policy)
        return {"restart_status": restart_status(rules, memory, self._facts(record))}

    def _facts(self, record: InstanceRecord) -> Facts:
        return Facts(
            state=record.state,
            stop_cause=record.stop_cause,
            exit_code=record.exit_code,
            started_at=record.started_at,
            stopped_at=record.stopped_at,
            unhealthy=self._health(record).status is HealthState.UNHEALTHY,
        )

    async def _carry_out(self, record: InstanceRecord, decision: Decision) -> None:
        try:
            self._memories[record.id] = decision.memory

            def write(txn: Txn) -> None:
                rows.put(txn, rows.RESTARTS, record.id, decision.memory)
                if decision.action is not Action.NONE:
                    note(txn, record, "restarting", _data(record, decision))

            await self._context.store.write(write)
            self._context.refresh(record.id)
            if decision.action is not Action.NONE:
                async with self._limiter:
                    await self._act(record, decision.action)
        except HypemanError as error:  # the memory could not be stored: decide again later
            log.warning("restart policy of instance %s: %s", record.id, error)
            await trio.sleep(1)
        finally:
            self._busy.discard(record.id)
            self._context.again(record.id)

    async def _act(self, record: InstanceRecord, action: Action) -> None:
        status = "success"
        instances = self._context.instances
        try:
            if action is Action.START:
                self._context.journal(record.id, "restart policy: start")
                await instances.start_again(record.id, record.boots)
                self._up[record.id] = True
            else:
                self._context.journal(record.id, "restart policy: unhealthy, stop to start again")
                await instances.stop_to_restart(record.id, record.boots)
        except (InvalidState, NotFound):
            status = "superseded"
        except HypemanError as error:
            status = "error"
            log.warning("restart policy: %s of instance %s failed: %s", action.value, record.id, error)
            self._context.journal(record.id, f"restart policy: {action.value} failed: {error}")
            await self._context.record(record, "restart_failed", {"error": error.message})
        if action is Action.START or status != "success":
            metrics.restarts.labels(status).inc()


def _data(record: InstanceRecord, decision: Decision) -> dict[str, Datum]:
    """Of the event that the policy begins a restart. Stopping an unhealthy instance is one, and its start another."""
    if decision.memory.health_failed:
        reason = "health_check_failed"
    else:
        reason = "reboot" if record.stop_cause is StopCause.HOST else "ended"
    return {"action": decision.action.value, "reason": reason, "attempts": decision.memory.attempts}
