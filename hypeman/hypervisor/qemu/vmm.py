"""One live QEMU: the Vmm interface over QMP.

All state that must survive a server restart is in the handle, in QEMU itself or in the run directory;
an object of this class can be discarded and recreated at any time.

    run_dir/   qmp.sock  agent.sock     listening sockets, accessible only to us; QEMU gets them as descriptors
               restored-from            path of a capture that is removed when the guest resumes
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import trio

from hypeman.errors import InternalError, InUse, NotSupported
from hypeman.host.files import Files
from hypeman.host.processes import Process, open_for_child
from hypeman.hypervisor import captures
from hypeman.hypervisor.interface import (
    Capture,
    Disk,
    ExitReason,
    VmmBroken,
    VmmExit,
    VmmGone,
    VmmHandle,
    VmmState,
)
from hypeman.hypervisor.live_vmm import LiveVmm
from hypeman.hypervisor.qemu import config as native
from hypeman.hypervisor.qemu import memory
from hypeman.hypervisor.qemu.client import QmpClient, QmpRefused, connect_unix
from hypeman.hypervisor.qmp import Happened
from hypeman.hypervisor.vmm_process import allow_file_size, became, rotate_log, take_back_capture

QMP_SOCKET = "qmp.sock"
AGENT_SOCKET = "agent.sock"

_UNPLUG_LIMIT = 15.0
_RESIZE_LIMIT = 15.0
_SAVE_LIMIT = 600.0
"""Seconds; a guest releases a disk in 0.1 s, memory in 1 s; a large memory is written at disk speed."""
_CANCEL_LIMIT = 10.0
_SAVING = "saving"
_MIGRATING = frozenset({"setup", "active", "pre-switchover", "device", "wait-unplug", "cancelling"})

_STATES = {
    "running": VmmState.RUNNING,
    "shutdown": VmmState.SHUTDOWN,
    "guest-panicked": VmmState.SHUTDOWN,
    "internal-error": VmmState.SHUTDOWN,
}

_REASONS = {
    "guest-shutdown": ExitReason.POWEROFF,
    "guest-reset": ExitReason.RESET,
    "guest-panic": ExitReason.RESET,
    "subsystem-reset": ExitReason.RESET,
    "host-signal": ExitReason.KILLED,
    "host-qmp-quit": ExitReason.KILLED,
    "host-qmp-system-reset": ExitReason.KILLED,
    "host-ui": ExitReason.KILLED,
    "host-error": ExitReason.FAILED,
}


class QemuVmm(LiveVmm):
    """A Vmm on QEMU. Created by the driver."""

    def __init__(
        self, handle: VmmHandle, process: Process, qmp: QmpClient, *, board: native.Board, machine: str
    ) -> None:
        super().__init__(handle, process)
        self._qmp = qmp
        self._board = board
        self._machine = machine
        self._files = Files()
        self._run_dir = Path(handle.run_dir)
        self._exit: VmmExit | None = None

    async def state(self) -> VmmState:
        status = await self._qmp.execute("query-status")
        return _STATES.get(status["status"], VmmState.PAUSED)

    async def open_channel(self) -> trio.abc.Stream:
        if self._channel is not None:  # QEMU serves one connection; a second one would wait for it
            await trio.aclose_forcefully(self._channel)
        self._channel = await connect_unix(str(self._run_dir / AGENT_SOCKET))
        return self._channel

    async def pause(self) -> None:
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        noted = (self._run_dir / captures.NOTE).exists()
        if noted:
            await trio.to_thread.run_sync(captures.invalidate_noted, self._run_dir)
        await self._qmp.execute("cont")
        if noted:
            await trio.to_thread.run_sync(captures.remove_noted, self._run_dir)

    # Capture

    async def capture(self, directory: Path, *, flush: bool = True) -> Capture:
        if self.config.pci_devices:
            raise NotSupported("the state of a passed-through device cannot be saved")
        async with self._changing:
            shared = await self._memory_is_shared()
            # A private mapping is read from the VMM. What a server of an earlier version started has no inode.
            private = not shared and self._handle.memory_inode != 0 and not self.config.hotplug_bytes
            state = captures.DEVICES if private else captures.STATE
            await trio.to_thread.run_sync(take_back_capture, directory)
            await self._qmp.execute("stop")
            if private:
                await self._save_devices(directory / state)
                saved = directory / captures.MEMORY
                await trio.to_thread.run_sync(partial(memory.save_private, self._handle, saved, flush=flush))
            else:
                await self._save_state(directory / state, without_memory=shared)
            if shared:
                with _closing(await trio.to_thread.run_sync(memory.of_process, self._handle)) as own:
                    await self._files.copy_open(own, directory / captures.MEMORY)
            return await trio.to_thread.run_sync(
                lambda: captures.publish(
                    directory,
                    kind=self._handle.kind,
                    version=self._qmp.version,
                    machine=self._machine,
                    config=self.config,
                    summed=(state,),
                    flush=flush,
                )
            )

    async def load_state(self, file: Path, *, without_memory: bool) -> None:
        """Load a saved state into a QEMU that was started to wait for one. Stays paused."""
        with _opened(str(file), os.O_RDONLY) as fd:
            await self._qmp.execute("getfd", {"fdname": "state"}, fds=[fd])
        await self._migrate("migrate-incoming", "state", ignore_shared=without_memory)

    async def _save_devices(self, file: Path) -> None:
        """The state of the devices without any memory; the VM is paused."""
        with _opened(str(file), os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            added = await self._qmp.execute("add-fd", {"opaque": _SAVING}, fds=[fd])
        number = added["fdset-id"]
        try:
            # Not live: the guest may continue with these disks.
            await self._qmp.execute("xen-save-devices-state", {"filename": f"/dev/fdset/{number}", "live": False})
        finally:
            with trio.CancelScope(shield=True), contextlib.suppress(VmmGone, VmmBroken, QmpRefused):
                await self._qmp.execute("remove-fd", {"fdset-id": number})

    async def _save_state(self, file: Path, *, without_memory: bool) -> None:
        with _opened(str(file), os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            await self._qmp.execute("getfd", {"fdname": "state"}, fds=[fd])
        await self._qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        try:
            await self._migrate("migrate", "state", ignore_shared=without_memory)
        except trio.Cancelled:
            with trio.CancelScope(shield=True), contextlib.suppress(VmmGone, VmmBroken):
                await self._cancel_migration()
            raise

    async def _cancel_migration(self) -> None:
        """Returns when the migration has ended: until then QEMU refuses the next one."""
        await self._qmp.execute("migrate_cancel")

        async def over() -> bool:
            return (await self._qmp.execute("query-migrate")).get("status") not in _MIGRATING

        await became(over, _CANCEL_LIMIT)

    async def _migrate(self, command: str, fdname: str, *, ignore_shared: bool) -> None:
        switches = {"x-ignore-shared": ignore_shared, "events": True}
        await self._qmp.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": state} for name, state in switches.items()]},
        )
        since = self._qmp.event_count
        await self._qmp.execute(command, {"uri": f"fd:{fdname}"})
        try:
            with trio.fail_after(_SAVE_LIMIT):
                event = await self._qmp.wait_event(_migration_ended, since=since)
        except trio.TooSlowError:
            raise VmmBroken(f"QEMU did not finish {command} within {_SAVE_LIMIT:g} s") from None
        if event.data["status"] != "completed":
            status = await self._qmp.execute("query-migrate")
            raise VmmBroken(f"QEMU failed to {command}: {status.get('error-desc', event.data['status'])}")

    async def _memory_is_shared(self) -> bool:
        # query-memdev tells it only from QEMU 6.1 on
        return bool(await self._qmp.execute("qom-get", {"path": "/objects/mem", "property": "share"}))

    # Devices

    async def add_disk(self, disk: Disk) -> Disk:
        if not self._board.pci:
            raise NotSupported("this kind of VM has no hot-plug")
        async with self._changing:
            disk = self._with_free_port(disk)
            flags = os.O_RDONLY if disk.readonly else os.O_RDWR
            with _opened(disk.path, flags) as fd:
                if not disk.readonly:
                    allow_file_size(self._handle.pid, os.fstat(fd).st_size)
                added = await self._qmp.execute("add-fd", {"opaque": native.disk_set(disk.id)}, fds=[fd])
            try:
                await self._qmp.execute("blockdev-add", native.block_node(disk, added["fdset-id"]))
                await self._qmp.execute("device_add", native.disk_device(disk, self._board))
                await self.limit_disk(disk)
            except BaseException:
                with trio.CancelScope(shield=True), contextlib.suppress(VmmBroken, VmmGone):
                    await self._unplug(disk.id)
                raise
            self._now_has_disks((*self.config.disks, disk))
            return disk

    async def remove_disk(self, disk_id: str) -> None:
        async with self._changing:
            disk = self._pullable(disk_id)
            await self._unplug(disk_id)
            self._now_has_disks(tuple(other for other in self.config.disks if other != disk))

    async def resize_disk(self, disk_id: str, size: int) -> None:
        self._disk(disk_id)
        allow_file_size(self._handle.pid, size)
        await self._qmp.execute("block_resize", {"node-name": native.disk_node(disk_id), "size": size})

    async def limit_disk(self, disk: Disk) -> None:
        """Limit the disk to its ``bps``, in each direction."""
        if disk.bps:
            limits = {"bps": 0, "bps_rd": disk.bps, "bps_wr": disk.bps, "iops": 0, "iops_rd": 0, "iops_wr": 0}
            device = native.throttled_device(disk.id, self._board)
            await self._qmp.execute("block_set_io_throttle", {"id": device, **limits})

    async def resize_memory(self, size: int) -> None:
        self._check_memory(size)
        low = self.config.memory_bytes
        device = "/machine/peripheral/hotplug-memory"
        wanted = (size - low) // native.MEMORY_BLOCK * native.MEMORY_BLOCK
        since = self._qmp.event_count
        await self._qmp.execute("qom-set", {"path": device, "property": "requested-size", "value": wanted})
        try:
            with trio.fail_after(_RESIZE_LIMIT):
                while (now := await self._qmp.execute("qom-get", {"path": device, "property": "size"})) != wanted:
                    await self._qmp.wait_event(_memory_changed, since=since)
                    since = self._qmp.event_count
        except trio.TooSlowError:
            raise VmmBroken(f"the guest went to {low + now} bytes of memory and not to {size}") from None

    async def can_lend(self) -> bool:
        """With a private mapping QEMU punches holes into the file: it must be ours alone, a consumed capture."""
        if not await super().can_lend():
            return False
        return await self._memory_is_shared() or await trio.to_thread.run_sync(memory.is_unlinked, self._handle)

    async def set_balloon(self, size: int) -> None:
        await self._check_balloon(size)
        await self._qmp.execute("balloon", {"value": self.config.memory_bytes - size})

    async def set_link(self, nic_id: str, *, up: bool) -> None:
        await self._qmp.execute("set_link", {"name": nic_id, "up": up})

    async def rotate_console(self) -> None:
        if not self._board.console_reopens:
            await trio.to_thread.run_sync(rotate_log, Path(self.config.console_log))
            return
        old = await self._descriptor_set(native.CONSOLE_SET)
        with _opened(self.config.console_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, log=True) as fd:
            added = await self._qmp.execute("add-fd", {"opaque": native.CONSOLE_SET}, fds=[fd])
        backend = {"type": "file", "data": {"out": f"/dev/fdset/{added['fdset-id']}", "append": True}}
        for name in ("console", "log"):
            await self._qmp.execute("chardev-change", {"id": name, "backend": backend})
        if old is not None:
            await self._qmp.execute("remove-fd", {"fdset-id": old})

    # End

    async def wait_exit(self) -> VmmExit:
        if self._exit is None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen)
                await self._process.wait()
                nursery.cancel_scope.cancel()
            self._exit = await self._why_ended()
        return self._exit

    async def aclose(self) -> None:
        self._qmp.close()
        await super().aclose()

    async def _listen(self) -> None:
        """Read events so that they do not accumulate in QEMU while no command runs."""
        with contextlib.suppress(VmmBroken, VmmGone):
            await self._qmp.wait_closed()

    async def _why_ended(self) -> VmmExit:
        with trio.move_on_after(1), contextlib.suppress(VmmBroken, VmmGone):
            await self._qmp.wait_closed()  # events from before QEMU exited are still in the socket
        event = self._qmp.find_event(lambda event: event.name == "SHUTDOWN")
        code = self._process.returncode
        if event is not None and (reason := str(event.data.get("reason"))) in _REASONS:
            return VmmExit(_REASONS[reason], reason)
        if self._killed or code is None or code == -9:
            return VmmExit(ExitReason.KILLED)
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return VmmExit(ExitReason.FAILED, f"QEMU ended {how}")

    # Parts

    def _with_free_port(self, disk: Disk) -> Disk:
        if any(other.id == disk.id for other in self.config.disks):
            raise InUse(f"the VM has a disk {disk.id!r} already")
        taken = {other.port for other in self.config.disks}
        if disk.port in taken - {0}:
            raise InUse(f"disk port {disk.port} is taken")
        port = disk.port or next((n for n in range(1, self.config.disk_ports + 1) if n not in taken), 0)
        if not 1 <= port <= self.config.disk_ports:
            raise InUse(f"all {self.config.disk_ports} ports for disks are taken")
        return msgspec.structs.replace(disk, port=port)

    async def _unplug(self, disk_id: str) -> None:
        """Unplug a disk, even if it is only partly plugged in; may be called again after a failure."""
        since = self._qmp.event_count
        try:
            await self._qmp.execute("device_del", {"id": disk_id})
            gone = False
        except QmpRefused as error:
            gone = "not found" in str(error)
            if not gone and "in the process of unplug" not in str(error):
                raise
        if not gone:
            try:
                with trio.fail_after(_UNPLUG_LIMIT):
                    # Another DEVICE_DELETED, without a device, is only for the virtio backend inside.
                    await self._qmp.wait_event(
                        lambda event: event.name == "DEVICE_DELETED" and event.data.get("device") == disk_id,
                        since=since,
                    )
            except trio.TooSlowError:
                raise VmmBroken(f"the guest did not release disk {disk_id!r}") from None
        with contextlib.suppress(QmpRefused):  # there is no such node
            await self._qmp.execute("blockdev-del", {"node-name": native.disk_node(disk_id)})
        if (number := await self._descriptor_set(native.disk_set(disk_id))) is not None:
            await self._qmp.execute("remove-fd", {"fdset-id": number})

    async def _descriptor_set(self, tag: str) -> int | None:
        for each in await self._qmp.execute("query-fdsets"):
            if any(fd.get("opaque") == tag for fd in each["fds"]):
                return int(each["fdset-id"])
        return None


@contextlib.contextmanager
def _opened(path: str, flags: int, *, log: bool = False) -> Iterator[int]:
    try:
        fd = open_for_child(path, flags, regular=not log, log=log)
    except OSError as error:
        raise InternalError(f"{path}: {error.strerror}") from error
    with _closing(fd):
        yield fd


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _migration_ended(event: Happened) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed", "cancelled")


def _memory_changed(event: Happened) -> bool:
    return event.name == "MEMORY_DEVICE_SIZE_CHANGE"
