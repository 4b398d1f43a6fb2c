"""LMDB behind two functions: ``read`` and ``write``.

    read(fn)          runs fn(txn) immediately, in this thread: reads mapped memory, no I/O wait
    await write(fn)   runs fn(txn) in a worker thread and returns when its changes are on disk

One plain function is one transaction: a write transaction of LMDB is bound to the thread that began
it, so whole functions are passed. Writes that arrive during a commit are committed together by the
next one, each in its own child transaction, so that they share the fsync but not their failures
(group commit). Writes run in the order of the calls.

Invariants:

- A ``write`` that returned is on disk. One that raised changed nothing.
- A submitted write is never cancelled; the caller waits shielded (milliseconds).
- One process owns a store (a lock on the directory), so caches cannot become stale.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import lmdb
import outcome
import trio

from hypeman import __version__
from hypeman.actor import current_actor
from hypeman.errors import HypemanError, StoreError
from hypeman.store.schema import MIGRATIONS, SCHEMA, SCHEMA_VERSION, Migration, SchemaRow
from hypeman.store.tables import Txn

R = TypeVar("R")

_INITIAL_MAP = 64 << 20
_LOCK_SECONDS = 1.0
_MAX_BATCH = 256
"""Maximum writes per commit; bounds how long the first of them waits."""


class _Write(Generic[R]):
    """A queued write function and its result."""

    __slots__ = ("actor", "done", "fn", "result")

    def __init__(self, fn: Callable[[Txn], R]) -> None:
        self.fn = fn
        self.actor = current_actor()
        self.done = trio.Event()
        self.result: outcome.Outcome[R] | None = None


class Store:
    """An open store. ``Store.open`` creates it, ``serving`` (or ``run`` in a nursery) processes writes."""

    def __init__(self, env: lmdb.Environment, lock_fd: int) -> None:
        self._env = env
        self._lock_fd = lock_fd
        self._pending: list[_Write[Any]] = []
        self._work = trio.Event()
        self._readers_gate = threading.Lock()
        """Held while the map is replaced by a larger one, when no reader may be active."""
        self._closed = False
        self.commits = 0
        self.committed = trio.Event()
        """Set by the next commit, and then replaced. Take it before reading, to miss no change."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        version: int = SCHEMA_VERSION,
        migrations: Mapping[int, Migration] = MIGRATIONS,
    ) -> Store:
        """Open the store in directory ``path``, creating or migrating it if needed.

        Raises StoreError, with the store unchanged, if it is in use by another server, cannot be
        read or written, or was written by a newer version.
        """
        with ExitStack() as undo, _translated(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = os.open(path / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, lock_fd)
            if not _lock(lock_fd):
                raise StoreError(f"store {path} is in use by another hypeman server")
            size = _file_size(path / "data.mdb")
            map_size = max(_INITIAL_MAP, _rounded(size * 2))
            env = lmdb.open(str(path), map_size=map_size, max_dbs=0, mode=0o600, readahead=False)
            undo.callback(env.close)
            _migrate(env, path, version, migrations)
            undo.pop_all()
            return cls(env, lock_fd)

    def close(self) -> None:
        """Close the file. Pending writes fail with StoreError."""
        if self._closed:
            return
        self._closed = True
        for write in self._pending:
            write.result = outcome.Error(StoreError("the store was closed"))
            write.done.set()
        self._pending.clear()
        self._work.set()
        self._env.close()
        os.close(self._lock_fd)

    def read(self, fn: Callable[[Txn], R]) -> R:
        """Run ``fn`` on a consistent view of the store and return its result.

        Synchronous on purpose: a row takes a few microseconds. ``fn`` must not write.
        """
        with self._readers_gate, _translated(None), self._env.begin() as txn:
            return fn(Txn(txn))

    async def write(self, fn: Callable[[Txn], R]) -> R:
        """Run ``fn`` in a transaction and return its result once it is durable.

        ``fn`` is a plain function; it runs in another thread and may run twice (if the map had to
        grow), so it must touch only the transaction. Its exceptions are raised here, with nothing
        changed.
        """
        write = self._hand_over(fn)
        with trio.CancelScope(shield=True):
            await write.done.wait()
        assert write.result is not None
        return write.result.unwrap()

    def write_soon(self, fn: Callable[[Txn], object]) -> None:
        """Like ``write``, without waiting: durable together with, and before, any later write.

        For records that may be lost in a crash, because the work is then redone.
        """
        self._hand_over(fn)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Process writes until cancelled; writes submitted before are still committed."""
        task_status.started()
        try:
            while not self._closed:
                await self._work.wait()
                await self._commit_pending()
        finally:
            with trio.CancelScope(shield=True):
                await self._commit_pending()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """``run`` around a block: code inside can write until it ends, also while being cancelled.

        Undoing is shielded, and it writes; if ``run`` were cancelled together with it, it would wait
        forever.
        """
        until_the_end = trio.CancelScope(shield=True)

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            with until_the_end:
                await self.run(task_status=task_status)

        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(serve)
                yield
            finally:
                until_the_end.cancel()

    @staticmethod
    def copy(path: Path, target: Path) -> None:
        """Write a compact, consistent copy of the store at ``path`` into the empty directory ``target``.

        A running server may own the store and write to it concurrently. Blocks; raises StoreError.
        """
        with _translated(path), lmdb.open(str(path), readonly=True, create=False) as env:
            env.copy(str(target), compact=True)

    def statistics(self) -> dict[str, int]:
        info, stat = self._env.info(), self._env.stat()
        return {
            "map_bytes": info["map_size"],
            "used_bytes": (info["last_pgno"] + 1) * stat["psize"],
            "entries": stat["entries"],
            "commits": self.commits,
        }

    # The writer's side

    def _hand_over(self, fn: Callable[[Txn], R]) -> _Write[R]:
        if self._closed:
            raise StoreError("the store is closed")
        write = _Write(fn)
        self._pending.append(write)
        self._work.set()
        return write

    async def _commit_pending(self) -> None:
        while self._pending and not self._closed:
            batch = self._pending[:_MAX_BATCH]
            del self._pending[:_MAX_BATCH]
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._commit, batch)
            for write in batch:
                write.done.set()
            self.committed.set()
            self.committed = trio.Event()
        if not self._closed:
            self._work = trio.Event()

    def _commit(self, batch: list[_Write[Any]]) -> None:
        """Commit the batch and set the result of each write. Never raises."""
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    for write in batch:
                        write.result = self._run_one(txn, write)
                self.commits += 1
                return
            except lmdb.MapFullError:
                self._grow()
            except lmdb.Error as error:  # the commit itself failed: full disk, I/O error; nothing was changed
                failure = StoreError(f"the store could not be written: {error}")
                for write in batch:
                    write.result = outcome.Error(failure)
                return

    def _run_one(self, parent: lmdb.Transaction, write: _Write[R]) -> outcome.Outcome[R]:
        child = self._env.begin(write=True, parent=parent)
        try:
            value = write.fn(Txn(child, write.actor))
            child.commit()
        except lmdb.MapFullError:
            child.abort()
            raise
        except BaseException as error:
            child.abort()
            return outcome.Error(error)
        return outcome.Value(value)

    def _grow(self) -> None:
        with self._readers_gate:
            self._env.set_mapsize(_rounded(self._env.info()["map_size"] * 2))


def _lock(fd: int) -> bool:
    """Take the lock; returns whether we have it. A server that was just killed may have left it to a child
    between fork and exec, which releases it shortly."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)


def _migrate(env: lmdb.Environment, path: Path, version: int, migrations: Mapping[int, Migration]) -> None:
    with env.begin() as txn:
        found = Txn(txn).get(SCHEMA, "schema")
    if found is not None and found.version == version:
        return
    if found is not None and found.version > version:
        raise StoreError(
            f"store {path} has schema version {found.version}, written by a newer hypeman "
            f"(made by {found.created_by}); this is {__version__} and knows up to {version}"
        )
    with env.begin(write=True) as txn:
        view = Txn(txn)
        if found is not None:
            for step in range(found.version, version):
                migrations[step](view)
        created_by = found.created_by if found is not None else __version__
        view.put(SCHEMA, "schema", SchemaRow(version, created_by))


@contextmanager
def _translated(path: Path | None) -> Any:
    try:
        yield
    except HypemanError:
        raise
    except (OSError, lmdb.Error) as error:
        where = f" {path}" if path is not None else ""
        raise StoreError(f"store{where} cannot be used: {error}") from error


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _rounded(size: int) -> int:
    """Round up to whole MiB, a multiple of every page size."""
    return (size + (1 << 20) - 1) >> 20 << 20
