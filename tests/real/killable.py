"""The real server, with a bomb in it: ``python -m tests.real.killable FILE``.

It counts the moments at which trouble would hurt. While FILE is there it says which kind and how many moments
to let pass; at the next one it happens, once, and FILE.where has the moment's name:

    {"run": 1, "kind": "server", "at": 7}               the server kills itself with SIGKILL
    {"run": 2, "kind": "vmm", "at": 7, "spare": ""}     all VMMs are killed with SIGKILL, that of ``spare`` apart
    {"run": 3, "kind": "write", "at": 7}                the disk is full, for this one write

Each run counts from its own beginning.

Moments are before and after: every commit of the store, every step done or undone, the first piece and the whole
of a file that a compression writes, every order to a VMM with an HTTP API; for VMMs also every QMP command, as long as
there is one to be killed. For writes they are the writes themselves. A server killed before something is found as one
killed after what it did last, so of these two moments there is only the second.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outcome

from hypeman import app
from hypeman.captures import compression
from hypeman.config import load_config
from hypeman.errors import StoreError
from hypeman.host import files
from hypeman.host.processes import MARK_VARIABLE, mark_argument
from hypeman.hypervisor.qemu.client import QmpClient
from hypeman.hypervisor.unix_http import UnixHttp
from hypeman.instances.machine.captures import Captures
from hypeman.instances.machine.machine import Machine
from hypeman.instances.model.steps import TakeBack
from hypeman.store import Store

_NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
_NEED_NO_SPACE = ("_remove", "allocated_bytes")


class Bomb:
    def __init__(self, file: Path, vms: Path) -> None:
        self._file = file
        self._vms = vms
        self._seen = 0
        self._run = 0
        self._last = ""
        self._one_at_a_time = threading.RLock()  # some moments are in worker threads

    def strikes(self, kind: str, where: str) -> bool:
        """Whether the moment has come; called at each."""
        with self._one_at_a_time:
            try:
                wanted = json.loads(self._file.read_text())
            except FileNotFoundError:
                return False
            if wanted["run"] != self._run:
                self._run, self._seen, self._last = wanted["run"], 0, ""
            if wanted["kind"] != kind:
                return False
            last, self._last = self._last, where
            if kind == "server" and where.startswith("before") and last.startswith("after"):
                return False  # the world is as it was at the last moment
            victims = self._vmms(wanted["spare"]) if kind == "vmm" else []
            if kind == "vmm" and not victims:
                return False
            self._seen += 1
            if self._seen != wanted["at"] + 1:
                return False
            self._file.with_suffix(".where").write_text(where)
            for pid in victims if kind == "vmm" else [os.getpid()] if kind == "server" else []:
                os.kill(pid, signal.SIGKILL)
            return True

    def _vmms(self, spared: str) -> list[int]:
        runs = [run for run in self._vms.iterdir() if run.name != spared] if self._vms.is_dir() else []
        marks = {f"{MARK_VARIABLE}={run}".encode() for run in runs} | {mark_argument(str(run)).encode() for run in runs}
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z" and not marks.isdisjoint((*environment, *words)):
                found.append(int(entry))
        return found


def around(name: str, fn: Callable[..., Any], *moments: Callable[[str], object]) -> Callable[..., Any]:
    """``fn`` with ``moments`` before and after it."""

    def tell(when: str) -> None:
        for moment in moments:
            moment(f"{when} {name}")

    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            tell("before")
            result = await fn(*args, **kwargs)
            tell("after")
            return result

    else:

        @functools.wraps(fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tell("before")
            result = fn(*args, **kwargs)
            tell("after")
            return result

    return wrapped


def arm(bomb: Bomb) -> None:
    server, vmm = functools.partial(bomb.strikes, "server"), functools.partial(bomb.strikes, "vmm")
    for name in ("do", "undo"):
        setattr(Machine, name, _around_steps(name, getattr(Machine, name), server, vmm))
    for owner, name in ((Machine, "reattach"), (Machine, "plug_memory"), (Captures, "collect")):
        setattr(owner, name, around(name, getattr(owner, name), server, vmm))
    _arm_store(bomb, server, vmm)
    _arm_compression(bomb, server, vmm)
    _arm_files(bomb)
    execute = QmpClient.execute

    async def told(self: QmpClient, name: str, *args: Any, **kwargs: Any) -> Any:
        return await around(f"QMP {name}", execute, vmm)(self, name, *args, **kwargs)

    QmpClient.execute = told  # type: ignore[method-assign]
    request = UnixHttp.request

    async def ordered(self: UnixHttp, method: str, target: str, *args: Any, **kwargs: Any) -> Any:
        moments = () if method == "GET" else (server, vmm)
        return await around(f"{method} {target}", request, *moments)(self, method, target, *args, **kwargs)

    UnixHttp.request = ordered  # type: ignore[method-assign]


def _around_steps(verb: str, fn: Callable[..., Any], *moments: Callable[[str], object]) -> Callable[..., Any]:
    async def wrapped(self: Machine, step: Any) -> None:
        what = f"undo {type(step.step).__name__}" if isinstance(step, TakeBack) else f"{verb} {type(step).__name__}"
        await around(what, fn, *moments)(self, step)

    return wrapped


def _arm_store(bomb: Bomb, *moments: Callable[[str], object]) -> None:
    commit = Store._commit

    def fail_or_commit(self: Store, batch: list[Any]) -> None:
        if not bomb.strikes("write", "commit"):
            commit(self, batch)
            return
        for write in batch:
            write.result = outcome.Error(StoreError(f"the store could not be written: {_NO_SPACE.strerror}"))

    Store._commit = around("commit", fail_or_commit, *moments)  # type: ignore[method-assign]


def _arm_compression(bomb: Bomb, *moments: Callable[[str], object]) -> None:
    write_at = compression._write_at

    def fail_or_write(fd: int, data: bytes, position: int) -> None:
        if bomb.strikes("write", "a piece of memory"):
            raise _NO_SPACE
        write_at(fd, data, position)

    first = around("a piece of memory", fail_or_write, *moments)

    def write(fd: int, data: bytes, position: int) -> None:
        (write_at if position else first)(fd, data, position)

    compression._write_at = write
    compression._pump = around("all memory", compression._pump, *moments)


def _arm_files(bomb: Bomb) -> None:
    in_thread = files._in_thread

    def refuse(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    async def fail_or_do(fn: Callable[..., Any], *args: Any) -> Any:
        needs_space = fn.__name__ not in _NEED_NO_SPACE
        if needs_space and bomb.strikes("write", f"files.{fn.__name__.strip('_')}"):
            return await in_thread(refuse, *args)
        return await in_thread(fn, *args)

    files._in_thread = fail_or_do


if __name__ == "__main__":
    config = load_config()
    arm(Bomb(Path(sys.argv[1]), config.paths.vms))
    app.main(config)
