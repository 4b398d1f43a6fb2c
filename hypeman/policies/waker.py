"""Brings instances back from standby when they are wanted: by a packet, or by a client of the API.

Packets are held by ``network/waking.py`` meanwhile, and put on the instance's TAP as part of the restore. A wake that
fails is reported to the senders, and not tried again by packets for RETRY seconds; those are answered with an error,
unless the instance has run meanwhile: a VMM that dies as it is woken is brought back by the restart policy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import trio

from hypeman.errors import HypemanError, InvalidState, NotFound
from hypeman.events.types import Datum
from hypeman.instances.model.policies import standby_rules
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import InstanceState, LastWake, WakeOn
from hypeman.network.asleep import Arrival
from hypeman.network.service import Network
from hypeman.policies import rows
from hypeman.policies.activity import Activity
from hypeman.policies.controller import Context, note
from hypeman.store import Txn
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)

RETRY = 5.0
"""Seconds after a failed wake for which packets do not try again."""


class _Failure(NamedTuple):
    """A wake that failed, and left the instance in standby."""

    capture: str | None
    """From which it could not be restored. Another standby has another one, of which this says nothing."""
    until: float
    """When packets may try again."""


class _Wake:
    """A wake in progress."""

    def __init__(self, kind: str, by: str) -> None:
        self.kind = kind
        self.by = by
        self.begin = trio.current_time()
        self.done = trio.Event()
        self.error: HypemanError | None = None


class Waker:
    """The wakes of all instances."""

    def __init__(self, context: Context, network: Network, activity: Activity) -> None:
        self._context = context
        self._network = network
        self._activity = activity
        self._wakes: dict[str, _Wake] = {}
        self._failed: dict[str, _Failure] = {}
        self._last: dict[str, LastWake] = {}
        self._changing: set[str] = set()

    def load(self, last: Mapping[str, LastWake]) -> None:
        self._last = dict(last)

    def forget(self, instance_id: str) -> None:
        self._last.pop(instance_id, None)
        self._failed.pop(instance_id, None)

    def last(self, instance_id: str) -> LastWake | None:
        return self._last.get(instance_id)

    # Packets

    def look(self, record: InstanceRecord) -> None:
        """Have packets to an instance held, or not, as its state and policy say.

        One that enters or leaves standby is held and released by those operations; this is for all other ways into
        standby and for changes of the policy.
        """
        wanted = record.state is InstanceState.STANDBY and _wakes_on(record) is not WakeOn.NONE
        settled = record.state in (InstanceState.STANDBY, InstanceState.STOPPED)
        if settled and wanted is not self._network.waking.is_held(record.id) and record.id not in self._changing:
            self._changing.add(record.id)
            self._context.spawn(self._hold_or_release, record.id)

    async def _hold_or_release(self, instance_id: str) -> None:
        try:
            await self._context.instances.settle_traffic(instance_id)
        except NotFound:
            return
        except HypemanError as error:
            log.warning("packets to instance %s cannot be held: %s", instance_id, error)
            await trio.sleep(RETRY)
        finally:
            self._changing.discard(instance_id)
            self._context.again(instance_id)

    def arrived(self, instance_id: str, arrival: Arrival) -> bool:
        """Whether to hold a packet to an instance; if it may, it wakes the instance."""
        record = self._context.instances.board.get(instance_id)
        if record is None:
            return False
        wake = self._wakes.get(instance_id)
        rules = standby_rules(record.spec.auto_standby)
        if rules.wake is WakeOn.NONE or rules.ignores(arrival.source, arrival.port):
            return False
        if arrival.quiet:
            return wake is not None
        if wake is None and record.state in (InstanceState.STANDBY, InstanceState.RUNNING):
            if self._has_just_failed(record):
                self._network.waking.refuse(arrival)
                return False
            self._begin(record, arrival.kind, str(arrival))
        return True

    def _has_just_failed(self, record: InstanceRecord) -> bool:
        failure = self._failed.get(record.id)
        return failure is not None and failure.capture == record.capture and failure.until > trio.current_time()

    # Clients

    async def wake(self, record: InstanceRecord, what: str) -> None:
        """Bring an instance back that is in standby, if its policy has requests over the API wake it.

        Returns when it runs. Raises the error of the restore.
        """
        if record.state is not InstanceState.STANDBY or _wakes_on(record) is not WakeOn.ALL:
            return
        wake = self._wakes.get(record.id) or self._begin(record, what, what)
        await wake.done.wait()
        if wake.error is not None:
            raise wake.error

    # Both

    def wake_connected(self, record: InstanceRecord) -> None:
        """An instance was put in standby while a connection to it was being opened."""
        if record.id not in self._wakes:
            self._begin(record, "tcp", "an open connection")

    def _begin(self, record: InstanceRecord, kind: str, by: str) -> _Wake:
        wake = self._wakes[record.id] = _Wake(kind, by)
        self._activity.touch(record.id)
        self._context.spawn(self._carry_out, record, wake)
        return wake

    async def _carry_out(self, record: InstanceRecord, wake: _Wake) -> None:
        status = "success"
        try:
            self._context.journal(record.id, f"woken by {wake.by}")
            await self._context.instances.restore(record.id)  # behind a standby that is in progress
        except InvalidState as error:
            current = self._context.instances.board.get(record.id)
            if current is None or current.state is not InstanceState.RUNNING:
                wake.error, status = error, "error"
            else:
                status = "superseded"  # it never slept, or someone else has restored it
        except HypemanError as error:
            wake.error, status = error, "error"
        finally:
            del self._wakes[record.id]
            wake.done.set()
        self._failed.pop(record.id, None)
        if wake.error is not None:
            current = self._context.instances.board.get(record.id)
            if current is not None and current.state is InstanceState.STANDBY:
                self._failed[record.id] = _Failure(current.capture, trio.current_time() + RETRY)
            self._network.waking.reject(record.id)
            log.warning("instance %s cannot be woken by %s: %s", record.id, wake.by, wake.error)
            self._context.journal(record.id, f"could not be woken: {wake.error.message}")
        seconds = trio.current_time() - wake.begin
        metrics.wakes.labels(wake.kind, status).inc()
        if status != "superseded":
            metrics.wake_seconds.labels(status).observe(seconds)
            await self._remember(record, wake, seconds)
        self._activity.touch(record.id)

    async def _remember(self, record: InstanceRecord, wake: _Wake, seconds: float) -> None:
        last = LastWake(at=self._context.now(), by=wake.by, milliseconds=round(seconds * 1000))
        if wake.error is not None:
            last = msgspec.structs.replace(last, error=wake.error.message)
        self._last[record.id] = last

        def write(txn: Txn) -> None:
            rows.put(txn, rows.WAKES, record.id, last)
            action = "woken" if wake.error is None else "wake_failed"
            data: dict[str, Datum] = {"by": wake.by, "milliseconds": last.milliseconds, "error": last.error or None}
            note(txn, record, action, data)

        try:
            await self._context.store.write(write)
        except HypemanError as error:
            log.warning("the wake of instance %s is not recorded: %s", record.id, error)


def _wakes_on(record: InstanceRecord) -> WakeOn:
    return standby_rules(record.spec.auto_standby).wake
