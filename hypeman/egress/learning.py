"""What an instance was seen to reach, and the narrowest rules that cover it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from hypeman.egress.records import AuditRecord
from hypeman.egress.rules import canonical_path
from hypeman.egress.types import AccessAction, AccessRule

MAX_PLACES = 500
"""Hosts with port that are remembered of an instance."""
MAX_METHODS = 16
"""Methods of a host that are listed; of more, all are proposed. A guest can invent them without end."""
MAX_PATHS = 32
"""Paths of a host that are listed; of more, only that there were many is remembered."""


class _Place:
    """A host and port."""

    def __init__(self) -> None:
        self.requests = 0
        self.unread = False
        """It was passed through: methods are not known."""
        self.methods: set[str] | None = set()
        """None: too many."""
        self.paths: set[str] | None = set()
        """None: not known of every request, or too many."""


class Seen:
    """What one instance reached since the server started."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, int], _Place] = {}
        self.requests = 0
        self.complete = True
        """Nothing was left out."""

    def add(self, record: AuditRecord) -> None:
        """Requests that were, or would have been, carried count; refused ones do not."""
        if record.kind == "refused" or record.reason != "ok" or not record.host:
            return
        place = self._places.get((record.host, record.port))
        if place is None:
            if len(self._places) >= MAX_PLACES:
                self.complete = False
                return
            place = self._places[record.host, record.port] = _Place()
        self.requests += 1
        place.requests += 1
        if record.kind == "passed_through":
            place.unread, place.paths = True, None
            return
        if place.methods is not None:
            place.methods.add(record.method.upper())
            if len(place.methods) > MAX_METHODS:
                place.methods = None
        path = canonical_path(record.target) if record.target else None
        if path is None or "*" in path or place.paths is None or len(record.target) >= 239:
            place.paths = None
            return
        place.paths.add(path)
        if len(place.paths) > MAX_PATHS:
            place.paths = None

    def rules(self) -> tuple[AccessRule, ...]:
        """One rule for all hosts of which the same was seen."""
        alike: dict[tuple[int, tuple[str, ...] | None, tuple[str, ...] | None], list[str]] = {}
        for (host, port), place in self._places.items():
            methods = None if place.unread or place.methods is None else tuple(sorted(place.methods))
            paths = tuple(sorted(place.paths)) if place.paths else None
            alike.setdefault((port, methods, paths), []).append(host)
        return tuple(self._made(alike))

    @staticmethod
    def _made(
        alike: dict[tuple[int, tuple[str, ...] | None, tuple[str, ...] | None], list[str]],
    ) -> Iterator[AccessRule]:
        for (port, methods, paths), hosts in sorted(alike.items(), key=lambda each: sorted(each[1])):
            yield AccessRule(
                action=AccessAction.ALLOW, hosts=tuple(sorted(hosts)), ports=(port,), methods=methods, paths=paths
            )
