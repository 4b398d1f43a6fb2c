"""OCI layouts between a guest and the registry: results and caches of builds.

A layout lies in a directory of the guest, and is read and written through the guest's agent. Blobs that the registry
has already are not read; every other one is verified by its digest. Nothing has a name until all of it is stored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

import msgspec

from hypeman.builds.work import BuildFailed
from hypeman.errors import NotFound
from hypeman.guest.copies import CopyIn, CopyOut
from hypeman.guest.session_types import CpRequest
from hypeman.host.files import read_pieces
from hypeman.images.manifest import (
    INDEX_TYPES,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    Index,
    ManifestError,
    PlatformMissing,
    choose_platform,
    digest_of,
    parse_manifest,
)
from hypeman.images.reference import host_platform
from hypeman.registry.names import RegistryFailure, check_digest
from hypeman.registry.service import Opened

_MAX_DEPTH = 3
_MAX_CHILDREN = 64
_MAX_DOCUMENTS = 256
_MAX_DOCUMENT_BYTES = 16 << 20
"""Of all manifests of a layout together: they are kept in memory."""


class GuestFiles(Protocol):
    async def copy_to(self, ref: str, request: CpRequest) -> CopyIn: ...
    async def copy_from(self, ref: str, request: CpRequest) -> CopyOut: ...


class RegistryNeeds(Protocol):
    async def mount(self, repository: str, digest: str, source: str) -> bool: ...
    async def put_blob(self, repository: str, digest: str, chunks: AsyncIterator[bytes]) -> None: ...
    async def put_manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> tuple[str, str]: ...
    async def manifest(self, repository: str, reference: str) -> Opened: ...
    async def blob(self, repository: str, digest: str) -> Opened: ...


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int = 0
    media_type: str = ""


class _Document(msgspec.Struct, frozen=True, rename="camel"):
    """A manifest of any kind, or an index."""

    config: _Part | None = None
    layers: tuple[_Part, ...] = ()
    manifests: tuple[_Part, ...] = ()
    media_type: str = ""

    @property
    def blobs(self) -> tuple[_Part, ...]:
        return (self.config, *self.layers) if self.config is not None else self.layers


class Root(msgspec.Struct, frozen=True):
    """The manifest or index that a layout is about."""

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return digest_of(self.data)


class Layout:
    """A layout in ``directory`` of the guest ``ref``."""

    def __init__(self, guests: GuestFiles, registry: RegistryNeeds, ref: str, directory: str) -> None:
        self._guests = guests
        self._registry = registry
        self._ref = ref
        self._directory = directory
        self._documents: dict[str, bytes] = {}

    async def store(self, repository: str) -> Root:
        """Store all of it in ``repository``, without a tag. Raises BuildFailed if it is not a layout of one image."""
        index = _decoded(await self._read("index.json"))
        if len(index.manifests) != 1:
            raise BuildFailed(f"the result has {len(index.manifests)} images, not one")
        try:
            return await self._store(repository, index.manifests[0], _MAX_DEPTH)
        except RegistryFailure as failure:
            raise BuildFailed(f"the result cannot be stored: {failure.message}") from None

    async def tag(self, repository: str, tag: str, root: Root) -> None:
        """Give it a name. Raises BuildFailed."""
        try:
            await self._registry.put_manifest(repository, tag, root.data, root.media_type)
        except RegistryFailure as failure:
            raise BuildFailed(f"the result cannot be stored: {failure.message}") from None

    async def load(self, repository: str, tag: str) -> str | None:
        """Write what ``repository`` has under ``tag`` into the directory: its digest, or None if there is nothing.
        Of an index, the image for this host's platform."""
        try:
            found, data = await self._manifest(repository, tag)
            if found.media_type in INDEX_TYPES:
                index = parse_manifest(data, found.media_type)
                assert isinstance(index, Index)
                found, data = await self._manifest(repository, choose_platform(index, host_platform()).digest)
            document = _decoded(data)
            for part in document.blobs:
                blob = await self._registry.blob(repository, part.digest)
                await self._write(_path(part.digest), read_pieces(blob.fd, 0, blob.size))
        except (RegistryFailure, ManifestError, PlatformMissing):
            return None
        await self._write(_path(found.digest), _once(data))
        entry = {
            "mediaType": found.media_type,
            "digest": found.digest,
            "size": found.size,
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }
        listed = {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": [entry]}
        await self._write("index.json", _once(msgspec.json.encode(listed)))
        await self._write("oci-layout", _once(b'{"imageLayoutVersion":"1.0.0"}'))
        return found.digest

    async def _manifest(self, repository: str, reference: str) -> tuple[Opened, bytes]:
        """What the registry has, and its content; the file is closed. Raises RegistryFailure."""
        found = await self._registry.manifest(repository, reference)
        async with aclosing(read_pieces(found.fd, 0, found.size)) as pieces:
            return found, b"".join([piece async for piece in pieces])

    async def _store(self, repository: str, part: _Part, depth: int) -> Root:
        data = await self._document(part.digest)
        document = _decoded(data)
        if depth == 0 or len(document.manifests) > _MAX_CHILDREN or len(document.layers) > MAX_LAYERS:
            raise BuildFailed("the result has too many parts")
        for child in document.manifests:
            await self._store(repository, child, depth - 1)
        for blob in document.blobs:
            await self._blob(repository, blob.digest)
        media_type = document.media_type or part.media_type
        await self._registry.put_manifest(repository, part.digest, data, media_type)
        return Root(data, media_type)

    async def _document(self, digest: str) -> bytes:
        if digest not in self._documents:
            data = await self._read(_path(digest))
            if digest_of(data) != digest:
                raise BuildFailed(f"the result does not have the digest {digest}")
            size = len(data) + sum(map(len, self._documents.values()))
            if len(self._documents) >= _MAX_DOCUMENTS or size > _MAX_DOCUMENT_BYTES:
                raise BuildFailed("the result has too many parts")
            self._documents[digest] = data
        return self._documents[digest]

    async def _blob(self, repository: str, digest: str) -> None:
        path = _path(digest)
        if await self._registry.mount(repository, digest, ""):
            return
        async with aclosing(await self._open(path)) as copy, aclosing(_content(copy)) as pieces:
            await self._registry.put_blob(repository, digest, pieces)

    async def _open(self, path: str) -> CopyOut:
        """The caller closes it."""
        return await self._guests.copy_from(self._ref, _request("from", f"{self._directory}/{path}"))

    async def _read(self, path: str) -> bytes:
        """A small file. Raises BuildFailed."""
        data = bytearray()
        try:
            async with aclosing(await self._open(path)) as copy, aclosing(_content(copy)) as pieces:
                async for piece in pieces:
                    data += piece
                    if len(data) > MAX_MANIFEST_BYTES:
                        raise BuildFailed(f"the result has a manifest of more than {MAX_MANIFEST_BYTES} bytes")
        except NotFound:
            raise BuildFailed(f"the result is not complete: {path} is missing") from None
        return bytes(data)

    async def _write(self, path: str, pieces: AsyncGenerator[bytes]) -> None:
        await write_guest_file(self._guests, self._ref, f"{self._directory}/{path}", pieces)


async def write_guest_file(
    guests: GuestFiles, ref: str, path: str, pieces: AsyncGenerator[bytes], mode: int = 0o600
) -> None:
    """Write a file of the guest. Raises HypemanError."""
    async with aclosing(pieces), await guests.copy_to(ref, _request("to", path, mode)) as copy:
        async for piece in pieces:
            await copy.send(piece)
        await copy.finish()


async def write_guest_bytes(guests: GuestFiles, ref: str, path: str, data: bytes) -> None:
    """The same for a small file."""
    await write_guest_file(guests, ref, path, _once(data))


def _request(direction: str, path: str, mode: int = 0) -> CpRequest:
    return msgspec.convert({"direction": direction, "guest_path": path, "mode": mode}, CpRequest)


async def _content(copy: CopyOut) -> AsyncGenerator[bytes]:
    """The bytes of the one file that is copied. What a guest sends besides is not read as content."""
    entries = 0
    async for item in copy:
        if isinstance(item, bytes):
            yield item
            continue
        entries += 1
        if entries > 1:
            raise BuildFailed("the result has a directory in place of a file")


async def _once(data: bytes) -> AsyncGenerator[bytes]:
    yield data


def _path(digest: str) -> str:
    """Raises BuildFailed if it is not a digest: it becomes a path."""
    try:
        check_digest(digest)
    except RegistryFailure as failure:
        raise BuildFailed(f"the result cannot be read: {failure.message}") from None
    return f"blobs/{digest.replace(':', '/')}"


def _decoded(data: bytes) -> _Document:
    try:
        return msgspec.json.decode(data, type=_Document)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise BuildFailed(f"the result has a manifest that cannot be read: {error}") from None
