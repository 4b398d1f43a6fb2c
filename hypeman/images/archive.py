"""Images without a registry: OCI layouts and archives, and the output of ``docker save``.

The archive is spooled, an unprivileged worker lists the offsets of its files, and those that its images need
are copied to the blob cache under the digest of their bytes. Names in an archive are not trusted: a blob is
identified by its digest, and a path is only a key in a table.

    index.json, blobs/sha256/<hex>              OCI layout; also newer ``docker save``
    manifest.json, <hex>.json, */layer.tar      older ``docker save``; gets an OCI-like manifest here

The archive itself may be compressed with gzip or zstd.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import AsyncIterable
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import trio
from msgspec import Meta

from hypeman.errors import InvalidRequest
from hypeman.host.files import HostError
from hypeman.images.blobs import Blobs, write_all
from hypeman.images.convert import MAX_MEMBERS, ConversionFailed, running_worker
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
    decode,
    digest_of,
    parse_config,
    parse_manifest,
)
from hypeman.images.reference import Platform
from hypeman.images.tar import TarError
from hypeman.images.unpack import sniff
from hypeman.images.worker import Sort


class Imported(msgspec.Struct, frozen=True):
    """One image imported from an archive; its blobs are in the cache."""

    manifest: Manifest
    digest: str
    names: tuple[str, ...]
    """That the archive gives it."""


_COPY = 1 << 20
_MAX_NESTING = 3
_MAX_IMAGES = 64
"""Limit per archive."""
_NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_DOCKER_LAYERS = {
    Compression.NONE: "application/vnd.docker.image.rootfs.diff.tar",
    Compression.GZIP: "application/vnd.docker.image.rootfs.diff.tar.gzip",
    Compression.ZSTD: "application/vnd.docker.image.rootfs.diff.tar.zstd",
}


class Bounds(msgspec.Struct, frozen=True):
    """Limits on an archive, and which of several images to import."""

    max_bytes: int
    max_entries: int
    platform: Platform


class _Saved(msgspec.Struct, frozen=True):
    """One image in the ``manifest.json`` of ``docker save``."""

    config: str = msgspec.field(name="Config")
    layers: Annotated[tuple[str, ...], Meta(max_length=MAX_LAYERS)] = msgspec.field(name="Layers", default=())
    repo_tags: tuple[str, ...] | None = msgspec.field(name="RepoTags", default=None)


async def import_stream(
    chunks: AsyncIterable[bytes], blobs: Blobs, bounds: Bounds, turns: trio.CapacityLimiter
) -> list[Imported]:
    """Import an archive from the network. Raises InvalidRequest; the cache is then unchanged.

    If the sender fails or the caller is cancelled, nothing is kept.
    """
    fd, partial = blobs.begin()
    blobs.abandon(partial)  # only the open file is needed
    try:
        total = 0
        async for chunk in chunks:
            total += len(chunk)
            if total > bounds.max_bytes:
                raise InvalidRequest(f"the archive is larger than the {bounds.max_bytes} bytes that are allowed")
            try:
                await trio.to_thread.run_sync(write_all, fd, chunk)
            except OSError as error:
                raise HostError(f"the archive cannot be stored: {error.strerror}") from None
        return await _import_archive(fd, blobs, bounds, turns)
    finally:
        os.close(fd)


async def import_file(path: Path, blobs: Blobs, bounds: Bounds, turns: trio.CapacityLimiter) -> list[Imported]:
    """Import an archive or an OCI layout directory. Raises InvalidRequest; the cache is then unchanged."""
    try:
        if await trio.to_thread.run_sync(path.is_dir):
            return await trio.to_thread.run_sync(_Importer(_Directory(path), blobs, bounds.platform).run)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return await _import_archive(fd, blobs, bounds, turns)
        finally:
            os.close(fd)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None


async def _import_archive(fd: int, blobs: Blobs, bounds: Bounds, turns: trio.CapacityLimiter) -> list[Imported]:
    plain, partial = blobs.begin()
    blobs.abandon(partial)
    try:
        async with running_worker(turns) as worker:
            found = await worker.sort(Sort(bounds.max_bytes, min(bounds.max_entries, MAX_MEMBERS)), fd, plain)
            members = {member.name: (member.offset, member.size) for member in worker.members}
            links = {link.name: link.target for link in worker.links}
        archive = _Archive(fd if found.plain else plain, members, links)
        return await trio.to_thread.run_sync(_Importer(archive, blobs, bounds.platform).run)
    except ConversionFailed as error:
        if not error.blame_image:
            raise
        raise InvalidRequest(f"the archive cannot be imported: it {error.message}") from None
    finally:
        os.close(plain)


class _Files(Protocol):
    """The files of an archive or a directory, by name."""

    def find(self, name: str) -> str:
        """The name of the file that ``name`` resolves to through links; empty if there is none."""

    def open(self, name: str) -> tuple[int, int, int]:
        """A new descriptor, the file's offset in it, and its size."""


class _Archive:
    def __init__(self, fd: int, members: dict[str, tuple[int, int]], links: dict[str, str]) -> None:
        self._fd = fd
        self._members = members
        self._links = links

    def find(self, name: str) -> str:
        for _ in range(8):
            if name in self._members:
                return name
            if name not in self._links:
                break
            name = self._links[name]
        return ""

    def open(self, name: str) -> tuple[int, int, int]:
        return os.dup(self._fd), *self._members[name]


class _Directory:
    """An OCI layout; links are not followed."""

    def __init__(self, path: Path) -> None:
        blobs = path / "blobs" / "sha256"
        found = [path / "index.json", *(blobs.iterdir() if blobs.is_dir() else ())]
        self._files = {str(file.relative_to(path)): file for file in found if file.is_file()}

    def find(self, name: str) -> str:
        return name if name in self._files else ""

    def open(self, name: str) -> tuple[int, int, int]:
        fd = os.open(self._files[name], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        return fd, 0, os.fstat(fd).st_size


class _Importer:
    def __init__(self, files: _Files, blobs: Blobs, platform: Platform) -> None:
        self._files = files
        self._blobs = blobs
        self._platform = platform
        self._added: set[str] = set()
        """Digests that were not in the cache before."""

    def run(self) -> list[Imported]:
        """Copy what the images need into the cache. Raises InvalidRequest. Blocks."""
        try:
            if self._files.find("index.json"):
                return self._from_layout()
            if self._files.find("manifest.json"):
                return self._from_docker()
            raise ManifestError("it has neither an index.json (OCI) nor a manifest.json (docker save)")
        except BaseException as error:
            for digest in self._added:
                self._blobs.remove(digest)
            if isinstance(error, TarError | ManifestError):
                raise InvalidRequest(f"the archive cannot be imported: {error}") from None
            raise

    # OCI layouts

    def _from_layout(self) -> list[Imported]:
        index = parse_manifest(self._read("index.json", MAX_MANIFEST_BYTES))
        if not isinstance(index, Index):
            raise ManifestError("its index.json is not an index")
        by_name: dict[str, list[Descriptor]] = {}
        for entry in index.manifests:
            if entry.media_type in INDEX_TYPES + MANIFEST_TYPES:
                by_name.setdefault(_name_of(entry), []).append(entry)
        if len(by_name) > 1:
            by_name.pop("", None)  # attestations and the like
        images: dict[str, Imported] = {}
        for name, entries in (by_name or {"": []}).items():
            image = self._from_index(msgspec.structs.replace(index, manifests=tuple(entries)))
            names = (*images[image.digest].names, name) if image.digest in images else (name,)
            images[image.digest] = msgspec.structs.replace(image, names=tuple(filter(None, names)))
        return list(images.values())

    def _from_index(self, document: Manifest | Index) -> Imported:
        digest = name = ""
        for _ in range(_MAX_NESTING):
            if not isinstance(document, Index):
                break
            images = [entry for entry in document.manifests if entry.media_type in INDEX_TYPES + MANIFEST_TYPES]
            chosen = images[0] if len(images) == 1 else choose_platform(document, self._platform)
            digest = chosen.digest
            document = parse_manifest(self._read_blob(digest, MAX_MANIFEST_BYTES), chosen.media_type)
        if isinstance(document, Index):
            raise ManifestError(f"its index points to indexes more than {_MAX_NESTING} levels deep")
        parse_config(self._read_blob(document.config.digest, MAX_CONFIG_BYTES), document)
        for blob in (digest, document.config.digest, *(layer.digest for layer in document.layers)):
            self._keep(self._find(_blob_name(blob)), blob)
        return Imported(document, digest, (name,) if name else ())

    def _read_blob(self, digest: str, limit: int) -> bytes:
        data = self._read(self._find(_blob_name(digest)), limit)
        if digest_of(data) != digest:
            raise ManifestError(f"blob {digest} has other content than its name says")
        return data

    # docker save

    def _from_docker(self) -> list[Imported]:
        saved = decode(self._read("manifest.json", MAX_MANIFEST_BYTES), tuple[_Saved, ...], "manifest.json")
        if not 0 < len(saved) <= _MAX_IMAGES:
            raise ManifestError(f"it has {len(saved)} images; 1 to {_MAX_IMAGES} are possible")
        return [self._from_saved(image) for image in saved]

    def _from_saved(self, saved: _Saved) -> Imported:
        layers = [self._find(_clean(name)) for name in saved.layers]
        manifest = Manifest(
            schema_version=2,
            media_type=MANIFEST_TYPES[1],
            config=self._describe(self._find(_clean(saved.config)), CONFIG_TYPES[1]),
            layers=tuple(self._describe(name) for name in layers),
        )
        parse_config(self._read(self._find(_clean(saved.config)), MAX_CONFIG_BYTES), manifest)
        data = msgspec.json.encode(manifest)
        digest = digest_of(data)
        document = parse_manifest(data)
        assert isinstance(document, Manifest)
        fd, partial = self._blobs.begin()
        try:
            write_all(fd, data)
            self._publish(fd, partial, digest)
        finally:
            os.close(fd)
            self._blobs.abandon(partial)
        return Imported(document, digest, saved.repo_tags or ())

    def _describe(self, name: str, media_type: str = "") -> Descriptor:
        """Copy a file to the cache and return its OCI descriptor. A layer's type is derived from its bytes."""
        digest, size, head = self._keep(name)
        return Descriptor(digest, size, media_type or _DOCKER_LAYERS[sniff(head)])

    # Bytes

    def _find(self, name: str) -> str:
        found = self._files.find(name)
        if not found:
            raise ManifestError(f"{name[:200]!r} is missing")
        return found

    def _read(self, name: str, limit: int) -> bytes:
        fd, offset, size = self._files.open(self._find(name))
        try:
            if size > limit:
                raise ManifestError(f"{name[:200]!r} is longer than {limit} bytes, too long for what it should be")
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def _keep(self, name: str, wanted: str = "") -> tuple[str, int, bytes]:
        """Copy a file to the cache; it must have the digest ``wanted`` if one is given.

        Returns its digest, its size and its first bytes.
        """
        source, offset, size = self._files.open(name)
        fd, partial = self._blobs.begin()
        try:
            digest, head, left = hashlib.sha256(), b"", size
            while left:
                data = os.pread(source, min(left, _COPY), offset)
                if not data:
                    raise TarError(f"has a file {name[:200]!r} that is shorter than it was")
                head = head or data[:8]
                digest.update(data)
                write_all(fd, data)
                offset, left = offset + len(data), left - len(data)
            found = f"sha256:{digest.hexdigest()}"
            if wanted and found != wanted:
                raise TarError(f"has a blob {name[:200]!r} with other content than its name says")
            self._publish(fd, partial, found)
            return found, size, head
        finally:
            os.close(source)
            os.close(fd)
            self._blobs.abandon(partial)

    def _publish(self, fd: int, partial: Path, digest: str) -> None:
        if not self._blobs.path(digest).exists():
            self._added.add(digest)
            self._blobs.publish(fd, partial, digest)


def _blob_name(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _clean(name: str) -> str:
    """A path as normalised by the worker."""
    return posixpath.normpath(name).lstrip("/")


def _name_of(entry: Descriptor) -> str:
    for key in _NAME_ANNOTATIONS:
        name = (entry.annotations or {}).get(key, "")
        if "/" in name or ":" in name:  # otherwise it is only a tag
            return name
    return ""
