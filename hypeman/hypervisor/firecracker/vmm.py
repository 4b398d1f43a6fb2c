"""One live Firecracker."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import trio

from hypeman.errors import InternalError, NotSupported
from hypeman.host.processes import Process
from hypeman.host.safe_open import open_regular
from hypeman.host.temporary_access import temporary_access
from hypeman.hypervisor import captures
from hypeman.hypervisor.firecracker import config as native
from hypeman.hypervisor.firecracker import jail
from hypeman.hypervisor.interface import Capture, Disk, ExitReason, VmmBroken, VmmExit, VmmHandle, VmmState
from hypeman.hypervisor.remote import RemoteVmm, clear
from hypeman.hypervisor.unix_http import ApiRefused, UnixHttp
from hypeman.hypervisor.vmm_process import allow_file_size, became, take_back_capture

_STATES = {"Running": VmmState.RUNNING, "Paused": VmmState.PAUSED, "Not started": VmmState.PAUSED}
_RESIZE_LIMIT = 15.0
_SIGNAL_LIMIT = 10.0
_SAVE_LIMIT = 600.0
_NOWHERE = "nowhere/file"


class FirecrackerVmm(RemoteVmm):
    """A Vmm on Firecracker. Created by the driver."""

    version = ""
    """Of the VMM; set by the driver."""

    def __init__(self, handle: VmmHandle, process: Process, api: UnixHttp, listener: trio.socket.SocketType) -> None:
        super().__init__(handle, process, api, listener)
        self._taking_down = trio.Lock()
        self._taken_down = False
        self.vsock_reset = False
        """The guest, which Firecracker has paused, will hear that its vsock was reset; set by the driver for one that
        was loaded. Else it would wait for answers that never come."""

    async def call(self, call: native.Call, *, timeout: float = 30.0) -> None:
        await self._api.request(call.method, call.target, call.body, timeout=timeout)

    async def state(self) -> VmmState:
        return VmmState.PAUSED if self._process.stopped() else await self._reported_state()

    async def _reported_state(self) -> VmmState:
        answer = await self._api.request("GET", "/")
        if not isinstance(answer, dict) or answer.get("state") not in _STATES:
            raise VmmBroken("Firecracker sent a malformed answer")
        return _STATES[answer["state"]]

    async def pause(self) -> None:
        """By a signal: a guest that Firecracker (1.16) itself has paused and resumed, and not saved in between,
        gets nothing from its vsock any more."""
        if await self.state() == VmmState.RUNNING:
            await self._signal(signal.SIGSTOP, stopped=True)

    async def resume(self) -> None:
        run_dir = Path(self.config.run_dir)
        await trio.to_thread.run_sync(captures.invalidate_noted, run_dir)
        await self._go_on()
        await trio.to_thread.run_sync(captures.remove_noted, run_dir)

    async def _go_on(self) -> None:
        if self._process.stopped():
            await self._signal(signal.SIGCONT, stopped=False)
        elif await self._reported_state() == VmmState.PAUSED:
            if not self.vsock_reset:
                await self._reset_vsock()
            await self.call(native.state_call(running=True))
            self.vsock_reset = False

    async def _reset_vsock(self) -> None:
        """For a VM that was paused to be saved, and was not: the save failed, or a server of ours ended before it.
        Firecracker resets the vsock at the beginning of every save, even of one that cannot be written."""
        with contextlib.suppress(ApiRefused):
            await self.call(native.snapshot_call(_NOWHERE, _NOWHERE))

    async def _signal(self, number: signal.Signals, *, stopped: bool) -> None:
        self._process.kill(number)

        async def done() -> bool:
            return self._process.stopped() == stopped or not self._process.alive()

        if not await became(done, _SIGNAL_LIMIT):
            raise VmmBroken(f"Firecracker did not react to {number.name}")

    async def capture(self, directory: Path, *, flush: bool = True) -> Capture:
        """Shielded from cancellation between pause and save, since a save cannot be aborted."""
        async with self._changing:
            await trio.to_thread.run_sync(take_back_capture, directory)
            with self._let_out(directory), trio.CancelScope(shield=True):
                if self._process.stopped():
                    await self._signal(signal.SIGCONT, stopped=False)
                if await self._reported_state() == VmmState.RUNNING:
                    await self.call(native.state_call(running=False))
                await self.call(native.snapshot_call(captures.STATE, captures.MEMORY), timeout=_SAVE_LIMIT)
                self.vsock_reset = True
            return await trio.to_thread.run_sync(
                lambda: captures.publish(
                    directory,
                    kind=self._handle.kind,
                    version=self.version,
                    machine="kvm/host",
                    config=self.config,
                    summed=(captures.STATE,),
                )
            )

    @contextlib.contextmanager
    def _let_out(self, directory: Path) -> Iterator[None]:
        """Put two empty files of ``directory`` into the jail while they are being written."""
        room = jail.room_of(self.config.run_dir)
        with contextlib.ExitStack() as opened:
            for name in (captures.STATE, captures.MEMORY):
                try:
                    fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    os.fchown(fd, self.config.uid, self.config.gid)
                    os.close(fd)
                    clear(room / name)  # of a server that ended in between
                    jail.let_in(directory / name, room / name)
                except OSError as error:
                    raise InternalError(f"{error.filename}: {error.strerror}") from error
                opened.callback(jail.take_out, room / name)
            yield

    async def kill(self) -> None:
        await super().kill()
        with trio.CancelScope(shield=True):
            async with self._taking_down:
                if not self._taken_down:  # else it may be the next VMM's by now
                    await trio.to_thread.run_sync(jail.take_down, self.config.run_dir)
                    self._taken_down = True

    async def add_disk(self, disk: Disk) -> Disk:
        raise NotSupported("Firecracker has no hot-plug of disks")

    async def remove_disk(self, disk_id: str) -> None:
        raise NotSupported("Firecracker has no hot-plug of disks")

    async def resize_disk(self, disk_id: str, size: int) -> None:
        disk = self._disk(disk_id)
        allow_file_size(self._handle.pid, size)
        try:
            await trio.to_thread.run_sync(_resize, disk.path, size)
        except OSError as error:
            raise InternalError(f"{disk.path}: {error.strerror}") from error
        with temporary_access(Path(disk.path), self.config.uid, write=not disk.readonly):  # it is reopened
            await self.call(native.resize_disk_call(disk))

    async def resize_memory(self, size: int) -> None:
        self._check_memory(size)
        await self.call(native.resize_memory_call(self.config, size))

        async def there() -> bool:
            status = await self._api.request("GET", "/hotplug/memory")
            return isinstance(status, dict) and status.get("plugged_size_mib") == status.get("requested_size_mib")

        if not await became(there, _RESIZE_LIMIT):
            raise VmmBroken(f"the guest did not reach {size} bytes of memory")

    async def set_balloon(self, size: int) -> None:
        await self._check_balloon(size)
        await self.call(native.balloon_call(size))

    def _ended_by_itself(self) -> VmmExit:
        return VmmExit(ExitReason.POWEROFF, "ended or reset by the guest; Firecracker does not tell which")


def _resize(path: str, size: int) -> None:
    """Raises OSError, also for a file on which the VMM holds a lease: it is not waited for."""
    with open(open_regular(path, os.O_WRONLY), "wb") as file:
        file.truncate(size)
