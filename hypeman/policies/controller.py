"""What the controllers of the policies share: the instances, the store, and the service's loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from hypeman.instances.service import Instances
from hypeman.store import Store


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
