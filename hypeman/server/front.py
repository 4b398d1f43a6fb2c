"""The application that the server starts with: plain requests by their routes, everything else by Quart.

Quart, what it imports and its map of URLs are an eighth of the CPU time of a start and 8 MB. They are loaded, in a
thread, by the first request that needs them: of a browser, of a follower of logs, or an upload.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from hypeman.server.exchange import ServerSettings
from hypeman.server.idempotency import Calls
from hypeman.server.plain_routes import routes_of
from hypeman.server.services import Services
from hypeman.server.sessions import Sessions


class Front:
    """The parameters are those of ``build_app`` (app.py)."""

    def __init__(
        self, services: Services, settings: ServerSettings, calls: Calls, sessions: Sessions, ui: Path | None
    ) -> None:
        self.plain = routes_of(services, settings)
        self._parameters = services, settings, calls, sessions, ui
        self._app: Callable[..., Awaitable[None]] | None = None
        self._loading = trio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._app is None:
            await self._load()
        assert self._app is not None
        await self._app(scope, receive, send)

    async def _load(self) -> None:
        async with self._loading:
            if self._app is None:
                self._app = await trio.to_thread.run_sync(self._build)

    def _build(self) -> Callable[..., Awaitable[None]]:
        from hypeman.server.app import build_app

        return build_app(*self._parameters)
