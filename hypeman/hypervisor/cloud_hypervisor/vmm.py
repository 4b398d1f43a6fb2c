"""One live Cloud Hypervisor; its events give the exit reason."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import trio

from hypeman.errors import InternalError, NotSupported
from hypeman.host.safe_open import open_regular
from hypeman.hypervisor import captures
from hypeman.hypervisor.cloud_hypervisor import config as native
from hypeman.hypervisor.interface import Capture, Disk, ExitReason, VmConfig, VmmBroken, VmmExit, VmmState
from hypeman.hypervisor.remote import RemoteVmm, placed
from hypeman.hypervisor.run_dir import ROOM, SAVING
from hypeman.hypervisor.unix_http import ApiRefused
from hypeman.hypervisor.vmm_process import allow_file_size, became, take_back_capture

_STATES = {"Running": VmmState.RUNNING, "Paused": VmmState.PAUSED, "Created": VmmState.PAUSED}
_UNPLUG_LIMIT = 15.0
_RESIZE_LIMIT = 15.0
_SAVE_LIMIT = 600.0
_FIFO_SIZE = 65536
_GATHERING = "restore is still in progress"
_GATHERING_POLL = 0.1

SNAPSHOT_SUMMED = ("config.json", "state.json")
SNAPSHOT_MEMORY = "memory-ranges"
"""What Cloud Hypervisor calls guest memory. In a capture it has the name that it has with all VMMs."""


class Event(msgspec.Struct, frozen=True):
    """One line of the event monitor."""

    source: str
    event: str


def parse_events(text: bytes) -> tuple[list[Event], bytes]:
    """The events in ``text``, one JSON object each with an empty line behind, and what is not complete yet."""
    *whole, rest = text.split(b"\n\n")
    events = []
    for part in whole:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeError):  # skip malformed events
            events.append(msgspec.json.decode(part, type=Event))
    return events, rest


class CloudHypervisorVmm(RemoteVmm):
    """A Vmm on Cloud Hypervisor. Created by the driver."""

    version = ""
    """Of the VMM; set by the driver."""
    _reset = False
    _off = False
    _unparsed = b""

    async def state(self) -> VmmState:
        return _STATES.get((await self._info())["state"], VmmState.SHUTDOWN)

    async def _info(self) -> dict[str, Any]:
        answer = await self._api.request("GET", "/api/v1/vm.info")
        if not isinstance(answer, dict) or "state" not in answer:
            raise VmmBroken("Cloud Hypervisor sent a malformed answer to vm.info")
        return answer

    async def _put(self, what: str, body: object = None, *, timeout: float = 30.0) -> object:
        return await self._api.request("PUT", f"/api/v1/vm.{what}", body, timeout=timeout)

    async def pause(self) -> None:
        if await self.state() == VmmState.RUNNING:
            await self._put("pause")

    async def resume(self) -> None:
        run_dir = Path(self.config.run_dir)
        await trio.to_thread.run_sync(captures.invalidate_noted, run_dir)
        if await self.state() == VmmState.PAUSED:
            await self._put("resume")
        await trio.to_thread.run_sync(captures.remove_noted, run_dir)

    async def capture(self, directory: Path, *, flush: bool = True) -> Capture:
        if self.config.pci_devices:
            raise NotSupported("the state of a passed-through device cannot be saved")
        async with self._changing:
            await self.pause()
            await trio.to_thread.run_sync(take_back_capture, directory)
            saving = directory / SAVING
            await trio.to_thread.run_sync(_make_writable, saving, self.config)
            await self._snapshot(saving)
            return await trio.to_thread.run_sync(self._publish, directory)

    def _publish(self, directory: Path) -> Capture:
        try:
            for name in SNAPSHOT_SUMMED:
                _take(directory, name, name)
            _take(directory, SNAPSHOT_MEMORY, captures.MEMORY)
            shutil.rmtree(directory / SAVING)
        except OSError as error:
            raise VmmBroken(f"Cloud Hypervisor saved no whole VM in {directory}: {error.strerror}") from error
        return captures.publish(
            directory,
            kind=self._handle.kind,
            version=self.version,
            machine="kvm/host",
            config=self.config,
            summed=SNAPSHOT_SUMMED,
        )

    async def _snapshot(self, directory: Path) -> None:
        """Refused by a lazily restored VM until it has loaded all of its memory, which it does by itself."""
        refusal: ApiRefused | None = None

        async def saved() -> bool:
            nonlocal refusal
            try:
                await self._put("snapshot", {"destination_url": f"file://{directory}"}, timeout=_SAVE_LIMIT)
            except ApiRefused as error:
                if _GATHERING not in error.message:
                    raise
                refusal = error
                return False
            return True

        if not await became(saved, _SAVE_LIMIT, every=_GATHERING_POLL) and refusal is not None:
            raise refusal

    async def add_disk(self, disk: Disk) -> Disk:
        async with self._changing:
            disk = self._with_port(disk)
            if not disk.readonly:
                allow_file_size(self._handle.pid, os.lstat(disk.path).st_size)
            with placed(room_of(self.config.run_dir), self.config, disk, os.symlink):
                await self._put("add-disk", native.disk_config(disk))
            self._now_has_disks((*self.config.disks, disk))
            return disk

    async def remove_disk(self, disk_id: str) -> None:
        async with self._changing:
            disk = self._pullable(disk_id)

            async def gone() -> bool:
                return disk_id not in _dict((await self._info()).get("device_tree"))

            if not await gone():
                await self._put("remove-device", {"id": disk_id})
            if not await became(gone, _UNPLUG_LIMIT):
                raise VmmBroken(f"the guest did not release disk {disk_id!r}")
            self._now_has_disks(tuple(other for other in self.config.disks if other != disk))

    async def resize_disk(self, disk_id: str, size: int) -> None:
        self._disk(disk_id)
        allow_file_size(self._handle.pid, size)
        await self._put("resize-disk", {"id": disk_id, "desired_size": size})

    async def resize_memory(self, size: int) -> None:
        self._check_memory(size)
        await self._put("resize", {"desired_ram": size})

        async def there() -> bool:
            return bool((await self._info()).get("memory_actual_size") == size)

        if not await became(there, _RESIZE_LIMIT):
            raise VmmBroken(f"the guest did not reach {size} bytes of memory")

    async def set_balloon(self, size: int) -> None:
        await self._check_balloon(size)
        await self._put("resize", {"desired_balloon": size})

    async def wait_exit(self) -> VmmExit:
        try:
            fd = os.open(os.path.join(self.config.run_dir, native.EVENTS), os.O_RDWR | os.O_NONBLOCK)
        except FileNotFoundError:  # the run directory is gone, and so is the VMM
            return await super().wait_exit()
        async with trio.lowlevel.FdStream(fd) as stream:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, stream)
                await self._process.wait()
                nursery.cancel_scope.cancel()
            with contextlib.suppress(BlockingIOError):  # its last events, which say how it ended
                self._heed(os.read(fd, _FIFO_SIZE))
        if self._reset:
            return VmmExit(ExitReason.RESET)
        return await super().wait_exit()

    def _ended_without_code(self) -> VmmExit:
        return VmmExit(ExitReason.POWEROFF) if self._off else super()._ended_without_code()

    async def _listen(self, events: trio.lowlevel.FdStream) -> None:
        while data := await events.receive_some():
            self._heed(bytes(data))

    def _heed(self, data: bytes) -> None:
        """Kill the VMM when its guest resets: otherwise Cloud Hypervisor would reboot it."""
        events, rest = parse_events(self._unparsed + data)
        self._unparsed = rest[-_FIFO_SIZE:]
        for event in events:
            if event.source == "vm" and event.event in ("rebooting", "panic"):
                self._reset = True
                self._process.kill()
            elif event.source == "vm" and event.event == "shutdown":
                self._off = True


def room_of(run_dir: str) -> Path:
    """The working directory of the VMM. That of one started by an older version is the run directory itself."""
    room = Path(run_dir, ROOM)
    return room if room.is_dir() else Path(run_dir)


def _make_writable(directory: Path, config: VmConfig) -> None:
    try:
        directory.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(directory, config.uid, config.gid)
    except OSError as error:
        raise InternalError(f"{directory}: {error.strerror}") from error


def _take(directory: Path, saved: str, name: str) -> None:
    """Move a file that the VMM has saved to where only root can change names, and only then look at what it is.
    Raises OSError if it is anything but a regular file with this one name."""
    target = directory / name
    os.rename(directory / SAVING / saved, target)
    try:
        os.close(open_regular(target, os.O_RDONLY, links=1))
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
