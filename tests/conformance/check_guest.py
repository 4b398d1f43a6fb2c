"""What instances rely on in a guest's agent, as one suite: on a real guest and on the fake of the crash matrix.

The guest runs ``sleep`` and has one unmounted disk besides its own. The checks are run in order on one guest, since a
real one takes seconds to boot; the last one ends it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import pytest
import trio

from hypeman.errors import HypemanError, InUse
from hypeman.guest.boot import GuestNetwork, GuestVolume
from hypeman.guest.failures import GuestLost
from hypeman.guest.types import Exited, GuestEvent, Ready, Started

SECONDS = 120.0


class Guest(Protocol):
    @property
    def events(self) -> AsyncIterator[GuestEvent]: ...
    def hold(self, held: bool) -> None: ...
    async def freeze(self) -> None: ...
    async def thaw(self) -> None: ...
    async def warm(self) -> None: ...
    async def set_identity(
        self,
        *,
        hostname: str,
        machine_id: str = "",
        network: GuestNetwork | None = None,
        entropy: bytes = b"",
        clock_ns: int = 0,
    ) -> None: ...
    async def mount_volume(self, volume: GuestVolume) -> None: ...
    async def unmount_volume(self, path: str) -> None: ...
    async def shutdown(self, *, grace_seconds: float | None = None, signal: int = 0) -> None: ...


class Bench:
    """``busy(path)``: within the block, a process in the guest uses the path."""

    def __init__(
        self,
        guest: Guest,
        *,
        disk: str,
        is_frozen: Callable[[], Awaitable[bool]],
        hostname: Callable[[], Awaitable[str]],
        busy: Callable[[str], AbstractAsyncContextManager[None]],
        wait_off: Callable[[], Awaitable[None]],
    ) -> None:
        self.guest = guest
        self.disk = disk
        self.is_frozen = is_frozen
        self.hostname = hostname
        self.busy = busy
        self.wait_off = wait_off

    async def until_it_runs(self) -> None:
        with trio.fail_after(SECONDS):
            while await self.is_frozen():
                await trio.lowlevel.checkpoint()


Check = Callable[[Bench], Awaitable[None]]


async def check_it_is_ready_then_started(bench: Bench) -> None:
    events = [await anext(bench.guest.events), await anext(bench.guest.events)]
    assert isinstance(events[0], Ready) and isinstance(events[1], Started)


async def check_the_workload_can_be_frozen_and_thawed(bench: Bench) -> None:
    """Each may be repeated: an undo does not know how far the step came."""
    await bench.guest.thaw()
    await bench.until_it_runs()
    for _ in range(2):
        await bench.guest.freeze()
        await bench.guest.warm()
        assert await bench.is_frozen()
    for _ in range(2):
        await bench.guest.thaw()
        await bench.until_it_runs()


async def check_a_guest_that_is_held_still_answers_afterwards(bench: Bench) -> None:
    bench.guest.hold(True)
    bench.guest.hold(False)
    await bench.guest.thaw()


async def check_it_takes_an_identity(bench: Bench) -> None:
    await bench.guest.set_identity(
        hostname="other", machine_id="f" * 32, network=None, entropy=b"\1" * 64, clock_ns=1_900_000_000 * 10**9
    )
    assert await bench.hostname() == "other"


async def check_a_volume_comes_and_goes(bench: Bench) -> None:
    await bench.guest.mount_volume(GuestVolume(bench.disk, "/vol/one"))
    for _ in range(2):
        await bench.guest.unmount_volume("/vol/one")


async def check_a_volume_in_use_stays(bench: Bench) -> None:
    await bench.guest.mount_volume(GuestVolume(bench.disk, "/vol/one"))
    async with bench.busy("/vol/one"):
        with pytest.raises(InUse, match="/vol/one is in use by"):
            await bench.guest.unmount_volume("/vol/one")
    with trio.fail_after(SECONDS):
        while True:
            try:
                await bench.guest.unmount_volume("/vol/one")
                break
            except InUse:  # its holder is just ending
                await trio.sleep(0.05)


async def check_it_shuts_down(bench: Bench) -> None:
    """The workload is ended by its stop signal; its end is reported, and then nothing more."""
    await bench.guest.shutdown(grace_seconds=30)
    with trio.fail_after(SECONDS):
        left = [event async for event in bench.guest.events]
        await bench.wait_off()
    assert left == [Exited(143, 15)]


async def check_it_is_lost_once_it_is_off(bench: Bench) -> None:
    for request in (bench.guest.freeze, bench.guest.thaw, bench.guest.shutdown):
        with pytest.raises(HypemanError) as caught, trio.fail_after(SECONDS):
            await request()
        assert isinstance(caught.value, GuestLost)


CHECKS: tuple[Check, ...] = tuple(check for name, check in list(globals().items()) if name.startswith("check_"))


async def run_all(bench: Bench) -> None:
    for check in CHECKS:
        with trio.fail_after(SECONDS):
            await check(bench)
