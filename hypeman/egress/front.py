"""What ingresses need from the engines: routes, listening sockets, and where instances are.

It is kept here, so that a new engine gets all of it. Changes go to all engines that run; if one is lost meanwhile, the
next one has them from here, and connections wait in the sockets.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import trio

from hypeman.egress import protocol
from hypeman.egress.link import EngineLink, EngineLost
from hypeman.egress.records import Served
from hypeman.errors import InternalError

log = logging.getLogger(__name__)

_AT_ONCE = 100
"""Instances in one message."""


class Place(NamedTuple):
    """Where an instance is."""

    address: str
    """Empty if it does not run."""
    exists: bool


class Front:
    """``run`` in a nursery. ``engines``: those that are connected now."""

    def __init__(self, engines: Callable[[], Sequence[EngineLink]], clients: Callable[[], tuple[int, int]]) -> None:
        self._engines = engines
        self._clients = clients
        self._sites: dict[str, bytes] = {}
        self._ports: dict[int, Sequence[socket.socket]] = {}
        self._pairs: dict[str, tuple[str, str]] = {}
        """Chain and key of host names, PEM."""
        self._challenges: dict[str, tuple[str, str, str, str]] = {}
        """Of host names: token, proof, chain, key."""
        self._place_of: Callable[[str], Place] = _nowhere
        self.on_served: Callable[[Served], None] | None = None
        """Gets each request that is done."""
        self._changed: dict[str, bool] = {}
        """Instances that engines do not know yet, and whether they have ended."""
        self._wake = trio.Event()

    def use(self, place_of: Callable[[str], Place], on_served: Callable[[Served], None]) -> None:
        """``place_of``: an instance's name or id → where it is; must not block."""
        self._place_of = place_of
        self.on_served = on_served

    @property
    def clients(self) -> tuple[int, int]:
        """Connections that are open, and how many were refused because of a bound, when last counted."""
        return self._clients()

    # ── Changes ──────────────────────────────────────────────────────────────────────────────────

    async def put(self, ingress: str, routes: bytes) -> None:
        """The routes of an ingress, instead of those before; in force when this returns, if an engine runs."""
        self._sites[ingress] = routes
        await self._everywhere(partial(_put, ingress, routes))

    async def drop(self, ingress: str) -> None:
        """Remove the routes of an ingress and end its exchanges. Idempotent."""
        self._sites.pop(ingress, None)
        await self._everywhere(lambda engine: engine.drop_site(ingress))

    async def certify(self, name: str, chain: str, key: str) -> None:
        """The certificate of a host name (``*.example.com``: of every name with one more label that has none of its
        own) and its key, PEM. Open connections keep the previous one."""
        self._pairs[name] = (chain, key)
        await self._everywhere(partial(_certify, name, chain, key))

    async def uncertify(self, name: str) -> None:
        """It has none any more. Idempotent."""
        self._pairs.pop(name, None)
        await self._everywhere(partial(_certify, name, "", ""))

    async def challenge(self, name: str, token: str, proof: str, chain: str, key: str) -> None:
        """What shows a public CA that the name is ours, instead of what did so before: ``proof`` by HTTP-01 for
        ``token``, the certificate by TLS-ALPN-01; either may be empty."""
        self._challenges[name] = (token, proof, chain, key)
        await self._everywhere(partial(_challenge, name, token, proof, chain, key))

    async def unchallenge(self, name: str) -> None:
        """The CA has seen it. Idempotent."""
        self._challenges.pop(name, None)
        await self._everywhere(partial(_challenge, name, "", "", "", ""))

    async def listen(self, port: int, sockets: Sequence[socket.socket]) -> None:
        """Take clients for ``port`` on these sockets, which the caller keeps open until ``unlisten``."""
        self._ports[port] = sockets
        await self._everywhere(lambda engine: engine.listen(port, sockets))

    async def unlisten(self, port: int) -> None:
        self._ports.pop(port, None)
        await self._everywhere(lambda engine: engine.unlisten(port))

    def let_go(self) -> None:
        """The caller closes its sockets; engines keep theirs."""
        self._ports.clear()

    async def inherited(self, port: int) -> list[socket.socket]:
        """The sockets for ``port`` of an engine that outlived the server before; empty if there is none."""
        for engine in tuple(self._engines()):
            if engine.has_sites and not engine.draining:
                with suppress(EngineLost):
                    if sockets := await engine.sockets(port):
                        return sockets
        return []

    async def _everywhere(self, act: Callable[[EngineLink], Awaitable[None]]) -> None:
        for engine in tuple(self._engines()):
            if engine.has_sites:
                with suppress(EngineLost):
                    await act(engine)

    async def set_all(self, engine: EngineLink) -> None:
        """Bring a new engine up to date. Raises EngineLost."""
        for name, pair in tuple(self._pairs.items()):
            await _certify(name, *pair, engine)
        for name, challenge in tuple(self._challenges.items()):
            await _challenge(name, *challenge, engine)
        for ingress, routes in tuple(self._sites.items()):
            await _put(ingress, routes, engine)
        for port, sockets in tuple(self._ports.items()):
            if self._ports.get(port) is sockets:
                await engine.listen(port, sockets)

    # ── Where instances are ──────────────────────────────────────────────────────────────────────

    def forget(self, instances: Iterable[str], ended: bool = False) -> None:
        """Something about these, by name or id, has changed. ``ended``: they run no more, and requests to them fail."""
        if self._sites:
            for instance in instances:
                self._changed[instance] = ended or self._changed.get(instance, False)
            self._wake.set()

    async def run(self) -> None:
        """Tell engines what changed, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._changed:
                batch = dict(self._changed.popitem() for _ in range(min(_AT_ONCE, len(self._changed))))
                await self._everywhere(partial(_forget, batch))

    async def locate(self, engine: EngineLink, asked: protocol.Locate) -> None:
        await engine.place(asked, self._place_of)


async def _put(ingress: str, routes: bytes, engine: EngineLink) -> None:
    try:
        await engine.put_site(ingress, routes)
    except InternalError as error:
        log.error("the routes of ingress %s: %s", ingress, error.message)


async def _certify(name: str, chain: str, key: str, engine: EngineLink) -> None:
    try:
        await engine.certify(name, chain, key)
    except InternalError as error:
        log.error("the certificate of %s: %s", name, error.message)


async def _challenge(name: str, token: str, proof: str, chain: str, key: str, engine: EngineLink) -> None:
    try:
        await engine.challenge(name, token, proof, chain, key)
    except InternalError as error:
        log.error("the challenge of %s: %s", name, error.message)


async def _forget(changed: Mapping[str, bool], engine: EngineLink) -> None:
    await engine.forget(tuple(changed), [instance for instance, ended in changed.items() if ended])


def _nowhere(_: str) -> Place:
    return Place("", exists=False)
