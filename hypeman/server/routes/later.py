"""Operations of the contract that this server does not implement yet: 501 with the reason, never 404, so that
a client can distinguish a missing feature from a wrong path. Their lists are empty, not 501: nothing can have
been created, and clients read all lists first."""

from __future__ import annotations

from typing import Any

from hypeman.errors import NotSupported
from hypeman.server.api import Routes
from hypeman.server.services import Services
from hypeman.tokens import Scope

routes = Routes("not yet")

_LATER: tuple[tuple[str, str, Scope, str], ...] = (
    ("POST", "/builds", Scope.BUILD_WRITE, "builds"),
    ("GET", "/builds/{id}", Scope.BUILD_READ, "builds"),
    ("DELETE", "/builds/{id}", Scope.BUILD_DELETE, "builds"),
    ("GET", "/builds/{id}/events", Scope.BUILD_READ, "builds"),
    ("POST", "/builders", Scope.BUILD_WRITE, "builders"),
    ("GET", "/builders/{id}", Scope.BUILD_READ, "builders"),
    ("DELETE", "/builders/{id}", Scope.BUILD_DELETE, "builders"),
    ("POST", "/builders/{id}/prune", Scope.BUILD_WRITE, "builders"),
)
"""Method, path, scope, and what is missing."""


def _declare(method: str, path: str, scope: Scope, missing: str) -> None:
    async def not_yet(services: Services, **path_parameters: str) -> Any:
        raise NotSupported(f"{missing}: not part of this server yet")

    not_yet.__name__ = f"{method.lower()}_{path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}"
    not_yet.__doc__ = f"Not yet: {missing}."
    routes.declare(method, path, scope, fails=(501,))(not_yet)


_LISTS: tuple[tuple[str, Scope], ...] = (
    ("/builds", Scope.BUILD_READ),
    ("/builders", Scope.BUILD_READ),
)


def _declare_list(path: str, scope: Scope) -> None:
    async def empty(services: Services) -> list[Any]:
        return []

    name = path.strip("/")
    empty.__name__ = f"list_{name}"
    empty.__doc__ = f"All {name}: none, since this server cannot create any yet."
    routes.get(path, scope)(empty)


for _path, _scope in _LISTS:
    _declare_list(_path, _scope)
for _method, _path, _scope, _missing in _LATER:
    _declare(_method, _path, _scope, _missing)
