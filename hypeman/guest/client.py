"""Client of one guest's agent: a method for each of its requests, and a guest's clock that is kept right.

``GuestClient.run`` is started in a nursery by the owner of the instance; it ends with the stream and raises
GuestLost (reconnecting may help) or GuestBroken (the guest violates the protocol: do not retry). All other
methods may be called by any number of tasks concurrently. Each releases its session on every exit path, including
cancellation: what ran in it is then killed.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from datetime import datetime

import trio

from hypeman.errors import HypemanError, InvalidRequest, NotFound
from hypeman.guest import clock, limits
from hypeman.guest.boot import GuestNetwork, GuestVolume, render_network, render_volume
from hypeman.guest.channel import Channel
from hypeman.guest.clock import Sample
from hypeman.guest.copies import CopyIn, CopyOut
from hypeman.guest.failures import NOT_SUPPORTED, GuestError, GuestTimeout, VolumeBusy, check, error_text, parsed
from hypeman.guest.fields import Fields, FieldWriter, Tag
from hypeman.guest.programs import ExecSession
from hypeman.guest.protocol import KEY_BYTES, MAIN_KEY, Op
from hypeman.guest.types import CopyToRequest, ExecRequest, Metrics, PathInfo, parse_metrics, parse_path_info

log = logging.getLogger(__name__)

_CLOCK_BEFORE_THAW = 0.8
"""Seconds that a guest stays frozen at most for its clock."""
_CLOCK_AFTER_THAW = 0.2
"""Seconds until the clock of a thawed guest is corrected more exactly: first it does what its client waits for."""
_CLOCK_WITHOUT_THAW = 10.0
"""Seconds until the clock of a restored guest that was not thawed is corrected; it thaws itself by then."""


class GuestClient(Channel):
    """One connection to one agent, with its requests."""

    def __init__(self, stream: trio.abc.Stream, *, nonce: bytes) -> None:
        super().__init__(stream, nonce=nonce)
        self.last_correction: Sample | None = None
        """How wrong the guest's clock was found to be."""
        self.restored = False
        """Its clock is corrected when it is thawed, and not before: until then it is busy with its identity."""
        self._thawed = trio.Event()
        self._clock_set_at = -math.inf
        """When a request last set the guest's clock, quickly enough for programs to run on."""
        self._clock = trio.Lock()
        """Held during a correction of the guest's clock."""
        self._clock_wanted = trio.Event()
        """Set when the guest's clock must be corrected now."""

    async def exec(self, request: ExecRequest) -> ExecSession:
        """Start a program. Failure to start is reported in its result (127, 126)."""
        writer = FieldWriter()
        for argument in request.argv:
            writer.text(Tag.ARG, argument)
        for variable in request.env:
            writer.text(Tag.ENV, variable)
        if request.cwd is not None:
            writer.text(Tag.CWD, request.cwd)
        writer.text(Tag.USER, request.user)
        writer.flag(Tag.TTY, request.tty)
        writer.u16(Tag.ROWS, min(request.rows, 65535))
        writer.u16(Tag.COLS, min(request.cols, 65535))
        writer.u64(Tag.TIMEOUT_MS, math.ceil(request.timeout_seconds * 1000))
        key = b""
        if (request.keep or request.main) and await self._can_keep():
            key = MAIN_KEY if request.main else secrets.token_bytes(KEY_BYTES)
            writer.add(Tag.SESSION_KEY, key)
        return ExecSession(self, await self.open(Op.EXEC, writer, kept=bool(key)), key)

    async def resume(self, key: bytes, received: int | None) -> ExecSession:
        """Go on with a kept program, whose client has ``received`` bytes of its output; None: it wants what follows.
        Raises NotFound if it is not there any more, or cannot go on from there."""
        writer = FieldWriter().add(Tag.SESSION_KEY, key)
        if received is not None:
            writer.u64(Tag.RECEIVED, received)
        session = await self.open(Op.RESUME, writer, kept=True)
        try:
            with trio.move_on_after(limits.OPEN):
                while session.resumed is None and session.ended is None:
                    await session.wait()
            if session.resumed is None:
                if session.ended is None:
                    raise GuestTimeout(f"the guest did not resume the program within {limits.OPEN:g} s")
                raise NotFound(session.ended.message)
        except BaseException:
            self.close(session, detach=True)
            raise
        return ExecSession(self, session, key, (session.resumed.output or 0) if received is None else received)

    async def _can_keep(self) -> bool:
        with trio.move_on_after(limits.OPEN):
            await self.wait_greeted()
        return self.keeps

    async def stat(self, path: str, *, follow_links: bool = False) -> PathInfo:
        writer = FieldWriter().text(Tag.PATH, path).flag(Tag.FOLLOW_LINKS, follow_links)
        reply, error, ended = await self.call(Op.STAT, writer)
        if ended.exit_code in NOT_SUPPORTED:
            check(error, ended)
        if ended.exit_code:
            return PathInfo(exists=False, error=error_text(error, ended))
        return parsed(parse_path_info, reply)

    async def copy_to(self, request: CopyToRequest) -> CopyIn:
        """Begin creating a file, directory or link; always call ``finish`` on the result, even without data."""
        writer = FieldWriter().text(Tag.PATH, request.path).u8(Tag.KIND, request.kind)
        if request.mode is not None:
            writer.u32(Tag.MODE, request.mode)
        if request.uid is not None:
            writer.u32(Tag.UID, request.uid)
        if request.gid is not None:
            writer.u32(Tag.GID, request.gid)
        if request.mtime is not None:
            writer.i64(Tag.MTIME, request.mtime)
        if request.link_target is not None:
            writer.text(Tag.LINK_TARGET, request.link_target)
        return CopyIn(self, await self.open(Op.COPY_TO, writer))

    def copy_from(self, path: str, *, follow_links: bool = False) -> CopyOut:
        """A file or tree. Use as an async context manager, or ``open`` it."""
        return CopyOut(self, FieldWriter().text(Tag.PATH, path).flag(Tag.FOLLOW_LINKS, follow_links))

    async def shutdown(self, *, grace_seconds: float | None = None, signal: int = 0) -> None:
        """Ask the guest to shut down: ``signal`` (0: the image's own) to its program, a forced kill after the grace
        period, power off. Returns when the guest has begun."""
        writer = FieldWriter().u32(Tag.STOP_SIGNAL, signal)
        if grace_seconds is not None:
            writer.u64(Tag.GRACE_MS, math.ceil(grace_seconds * 1000))
        await self.request(Op.SHUTDOWN, writer)

    async def set_identity(
        self,
        *,
        hostname: str,
        machine_id: str = "",
        network: GuestNetwork | None = None,
        entropy: bytes = b"",
        clock_ns: int = 0,
        nonce: bytes | None = None,
    ) -> None:
        """Give a restored or forked guest its own identity; complete when this returns.

        ``network`` replaces MAC, address and route (the link to the guest should be down until then);
        ``nonce`` authenticates the agent from the next connection on.
        """
        writer = FieldWriter().text(Tag.HOSTNAME, hostname).text(Tag.MACHINE_ID, machine_id)
        writer.add(Tag.ENTROPY, entropy).u64(Tag.CLOCK_NS, clock_ns)
        if nonce is not None:
            writer.add(Tag.NONCE, nonce)
        if network is not None:
            render_network(writer, network)
        await self.request(Op.IDENTITY, writer)
        if 0 <= time.time_ns() - clock_ns < clock.QUICK:
            self._clock_set_at = trio.current_time()

    async def mount_volume(self, volume: GuestVolume) -> None:
        """Mount a hot-plugged disk; waits up to 10 s for it to appear."""
        await self.request(Op.MOUNT, FieldWriter().nested(Tag.VOLUME, render_volume(volume)))

    async def unmount_volume(self, path: str) -> None:
        """Unmount; no-op if nothing is mounted there. Raises VolumeBusy with the users; nothing has changed then."""
        reply, error, ended = await self.call(Op.UNMOUNT, FieldWriter().text(Tag.PATH, path))
        holders = tuple(parsed(Fields, reply).texts(Tag.HOLDER))
        if holders:
            raise VolumeBusy(f"{path} is in use by {', '.join(holders)}", holders)
        check(error, ended)

    async def online_memory(self) -> int:
        """Bring hot-plugged memory online; returns the guest's total bytes."""
        return parsed(Fields, await self.request(Op.MEMORY, None)).u64(Tag.MEMORY_TOTAL)

    async def metrics(self) -> Metrics:
        return parsed(parse_metrics, await self.request(Op.METRICS, None))

    async def warm(self) -> None:
        """Have the guest execute a program of the agent's, so that the first exec is as fast as others. A no-op on an
        agent of an earlier version."""
        await self.call(Op.WARM, None)

    async def freeze(self) -> None:
        """Stop all processes but the agent, for at most 10 s of guest time, so that after a restore or fork
        identity and clock are set before they resume."""
        await self.request(Op.FREEZE, None)

    # The clock

    async def read_clock(self) -> Sample:
        """The guest's clock, compared to the host's."""
        asked = time.time_ns()
        reply = await self.request(Op.CLOCK, None)
        answered = time.time_ns()
        guest = parsed(Fields, reply).u64(Tag.CLOCK_NS)
        if not 0 < guest < 2**63:
            raise GuestError("the guest did not report its time")
        return Sample(asked, answered, guest)

    async def correct_clock(self, *, good: int = clock.GOOD) -> Sample:
        """Bring the guest's clock to the host's, and return by how much it was wrong.

        A sample with an uncertainty of ``good`` nanoseconds suffices.

        ``run`` does this by itself: at once, regularly, after a pause (``hold``), and when the host's clock was set or
        the host was suspended. The guest starts its program only after the first time.
        """
        async with self._clock:
            samples = [await self.read_clock()]
            while len(samples) < clock.SAMPLES and samples[-1].uncertainty > good:
                samples.append(await self.read_clock())
            best = clock.most_certain(samples)
            if best.correction or self.last_correction is None:  # the guest waits for the first one
                await self.request(Op.CLOCK, FieldWriter().i64(Tag.CLOCK_DELTA_NS, best.correction))
            self.last_correction = best
            return best

    async def thaw(self) -> None:
        """Let the processes run again, with the clock corrected."""
        if trio.current_time() - self._clock_set_at > _CLOCK_BEFORE_THAW:
            await self._correct_before_thaw()
        await self.request(Op.THAW, None)
        self._thawed.set()

    async def _correct_before_thaw(self) -> None:
        with trio.move_on_after(_CLOCK_BEFORE_THAW):
            try:
                await self.correct_clock(good=clock.QUICK)
            except (GuestError, GuestTimeout, InvalidRequest) as error:  # an agent of an earlier version, or no time
                log.debug("a guest runs on without having its clock corrected: %s", error.message)

    def hold(self, held: bool) -> None:
        super().hold(held)
        self._clock_wanted.set()

    def _set_silent(self, since: datetime | None) -> None:
        super()._set_silent(since)
        if since is None:
            self._clock_wanted.set()

    async def run_beside(self) -> None:
        """Correct the guest's clock as ``correct_clock`` says."""
        await self._greeted.wait()
        if self.restored:
            with trio.move_on_after(_CLOCK_WITHOUT_THAW):
                await self._thawed.wait()
                await trio.sleep(_CLOCK_AFTER_THAW)
        while self._lost is None:
            if self._held:
                await self._wait_resumed()
                await trio.sleep(_CLOCK_AFTER_THAW)
            self._clock_wanted = trio.Event()
            step = clock.host_step()
            last: Sample | None = None
            try:
                last = await self.correct_clock(good=clock.QUICK if self.last_correction is None else clock.GOOD)
            except GuestTimeout:
                pass  # it may be able to answer later
            except HypemanError as error:
                if self._lost is None:  # an agent of an earlier version
                    log.debug("the clock of a guest is not kept: %s", error.message)
                return
            due = trio.current_time() + clock.next_after(last)
            while trio.current_time() < due and abs(clock.host_step() - step) < clock.STEP:
                with trio.move_on_at(min(due, trio.current_time() + clock.STEP_CHECK)):
                    await self._clock_wanted.wait()
                    break

    async def _wait_resumed(self) -> None:
        while self._held:
            await self._stirred.wait()
