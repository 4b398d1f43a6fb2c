"""Files that an instance's guest and VMM write and others read: logs, and the outcome on the boot disk."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import trio

from hypeman.errors import HypemanError
from hypeman.guest.boot import MAX_BOOT_DISK, parse_outcome
from hypeman.guest.types import Exited, Fatal
from hypeman.host.log_times import LogTimes, begin_run, move_times
from hypeman.host.safe_open import open_log, read_start
from hypeman.hypervisor.interface import Vmm
from hypeman.hypervisor.vmm_process import rotate_log
from hypeman.instances.machine.context import Context
from hypeman.text import one_line

log = logging.getLogger(__name__)

MAX_OLD = 4
"""How many times the limit of a log an old one may have."""


class Logs:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._times = LogTimes()
        self._old_sizes: dict[str, int] = {}
        """Of the old log of each running instance's guest, when last looked at."""

    async def read_outcome(self, instance_id: str) -> Exited | Fatal | None:
        """How the workload ended, as the guest wrote it to its boot disk, in case the channel was down."""
        record = self._context.record(instance_id)
        disk = self._context.paths.instance(instance_id).boot_disk
        try:
            content = await trio.to_thread.run_sync(read_start, disk, MAX_BOOT_DISK)  # the VMM may have enlarged it
        except OSError:
            return None  # it never booted
        return parse_outcome(content, record.nonce)

    def journal(self, instance_id: str, line: str) -> None:
        """Append one line to the instance's ``hypeman`` log; losing one is better than failing for it."""
        text = one_line(line) + "\n"  # parts of it come from guests and images
        path = self._context.paths.instance(instance_id).log("hypeman")
        with contextlib.suppress(OSError), open(open_log(path), "ab") as file:
            file.write(text.encode())

    async def begin_run(self, instance_id: str) -> None:
        """What the guest prints from now on is of another run. A run without a mark is better than none."""
        app = self._context.paths.instance(instance_id).log("app")
        try:
            await trio.to_thread.run_sync(begin_run, app)
        except OSError as error:
            log.warning("the log of instance %s cannot be marked: %s", instance_id, error)

    async def note_times(self, limit: int) -> Sequence[str]:
        """Note how much each guest has printed until now. Returns the instances whose guest's log is larger than
        ``limit`` bytes."""
        live = self._context.live
        self._old_sizes = {instance: size for instance, size in self._old_sizes.items() if instance in live}
        logs = {self._context.paths.instance(each).log("app"): each for each in live}
        if not logs:
            return ()
        sizes = await trio.to_thread.run_sync(self._times.note, logs)
        return [logs[path] for path, size in sizes.items() if size > limit]

    async def rotate(self, instance_id: str, limit: int) -> None:
        """Rotate logs larger than ``limit`` bytes; one old log is kept of each, and emptied if it has grown beyond
        ``MAX_OLD`` times ``limit``: a guest can print gigabytes between two looks at its log.

        The VMM reopens the console log; an old one that grows is of a VMM that did not get the command, as when the
        server was killed in between. It holds its own log open for appending, so that one is copied and truncated: a
        line in flight may be lost, which is harmless for that log.
        """
        mine = self._context.paths.instance(instance_id)
        live = self._context.live.get(instance_id)
        app = mine.log("app")
        old = app.with_suffix(".log.1")
        before = self._old_sizes.pop(instance_id, None)
        if live is not None:
            try:
                if _size(app) > limit:
                    await trio.to_thread.run_sync(os.replace, app, old)
                    with contextlib.suppress(OSError):  # without its times; the guest must not keep writing to it
                        await trio.to_thread.run_sync(move_times, app, old)
                    await _reopen(live.vmm, app)
                elif before is not None and _size(old) > before:
                    await _reopen(live.vmm, app)
            finally:
                if _size(old) > MAX_OLD * limit:
                    self.journal(instance_id, f"the guest printed {_size(old)} bytes at once, which were discarded")
                    await trio.to_thread.run_sync(_empty, old)
                self._old_sizes[instance_id] = _size(old)
        for other in (mine.log("vmm"), mine.log("hypeman")):
            if _size(other) > limit:
                await self._context.files.copy(other, other.with_suffix(".log.1"))
                await trio.to_thread.run_sync(_empty, other)


async def _reopen(vmm: Vmm, app: Path) -> None:
    """Have the VMM write to a new log; if that fails, empty the one to which it writes."""
    try:
        await vmm.rotate_console()
    except HypemanError as error:
        log.warning("%s: the VMM keeps writing to the same log: %s", app, error)
        await trio.to_thread.run_sync(rotate_log, app)


def _empty(path: Path) -> None:
    """Truncate one of the server's logs. Raises OSError; EINVAL if it is not a regular file."""
    descriptor = open_log(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
