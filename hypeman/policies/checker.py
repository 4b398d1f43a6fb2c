"""Has running instances checked as their health checks say, a bounded number at a time, and keeps the results.

An instance in any other state is not checked, so a check never wakes one. A check that fails while the server itself
has paused the VM, for a capture, does not count. Results are not stored: after a restart of the server, an instance is
``starting`` until its next check.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

import trio

from hypeman.guest.client import GuestClient
from hypeman.instances.model.policies import HealthRules, health_rules
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import HealthCheck, HealthState, InstanceHealthStatus, InstanceState
from hypeman.network.leases import get_lease
from hypeman.policies import health
from hypeman.policies.controller import Context
from hypeman.policies.health import Result
from hypeman.policies.probes import CheckFailed, Probes
from hypeman.policies.timers import Timers
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)

SPREAD = 1.0
"""Seconds over which the first checks of instances that start together are spread."""

OwnConnection = Callable[[str, int], None]
"""Called with address and local port of a check's connection before it is opened."""


@dataclass
class _Checked:
    """An instance that has checks."""

    record: InstanceRecord
    wanted: HealthCheck | None
    """As in the record: a changed policy starts over."""
    rules: HealthRules
    status: InstanceHealthStatus
    started_at: datetime
    address: str
    running: bool

    def goes_on(self, record: InstanceRecord) -> bool:
        """Whether the checks of the running instance ``record`` are these."""
        return self.running and self.record.boots == record.boots and self.wanted == record.spec.health_check


class Checker:
    """The health checks of all instances."""

    def __init__(
        self, context: Context, *, most: int, probes: Probes, opening: OwnConnection = lambda address, port: None
    ) -> None:
        self._context = context
        self._limiter = trio.CapacityLimiter(most)
        self._probes = probes
        self._opening = opening
        self._checked: dict[str, _Checked] = {}
        self._timers: Timers[str] = Timers()
        """On Trio's clock: a step of the host's clock neither delays nor hurries checks."""

    def forget(self, instance_id: str) -> None:
        self._checked.pop(instance_id, None)
        self._timers.cancel(instance_id)

    def look(self, record: InstanceRecord) -> None:
        """Begin or end the checks of an instance, as its record says."""
        rules = health_rules(record.spec.health_check)
        before = self._checked.get(record.id)
        if not rules.active:
            if before is not None:
                self.forget(record.id)
                self._context.refresh(record.id)
            return
        running = record.state is InstanceState.RUNNING and not record.deleting
        if before is not None and running and before.goes_on(record):
            before.record = record
            return
        status = before.status if before is not None else None
        if running or record.state in (InstanceState.CREATED, InstanceState.INITIALIZING):
            status = health.begin(status)
        else:
            status = health.end(status)
        lease = self._context.store.read(lambda txn: get_lease(txn, record.id))
        self._checked[record.id] = _Checked(
            record=record,
            wanted=record.spec.health_check,
            rules=rules,
            status=status,
            started_at=record.phases.since,
            address=lease.ipv4 if lease is not None else "",
            running=running,
        )
        if running:
            spread = min(rules.interval, SPREAD) * (zlib.crc32(record.id.encode()) % 1000) / 1000
            self._timers.set(record.id, trio.current_time() + spread)
        else:
            self._timers.cancel(record.id)
        if before is None or before.status != status:
            self._context.refresh(record.id)

    def next(self) -> float | None:
        """When ``run_due`` is to be called, on Trio's clock."""
        return self._timers.next()

    def run_due(self) -> None:
        """Begin the checks whose time has come."""
        for instance_id in self._timers.pop_due(trio.current_time()):
            checked = self._checked.get(instance_id)
            if checked is not None:
                self._context.spawn(self._check, checked)

    def status(self, record: InstanceRecord) -> InstanceHealthStatus:
        checked = self._checked.get(record.id)
        return checked.status if checked is not None else health.DISABLED

    def details(self, record: InstanceRecord) -> Mapping[str, object]:
        """Fields of the Instance that clients see."""
        return {"health_status": self.status(record)}

    def counts(self) -> dict[tuple[str, ...], float]:
        """Instances that have checks, by status."""
        counted = Counter(checked.status.status.value for checked in self._checked.values())
        return {(state.value,): float(counted.get(state.value, 0)) for state in HealthState if state != "disabled"}

    async def _check(self, checked: _Checked) -> None:
        record = checked.record
        async with self._limiter:
            guest = self._guest(record.id)
            if self._checked.get(record.id) is not checked:
                return
            if guest is not None and guest.held:
                self._again(checked)
                return
            begin = trio.current_time()
            error = await self._ask(checked, guest)
        if self._checked.get(record.id) is not checked:
            return  # it has been stopped, started or changed meanwhile
        held = guest is not None and (guest.held or guest is not self._guest(record.id))
        if error is None or not held:
            await self._count(checked, error, trio.current_time() - begin)
        self._again(checked)

    async def _ask(self, checked: _Checked, guest: GuestClient | None) -> str | None:
        """Why the check failed; None if it succeeded."""
        rules, address = checked.rules, checked.address
        try:
            with trio.fail_after(rules.timeout):
                await self._probes.check(
                    rules, address=address, guest=guest, opening=lambda port: self._opening(address, port)
                )
        except CheckFailed as failed:
            return str(failed)
        except trio.TooSlowError:
            return f"no answer within {rules.timeout:g} s"
        except Exception:  # what a guest answers must never end the server
            log.exception("health check of instance %s", checked.record.id)
            return "the check itself failed; see the server's log"
        return None

    async def _count(self, checked: _Checked, error: str | None, seconds: float) -> None:
        kind = checked.rules.type.value
        metrics.health_checks.labels(kind, "success" if error is None else "failure").inc()
        metrics.health_check_seconds.labels(kind).observe(seconds)
        before = checked.status
        checked.status = health.after(checked.rules, before, checked.started_at, Result(self._context.now(), error))
        self._context.refresh(checked.record.id)
        if checked.status.status is not before.status:
            said = f"health: {checked.status.status.value}" + (f" ({error})" if error is not None else "")
            self._context.journal(checked.record.id, said)
            self._context.again(checked.record.id)
            data = {"from": before.status.value, "to": checked.status.status.value, "error": error}
            await self._context.record(checked.record, "health_changed", data)

    def _again(self, checked: _Checked) -> None:
        self._timers.set(checked.record.id, trio.current_time() + checked.rules.interval)
        self._context.wake()

    def _guest(self, instance_id: str) -> GuestClient | None:
        live = self._context.instances.machine.live(instance_id)
        return live.guest if live is not None else None
