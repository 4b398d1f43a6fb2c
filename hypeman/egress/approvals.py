"""Requests that rules hold until someone approves or denies them, and decisions that are in force for a time.

Requests of one instance for the same rule, host, method and path are one approval with one id. A decision for a time
covers the rule at that host and port, for every method and path that the rule covers. All of it is in memory: after a
restart the engine asks again, and what was decided for a time is asked again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import msgspec
import trio

from hypeman.egress.protocol import ApprovalNeeded
from hypeman.egress.service import Decide
from hypeman.egress.types import EgressApproval
from hypeman.errors import HypemanError, NotFound
from hypeman.ids import new_id

log = logging.getLogger(__name__)

MAX_PENDING = 128
"""Of an instance; further requests time out."""
MAX_WAITING = 128
"""Requests that one decision answers, the newest; the engine holds fewer. Those that their clients gave up are not
known here, and a guest can make and give up requests without end."""
MAX_DECIDED = 1024
"""Decisions in force, of all instances; the oldest are forgotten."""

Note = Callable[[str, "EgressApproval"], Awaitable[None]]
"""Log an event: ``approval_requested``, ``approved`` or ``denied``."""


class _Scope(msgspec.Struct, frozen=True):
    """What a decision for a time covers."""

    instance: str
    rule: str
    tls: bool
    host: str
    port: int


class _Pending:
    def __init__(self, shown: EgressApproval, scope: _Scope, deadline: float) -> None:
        self.shown = shown
        self.scope = scope
        self.deadline = deadline
        self.waiting: deque[Decide] = deque(maxlen=MAX_WAITING)


class Approvals:
    """``ask`` is for ``Egress.on_approval_needed``."""

    def __init__(self, note: Note, *, timeout: float) -> None:
        """``timeout``: seconds that a request is held."""
        self._note = note
        self._timeout = timeout
        self._pending: dict[tuple[_Scope, str, str], _Pending] = {}
        """By what is asked for, method and path."""
        self._decided: dict[_Scope, tuple[float, bool]] = {}
        """Until when, and whether it is allowed."""

    async def ask(self, held: ApprovalNeeded, decide: Decide) -> None:
        """Decide at once if that was decided for a time; else remember the request. Does not raise."""
        scope = _Scope(held.instance, held.rule, held.tls, held.host, held.port)
        until, allowed = self._decided.get(scope, (0.0, False))
        if until > trio.current_time():
            await decide(allowed)
            return
        self._purge()
        key = (scope, held.method, held.path)
        pending = self._pending.get(key)
        if pending is None:
            if sum(each.instance == held.instance for each, _, _ in self._pending) >= MAX_PENDING:
                return
            now = datetime.now(UTC)
            shown = EgressApproval(
                id=new_id(),
                instance_id=held.instance,
                rule=held.rule,
                scheme="https" if held.tls else "http",
                host=held.host,
                port=held.port,
                method=held.method,
                path=held.path,
                waiting=1,
                since=now,
                expires_at=now + timedelta(seconds=self._timeout),
            )
            pending = _Pending(shown, scope, trio.current_time() + self._timeout)
            self._pending[key] = pending
            pending.waiting.append(decide)
            await self._log("approval_requested", shown)
            return
        pending.deadline = trio.current_time() + self._timeout
        pending.waiting.append(decide)
        expires = datetime.now(UTC) + timedelta(seconds=self._timeout)
        pending.shown = msgspec.structs.replace(pending.shown, waiting=len(pending.waiting), expires_at=expires)

    def pending(self, instance_id: str | None = None) -> list[EgressApproval]:
        """What waits for a decision, of one instance or of all, oldest first."""
        self._purge()
        shown = [each.shown for each in self._pending.values()]
        return [each for each in shown if instance_id in (None, each.instance_id)]

    async def decide(self, instance_id: str, approval: str, *, allow: bool, seconds: float) -> EgressApproval:
        """Decide about the requests that wait, and for ``seconds`` about those to come. Raises NotFound."""
        self._purge()
        mine = [key for key, each in self._pending.items() if each.shown.id == approval]
        if not mine or mine[0][0].instance != instance_id:
            raise NotFound(
                f"no request is waiting for approval {approval!r}; it may have timed out", code="no_approval"
            )
        each = self._pending.pop(mine[0])
        waiting = deque(each.waiting)
        if seconds > 0:
            self._decided.pop(each.scope, None)
            if len(self._decided) >= MAX_DECIDED:
                del self._decided[next(iter(self._decided))]
            self._decided[each.scope] = (trio.current_time() + seconds, allow)
            for other, more in list(self._pending.items()):
                if more.scope == each.scope:
                    del self._pending[other]
                    waiting.extend(more.waiting)
        for decide in waiting:
            await decide(allow)
        await self._log("approved" if allow else "denied", each.shown)
        return each.shown

    def forget(self, instance_id: str) -> None:
        """Other rules are in force: what was decided under those before is asked again."""
        self._decided = {scope: known for scope, known in self._decided.items() if scope.instance != instance_id}

    def _purge(self) -> None:
        now = trio.current_time()
        self._pending = {key: each for key, each in self._pending.items() if each.deadline > now}

    async def _log(self, action: str, shown: EgressApproval) -> None:
        try:
            await self._note(action, shown)
        except HypemanError as error:  # the request can be approved all the same
            log.error("the event egress.%s was not logged: %s", action, error.message)
