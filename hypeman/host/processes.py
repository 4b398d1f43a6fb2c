"""Other programs: VMMs that outlive us, and short helper tools.

    spawn    starts a program in a session of its own that outlives us; returns a Process
    find     finds a Process again by its stored identity, or by its mark
    run      runs a helper tool: waits for it, returns its output, kills its process group when cancelled

Rules:

- A process is named by pid, start time and boot id together, never by a bare pid, and signalled
  only through its pidfd, so that a process that reuses the pid is never hit.
- A spawned program inherits only the listed descriptors, under their numbers here, and a minimal environment.
  Its user is set before ``exec``, and it can never gain privileges. A server running as root starts it through
  the launcher (ext/launcher): in its own namespaces, with limits and a seccomp filter.
- It carries its mark (``HYPEMAN_MARK``) in its environment, or as an argument where an intermediate program
  clears the environment (``mark_argument``). ``find_marked`` finds a program that we started but could not
  record before we were killed.
- Starting happens in a thread: fork and exec of QEMU take 2–10 ms, too long for the event loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import math
import os
import resource
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

import hypeman
from hypeman.errors import InternalError
from hypeman.host.safe_open import open_log, open_regular

_T = TypeVar("_T")

MARK_VARIABLE = "HYPEMAN_MARK"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_OUTPUT = 4 * 1024 * 1024
_PR_SET_NO_NEW_PRIVS = 38
_PIDFD_GETFD = 438
_CLONE_NEWPID = 0x20000000
LAUNCHER = Path(__file__).parent / "bin" / "hypeman-launch"
_MAX_REPORT = 1024

_libc = ctypes.CDLL(None, use_errno=True)


class SpawnFailed(InternalError):
    """A program could not be started; everything it had was cleaned up."""


class ToolFailed(InternalError):
    """A helper tool failed, timed out or produced too much output."""

    def __init__(self, message: str, *, returncode: int | None = None, output: bytes = b"") -> None:
        super().__init__(message)
        self.returncode = returncode
        self.output = output


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to start a program."""

    argv: tuple[str, ...]
    log: str
    """Standard output and error are appended here; created with mode 0600 if missing."""
    output: str = ""
    """Where standard output is appended instead: the console of a VMM that writes it to stdout."""
    cwd: str = "/"
    mark: str
    """Unique among our running programs; the run directory of a VMM."""
    fds: tuple[int, ...] = ()
    """Descriptors to inherit, under the same numbers."""
    uid: int = 0
    gid: int = 0
    devices: tuple[str, ...] = ()
    """Device files that it opens itself: it is put into their groups where those have access."""
    cgroup: str = ""
    """Directory of a control group to put it into; empty for none."""
    isolated: bool = True
    """Run in an empty network namespace. A program that opens TAPs by name needs the host's."""
    root_files: tuple[str, ...] = ()
    """The only files and directories that it sees (read-only, same paths), besides ``own_files``, ``devices``,
    ``other_devices`` and a /proc of its own. Empty: it sees the host's, as a jailer must, which makes a root itself."""
    own_files: tuple[str, ...] = ()
    """Files and directories that it may also write to, as far as its user may; only with ``root_files``."""
    other_devices: tuple[str, ...] = ()
    """World-accessible devices that it opens; only with ``root_files``."""
    jailer: bool = False
    """It creates its own namespaces and root directory, and drops root itself."""
    max_file_size: int = 0
    """Maximum size in bytes of a file it writes (RLIMIT_FSIZE); 0 is no limit."""
    locked_memory: int = 0
    """Bytes it may lock in memory; device passthrough locks all guest memory."""


class ProcessId(msgspec.Struct, frozen=True):
    """Identifies one process uniquely, also across reboots."""

    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of /proc/<pid>/stat."""
    boot_id: str


class Process:
    """One process, ours or adopted, held by a pidfd. ``close`` closes the pidfd; the process keeps running."""

    def __init__(self, identity: ProcessId, pidfd: int) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self._returncode: int | None = None

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, or minus the signal, once ``wait`` returned; None for one that is not our child."""
        return self._returncode

    def alive(self) -> bool:
        """Whether it is still running; a zombie is not."""
        if self._pidfd < 0:
            return False
        poller = select.poll()  # not select: pidfds may be above 1024 here
        poller.register(self._pidfd, select.POLLIN)
        return not poller.poll(0)

    def stopped(self) -> bool:
        """Whether it is stopped by SIGSTOP."""
        try:
            return _stat(self.pid)[0] == b"T" and self.alive()
        except OSError:
            return False

    async def wait(self) -> int | None:
        """Wait for the process to exit and return ``returncode``. Any number of tasks may wait."""
        if self._pidfd >= 0 and self.alive():
            own = os.dup(self._pidfd)  # Trio lets only one task wait for one descriptor
            try:
                await trio.lowlevel.wait_readable(own)
            finally:
                os.close(own)
        else:
            await trio.lowlevel.checkpoint()
        self._reap()
        return self._returncode

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; a no-op if the process has already exited."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        if self._pidfd >= 0:
            if not self.alive():
                self._reap()
            os.close(self._pidfd)
            self._pidfd = -1

    def _reap(self) -> None:
        if self._pidfd < 0 or self._returncode is not None:
            return
        with contextlib.suppress(ChildProcessError):  # adopted: init reaps it and gets the exit code
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            if result is not None:
                exited = result.si_code == os.CLD_EXITED
                self._returncode = result.si_status if exited else -result.si_status


class Processes:
    """Starts, finds and watches programs. One per server; cheap to create."""

    def __init__(self) -> None:
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Inherited by all child processes: a core file would contain a guest's memory, or our secrets.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    async def spawn(self, program: Program) -> Process:
        """Start ``program``. Raises SpawnFailed. Also cleans up when cancelled."""
        with trio.CancelScope(shield=True):  # a few ms; a partial start could not be undone
            process = await trio.to_thread.run_sync(self._spawn, program)
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            process.close()
            raise
        return process

    def find(self, identity: ProcessId) -> Process | None:
        """The running process with this identity, or None."""
        if identity.boot_id != self.boot_id:
            return None
        process = self._open(identity.pid)
        if process is not None and process.identity != identity:
            process.close()
            return None
        return process

    def find_marked(self, mark: str) -> Process | None:
        """The running program that was started with ``mark``. Scans every process (25 µs each)."""
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or not _has_mark(entry, mark):
                continue
            process = self._open(int(entry))
            if process is not None and _has_mark(entry, mark):
                return process
            if process is not None:
                process.close()
        return None

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float = 60.0,
        quiet_limit: float = math.inf,
        max_output: int = _MAX_OUTPUT,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> bytes:
        """Return the standard output of a helper tool. Raises ToolFailed with its standard error.

        ``timeout`` is for the whole run, ``quiet_limit`` the longest time without output.
        On cancellation, timeout or too much output its process group is killed and reaped before this returns.
        """
        try:
            process = await trio.lowlevel.open_process(
                list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True, env={**tool_environment(), **(env or {})}, cwd=cwd,
            )  # fmt: skip
        except OSError as error:
            raise ToolFailed(f"{argv[0]} cannot be started: {error.strerror or error}") from None
        output, errors = bytearray(), bytearray()
        overflow = False
        patience = trio.CancelScope(deadline=trio.current_time() + quiet_limit)

        async def feed(stream: trio.abc.SendStream) -> None:
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError):  # it may not read all of its input
                    await stream.send_all(stdin)

        async def collect(stream: trio.abc.ReceiveStream, into: bytearray) -> None:
            nonlocal overflow
            async with stream:
                while chunk := await stream.receive_some(65536):
                    into += chunk
                    patience.deadline = trio.current_time() + quiet_limit
                    if len(into) > max_output:
                        overflow = True
                        _kill_group(process.pid)
                        return

        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            with trio.move_on_after(timeout) as limit, patience:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(feed, process.stdin)
                    nursery.start_soon(collect, process.stdout, output)
                    nursery.start_soon(collect, process.stderr, errors)
                    await process.wait()
        finally:
            if process.returncode is None:
                _kill_group(process.pid)
                with trio.CancelScope(shield=True):
                    await process.wait()
        message = bytes(errors[-2000:]).decode(errors="replace").strip()
        if overflow:
            raise ToolFailed(f"{argv[0]} wrote more than {max_output} bytes")
        if limit.cancelled_caught:
            raise ToolFailed(f"{argv[0]} did not end within {timeout:g} s{': ' + message if message else ''}")
        if patience.cancelled_caught:
            raise ToolFailed(f"{argv[0]} printed nothing for {quiet_limit:g} s{': ' + message if message else ''}")
        if process.returncode != 0:
            raise ToolFailed(
                f"{argv[0]} failed ({_describe(process.returncode)}){': ' + message if message else ''}",
                returncode=process.returncode,
                output=bytes(output),
            )
        return bytes(output)

    def close(self) -> None:
        """A no-op: nothing is held open."""

    def _spawn(self, program: Program) -> Process:
        with contextlib.ExitStack() as opened:
            try:
                log = _open_log(program.log, opened)
                output = _open_log(program.output, opened) if program.output else log
                start = _launch if os.geteuid() == 0 else _start
                pid = _in_own_thread(lambda: start(program, output, log))
            except OSError as error:
                raise SpawnFailed(f"{program.argv[0]} cannot be started: {error.strerror or error}") from error
        # If it has exited it is still a zombie: it has not been reaped.
        return Process(ProcessId(pid, _start_time(pid), self.boot_id), os.pidfd_open(pid))

    def _open(self, pid: int) -> Process | None:
        try:
            pidfd = os.pidfd_open(pid)
        except (ProcessLookupError, PermissionError):
            return None
        try:
            started = _start_time(pid)
        except (OSError, ValueError):
            os.close(pidfd)
            return None
        process = Process(ProcessId(pid, started, self.boot_id), pidfd)
        if not process.alive():  # so the start time may belong to a process that reused the pid, or ours is dead
            process.close()
            return None
        return process


def _open_log(path: str, opened: contextlib.ExitStack) -> int:
    fd = open_log(path)
    os.set_blocking(fd, True)
    opened.callback(os.close, fd)
    return fd


def _launch(program: Program, output: int, log: int) -> int:
    """Start ``program`` through the launcher (ext/launcher), which sandboxes it. Raises OSError.

    Returns once the program runs. Call it in a thread that ends afterwards: the PID namespace for the next child
    is a per-thread setting.
    """
    if not LAUNCHER.exists():
        raise OSError(errno.ENOENT, f"{LAUNCHER} is missing; run make")
    with contextlib.ExitStack() as opened:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        opened.callback(os.close, reading)
        with contextlib.ExitStack() as handed:
            handed.callback(os.close, writing)
            options = ["--status", str(writing)]
            fds = [*program.fds, writing]
            if program.cgroup:
                try:
                    cgroup = os.open(os.path.join(program.cgroup, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise OSError(error.errno, f"it cannot be confined to {program.cgroup}: {error.strerror}") from None
                handed.callback(os.close, cgroup)
                options += ["--cgroup", str(cgroup)]
                fds.append(cgroup)
            if _libc.unshare(_CLONE_NEWPID) != 0:
                raise OSError(ctypes.get_errno(), "making a PID namespace (CAP_SYS_ADMIN is missing)")
            child = _popen([str(LAUNCHER), *options, *_launcher_options(program), "--", *program.argv],
                           program, output, log, tuple(fds))  # fmt: skip
        report = b""
        while len(report) < _MAX_REPORT and (more := os.read(reading, _MAX_REPORT)):
            report += more
    if report:  # it has ended
        os.waitid(os.P_PID, child, os.WEXITED)
        raise OSError(errno.EIO, report.decode(errors="replace"))
    return child


def _launcher_options(program: Program) -> list[str]:
    options = ["--net"] if program.isolated else []
    for name, number in (
        *(("--fsize", program.max_file_size), ("--memlock", program.locked_memory)),
        *(("--uid", program.uid), ("--gid", program.gid)),
        *(("--group", group) for group in (groups_for(program.devices) if program.uid else ())),
    ):
        if number:
            options += [name, str(number)]
    if program.jailer:
        options.append("--jailer")
    if program.root_files:
        for path in program.own_files:  # first: a directory would cover what was there before it
            options += ["--own", path]
        for path in program.root_files:
            options += ["--file", path]
        for path in (*program.devices, *program.other_devices):
            options += ["--device", path]
        options += ["--chdir", program.cwd]
    return options


def _start(program: Program, output: int, log: int) -> int:
    """The same for a server that is not root, without a sandbox. Runs in a thread of its own."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "giving up new privileges")
    return _popen(list(program.argv), program, output, log, program.fds)


def _popen(argv: list[str], program: Program, output: int, log: int, fds: tuple[int, ...]) -> int:
    child = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=log,
        cwd=program.cwd,
        env={"PATH": _PATH, "LANG": "C.UTF-8", MARK_VARIABLE: program.mark},
        pass_fds=fds,
        start_new_session=True,
        restore_signals=False,  # SIGXFSZ stays ignored, as in Python: a file at its limit is an error, not fatal
        umask=0o077,
    )
    child.returncode = 0  # from here on it is watched and reaped through the pidfd, not by Popen
    return int(child.pid)


def groups_for(devices: Sequence[str]) -> list[int]:
    """The groups that may open ``devices`` for reading and writing. Never includes root's group; a device
    that is missing or world-accessible needs none."""
    groups = set()
    for device in devices:
        with contextlib.suppress(OSError):
            status = os.stat(device)
            if status.st_mode & 0o060 == 0o060 and status.st_mode & 0o006 != 0o006 and status.st_gid:
                groups.add(status.st_gid)
    return sorted(groups)


def open_to_users(device: str) -> bool:
    """Whether a program that is not root can open ``device``: through the mode for others, or through a group."""
    return bool(groups_for([device])) or os.stat(device).st_mode & 0o006 == 0o006


def tool_environment() -> dict[str, str]:
    """The environment of helper tools: ours without secrets, and without variables that change what they load."""
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "TZ") if name in os.environ}
    return {"PATH": os.environ.get("PATH", _PATH), "LANG": "C.UTF-8", **kept}


def own_environment() -> dict[str, str]:
    """The environment of this program as a helper (``own_program.py``): that of tools, and where the package is."""
    return {**tool_environment(), "PYTHONPATH": str(Path(hypeman.__file__).parent.parent)}


def _start_time(pid: int) -> int:
    return int(_stat(pid)[19])


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/<pid>/stat, from the process state on."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return stat[stat.rindex(b")") + 2 :].split()  # the name before it may contain spaces and parentheses


def mark_argument(mark: str) -> str:
    """An argument that marks a program in place of its environment; 35 letters, digits and dashes."""
    return "hm-" + hashlib.sha256(mark.encode()).hexdigest()[:32]


def _has_mark(pid: str, mark: str) -> bool:
    try:
        if environment := Path(f"/proc/{pid}/environ").read_bytes():
            return f"{MARK_VARIABLE}={mark}".encode() in environment.split(b"\0")
        return mark_argument(mark).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _describe(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-returncode).name
    return f"code {returncode}"


def _in_own_thread(function: Callable[[], _T]) -> _T:
    """Run ``function()`` in a thread that ends with it, unlike a pool's threads."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="spawn")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def copy_descriptor(pid: int, number: int) -> int:
    """A copy of descriptor ``number`` of process ``pid``. Raises OSError.

    Check the file through the copy: the process may replace the descriptor at any moment.
    """
    pidfd = os.pidfd_open(pid)
    try:
        descriptor = int(_libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
        if descriptor < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code) if code != errno.EPERM else "CAP_SYS_PTRACE is missing")
        return descriptor  # the kernel sets close-on-exec
    finally:
        os.close(pidfd)


def open_for_child(path: str, flags: int, mode: int = 0o600, *, regular: bool = False, log: bool = False) -> int:
    """A descriptor to pass to a program: opened by us, so that its user needs no access to the path.

    ``regular``: only a regular file, not following links; ``log``: a log (``open_log``). Raises OSError.
    """
    if regular or log:
        fd = open_regular(path, flags, mode, links=2 if log else 0)
        os.set_blocking(fd, True)
    else:
        fd = os.open(path, flags | os.O_CLOEXEC, mode)
    if fd > 2:
        return fd
    try:  # 0 to 2 are the child's standard streams
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)
