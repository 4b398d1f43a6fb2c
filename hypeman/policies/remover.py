"""Deletes instances that were made to be deleted when they have ended, as `docker run --rm` does.

Not at once: a client that has waited for the end reads the exit code and the rest of the log. One that still follows
the log is waited for, but not indefinitely.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

import trio

from hypeman.errors import HypemanError, InvalidState, NotFound
from hypeman.instances.model.policies import restart_rules
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.types import InstanceState, RestartMode
from hypeman.policies.controller import Context

log = logging.getLogger(__name__)

GRACE = timedelta(seconds=2)
LONGEST_GRACE = timedelta(seconds=30)
"""While a client uses the instance."""
PAUSE = 60.0
"""Seconds until a deletion that failed is tried again."""


class Remover:
    """Of all instances."""

    def __init__(self, context: Context, *, sessions: Callable[[str], int]) -> None:
        """``sessions``: how many clients use an instance."""
        self._context = context
        self._sessions = sessions
        self._busy: set[str] = set()

    def look(self, record: InstanceRecord, now: datetime) -> datetime | None:
        """Decide about an instance; returns when to look again."""
        if not record.spec.auto_remove or record.state is not InstanceState.STOPPED or record.id in self._busy:
            return None
        if restart_rules(record.spec.restart_policy).mode is not RestartMode.NEVER:  # given to it later
            return None
        grace = LONGEST_GRACE if self._sessions(record.id) else GRACE
        time = (record.stopped_at or record.phases.since) + grace
        if now < time:
            return time
        self._busy.add(record.id)
        self._context.spawn(self._remove, record)
        return None

    async def _remove(self, record: InstanceRecord) -> None:
        try:
            await self._context.instances.delete_ended(record.id, record.boots)
        except NotFound:
            pass  # by a client
        except InvalidState:  # a client has started it again
            await trio.sleep(GRACE.total_seconds())
        except HypemanError as error:
            log.warning("instance %s, which has ended, cannot be deleted: %s", record.id, error)
            await trio.sleep(PAUSE)
        finally:
            self._busy.discard(record.id)
            self._context.again(record.id)
