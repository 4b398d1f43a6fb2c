"""The audit log: one structured line per mediated request, from the logger ``hypeman.egress.audit``.

Rules:
- Credential values are not logged, paths and queries only where a rule of the instance says so. Names of
  credentials are logged as ``rules``, because the log redacts every field whose own name mentions credentials.
- Guests control the number of lines, so writing must not delay the API: lines are written in batches
  of ``BATCH`` with a checkpoint in between, and at most ``MAX_QUEUED`` are queued. Records beyond that are
  dropped, and a separate line reports how many. A line costs 50 µs of CPU.
- ``flush`` writes what is still queued at shutdown.
"""

from __future__ import annotations

import logging
from collections import deque

import trio

from hypeman.egress.records import AuditRecord

MAX_QUEUED = 10_000
"""Records, about 6 MB."""
BATCH = 32

_log = logging.getLogger("hypeman.egress.audit")


class AuditLog:
    """``offer`` takes records, ``run`` writes them."""

    def __init__(self) -> None:
        self._queue: deque[AuditRecord] = deque()
        self._arrived = trio.Event()
        self._dropped = 0

    def offer(self, record: AuditRecord) -> None:
        """For ``Egress.on_audit``."""
        if not _log.isEnabledFor(logging.INFO):
            return
        if len(self._queue) >= MAX_QUEUED:
            self._dropped += 1
            return
        self._queue.append(record)
        self._arrived.set()

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while self._queue:
                self._write(BATCH)
                await trio.lowlevel.checkpoint()
            self._report_dropped()

    def flush(self) -> None:
        """Write everything queued; the data plane delivers its last records once it has drained."""
        self._write(len(self._queue))
        self._report_dropped()

    def _write(self, count: int) -> None:
        for _ in range(min(count, len(self._queue))):
            record = self._queue.popleft()
            _log.info(record.kind, extra=_fields(record))

    def _report_dropped(self) -> None:
        if self._dropped:
            _log.warning("requests came faster than lines could be written", extra={"lost": self._dropped})
            self._dropped = 0


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
        **({"decision": record.decision, "decided_by": record.rule} if record.decision else {}),
        **({"target": record.target} if record.target else {}),
    }
