"""Effects on captures: a VM's memory and devices saved to a directory, published by rename."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import trio

from hypeman.captures.records import CAPTURES, CaptureRow
from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.hypervisor.captures import MEMORY, make_lasting
from hypeman.hypervisor.interface import VmmGone
from hypeman.instances.machine.context import Context
from hypeman.instances.machine.guest import Guests, freeze
from hypeman.instances.model.steps import FreeCapture, SaveCapture
from hypeman.store import Txn
from hypeman.telemetry import metrics

log = logging.getLogger(__name__)


class CompressorNeeds(Protocol):
    def plain(self, capture_id: str) -> AbstractAsyncContextManager[None]: ...
    def schedule(self, capture_id: str, *, delay: float = 0.0) -> None: ...
    def is_busy(self, capture_id: str) -> bool: ...
    def is_compressing(self, capture_id: str) -> bool: ...


class Captures:
    def __init__(self, context: Context, guests: Guests, compressor: CompressorNeeds) -> None:
        self._context = context
        self._guests = guests
        self.compressor = compressor

    async def save(self, step: SaveCapture) -> None:
        live = self._context.living(step.instance)
        directory = self._context.paths.capture(step.capture)
        side = _side(directory)
        await self._context.files.remove(side)
        await self._context.files.make_dir(side, mode=0o711)  # a fork's VMM user needs search permission
        async with live.without_loan():
            await freeze(live)
            live.hold(True)
            try:
                with metrics.timed_vmm_call("capture"):
                    await live.vmm.capture(side, flush=not step.transient)
            except VmmGone as error:
                raise VmmGone(f"the VMM was lost while the VM was saved: {error}") from error
        await self._context.files.publish(side, directory)

    async def discard(self, step: SaveCapture) -> None:
        """Resume the VM where it was, with its memory, and remove the capture."""
        directory = self._context.paths.capture(step.capture)
        await self._context.files.remove(directory)
        await self._context.files.remove(_side(directory))
        await self._guests.resume(step.instance)

    async def free(self, step: FreeCapture) -> None:
        """Remove a capture without holders, directory first: a row without one is never restored."""

        def is_free(txn: Txn) -> bool:
            row = txn.get(CAPTURES, step.capture)
            return row is None or not row.holders

        if self._context.store.read(is_free):
            await self._context.files.remove(self._context.paths.capture(step.capture))
            await self._context.store.write(lambda txn: txn.delete(CAPTURES, step.capture))

    def restorable(self, capture_id: str) -> AbstractAsyncContextManager[None]:
        """Within the block, the capture's memory is uncompressed on disk and not being compressed."""
        return self.compressor.plain(capture_id)

    async def describe(
        self,
        instance_id: str,
        capture_id: str,
        *,
        holder: str,
        compression: SnapshotCompressionConfig | None = None,
    ) -> CaptureRow:
        """The row of a capture just made of the instance."""
        directory = self._context.paths.capture(capture_id)
        return CaptureRow(
            id=capture_id,
            holders=(holder,),
            size_bytes=await self._context.files.allocated(directory),
            # Some VMMs write plugged memory after the rest, some store all memory in their state file.
            memory_bytes=_size(directory / MEMORY) or self._context.record(instance_id).spec.memory_bytes,
            compression=compression,
        )

    async def collect(self) -> None:
        """At server start, remove what a crash left: captures without holders and directories without a row. Flush
        those that were to be restored at once."""

        def read(txn: Txn) -> tuple[set[str], list[str]]:
            rows = dict(txn.scan(CAPTURES))
            return set(rows), [key for key, row in rows.items() if not row.holders]

        known, unheld = self._context.store.read(read)
        captures = self._context.paths.captures
        if captures.is_dir():
            for directory in await trio.to_thread.run_sync(lambda: list(captures.iterdir())):
                if directory.name not in known:
                    await _or_log(self._context.files.remove(directory), directory.name)
        for capture_id in known - set(unheld):
            await _or_log(trio.to_thread.run_sync(make_lasting, self._context.paths.capture(capture_id)), capture_id)
        for capture_id in unheld:
            await _or_log(self.free(FreeCapture(capture_id)), capture_id)


def _side(directory: Path) -> Path:
    """Where a capture is written before it is published."""
    return directory.with_name(directory.name + ".new")


async def _or_log(removal: Awaitable[None], capture: str) -> None:
    """Leftovers only cost disk space; the next server start retries."""
    try:
        await removal
    except Exception as error:
        log.warning("unused capture %s cannot be removed: %s", capture, error)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
