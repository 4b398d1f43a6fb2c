"""How much each credential of an instance is used, for metrics. Pure.

Names are chosen by clients and instances come and go, so only the ``MAX_CREDENTIALS`` that were used last are
remembered; one that is used again after it was forgotten counts from zero, as counters do after a restart.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping

from hypeman.egress.records import AuditRecord

MAX_CREDENTIALS = 500

REJECTED = (401, 403)
"""What a host answers if a credential is not valid, or not for this."""


def outcome_of(record: AuditRecord) -> str:
    """``ok``; ``rejected``: the host did not accept the credential; ``failed``: anything else."""
    if record.reason != "ok" or record.status == 0:
        return "failed"
    return "rejected" if record.status in REJECTED else "ok" if record.status < 400 else "failed"


class Usage:
    """Counts requests and bytes by instance and name of the credential."""

    def __init__(self) -> None:
        self._requests: OrderedDict[tuple[str, str], Counter[str]] = OrderedDict()
        self._bytes: dict[tuple[str, str], Counter[str]] = {}

    def add(self, record: AuditRecord) -> None:
        """For ``Egress.on_audit``."""
        for credential in dict.fromkeys(record.credentials):
            key = (record.instance, credential)
            if key not in self._requests:
                self._make_room()
                self._requests[key], self._bytes[key] = Counter(), Counter()
            self._requests.move_to_end(key)
            self._requests[key][outcome_of(record)] += 1
            self._bytes[key].update(up=record.bytes_up, down=record.bytes_down)

    def _make_room(self) -> None:
        if len(self._requests) >= MAX_CREDENTIALS:
            oldest, _ = self._requests.popitem(last=False)
            del self._bytes[oldest]

    def requests(self) -> Mapping[tuple[str, ...], float]:
        """By instance, credential and outcome."""
        return {(*key, outcome): count for key, counts in self._requests.items() for outcome, count in counts.items()}

    def bytes(self) -> Mapping[tuple[str, ...], float]:
        """By instance, credential and direction."""
        return {(*key, way): count for key, counts in self._bytes.items() for way, count in counts.items()}
