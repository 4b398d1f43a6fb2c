"""What the controllers of the policies share: the instances, the store, and the service's loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from hypeman import events
from hypeman.errors import HypemanError
from hypeman.events.types import Datum
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.rows import INSTANCES
from hypeman.instances.service import Instances
from hypeman.store import Store, Txn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    instances: Instances
    store: Store
    spawn: Callable[..., None]
    """Run an async function with arguments in the service's nursery."""
    again: Callable[[str], None]
    """Have all controllers look at an instance soon."""
    wake: Callable[[], None]
    """A timer of a controller was set: the loop may have to wait less long."""
    now: Callable[[], datetime]

    def refresh(self, instance_id: str) -> None:
        """What is shown of an instance's policies has changed."""
        self.instances.board.refresh(instance_id)

    def journal(self, instance_id: str, text: str) -> None:
        """Append a line to the instance's own log."""
        self.instances.machine.journal(instance_id, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ} {text}")

    async def record(self, record: InstanceRecord, action: str, data: Mapping[str, Datum]) -> None:
        """Log the event ``instance.<action>``, of a change that is not stored. A full disk must not end the policy."""
        try:
            await self.store.write(lambda txn: note(txn, record, action, data))
        except HypemanError as error:
            log.warning("instance.%s of instance %s is not recorded: %s", action, record.id, error)


def note(txn: Txn, record: InstanceRecord, action: str, data: Mapping[str, Datum]) -> None:
    """Log the event ``instance.<action>`` in the transaction of its change, unless the instance was deleted."""
    if txn.exists(INSTANCES, record.id):
        events.record(txn, events.Kind.INSTANCE, action, record.id, name=record.name, tags=record.spec.tags, data=data)
