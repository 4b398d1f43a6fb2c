"""The audit log: one structured line a mediated request, from the logger ``hypeman.egress.audit``.

Rules:
- No path, no query, no value. Names of credentials stand under ``rules``, because the log blanks every
  field whose own name speaks of credentials.
- Guests decide how many lines there are, so writing must not hold up the API: lines are written some at
  a time with everybody else's turn in between, and only so many may wait. What is too much is counted
  and told by a line of its own. A line costs 50 µs of CPU.
- What waits at the end is still written: ``flush``.
"""

from __future__ import annotations

import logging
from collections import deque

import trio

from hypeman.egress.service import AuditRecord

MOST_WAITING = 10_000
"""Some 6 MB."""
AT_A_TIME = 32

_log = logging.getLogger("hypeman.egress.audit")


class AuditLog:
    """``offer`` takes records, ``run`` writes them."""

    def __init__(self) -> None:
        self._waiting: deque[AuditRecord] = deque()
        self._arrived = trio.Event()
        self._lost = 0

    def offer(self, record: AuditRecord) -> None:
        """For ``Egress.on_audit``."""
        if not _log.isEnabledFor(logging.INFO):
            return
        if len(self._waiting) >= MOST_WAITING:
            self._lost += 1
            return
        self._waiting.append(record)
        self._arrived.set()

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while self._waiting:
                self._write(AT_A_TIME)
                await trio.lowlevel.checkpoint()
            self._tell_lost()

    def flush(self) -> None:
        """Write everything that still waits; the data plane has its last records when it has drained."""
        self._write(len(self._waiting))
        self._tell_lost()

    def _write(self, count: int) -> None:
        for _ in range(min(count, len(self._waiting))):
            record = self._waiting.popleft()
            _log.info(record.kind, extra=_fields(record))

    def _tell_lost(self) -> None:
        if self._lost:
            _log.warning("requests came faster than lines could be written", extra={"lost": self._lost})
            self._lost = 0


def _fields(record: AuditRecord) -> dict[str, object]:
    return {
        "instance": record.instance,
        "host": record.host,
        "port": record.port,
        "method": record.method,
        "status": record.status,
        "reason": record.reason,
        "injected": record.injected,
        "rules": record.credentials,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "ms": round(record.seconds * 1000, 2),
    }
