"""Results that a guest hands over, honest and hostile, and what the registry gets of them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hypeman.builds.layouts import Layout
from hypeman.builds.request import BuildSecret
from hypeman.builds.vm import Redactor, repository_of
from hypeman.builds.work import BuildFailed
from hypeman.errors import NotFound
from hypeman.guest.session_types import CpRequest
from hypeman.guest.types import CopyEntry, FileKind
from hypeman.images.manifest import INDEX_TYPES, MANIFEST_TYPES, MAX_MANIFEST_BYTES, digest_of
from hypeman.images.reference import parse_reference
from hypeman.registry.names import Code, RegistryFailure
from hypeman.registry.service import Opened

OUT = "/hypeman/out"


class FakeCopy:
    """A file on its way, in either direction."""

    def __init__(self, files: dict[str, bytes], path: str) -> None:
        self._files = files
        self._path = path
        self._sent = bytearray()
        data = files.get(path)
        size = len(data or b"")
        entry = CopyEntry(path="x", kind=FileKind.FILE, mode=0o644, uid=0, gid=0, size=size, mtime=0, link_target=None)
        self._items: list[Any] = [entry, data]

    def __aiter__(self) -> FakeCopy:
        return self

    async def __anext__(self) -> Any:
        if self._path not in self._files:
            raise NotFound(self._path)
        if not self._items:
            raise StopAsyncIteration
        return self._items.pop(0)

    async def send(self, data: bytes) -> None:
        self._sent += data

    async def finish(self) -> int:
        self._files[self._path] = bytes(self._sent)
        return len(self._sent)

    async def aclose(self) -> None:
        pass

    async def __aenter__(self) -> FakeCopy:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class FakeGuest:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.read: list[str] = []

    async def copy_to(self, ref: str, request: CpRequest) -> Any:
        return FakeCopy(self.files, request.guest_path)

    async def copy_from(self, ref: str, request: CpRequest) -> Any:
        self.read.append(request.guest_path)
        return FakeCopy(self.files, request.guest_path)

    def put(self, data: bytes) -> dict[str, Any]:
        """Add a blob; returns its descriptor."""
        digest = digest_of(data)
        self.files[f"{OUT}/blobs/{digest.replace(':', '/')}"] = data
        return {"digest": digest, "size": len(data)}

    def image(self, *layers: bytes, **more: Any) -> dict[str, Any]:
        document = {
            "schemaVersion": 2,
            "config": self.put(b"{}"),
            "layers": [self.put(layer) for layer in layers],
            **more,
        }
        return {"mediaType": MANIFEST_TYPES[0], **self.put(msgspec.json.encode(document))}

    def index(self, *manifests: dict[str, Any]) -> None:
        document = {"schemaVersion": 2, "manifests": manifests}
        self.files[f"{OUT}/index.json"] = msgspec.json.encode(document)


class FakeRegistry:
    """As strict as the real one about what a manifest needs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[bytes, str]] = {}

    async def mount(self, repository: str, digest: str, source: str) -> bool:
        found = next((data for (_, known), data in self.blobs.items() if known == digest), None)
        if found is not None:
            self.blobs[repository, digest] = found
        return found is not None

    async def put_blob(self, repository: str, digest: str, chunks: AsyncIterator[bytes]) -> None:
        data = b"".join([chunk async for chunk in chunks])
        if digest_of(data) != digest:
            raise RegistryFailure(Code.DIGEST_INVALID, "the bytes received do not have the digest")
        self.blobs[repository, digest] = data

    async def put_manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> tuple[str, str]:
        self.manifests[repository, reference] = (data, media_type)
        return digest_of(data), ""

    async def manifest(self, repository: str, reference: str) -> Opened:
        data, media_type = self.manifests.get((repository, reference)) or _unknown()
        return Opened(self._open(data), len(data), digest_of(data), media_type)

    async def blob(self, repository: str, digest: str) -> Opened:
        data = self.blobs[repository, digest]
        return Opened(self._open(data), len(data), digest, "application/octet-stream")

    def _open(self, data: bytes) -> int:
        path = self._directory / "content"
        path.write_bytes(data)
        return os.open(path, os.O_RDONLY)


def _unknown() -> Any:
    raise RegistryFailure(Code.MANIFEST_UNKNOWN, "none")


@pytest.fixture
def guest() -> FakeGuest:
    return FakeGuest()


@pytest.fixture
def registry(tmp_path: Path) -> FakeRegistry:
    return FakeRegistry(tmp_path)


async def test_a_result_is_stored_once_and_tagged_last(guest: FakeGuest, registry: FakeRegistry) -> None:
    guest.index(guest.image(b"one", b"two"))
    root = await Layout(guest, registry, "vm", OUT).store("team/app")
    assert sorted(registry.blobs.values()) == [b"one", b"two", b"{}"]
    assert [reference for _, reference in registry.manifests] == [root.digest], "no tag yet"
    guest.read.clear()
    layout = Layout(guest, registry, "vm", OUT)
    await layout.tag("other/app", "v1", await layout.store("other/app"))
    assert len(guest.read) == 2, "blobs that are there are not read"
    assert ("other/app", "v1") in registry.manifests and ("other/app", digest_of(b"one")) in registry.blobs


async def test_attestations_are_stored(guest: FakeGuest, registry: FakeRegistry) -> None:
    children = [guest.image(b"one"), guest.image(b"statement")]
    document = {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": children}
    guest.index({"mediaType": INDEX_TYPES[0], **guest.put(msgspec.json.encode(document))})
    root = await Layout(guest, registry, "vm", OUT).store("a/b")
    assert root.media_type == INDEX_TYPES[0]
    assert {reference for _, reference in registry.manifests} == {root.digest, *(child["digest"] for child in children)}


async def test_a_cache_comes_back_as_it_went(guest: FakeGuest, registry: FakeRegistry) -> None:
    guest.index(guest.image(b"one", b"two"))
    before = {path: data for path, data in guest.files.items() if "/blobs/" in path}
    layout = Layout(guest, registry, "vm", OUT)
    await layout.tag("cache/x", "latest", await layout.store("cache/x"))
    guest.files.clear()
    assert await layout.load("cache/none", "latest") is None and not guest.files
    assert await layout.load("cache/x", "latest") is not None
    assert {path: data for path, data in guest.files.items() if "/blobs/" in path} == before
    assert b'"org.opencontainers.image.ref.name":"latest"' in guest.files[f"{OUT}/index.json"]


def _mismatch(guest: FakeGuest) -> None:
    image = guest.image(b"one")
    guest.files[f"{OUT}/blobs/{image['digest'].replace(':', '/')}"] += b" "
    guest.index(image)


def _wrong_layer(guest: FakeGuest) -> None:
    guest.index(guest.image(b"one"))
    guest.files[f"{OUT}/blobs/{digest_of(b'one').replace(':', '/')}"] = b"other"


def _path(guest: FakeGuest) -> None:
    guest.index({"digest": "sha256:../../../etc/passwd", "size": 1})


def _path_of_a_layer(guest: FakeGuest) -> None:
    guest.index(guest.image(layers=[{"digest": "sha512:/etc/shadow", "size": 1}]))


def _nothing(guest: FakeGuest) -> None:
    guest.index()


def _endless(guest: FakeGuest) -> None:
    guest.files[f"{OUT}/index.json"] = b" " * (MAX_MANIFEST_BYTES + 1)


def _nonsense(guest: FakeGuest) -> None:
    guest.files[f"{OUT}/index.json"] = b"\xff\x00"


def _deep(guest: FakeGuest) -> None:
    part: dict[str, Any] = {"mediaType": INDEX_TYPES[0], **guest.image(b"one")}
    for _ in range(5):
        part = {"mediaType": INDEX_TYPES[0], **guest.put(msgspec.json.encode({"manifests": [part]}))}
    guest.index(part)


def _many(guest: FakeGuest, parents: int, children: int, size: int) -> None:
    """An index of indexes of distinct manifests, each of them small enough."""

    def index(*manifests: dict[str, Any], **more: str) -> dict[str, Any]:
        data = msgspec.json.encode({"mediaType": INDEX_TYPES[0], "manifests": manifests, **more})
        return {"mediaType": INDEX_TYPES[0], **guest.put(data)}

    distinct = [[index(more=f"{n} {m} ".ljust(size)) for m in range(children)] for n in range(parents)]
    guest.index(index(*(index(*each) for each in distinct)))


@pytest.mark.parametrize(("parents", "children", "size"), [(20, 16, 1), (6, 4, 1 << 20)])
async def test_manifests_do_not_fill_the_memory(
    guest: FakeGuest, registry: FakeRegistry, parents: int, children: int, size: int
) -> None:
    """They are kept until the build is over: a quarter of a million of 4 MB each would be possible."""
    _many(guest, 2, 10, 1)
    await Layout(guest, registry, "vm", OUT).store("a/b")
    assert len(registry.manifests) == 23
    _many(guest, parents, children, size)
    guest.read.clear()
    with pytest.raises(BuildFailed, match="too many parts"):
        await Layout(guest, registry, "vm", OUT).store("a/c")
    assert len(guest.read) < 260


@pytest.mark.parametrize(
    "spoil",
    [_mismatch, _wrong_layer, _path, _path_of_a_layer, _nothing, _endless, _nonsense, _deep, lambda guest: None],
)
async def test_a_hostile_guest_gets_no_image(guest: FakeGuest, registry: FakeRegistry, spoil: Any) -> None:
    spoil(guest)
    with pytest.raises(BuildFailed):
        await Layout(guest, registry, "vm", OUT).store("a/b")
    assert all(reference.startswith("sha256:") for _, reference in registry.manifests), "something has a name"
    assert not [path for path in guest.read if ".." in path or "shadow" in path]


def test_secrets_are_hidden() -> None:
    redactor = Redactor([b"s3cret-value\n", b"-----BEGIN\nline of a key\n", b"abc"])
    assert "s3cret" not in repr(BuildSecret("npm", value="s3cret", value_base64="s3cret"))
    assert redactor.text("a s3cret-value, and line of a key: abc") == "a ***, and ***: abc", "short ones are everywhere"


def test_where_images_lie() -> None:
    assert [repository_of(parse_reference(name)) for name in ("app", "team/app", "quay.io/a/b")] == [
        "library/app",
        "team/app",
        "quay.io/a/b",
    ]
