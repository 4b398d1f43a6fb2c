"""What VMMs with an HTTP API have in common: the room they work in, their start, their life and their guest channel.

    room/          working directory of the VMM; every path it is given is a name in there
      disk-<id>    ways to the disks; so a saved state, which remembers paths, holds none of ours,
      kernel …     and comes back in another room with other disks behind the same names
      api.sock     the VMM's API
      vsock.sock   its vsock; what the guest dials on the host arrives at vsock.sock_1024, where we listen

Files are lent to the VMM's user while it opens them, so they may belong to root.
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

from hypeman.errors import InternalError, InUse
from hypeman.host.loans import lent
from hypeman.host.ownership import take_back
from hypeman.host.processes import Process, Processes, Program
from hypeman.host.safe_open import open_log
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
from hypeman.hypervisor.vmm_process import LastWords, end

_START_LIMIT = 20.0
"""Seconds until the API answers; it takes 5-50 ms."""


class RemoteVmm(LiveVmm):
    """One VMM process with an HTTP API. The kinds add what they say over it."""

    def __init__(self, handle: VmmHandle, process: Process, api: UnixHttp, listener: trio.socket.SocketType) -> None:
        super().__init__(handle, process)
        self._api = api
        self._listener = listener

    @property
    def api(self) -> UnixHttp:
        return self._api

    async def open_channel(self) -> trio.abc.Stream:
        if self._channel is not None:  # the agent holds one connection and dials again when it ends
            await trio.aclose_forcefully(self._channel)
        connection, _ = await self._listener.accept()
        self._channel = trio.SocketStream(connection)
        return self._channel

    async def set_link(self, nic_id: str, *, up: bool) -> None:
        """These VMMs have no link. The rules on its TAP keep a guest with a foreign address silent."""
        await trio.lowlevel.checkpoint()

    async def rotate_console(self) -> None:
        await trio.to_thread.run_sync(_rotate, Path(self.config.console_log))

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
        """The VMM was started by an earlier server, so only init learns its exit code. Without other evidence that
        the guest ended, it counts as killed: a restart policy must not take a crash for a power-off."""
        return VmmExit(ExitReason.KILLED, "the VMM ended; how is unknown, since the server was restarted meanwhile")

    async def aclose(self) -> None:
        self._listener.close()
        await super().aclose()

    @contextlib.contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """Let go of what this object holds if the block fails; ending the process is ``started``'s."""
        try:
            yield
        except BaseException:
            self._listener.close()
            raise

    def _with_port(self, disk: Disk) -> Disk:
        """These VMMs find a place by themselves; the port only says that the disk can be pulled again."""
        if any(other.id == disk.id for other in self.config.disks):
            raise InUse(f"the VM has a disk {disk.id!r} already")
        taken = {other.port for other in self.config.disks}
        port = disk.port or next(number for number in range(1, len(taken) + 2) if number not in taken)
        return msgspec.structs.replace(disk, port=port)


Place = Callable[[Path, Path], None]
"""Makes a file of ours (first) reachable under a name in a room (second)."""


@contextlib.contextmanager
def furnished(room: Path, config: VmConfig, place: Place, *, kernel: bool) -> Iterator[None]:
    """The disks, and the kernel where it is wanted, placed in an empty room and lent as long as the VMM opens them."""
    with contextlib.ExitStack() as loans:
        try:
            for disk in config.disks:
                loans.enter_context(placed(room, config, disk, place))
            for name, path in ((KERNEL, config.kernel), (INITRD, config.initrd)):
                if kernel and path is not None:
                    place(Path(path), room / name)
                    loans.enter_context(lent(Path(path), config.uid, write=False))
        except OSError as error:
            raise LaunchFailed(f"{error.filename or config.run_dir}: {error.strerror}") from error
        yield


@contextlib.contextmanager
def placed(room: Path, config: VmConfig, disk: Disk, place: Place) -> Iterator[None]:
    """One disk, which is lent as long as the block runs; the way to it stays."""
    name = room / disk_link(disk.id)
    name.unlink(missing_ok=True)
    place(Path(disk.path), name)
    with lent(Path(disk.path), config.uid, write=not disk.readonly):
        yield


def emptied(directory: Path) -> None:
    """``directory``, there, root's alone, and with nothing in it."""
    directory.mkdir(mode=0o700, exist_ok=True)
    take_back(directory)
    directory.chmod(0o700)
    for old in directory.iterdir():
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def listen_for_guest(room: Path, config: VmConfig) -> trio.socket.SocketType:
    """The socket at which the guest's agent arrives; made anew after a restart of ours.

    Its owner is changed beside the room, where no name can be changed under our hands.
    """
    beside = os.open(room / os.pardir, os.O_PATH | os.O_DIRECTORY)
    path = Path(f"/proc/self/fd/{beside}", "channel.new")  # short enough for a socket
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
    """A socket that listens at ``path``."""
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
    """The process, ended again if the block fails; then its last words are in the error."""
    words = LastWords(program.log)
    process = await processes.spawn(program)
    try:
        yield process
    except BaseException as error:
        await end(process)
        if isinstance(error, VmmGone | VmmBroken):
            raise LaunchFailed(f"{error.message}: {words}".removesuffix(": ")) from error
        raise


async def wait_api(api: UnixHttp, process: Process, target: str) -> object:
    """The first answer to GET ``target``. Raises VmmGone if the process ends, VmmBroken if it is too slow."""
    with trio.move_on_after(_START_LIMIT):
        while process.alive():
            with contextlib.suppress(VmmGone):  # it does not listen yet
                return await api.request("GET", target)
            await trio.sleep(0.002)
        raise VmmGone("the VMM ended at its start")
    raise VmmBroken(f"the VMM's API did not answer within {_START_LIMIT:g} s")


def _rotate(log: Path) -> None:
    """Have a process that cannot reopen its standard output go on in an empty ``log``.

    Its file was renamed to ``log``.1 by the caller; it gets its name back, empty, and what it held becomes ``log``.1.
    What is written in between is lost: some microseconds of a console. The VMM is not asked which file it writes to: a
    VMM that was taken over could name any file.
    """
    renamed = log.with_suffix(log.suffix + ".1")
    try:
        with open(open_log(renamed, os.O_RDWR), "rb+", buffering=0) as old:
            copy = renamed.with_name(renamed.name + ".new")
            copy.unlink(missing_ok=True)
            with open(open_log(copy), "ab") as new:
                shutil.copyfileobj(old, new)
            renamed.rename(log)
            copy.rename(renamed)
            os.truncate(old.fileno(), 0)
    except OSError as error:
        raise InternalError(f"the console log {log} cannot be rotated: {error.strerror}") from error
