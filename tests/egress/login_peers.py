"""What the tests' servers of Postgres and MySQL have in common: faults of their streams, and where they wait."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable

import trio
import trio.lowlevel

from tests.egress.conftest import Wire, World


class LoginServer:
    """A host that asks for a password."""

    def __init__(self, password: str, context: ssl.SSLContext) -> None:
        self.password = password
        self.context = context
        self.connections = 0
        self.closes = False
        """After what it sends in the place of its answer."""
        self.piece = 0
        """Bytes of a TCP segment; 0: all at once."""
        self.stops_at = ""
        """Where it waits for `held`: before it begins TLS, lets in ("shown": the password was), or is ready."""
        self.held = trio.Event()
        self.arrived = trio.Event()
        """It has stopped there."""

    async def serve(self, stream: trio.SocketStream) -> None:
        wire = Wire(stream)
        self.connections += 1
        try:
            await self._serve(wire)
        except (EOFError, trio.BrokenResourceError, trio.ClosedResourceError, OSError, AssertionError):
            pass
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await trio.aclose_forcefully(wire.stream)

    async def send(self, wire: Wire, data: bytes) -> None:
        for at in range(0, len(data), self.piece or max(1, len(data))):
            await wire.send(data[at : at + self.piece] if self.piece else data)
            if self.piece:
                await trio.lowlevel.checkpoint()

    async def _serve(self, wire: Wire) -> None:
        raise NotImplementedError

    async def _stop(self, stage: str) -> None:
        if self.stops_at == stage:
            self.arrived.set()
            await self.held.wait()


async def check_sessions(world: World, session: Callable[[int], Awaitable[None]]) -> None:
    """Forty at once, each with its number; the engine holds nothing afterwards."""
    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(session, number)
    with trio.fail_after(60):
        while (await world.egress.statistics()).in_use["connections"]:
            await trio.sleep(0.02)
    assert (await world.egress.statistics()).in_use["bytes"] == 0
