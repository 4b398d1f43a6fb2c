"""Directories and files here that a service mounts: each directory becomes a volume that is filled from it when it is
made, files become one together.

A VM does not share the host's files, so this is a copy: changes here do not appear in the guest, and changes in the
guest do not appear here. Of a read-only mount the volume's name has a hash of the content: changed files are noticed as
a changed service, and come with ``up --replace``. A writable one is filled once, and then is the guest's.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from hypeman.cli.compose.model import ComposeError, CopiedFile, Volume
from hypeman.cli.context import entries, write_directory

MAX_BYTES = 1 << 30
MAX_ENTRIES = 100_000
_WRITABLE_GB = 10
_OF_THE_KERNEL = (("/", "proc"), ("/", "sys"), ("/", "dev"))
_CHUNK = 1 << 20
_HASH_CHARACTERS = 10


def copied_volume(stack: str, service: str, source: Path, target: str, *, readonly: bool) -> Volume:
    """The volume for ``source`` at ``target``: an empty one if a directory to write to does not exist yet, as Docker
    makes it. Raises ComposeError if it is no directory, or too large to be copied."""
    name = f"{stack}-{service}-{_as_name(target)}"
    if not source.exists():
        if readonly:
            raise ComposeError(f"{source} does not exist")
        return Volume(name, name, _WRITABLE_GB)
    if not source.is_dir():
        raise ComposeError(f"{source} is neither a directory nor a file: only these are copied into a VM")
    if source == Path("/") or source.parts[:2] in _OF_THE_KERNEL:
        raise ComposeError(f"{source} is the host's: a VM has its own")
    try:
        size = _checked_size(source)
        digest = _digest(source) if readonly else ""
    except OSError as error:
        raise ComposeError(f"{error.filename or source} cannot be read: {error.strerror}") from None
    gigabytes = _gigabytes_for(size)
    if readonly:
        return Volume(name, f"{name}-{digest[:_HASH_CHARACTERS]}", gigabytes, str(source), by_content=True)
    return Volume(name, name, max(_WRITABLE_GB, gigabytes), str(source))


def file_volume(stack: str, service: str, files: Sequence[CopiedFile], *, readonly: bool) -> Volume:
    """The volume for ``files``. Raises ComposeError if one cannot be read, or if they are too large to be copied."""
    digest = hashlib.sha256()
    size = 0
    for file in files:
        digest.update(f"{file.path}\0{file.mode} {file.uid} {file.gid}\0".encode())
        try:
            data = _content(file)
        except OSError as error:
            raise ComposeError(f"{file.source} cannot be read: {error.strerror}") from None
        size += len(data)
        if size > MAX_BYTES:
            raise ComposeError("the files have more than 1 GB, too much for a copy: use a named volume")
        digest.update(hashlib.sha256(data).digest())
    gigabytes = _gigabytes_for(size)
    if readonly:
        name = f"{stack}-{service}-files"
        return Volume(
            name, f"{name}-{digest.hexdigest()[:_HASH_CHARACTERS]}", gigabytes, files=tuple(files), by_content=True
        )
    name = f"{stack}-{service}-{_as_name(files[0].path)}"
    return Volume(name, name, gigabytes, files=tuple(files))


def _content(file: CopiedFile) -> bytes:
    """Raises OSError."""
    return Path(file.source).read_bytes() if file.source else file.content.encode()


def _gigabytes_for(size: int) -> int:
    """Of a volume that is filled with ``size`` bytes."""
    return 1 + 2 * size // (1 << 30)


def _as_name(path: str) -> str:
    """Of a path in the guest. Paths that would read the same are told apart by a hash."""
    readable = re.sub(r"[^a-z0-9]+", "-", path.lower()).strip("-") or "root"
    if re.fullmatch(r"(/[a-z0-9]+)*/?", f"/{path.lstrip('/')}"):
        return readable
    return f"{readable}-{hashlib.sha256(path.strip('/').encode()).hexdigest()[:6]}"


def _checked_size(directory: Path) -> int:
    """Bytes of all files, from their attributes alone. Raises ComposeError if there is too much to copy."""
    size = 0
    for count, path in enumerate(entries(directory), 1):
        size += os.lstat(directory / path).st_size
        if size > MAX_BYTES or count > MAX_ENTRIES:
            raise ComposeError(
                f"{directory} has more than 1 GB or {MAX_ENTRIES} files, too much for a copy: use a named volume"
            )
    return size


def _digest(directory: Path) -> str:
    """A hash of names, modes and content."""
    digest = hashlib.sha256()
    for path in entries(directory):
        about = os.lstat(directory / path)
        digest.update(f"{path}\0{about.st_mode}\0".encode(errors="surrogateescape"))
        if stat.S_ISLNK(about.st_mode):
            digest.update(os.fsencode(os.readlink(directory / path)))
        elif stat.S_ISREG(about.st_mode):
            with open(directory / path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def archive(volume: Volume) -> Iterator[bytes]:
    """The tar.gz of what ``volume`` is filled from; of a directory, with owners as they are."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        if volume.source:
            write_directory(Path(volume.source), file)
        else:
            _write_files(volume.files, file)
        file.seek(0)
        yield from _chunks(file)


def _write_files(files: Sequence[CopiedFile], output: IO[bytes]) -> None:
    import io
    import tarfile

    with tarfile.open(fileobj=output, mode="w:gz", compresslevel=1, format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            data = _content(file)
            entry = tarfile.TarInfo(file.path)
            entry.size, entry.mode, entry.uid, entry.gid = len(data), file.mode, file.uid, file.gid
            tar.addfile(entry, io.BytesIO(data))


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk
