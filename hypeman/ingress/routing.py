"""The routing table: which rule is for a host name on a port. Pure.

Labels are compared from the right, and a label written out wins over a capture: ``a.example.com``, then
``{x}.example.com``, then ``a.{y}.com``. So the order in which rules were added does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec import Struct

from hypeman.ingress.hostnames import capture_of, fill_in, parse_hostname


class Route(Struct, frozen=True):
    """A rule as the data plane needs it."""

    ingress: str
    """Id."""
    hostname: str
    port: int
    instance: str
    """A name; with a pattern, a text with captures."""
    target_port: int
    auth_header: str = ""
    auth_value: str = ""
    tls: bool = False
    """Requests over TLS are for this rule, plain ones are not; otherwise the other way round."""
    redirect: int = 0
    """A plain request is answered with 308 and the same host and target at ``https`` on this port; 0: it is not."""

    def __repr__(self) -> str:
        """Without the secret."""
        return f"Route({self.hostname}:{self.port} to {self.instance}:{self.target_port})"


class Found(NamedTuple):
    route: Route
    instance: str
    """With captures filled in."""


class _Node:
    __slots__ = ("below", "capture", "routes")

    def __init__(self) -> None:
        self.below: dict[str, _Node] = {}
        self.capture: _Node | None = None
        self.routes: dict[int, Route] = {}
        """By port."""


class RoutingTable:
    """Routes by host name and port. Adding and removing one costs the same however many there are."""

    def __init__(self, routes: Iterable[Route] = ()) -> None:
        self._root = _Node()
        for route in routes:
            self.add(route)

    def add(self, route: Route) -> None:
        """Replaces one for the same hosts and port."""
        node = self._root
        for label in reversed(parse_hostname(route.hostname)):
            if capture_of(label) is None:
                node = node.below.setdefault(label, _Node())
            else:
                node.capture = node.capture or _Node()
                node = node.capture
        node.routes[route.port] = route

    def remove(self, route: Route) -> None:
        """Idempotent."""
        self._remove(self._root, list(parse_hostname(route.hostname)), route)

    def _remove(self, node: _Node, labels: list[str], route: Route) -> bool:
        """Whether ``node`` is empty then."""
        if not labels:
            if node.routes.get(route.port) == route:
                del node.routes[route.port]
        else:
            label = labels.pop()
            is_capture = capture_of(label) is not None
            below = node.capture if is_capture else node.below.get(label)
            if below is not None and self._remove(below, labels, route):
                if is_capture:
                    node.capture = None
                else:
                    del node.below[label]
        return not (node.routes or node.below or node.capture)

    def find(self, host: str, port: int) -> Found | None:
        """``host`` as ``parse_host`` returns it."""
        labels = host.split(".")
        route = self._find(self._root, labels, len(labels), port)
        if route is None:
            return None
        pattern = parse_hostname(route.hostname)
        values = {
            name: label for part, label in zip(pattern, labels, strict=True) if (name := capture_of(part)) is not None
        }
        return Found(route, fill_in(route.instance, values) if values else route.instance)

    def _find(self, node: _Node, labels: list[str], left: int, port: int) -> Route | None:
        if not left:
            return node.routes.get(port)
        below = node.below.get(labels[left - 1])
        found = self._find(below, labels, left - 1, port) if below is not None else None
        if found is None and node.capture is not None:
            found = self._find(node.capture, labels, left - 1, port)
        return found
