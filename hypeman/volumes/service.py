"""Creates, fills, lists and deletes volumes. records.py decides whether one can be attached.

A disk is created in a temporary directory and published by rename before its row is written, so a row always
has a complete disk. A directory without a row was left by a crash and is removed at start.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import trio
from msgspec import UNSET

from hypeman.errors import AlreadyExists, Conflict, InsufficientResources, InvalidRequest
from hypeman.host.disks import Disks
from hypeman.host.files import Files, HostError, allocated_bytes
from hypeman.ids import check_tags, new_id, tags_match
from hypeman.paths import Paths
from hypeman.store import Store, Txn
from hypeman.telemetry import metrics
from hypeman.units import format_size
from hypeman.volumes.archive import spooled
from hypeman.volumes.records import VOLUMES, Attachment, VolumeRecord, attachments_of, find_volume, note
from hypeman.volumes.types import CreateVolumeRequest, Volume, VolumeAttachment

_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}")
_RESERVED = ("hm-", "overlay-", "boot-", "root-")
MAX_SIZE_GB = 1 << 16
_UNPACKED = 2
"""An archive may unpack to this many times the volume's size: headers and padding are not stored in the volume."""


class Fill(Protocol):
    """Unpacks the open file ``archive`` into the empty ext4 file system in the open file ``disk``.

    Raises InvalidRequest, with the code ``archive_too_large`` if it does not fit.
    """

    async def __call__(self, archive: int, disk: int, *, max_bytes: int) -> None: ...


class Volumes:
    def __init__(
        self,
        *,
        store: Store,
        paths: Paths,
        files: Files,
        disks: Disks,
        fill: Fill,
        max_total: int = 0,
        room: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        """``room``: bytes that a new volume may have, from what the file system has free."""
        self._store = store
        self._paths = paths
        self._files = files
        self._disks = disks
        self._fill = fill
        self._room = room
        self._max_total = max_total
        """Total bytes of all volumes; 0 is unlimited."""

    async def start(self) -> None:
        """Remove incomplete volumes left by a crash."""
        known = self._store.read(lambda txn: set(txn.keys(VOLUMES)))
        if self._paths.volumes.is_dir():
            for directory in self._paths.volumes.iterdir():
                if directory.name not in known:
                    await self._files.remove(directory)

    async def list(self, *, tags: Mapping[str, str]) -> Sequence[Volume]:
        def find(txn: Txn) -> list[Volume]:
            fitting = [record for _, record in txn.scan(VOLUMES) if tags_match(record.tags, tags)]
            return [_view(record, attachments_of(txn, record.id)) for record in fitting]

        return self._store.read(find)

    async def get(self, ref: str) -> Volume:
        def find(txn: Txn) -> Volume:
            record = find_volume(txn, ref)
            return _view(record, attachments_of(txn, record.id))

        return self._store.read(find)

    def sizes(self) -> Sequence[int]:
        """Bytes that each volume has."""
        return self._store.read(lambda txn: [record.size_gb << 30 for _, record in txn.scan(VOLUMES)])

    async def used_bytes(self) -> int:
        """Bytes that all volumes together occupy: their disks are sparse. One that is being deleted counts as none."""
        disks = self._store.read(lambda txn: [self._paths.volume_disk(key) for key in txn.keys(VOLUMES)])
        return await trio.to_thread.run_sync(lambda: sum(map(allocated_bytes, disks)))

    async def create(self, request: CreateVolumeRequest) -> Volume:
        """Create an empty ext4 disk. Raises AlreadyExists if the id is taken."""

        async def make(disk: Path, size: int) -> None:
            await self._disks.make(disk, size)

        return await self._create(request, make)

    async def create_from_archive(self, request: CreateVolumeRequest, chunks: AsyncIterable[bytes]) -> Volume:
        """Create a disk with the content of an archive: tar, plain or compressed with gzip or zstd."""

        async def make(disk: Path, size: int) -> None:
            async with spooled(chunks, disk.parent, limit=size) as archive:
                await self._disks.make(disk, size)
                fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    await self._fill(archive, fd, max_bytes=_UNPACKED * size)
                finally:
                    os.close(fd)

        return await self._create(request, make)

    async def delete(self, ref: str) -> None:
        """Raises Conflict while it is attached to an instance."""

        def remove(txn: Txn) -> VolumeRecord:
            record = find_volume(txn, ref)
            attached = attachments_of(txn, record.id)
            if attached:
                raise Conflict(f"volume {record.id!r} is attached to instance {attached[0].instance_id}")
            txn.delete(VOLUMES, record.id)
            note(txn, record, "deleted")
            return record

        record = await self._store.write(remove)
        with trio.CancelScope(shield=True):  # no one else would clean up
            await self._files.remove(self._paths.volumes / record.id)

    async def _create(self, request: CreateVolumeRequest, make: Callable[[Path, int], Awaitable[None]]) -> Volume:
        record = _checked(request)
        with metrics.volume_create_seconds.time():
            return await self._make(record, make)

    async def _make(self, record: VolumeRecord, make: Callable[[Path, int], Awaitable[None]]) -> Volume:
        size = record.size_gb << 30
        if size > (room := self._room()):
            raise InvalidRequest(f"a volume of {record.size_gb} GB does not fit: {room >> 30} GB are free on the disk")
        self._store.read(lambda txn: self._check_room(txn, record))
        side = self._paths.tmp / f"volume-{new_id()}"
        final = self._paths.volumes / record.id
        await self._files.make_dir(side, mode=0o711)
        await self._files.make_dir(self._paths.volumes, mode=0o711)
        published = False
        try:
            await make(side / "disk.raw", size)
            try:
                await self._files.publish(side, final)
            except HostError as error:
                if final.exists():
                    raise _taken(record.id) from error  # created concurrently
                raise
            published = True
            await self._store.write(lambda txn: self._insert(txn, record))
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._files.remove(final if published else side)
            raise
        return _view(record, [])

    def _check_room(self, txn: Txn, record: VolumeRecord) -> None:
        if txn.exists(VOLUMES, record.id):
            raise _taken(record.id)
        if self._max_total:
            held = sum(other.size_gb for _, other in txn.scan(VOLUMES)) << 30
            if held + (record.size_gb << 30) > self._max_total:
                raise InsufficientResources(
                    f"{record.size_gb} GB more would pass limits.max_total_volume_storage "
                    f"({format_size(self._max_total)}); {format_size(held)} are in use"
                )

    def _insert(self, txn: Txn, record: VolumeRecord) -> None:
        self._check_room(txn, record)
        txn.put(VOLUMES, record.id, record)
        note(txn, record, "created", {"size_gb": record.size_gb})


def _taken(identifier: str) -> AlreadyExists:
    return AlreadyExists(f"a volume with id {identifier!r} already exists")


def _checked(request: CreateVolumeRequest) -> VolumeRecord:
    if not request.name or len(request.name) > 255 or "\0" in request.name:
        raise InvalidRequest("name must have 1 to 255 characters")
    if not 1 <= request.size_gb <= MAX_SIZE_GB:
        raise InvalidRequest(f"size_gb must be 1 to {MAX_SIZE_GB}")
    identifier = request.id or new_id()
    if not _ID.fullmatch(identifier) or identifier.startswith(_RESERVED):
        raise InvalidRequest(
            f"id {identifier[:80]!r} must be 1 to 64 of letters, digits, '_', '.' and '-', begin with a letter or "
            f"digit, and not begin with {', '.join(_RESERVED)}"
        )
    return VolumeRecord(
        id=identifier,
        name=request.name,
        size_gb=request.size_gb,
        created_at=datetime.now(UTC),
        tags=check_tags(request.tags),
    )


def _view(record: VolumeRecord, attachments: Sequence[Attachment]) -> Volume:
    return Volume(
        id=record.id,
        name=record.name,
        size_gb=record.size_gb,
        created_at=record.created_at,
        tags=record.tags or UNSET,
        attachments=tuple(
            VolumeAttachment(instance_id=a.instance_id, mount_path=a.mount_path, readonly=a.readonly)
            for a in attachments
        )
        or UNSET,
    )
