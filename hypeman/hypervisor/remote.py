"""Common code for VMMs with an HTTP API: working directory, start, lifetime and guest channel.

    room/          working directory of the VMM; all its paths are relative to it
      disk-<id>    links to the disks; so a saved state, which contains paths, has no host paths and can
      kernel …     be restored in another room with other disks under the same names
      api.sock     the VMM's API
      vsock.sock   its vsock; guest connections to the host arrive at vsock.sock_1024, where we listen

The VMM's user gets temporary access to files while it opens them, so they may belong to root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import trio

from hypeman.errors import InUse
from hypeman.host.ownership import take_back
from hypeman.host.processes import Process, Processes, Program
from hypeman.host.temporary_access import temporary_access
from hypeman.hypervisor.interface import (
    AGENT_VSOCK_PORT,
    Disk,
    ExitReason,
    LaunchFailed,
    VmConfig,
    VmmBroken,
    VmmExit,
    VmmGone,
    VmmHandle,
)
from hypeman.hypervisor.live_vmm import LiveVmm
from hypeman.hypervisor.run_dir import INITRD, KERNEL, VSOCK, disk_link
from hypeman.hypervisor.unix_http import UnixHttp
from hypeman.hypervisor.vmm_process import LogTail, end, rotate_log

_START_LIMIT = 20.0
"""Seconds to wait until the API answers; it takes 5-50 ms."""


class RemoteVmm(LiveVmm):
    """One VMM process with an HTTP API. Subclasses implement the requests."""

    def __init__(self, handle: VmmHandle, process: Process, api: UnixHttp, listener: trio.socket.SocketType) -> None:
        super().__init__(handle, process)
        self._api = api
        self._listener = listener

    @property
    def api(self) -> UnixHttp:
        return self._api

    async def open_channel(self) -> trio.abc.Stream:
        if self._channel is not None:  # the agent keeps one connection and reconnects when it is closed
            await trio.aclose_forcefully(self._channel)
        connection, _ = await self._listener.accept()
        self._channel = trio.SocketStream(connection)
        return self._channel

    async def set_link(self, nic_id: str, *, up: bool) -> None:
        """A no-op: these VMMs have no link state. The TAP's rules drop packets with a foreign address."""
        await trio.lowlevel.checkpoint()

    async def rotate_console(self) -> None:
        await trio.to_thread.run_sync(rotate_log, Path(self.config.console_log))

    async def wait_exit(self) -> VmmExit:
        code = await self._process.wait()
        if self._killed or code == -9:
            return VmmExit(ExitReason.KILLED)
        if code is None:
            return self._ended_without_code()
        if code == 0:
            return self._ended_by_itself()
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return VmmExit(ExitReason.FAILED, f"{self._handle.kind} ended {how}")

    def _ended_by_itself(self) -> VmmExit:
        return VmmExit(ExitReason.POWEROFF)

    def _ended_without_code(self) -> VmmExit:
        """The VMM was started by an earlier server, so only init gets its exit code. Without other evidence that
        the guest shut down, it counts as killed: a restart policy must not mistake a crash for a power-off."""
        return VmmExit(ExitReason.KILLED, "the VMM ended; how is unknown, since the server was restarted meanwhile")

    async def aclose(self) -> None:
        self._listener.close()
        await super().aclose()

    @contextlib.contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """Release this object's resources if the block fails; ``started`` kills the process."""
        try:
            yield
        except BaseException:
            self._listener.close()
            raise

    def _with_port(self, disk: Disk) -> Disk:
        """These VMMs choose a slot themselves; the port only means that the disk can be unplugged."""
        if any(other.id == disk.id for other in self.config.disks):
            raise InUse(f"the VM has a disk {disk.id!r} already")
        taken = {other.port for other in self.config.disks}
        port = disk.port or next(number for number in range(1, len(taken) + 2) if number not in taken)
        return msgspec.structs.replace(disk, port=port)


PlaceFile = Callable[[Path, Path], None]
"""Makes one of our files (first) reachable under a name in a room (second)."""


@contextlib.contextmanager
def populated(room: Path, config: VmConfig, place: PlaceFile, *, kernel: bool) -> Iterator[None]:
    """PlaceFile the disks, and optionally the kernel, in an empty room, accessible to the VMM during the block."""
    with contextlib.ExitStack() as opened:
        try:
            for disk in config.disks:
                opened.enter_context(placed(room, config, disk, place))
            for name, path in ((KERNEL, config.kernel), (INITRD, config.initrd)):
                if kernel and path is not None:
                    place(Path(path), room / name)
                    opened.enter_context(temporary_access(Path(path), config.uid, write=False))
        except OSError as error:
            raise LaunchFailed(f"{error.filename or config.run_dir}: {error.strerror}") from error
        yield


@contextlib.contextmanager
def placed(room: Path, config: VmConfig, disk: Disk, place: PlaceFile) -> Iterator[None]:
    """PlaceFile one disk, accessible to the VMM during the block; the link to it remains."""
    name = room / disk_link(disk.id)
    try:
        clear(name)
        place(Path(disk.path), name)
    except OSError as error:
        raise LaunchFailed(f"disk {disk.id!r} ({Path(disk.path).name}) cannot be placed: {error.strerror}") from error
    with temporary_access(Path(disk.path), config.uid, write=not disk.readonly):
        yield


def clear(name: Path) -> None:
    """Remove whatever the VMM has put there. Raises OSError."""
    try:
        name.unlink(missing_ok=True)
    except IsADirectoryError:
        shutil.rmtree(name)  # follows no links


def emptied(directory: Path) -> None:
    """Make ``directory`` exist, empty and accessible only to root."""
    directory.mkdir(mode=0o700, exist_ok=True)
    take_back(directory)
    directory.chmod(0o700)
    for old in directory.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def listen_for_guest(room: Path, config: VmConfig) -> trio.socket.SocketType:
    """The socket that the guest agent connects to; recreated after a server restart.

    Its owner is changed outside the room, where the VMM cannot replace it.
    """
    beside = os.open(room / os.pardir, os.O_PATH | os.O_DIRECTORY)
    path = Path(f"/proc/self/fd/{beside}", "channel.new")  # short enough for a socket address
    try:
        path.unlink(missing_ok=True)
        sock = trio.socket.from_stdlib_socket(listening(path))
        try:
            if os.geteuid() == 0:
                os.chown(path, config.uid, config.gid)
            path.rename(room / f"{VSOCK}_{AGENT_VSOCK_PORT}")
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(beside)


def listening(path: Path) -> socket.socket:
    """A listening socket at ``path``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        sock.listen(4)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.asynccontextmanager
async def started(processes: Processes, program: Program) -> AsyncIterator[Process]:
    """Start the process; if the block fails, kill it and add its last output to the error."""
    words = LogTail(program.log)
    process = await processes.spawn(program)
    try:
        yield process
    except BaseException as error:
        await end(process)
        if isinstance(error, VmmGone | VmmBroken):
            raise LaunchFailed(f"{error.message}: {words}".removesuffix(": ")) from error
        raise


async def wait_api(api: UnixHttp, process: Process, target: str) -> object:
    """The first response to GET ``target``. Raises VmmGone if the process exits, VmmBroken on timeout."""
    with trio.move_on_after(_START_LIMIT):
        while process.alive():
            with contextlib.suppress(VmmGone):  # not listening yet
                return await api.request("GET", target)
            await trio.sleep(0.002)
        raise VmmGone("the VMM ended at its start")
    raise VmmBroken(f"the VMM's API did not answer within {_START_LIMIT:g} s")
