"""What the contract has and this server has not yet: answered with 501 and a sentence, never with 404,
so that a client knows that it asked the right thing of the wrong version."""

from __future__ import annotations

from typing import Any

from hypeman.errors import NotSupported
from hypeman.server.api import Routes
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("not yet")

_LATER: tuple[tuple[str, str, Scope, str], ...] = (
    ("GET", "/ingresses", Scope.INGRESS_READ, "ingresses"),
    ("POST", "/ingresses", Scope.INGRESS_WRITE, "ingresses"),
    ("GET", "/ingresses/{id}", Scope.INGRESS_READ, "ingresses"),
    ("DELETE", "/ingresses/{id}", Scope.INGRESS_DELETE, "ingresses"),
    ("GET", "/builds", Scope.BUILD_READ, "builds"),
    ("POST", "/builds", Scope.BUILD_WRITE, "builds"),
    ("GET", "/builds/{id}", Scope.BUILD_READ, "builds"),
    ("DELETE", "/builds/{id}", Scope.BUILD_DELETE, "builds"),
    ("GET", "/builds/{id}/events", Scope.BUILD_READ, "builds"),
    ("GET", "/builders", Scope.BUILD_READ, "builders"),
    ("POST", "/builders", Scope.BUILD_WRITE, "builders"),
    ("GET", "/builders/{id}", Scope.BUILD_READ, "builders"),
    ("DELETE", "/builders/{id}", Scope.BUILD_DELETE, "builders"),
    ("POST", "/builders/{id}/prune", Scope.BUILD_WRITE, "builders"),
    ("GET", "/pushes", Scope.IMAGE_READ, "pushes"),
    ("POST", "/pushes", Scope.IMAGE_WRITE, "pushes"),
    ("GET", "/pushes/{id}", Scope.IMAGE_READ, "pushes"),
    ("GET", "/v2/", Scope.IMAGE_READ, "registry uploads"),
    ("GET", "/v2/{rest}", Scope.IMAGE_READ, "registry uploads"),
    ("POST", "/v2/{rest}", Scope.IMAGE_WRITE, "registry uploads"),
    ("PATCH", "/v2/{rest}", Scope.IMAGE_WRITE, "registry uploads"),
    ("PUT", "/v2/{rest}", Scope.IMAGE_WRITE, "registry uploads"),
    ("GET", "/instances/{id}/auto-standby/status", Scope.INSTANCE_READ, "auto-standby"),
    ("POST", "/instances/{id}/auto-standby/hold", Scope.INSTANCE_WRITE, "auto-standby"),
    ("GET", "/instances/{id}/snapshot-schedule", Scope.SNAPSHOT_READ, "snapshot schedules"),
    ("PUT", "/instances/{id}/snapshot-schedule", Scope.SNAPSHOT_WRITE, "snapshot schedules"),
    ("DELETE", "/instances/{id}/snapshot-schedule", Scope.SNAPSHOT_DELETE, "snapshot schedules"),
)
"""Method, path, scope, and what is missing."""


def _declare(method: str, path: str, scope: Scope, missing: str) -> None:
    async def not_yet(services: Services, **path_parameters: str) -> Any:
        raise NotSupported(f"{missing}: not part of this server yet")

    not_yet.__name__ = f"{method.lower()}_{path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}"
    not_yet.__doc__ = f"Not yet: {missing}."
    routes.declare(method, path, scope, fails=(501,))(not_yet)


for _method, _path, _scope, _missing in _LATER:
    _declare(_method, _path, _scope, _missing)
