"""Images without a registry: OCI layouts and archives, and what ``docker save`` writes.

Every file of an archive goes to the blob cache under the digest of its bytes while it streams by;
then the index is read, and what the image does not need is removed again. Nothing in an archive is
trusted for its name: a blob is what its digest says, a path is only a key in a table.

    index.json, blobs/sha256/<hex>              OCI layout; also newer ``docker save``
    manifest.json, <hex>.json, */layer.tar      older ``docker save``; gets an OCI-like manifest here

The archive itself may be compressed with gzip or zstd.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import AsyncIterable, Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import trio
from msgspec import Meta

from hypeman.errors import InvalidRequest
from hypeman.images.blobs import Blobs
from hypeman.images.failures import first_failure
from hypeman.images.manifest import (
    CONFIG_TYPES,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_CONFIG_BYTES,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    Compression,
    Descriptor,
    Index,
    Manifest,
    ManifestError,
    choose_platform,
    digest_of,
    parse_config,
    parse_manifest,
)
from hypeman.images.reference import Platform
from hypeman.images.tar import Kind, Source, TarError, TarReader
from hypeman.images.unpack import sniff, unpack

Imported = tuple[Manifest, str, str]
"""Manifest, its digest, and the name that the archive gives its image (empty if none)."""

_COPY = 1 << 20
_MAX_NESTING = 3
_NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_DOCKER_LAYERS = {
    Compression.NONE: "application/vnd.docker.image.rootfs.diff.tar",
    Compression.GZIP: "application/vnd.docker.image.rootfs.diff.tar.gzip",
    Compression.ZSTD: "application/vnd.docker.image.rootfs.diff.tar.zstd",
}


class _Saved(msgspec.Struct, frozen=True):
    """One image in the ``manifest.json`` of ``docker save``."""

    config: str = msgspec.field(name="Config")
    layers: Annotated[tuple[str, ...], Meta(max_length=MAX_LAYERS)] = msgspec.field(name="Layers")
    repo_tags: tuple[str, ...] | None = msgspec.field(name="RepoTags", default=None)


class _Member(msgspec.Struct, frozen=True):
    """A file of the archive, in the cache."""

    digest: str
    size: int
    compression: Compression


async def import_stream(
    chunks: AsyncIterable[bytes], blobs: Blobs, max_bytes: int, max_entries: int, platform: Platform
) -> Imported:
    """Take in an archive as it streams by. Raises InvalidRequest; the cache is then as before.

    Reading happens in a thread. If the sender fails or the caller is cancelled, nothing is kept.
    """
    send, receive = trio.open_memory_channel[bytes](4)

    async def feed() -> None:
        async with send:
            async for chunk in chunks:
                await send.send(chunk)

    def pull() -> Iterator[bytes]:
        while True:
            try:
                yield trio.from_thread.run(receive.receive)
            except trio.EndOfChannel:
                return

    importer = _Importer(blobs, max_bytes, max_entries, platform)
    try:
        async with receive, trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            result = await trio.to_thread.run_sync(importer.from_archive, pull())
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_failure(group) from None
    return result


async def import_file(path: Path, blobs: Blobs, max_bytes: int, max_entries: int, platform: Platform) -> Imported:
    """Take in an archive or the directory of an OCI layout. Raises InvalidRequest; the cache is then as before."""

    def work() -> Imported:
        importer = _Importer(blobs, max_bytes, max_entries, platform)
        try:
            if path.is_dir():
                return importer.from_directory(path)
            with open(path, "rb") as file:
                return importer.from_archive(iter(lambda: file.read(_COPY), b""))
        except OSError as error:
            raise InvalidRequest(f"{path} can not be read: {error.strerror}") from None

    return await trio.to_thread.run_sync(work)


class _Importer:
    def __init__(self, blobs: Blobs, max_bytes: int, max_entries: int, platform: Platform) -> None:
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._platform = platform
        self._members: dict[str, _Member] = {}
        self._links: dict[str, str] = {}
        self._added: set[str] = set()
        """Digests that were not in the cache before."""

    def from_archive(self, chunks: Iterator[bytes]) -> Imported:
        return self._import(lambda: self._take_archive(chunks))

    def from_directory(self, path: Path) -> Imported:
        return self._import(lambda: self._take_directory(path))

    def _import(self, take: Callable[[], None]) -> Imported:
        needed: set[str] = set()
        try:
            take()
            manifest, digest, name = self._choose()
            parse_config(self._read(manifest.config.digest, MAX_CONFIG_BYTES), manifest)
            needed = {digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}
            present = {member.digest for member in self._members.values()} | {digest}
            if missing := needed - present:
                raise ManifestError(f"blob {min(missing)} is missing")
            return manifest, digest, name
        except (TarError, ManifestError) as error:
            needed = set()
            raise InvalidRequest(f"the archive can not be imported: {error}") from None
        except BaseException:
            needed = set()
            raise
        finally:
            for digest in self._added - needed:
                self._blobs.remove(digest)

    # Bytes to the cache

    def _take_archive(self, chunks: Iterator[bytes]) -> None:
        left = next(chunks, b"")
        compression = sniff(left)

        def read(size: int) -> bytes:
            nonlocal left
            while not left:
                if (following := next(chunks, None)) is None:
                    return b""
                left = following
            taken, left = left[:size], left[size:]
            return taken

        source = Source(unpack(read, compression), limit=self._max_bytes)
        reader = TarReader(source, max_entries=self._max_entries)
        while (entry := reader.next_entry()) is not None:
            name = _clean(entry.name)
            if entry.kind is Kind.FILE and entry.pieces is None:
                self._keep(name, entry.size, reader.data)
            elif entry.kind is Kind.SYMLINK:
                self._links[name] = _clean(posixpath.join(posixpath.dirname(name.encode()), entry.target))
            elif entry.kind is Kind.HARD_LINK:
                self._links[name] = _clean(entry.target)

    def _take_directory(self, path: Path) -> None:
        """The few files of an OCI layout; links are not followed."""
        blobs = path / "blobs" / "sha256"
        files = [path / "index.json", *(sorted(blobs.iterdir()) if blobs.is_dir() else [])]
        for file in files:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(fd, "rb") as opened:
                size = os.fstat(fd).st_size
                self._keep(str(file.relative_to(path)), size, opened.read)

    def _keep(self, name: str, size: int, read: Callable[[int], bytes]) -> None:
        fd, partial = self._blobs.begin()
        try:
            digest, head, left = hashlib.sha256(), b"", size
            while left:
                data = read(min(left, _COPY))
                if not data:
                    raise TarError(f"has a file {name!r} that is shorter than it was")
                head = head or data[:4]
                digest.update(data)
                left -= os.write(fd, data)
            found = f"sha256:{digest.hexdigest()}"
            if name.startswith("blobs/sha256/") and name != f"blobs/sha256/{digest.hexdigest()}":
                raise TarError(f"has a blob {name!r} with other content than its name says")
            if not self._blobs.path(found).exists():
                self._added.add(found)
                self._blobs.publish(fd, partial, found)
            self._members[name] = _Member(found, size, sniff(head))
        finally:
            os.close(fd)
            self._blobs.abandon(partial)

    # From the cache to a manifest

    def _choose(self) -> Imported:
        if "index.json" in self._members:
            return self._from_layout()
        if "manifest.json" in self._members:
            return self._from_docker()
        raise ManifestError("it has neither an index.json (OCI) nor a manifest.json (docker save)")

    def _from_layout(self) -> Imported:
        document = parse_manifest(self._read(self._members["index.json"].digest, MAX_MANIFEST_BYTES))
        name, digest = "", ""
        for _ in range(_MAX_NESTING):
            if not isinstance(document, Index):
                break
            images = [entry for entry in document.manifests if entry.media_type in INDEX_TYPES + MANIFEST_TYPES]
            chosen = images[0] if len(images) == 1 else choose_platform(document, self._platform)
            name = name or _name_of(chosen)
            digest = chosen.digest
            document = parse_manifest(self._read(digest, MAX_MANIFEST_BYTES), chosen.media_type)
        if isinstance(document, Index):
            raise ManifestError(f"its index points to indexes more than {_MAX_NESTING} levels deep")
        return document, digest, name

    def _from_docker(self) -> Imported:
        text = self._read(self._members["manifest.json"].digest, MAX_MANIFEST_BYTES)
        try:
            saved = msgspec.json.decode(text, type=tuple[_Saved, ...])
        except msgspec.DecodeError as error:
            raise ManifestError(f"its manifest.json can not be read: {error}") from None
        if len(saved) != 1:
            raise ManifestError(f"it holds {len(saved)} images; save them one at a time")
        config = self._find(saved[0].config)
        layers = [self._find(name) for name in saved[0].layers]
        manifest = Manifest(
            schema_version=2,
            media_type=MANIFEST_TYPES[1],
            config=Descriptor(config.digest, config.size, CONFIG_TYPES[1]),
            layers=tuple(Descriptor(found.digest, found.size, _DOCKER_LAYERS[found.compression]) for found in layers),
        )
        data = msgspec.json.encode(manifest)
        digest = digest_of(data)
        self._keep(f"blobs/sha256/{digest.removeprefix('sha256:')}", len(data), lambda _: data)
        return _checked(data), digest, next(iter(saved[0].repo_tags or ()), "")

    def _find(self, name: str) -> _Member:
        """A file by its name in the archive, through links."""
        path = _clean(name.encode())
        for _ in range(8):
            if path in self._members:
                return self._members[path]
            if path not in self._links:
                break
            path = self._links[path]
        raise ManifestError(f"{name[:200]!r} is missing")

    def _read(self, digest: str, limit: int) -> bytes:
        fd = self._blobs.open(digest)
        if fd is None:
            raise ManifestError(f"blob {digest} is missing")
        with open(fd, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ManifestError(f"blob {digest} is longer than {limit} bytes, too long for what it should be")
        return data


def _checked(data: bytes) -> Manifest:
    """A manifest that we wrote ourselves, through the same checks as all others."""
    document = parse_manifest(data)
    assert isinstance(document, Manifest)
    return document


def _clean(name: bytes) -> str:
    """A path as a key: no leading or doubled slashes, no dots. Where it leads does not matter here."""
    return posixpath.normpath(name).decode(errors="surrogateescape").lstrip("/")


def _name_of(entry: Descriptor) -> str:
    for key in _NAME_ANNOTATIONS:
        name = (entry.annotations or {}).get(key, "")
        if "/" in name or ":" in name:  # else it is only a tag
            return name
    return ""
