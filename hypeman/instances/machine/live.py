"""One boot of one VM while it is watched: the VMM process and the connection to its guest agent.

``run`` returns when the VMM exits. Until then it keeps the channel to the guest agent open,
reconnects when it breaks (also after a restart of this server), and reports events through
``tell``: facts only; the instance's task decides what they mean.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

import trio

from hypeman.errors import HypemanError, InvalidState
from hypeman.guest import limits
from hypeman.guest.client import GuestClient
from hypeman.guest.failures import GuestBroken, GuestLost
from hypeman.guest.types import Exited, Fatal, GuestEvent, Ready, Started
from hypeman.hypervisor.interface import HALTED, ExitReason, Vmm, VmmExit, VmmGone, VmmState
from hypeman.instances.model.events import Unwatched, VmEvent

log = logging.getLogger(__name__)

_RECONNECT_FIRST = 0.01
_RECONNECT_MOST = 1.0
_SHORT_LIVED = 1.0
"""Reconnects are delayed after connections shorter than this, or a guest could keep the server busy."""


_HALT_LOOK = 10.0
_HALT_LOOKS = 2
_HALT_TURNS = 4
"""Seconds between looks at the vCPUs of a silent guest; how many must find them asleep; how often they may have woken
up in between, for our pings and for packets. An idle Linux wakes up 50 times a second, a halted one never."""


Connect: TypeAlias = Callable[[trio.abc.Stream, bytes], GuestClient]
"""Opens a client for the agent over a stream; the boot's nonce authenticates the agent."""


def connect_guest(stream: trio.abc.Stream, nonce: bytes) -> GuestClient:
    return GuestClient(stream, nonce=nonce)


class Live:
    """A running VM. ``boot`` numbers the launch, so that late events of an older one can be recognized."""

    def __init__(self, vmm: Vmm, *, nonce: bytes, boot: int, connect: Connect, restored: bool = False) -> None:
        self.vmm = vmm
        self.boot = boot
        self.guest: GuestClient | None = None
        """The agent's client, while connected."""
        self.started = False
        """Whether the workload was started."""
        self.exited: Exited | None = None
        """How the workload ended, once it has ended."""
        self.fatal: Fatal | None = None
        self.lent: int | None = 0
        """Bytes that the guest lends to the host (``reclaim.py``); None if unknown."""
        self._balloon = trio.Lock()
        """Held while ``lent`` changes, and while the VM is saved, which would save the loan too."""
        self.known_as: str | None = None
        """The name that the running guest was given since it was restored or claimed; its program is still frozen."""
        self._restored = restored
        """Its program is frozen until it is awakened, on the first connection."""
        self._nonce = nonce
        self._connect = connect
        self._over = False
        """Whether the VMM has exited or is no longer watched."""
        self._changed = trio.Event()
        self._absent_since = datetime.now(UTC)
        """When the connection to the agent was last lost; ignored while connected."""
        self._held = False
        """Paused by the server."""
        self._halted = False
        """Ended by us, since the guest had halted."""
        self._asking: set[trio.CancelScope] = set()
        self._given_up = False

    @property
    def silent_since(self) -> datetime | None:
        """When the guest was last heard from (UTC), if that exceeds the limit."""
        if self.guest is not None:
            return self.guest.silent_since
        absent_for = datetime.now(UTC) - self._absent_since
        return self._absent_since if absent_for > timedelta(seconds=limits.ABSENT) else None

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Wraps each wait for the guest in the instance's task. Raises InvalidState after ``give_up(True)``."""
        scope = trio.CancelScope()
        if self._given_up:
            scope.cancel()
        self._asking.add(scope)
        try:
            with scope:
                yield
        finally:
            self._asking.discard(scope)
        if scope.cancelled_caught:
            raise InvalidState("gave up waiting for the guest, because the instance is to be stopped or deleted")

    def give_up(self, given_up: bool) -> None:
        """Abort all waits for the guest, including later ones, until called with False."""
        self._given_up = given_up
        if given_up:
            for scope in self._asking:
                scope.cancel()

    def hold(self, held: bool) -> None:
        """Mark the VM as paused by the server, so that its guest is not expected to answer, or as resumed."""
        self._held = held
        if self.guest is not None:
            self.guest.hold(held)

    async def run(self, tell: Callable[[Live, VmEvent], None]) -> None:
        event: VmEvent = Unwatched()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._talk, tell)
                nursery.start_soon(self._end_if_halted)
                ended = await self.vmm.wait_exit()
                event = VmmExit(ExitReason.POWEROFF, HALTED) if self._halted else ended
                nursery.cancel_scope.cancel()
        except Exception:  # any error of a driver affects this instance only, not the server
            log.exception("the VMM of %s can no longer be watched", self.vmm.handle.config.instance_id)
        self._over = True
        self._wake()
        try:
            await self.vmm.aclose()
        except Exception:
            log.exception("closing the connections to the VMM of %s failed", self.vmm.handle.config.instance_id)
        tell(self, event)

    async def _end_if_halted(self) -> None:
        """`halt` stops the vCPUs permanently, and many kernels do not power off then: such a VM is ended by us."""
        asleep, before = 0, None
        while True:
            await trio.sleep(_HALT_LOOK)
            now = self.vmm.vcpu_turns() if self.silent_since is not None and not self._held else None
            rested = now is not None and before is not None and now - before <= _HALT_TURNS
            asleep, before = asleep + 1 if rested else 0, now
            if asleep >= _HALT_LOOKS and await self._runs():
                log.info("the guest of %s has halted; its VMM is ended", self.vmm.handle.config.instance_id)
                self._halted = True
                with suppress(HypemanError):
                    await self.vmm.kill()
                    return
                self._halted = False

    async def _runs(self) -> bool:
        try:
            return not self._held and await self.vmm.state() is VmmState.RUNNING
        except HypemanError:
            return False

    async def lend(self, size: int) -> None:
        """Calls ``Vmm.set_balloon``. Raises InvalidState while the VM is being saved, which may take long."""
        try:
            self._balloon.acquire_nowait()
        except trio.WouldBlock:
            raise InvalidState("its memory is just being saved") from None
        try:
            await self._set_balloon(size)
        finally:
            self._balloon.release()

    async def end_loan(self) -> None:
        """Best effort: if ``lent`` is not 0 afterwards, the VMM did not comply."""
        try:
            await self.lend(0)
        except VmmGone:
            self.lent = 0
        except HypemanError as error:
            log.warning("the memory of %s was not returned: %s", self.vmm.handle.config.instance_id, error.message)

    @asynccontextmanager
    async def without_loan(self) -> AsyncIterator[None]:
        """The guest lends no memory within the block."""
        async with self._balloon:
            if self.lent != 0:
                await self._set_balloon(0)
            yield

    async def _set_balloon(self, size: int) -> None:
        self.lent = None
        await self.vmm.set_balloon(size)
        self.lent = size

    async def wait_guest(self, seconds: float, *, instead_of: GuestClient | None = None) -> GuestClient:
        """Wait up to ``seconds`` for the agent, on a connection other than ``instead_of``.

        Raises InvalidState if it does not answer, VmmGone if the VMM has exited.
        """
        with trio.move_on_after(seconds):
            while self.guest in (None, instead_of) and not self._over:
                await self._changed.wait()
        if self.guest is not None and self.guest is not instead_of:
            return self.guest
        if self._over:
            raise VmmGone("the VMM has ended")
        raise InvalidState("the guest agent does not answer")

    async def _talk(self, tell: Callable[[Live, VmEvent], None]) -> None:
        pause = _RECONNECT_FIRST
        while True:
            ready, begun = False, trio.current_time()
            try:
                ready = await self._talk_once(await self.vmm.open_channel(), tell)
            except (HypemanError, OSError, trio.BrokenResourceError) as error:
                log.debug("no channel to the guest of %s: %s", self.vmm.handle.config.instance_id, error)
            except Exception:  # malformed data from a guest must never stop the server
                log.exception("the channel to the guest of %s failed", self.vmm.handle.config.instance_id)
            lasted = trio.current_time() - begun
            pause = _RECONNECT_FIRST if ready and lasted > _SHORT_LIVED else min(pause * 2, _RECONNECT_MOST)
            await trio.sleep(pause)

    async def _talk_once(self, stream: trio.abc.Stream, tell: Callable[[Live, VmEvent], None]) -> bool:
        """Handle one connection until it closes; returns whether the guest became ready on it."""
        ready = False
        client = self._connect(stream, self._nonce)
        client.restored, self._restored = self._restored, False
        client.silence_changed = lambda: self._log_silence(client)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, client)
            try:
                async for event in client.events:
                    ready = ready or isinstance(event, Ready)
                    self._hear(client, event)
                    tell(self, event)
            finally:
                self._set_guest(None)
        return ready

    async def _serve(self, client: GuestClient) -> None:
        try:
            await client.run()
        except (GuestLost, GuestBroken) as error:
            log.debug("channel to the guest of %s ended: %s", self.vmm.handle.config.instance_id, error)

    def _hear(self, client: GuestClient, event: GuestEvent) -> None:
        match event:
            case Ready():
                self._set_guest(client)
            case Exited():
                self.exited = event
            case Fatal():
                self.fatal = event
            case Started():
                self.started = True

    def _log_silence(self, client: GuestClient) -> None:
        instance = self.vmm.handle.config.instance_id
        if client.silent_since is not None:
            log.warning("the guest of %s does not answer; last heard at %s", instance, client.silent_since)
        else:
            log.warning("the guest of %s answers again", instance)

    def _set_guest(self, client: GuestClient | None) -> None:
        if client is None and self.guest is not None:
            self._absent_since = datetime.now(UTC)
        self.guest = client
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
