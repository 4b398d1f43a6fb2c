"""``hypeman backup``: all state of a host in one file, and its restore on an empty host.

Works with or without a running server: the store is copied as an LMDB snapshot; everything else either does not
change once recorded (images, snapshots, captures) or is not in use (disks of instances that are stopped or in standby,
volumes that no running instance may write to). Instances that have a VM are left out, with the volumes they may write
to, since their disks change during the copy; their snapshots are included. The copied store marks them as partially
deleted, so the first server on it removes them as it would after a crash. Also not included: settings, the layer
cache, TAPs and rules (recreated at start).

Invariants: files are checked again after copying; if one has changed, no backup is made and the error names it.
A restore ends with a complete data directory or an empty one.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
import trio
import zstandard

from hypeman import __version__
from hypeman.captures.records import CAPTURES, of_instance
from hypeman.errors import Conflict, InvalidRequest
from hypeman.host.files import HostError
from hypeman.host.tarballs import pack
from hypeman.images.records import IMAGES
from hypeman.images.tar import Entry, Kind, Source, TarError, TarReader
from hypeman.images.types import ImageStatus
from hypeman.instances.model.plan import plan_delete
from hypeman.instances.model.record import InstanceRecord, Intent, Operation
from hypeman.instances.model.types import InstanceState
from hypeman.instances.rows import INSTANCES, INTENTS, SNAPSHOTS
from hypeman.paths import Paths
from hypeman.store import Store, Txn
from hypeman.volumes.records import ATTACHMENTS, VOLUMES

FORMAT = 1
_AT_REST = (InstanceState.STOPPED, InstanceState.STANDBY)
_ABOUT = "backup.json"
_HALF = ".restoring"
_SAFE_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,254}){0,15}")
_MAX_ENTRIES = 10_000_000
_CHUNK = 1 << 20


class About(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of a backup; its first entry."""

    format: int
    version: str
    """Version of the program that made it."""
    created_at: datetime
    instances: tuple[str, ...]
    """Names of the instances in it."""
    left_out: tuple[str, ...]
    """Names of the instances left out because they had a VM."""
    volumes_left_out: tuple[str, ...] = ()
    images: int = 0
    """How many are in it; of volumes and snapshots likewise. 0 in backups of earlier versions."""
    volumes: int = 0
    snapshots: int = 0


class Contents(msgspec.Struct, frozen=True):
    """What to copy according to the store, as directories below the data directory, and what is left out."""

    directories: tuple[str, ...]
    instances: tuple[InstanceRecord, ...]
    left_out: tuple[InstanceRecord, ...]
    volumes_left_out: tuple[str, ...]


def create(paths: Paths, target: Path) -> About:
    """Write a new file ``target``. Raises Conflict if something changed meanwhile, otherwise HypemanError."""
    if not (paths.store / "data.mdb").exists():
        raise InvalidRequest(f"there is nothing to back up in {paths.data_dir}")
    with tempfile.TemporaryDirectory(prefix=".backup.", dir=paths.data_dir) as staging:
        work = Path(staging)
        (work / "store").mkdir(mode=0o700)
        Store.copy(paths.store, work / "store")
        contents = trio.run(_settle_copy, work / "store")
        counts = Counter(directory.partition("/")[0] for directory in contents.directories)
        about = About(
            format=FORMAT,
            version=__version__,
            created_at=datetime.now(UTC),
            instances=tuple(record.name for record in contents.instances),
            left_out=tuple(record.name for record in contents.left_out),
            volumes_left_out=contents.volumes_left_out,
            images=counts["images"],
            volumes=counts["volumes"],
            snapshots=counts["snapshots"],
        )
        (work / _ABOUT).write_bytes(msgspec.json.encode(about))
        before = _look(paths.data_dir, contents.directories)
        pack(target, [(work, (_ABOUT, "store", "store/data.mdb")), (paths.data_dir, before)])
        if changed := _first_difference(before, _look(paths.data_dir, contents.directories)):
            target.unlink()
            raise Conflict(f"{paths.data_dir / changed} changed while it was copied; make the backup again")
    return about


def restore(paths: Paths, source: Path) -> About:
    """Fill an empty data directory from a backup. On HypemanError the directory is left empty."""
    data = paths.data_dir
    if data.is_dir() and (found := sorted(set(os.listdir(data)) - {_HALF, "lost+found"})):
        raise Conflict(f"{data} is not empty (there is {found[0]}); move it away first")
    half = data / _HALF
    shutil.rmtree(half, ignore_errors=True)
    data.mkdir(mode=0o711, parents=True, exist_ok=True)
    try:
        half.mkdir(mode=0o700)
        _unpack(source, half)
        about = _read_about(half)
        Store.open(half / "store").close()  # refuses a store of a newer version
        (half / _ABOUT).unlink()
        # The store comes last: without it a server, or a second restore, may treat the rest as leftovers.
        for name in sorted(os.listdir(half), key=lambda name: name == "store"):
            (half / name).rename(data / name)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return about


def _unpack(source: Path, directory: Path) -> None:
    """Unpack regular files and directories, nothing else, into an empty directory that only root can write to.

    Modes are fixed: nothing is executable, setuid or writable by others. Raises HostError.
    """
    try:
        with source.open("rb") as file:
            reader = TarReader(Source(_plain(file)), max_entries=_MAX_ENTRIES)
            root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                while (entry := reader.next_entry()) is not None:
                    _unpack_entry(entry, reader, root)
            finally:
                os.close(root)
    except (TarError, zstandard.ZstdError) as error:
        raise HostError(f"{source} is damaged: it {error}") from None
    except OSError as error:
        raise HostError(f"{source} cannot be unpacked: {error}") from error


def _plain(file: BinaryIO) -> Iterator[bytes]:
    frame = zstandard.ZstdDecompressor().decompressobj()
    while data := file.read(_CHUNK // 16):
        yield frame.decompress(data)
    if not frame.eof:
        raise TarError("is cut off")


def _unpack_entry(entry: Entry, reader: TarReader, root: int) -> None:
    """``root`` is the directory's descriptor. There are no links below it, since none are ever created."""
    name = entry.name.rstrip(b"/")
    if not _SAFE_NAME.fullmatch(name):
        raise TarError(f"has the name {name[:200]!r}, which no backup has")
    if entry.kind is Kind.DIRECTORY:
        os.mkdir(name, 0o700, dir_fd=root)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        mode = entry.mode & 0o711
    elif entry.kind is Kind.FILE:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root)
        mode = entry.mode & 0o644
    else:
        raise TarError(f"has {name[:200]!r}, which is neither a regular file nor a directory")
    try:
        if entry.kind is Kind.FILE:
            for offset, length in ((0, entry.size),) if entry.pieces is None else entry.pieces:
                end = offset + length
                while offset < end:
                    data = reader.data(min(_CHUNK, end - offset))
                    offset += _write_at(fd, data, offset)
            os.ftruncate(fd, entry.size)
        if os.geteuid() == 0:
            os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, mode)
        os.utime(fd, ns=(entry.mtime * 10**9 + entry.mtime_ns,) * 2)
    finally:
        os.close(fd)


def _write_at(fd: int, data: bytes, offset: int) -> int:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
    return len(data)


def _read_about(directory: Path) -> About:
    try:
        about = msgspec.json.decode((directory / _ABOUT).read_bytes(), type=About)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"this is not a backup of hypeman: {error}") from None
    if about.format != FORMAT:
        raise InvalidRequest(f"this backup has format {about.format}; hypeman {__version__} reads {FORMAT}")
    return about


async def _settle_copy(path: Path) -> Contents:
    """The contents of the copied store, after instances to be left out were marked in it."""
    store = Store.open(path)
    try:
        async with store.serving():
            contents = store.read(find_contents)
            await store.write(lambda txn: condemn(txn, contents))
    finally:
        store.close()
    for lock in ("lock.mdb", "owner.lock"):
        (path / lock).unlink(missing_ok=True)
    return contents


def find_contents(txn: Txn) -> Contents:
    everyone = [record for _, record in txn.scan(INSTANCES)]
    resting = tuple(record for record in everyone if _is_resting(txn, record))
    running = tuple(record for record in everyone if record not in resting)
    busy = {record.id for record in running}
    written = {row.volume_id for _, row in txn.scan(ATTACHMENTS) if row.instance_id in busy and not row.readonly}
    captures = [
        row.id for _, row in txn.scan(CAPTURES) if set(row.holders) - {of_instance(record.id) for record in running}
    ]
    images = [row.digest.partition(":")[2] for _, row in txn.scan(IMAGES) if row.status is ImageStatus.READY]
    below = {
        "images": images,
        "volumes": [volume_id for volume_id in txn.keys(VOLUMES) if volume_id not in written],
        "instances": [record.id for record in resting],
        "captures": captures,
        "snapshots": list(txn.keys(SNAPSHOTS)),
    }
    directories = tuple(f"{folder}/{name}" for folder, names in below.items() for name in names)
    return Contents(("egress", "ingress", *directories), resting, running, tuple(sorted(written)))


def _is_resting(txn: Txn, record: InstanceRecord) -> bool:
    return record.handle is None and record.state in _AT_REST and not txn.exists(INTENTS, record.id)


def condemn(txn: Txn, contents: Contents) -> None:
    """Mark the instances left out for deletion by the next server, and remove the rows of their volumes."""
    for record in contents.left_out:
        dead = msgspec.structs.replace(record, state=InstanceState.STOPPED, handle=None, deleting=True)
        txn.put(INSTANCES, record.id, dead)
        txn.put(INTENTS, record.id, Intent(Operation.DELETE, plan_delete(dead)))
    for volume_id in contents.volumes_left_out:
        txn.delete(VOLUMES, volume_id)


Look = dict[str, tuple[int, int, int]]
"""Path below the data directory → inode, size and ctime."""


def _look(data: Path, directories: Iterable[str]) -> Look:
    return {path: _identity(data / path) for path in _paths(data, directories)}


def _paths(data: Path, directories: Iterable[str]) -> Iterator[str]:
    """The directories, those above them, and everything in them, in order."""
    above = dict.fromkeys(name.partition("/")[0] for name in directories)
    yield from (name for name in above if (data / name).is_dir())
    for name in directories:
        for directory, folders, files in os.walk(data / name):
            folders.sort()
            here = os.path.relpath(directory, data)
            if here not in above:
                yield here
            yield from (f"{here}/{file}" for file in sorted(files))


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        found = path.lstat()
    except OSError as error:
        raise Conflict(f"{path} went away while it was copied; make the backup again ({error.strerror})") from None
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _first_difference(before: Look, after: Look) -> str:
    """A path that has changed. Parent directories change with unrelated work and are ignored."""
    return next((p for p in before | after if "/" in p and before.get(p) != after.get(p)), "")
