"""Images without a registry: OCI layouts, OCI archives and what ``docker save`` writes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from hypeman.errors import InvalidRequest
from hypeman.images.types import ImageStatus
from hypeman.paths import Paths
from tests.images.conftest import Start, need
from tests.images.layout import ImageFiles, archive_directory, directory, entry, in_pieces, symlink, tar

FILES = ImageFiles([tar(directory("a")), tar(entry("a/b", data=b"b" * 20_000))], config={"Cmd": ["/a/b"]})


def blobs_of(paths: Paths) -> set[str]:
    return set(os.listdir(paths.blobs / "sha256")) | set(os.listdir(paths.blobs / "partial"))


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", ["oci", "docker"])
async def test_archive(
    kind: str, compress: Callable[[bytes], bytes], make_images: Start, paths: Paths, tmp_path: Path
) -> None:
    """Streamed in, converted, its config read; only what the image needs stays in the cache."""
    layout = FILES.write_layout(tmp_path / "oci", tag="docker.io/acme/tool:2")
    data = archive_directory(layout) if kind == "oci" else FILES.docker_archive("acme/tool:2")
    images = await make_images()
    image = await images.import_archive(in_pieces(compress(data)), tags={"from": "archive"})
    assert image.name == "docker.io/acme/tool:2" and image.tags == {"from": "archive"}
    with trio.fail_after(30):
        image = await images.wait_final("acme/tool:2")
    assert image.status is ImageStatus.READY, image.error
    assert image.cmd == ("/a/b",)
    if kind == "oci":
        assert image.digest == FILES.digest
    assert len(blobs_of(paths)) == 4


async def test_a_name_of_ones_own(make_images: Start, tmp_path: Path) -> None:
    images = await make_images()
    by_itself = await images.import_archive(in_pieces(FILES.docker_archive("acme/tool:2")), default_name="other")
    assert by_itself.name == "docker.io/acme/tool:2"
    nameless = archive_directory(FILES.write_layout(tmp_path / "oci"))
    assert (await images.import_archive(in_pieces(nameless), default_name="other")).name.endswith("/other:latest")
    with pytest.raises(InvalidRequest, match="give a name"):
        await images.import_archive(in_pieces(nameless))
    image = await images.import_archive(in_pieces(FILES.docker_archive("acme/tool:2")), name="mine")
    assert image.name == "docker.io/library/mine:latest"
    assert (await images.wait_ready("mine")).size > 0
    with pytest.raises(InvalidRequest, match="not a digest"):
        await images.import_archive(in_pieces(FILES.docker_archive("x")), name=f"mine@{FILES.digest}")


async def test_null_in_an_archive(make_images: Start) -> None:
    """An image of nothing but its configuration, as Go writes empty lists."""
    config = {"config": {"Cmd": ["/x"], "Env": None, "User": None}, "rootfs": {"type": "layers", "diff_ids": None}}
    saved = [{"Config": "c.json", "RepoTags": None, "Layers": None}]
    data = tar(
        entry("c.json", data=json.dumps(config).encode()), entry("manifest.json", data=json.dumps(saved).encode())
    )
    images = await make_images()
    await images.import_archive(in_pieces(data), name="nothing")
    assert (await images.wait_ready("nothing")).config.cmd == ("/x",)


async def test_layers_that_are_links(make_images: Start) -> None:
    """Older docker wrote a layer that appears twice as a link to the first."""
    layer = FILES.layers[0]
    files = ImageFiles([layer, layer])
    saved = [{"Config": "c.json", "RepoTags": None, "Layers": ["1/layer.tar", "2/layer.tar"]}]
    data = tar(
        entry("1/layer.tar", data=layer), symlink("2/layer.tar", "../1/layer.tar"), entry("c.json", data=files.config),
        entry("manifest.json", data=json.dumps(saved).encode()),
    )  # fmt: skip
    images = await make_images()
    await images.import_archive(in_pieces(data), name="twice")
    assert (await images.wait_ready("twice")).size > 0


@pytest.mark.parametrize("form", ["directory", "archive"])
async def test_by_path(form: str, make_images: Start, tmp_path: Path) -> None:
    """From a path that the configuration allows, and from no other, whatever links say."""
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    allowed.mkdir()
    layout = FILES.write_layout(outside / "oci")
    (outside / "x.tar").write_bytes(archive_directory(layout))
    (allowed / "oci-link").symlink_to(outside / "oci")
    images = await make_images(import_paths=(str(allowed),))
    for path in (outside / "oci", outside / "x.tar", allowed / "oci-link", allowed / ".." / "outside" / "x.tar"):
        with pytest.raises(InvalidRequest, match="import_paths"):
            await images.import_path(str(path), name="x")
    FILES.write_layout(allowed / "oci")
    (outside / "x.tar").rename(allowed / "x.tar")
    await images.import_path(str(allowed / ("oci" if form == "directory" else "x.tar")), name="x")
    assert (await images.wait_ready("x")).digest == FILES.digest


async def test_several_images_in_one_archive(make_images: Start) -> None:
    """As ``docker save a b`` writes them: all are imported, or the one that is named."""
    other = ImageFiles([tar(entry("other"))])
    saved = [
        {"Config": "1.json", "RepoTags": ["acme/one:1", "acme/uno:1"], "Layers": ["0/layer.tar", "1/layer.tar"]},
        {"Config": "2.json", "RepoTags": ["acme/two:2"], "Layers": ["2/layer.tar"]},
    ]
    layers = [*FILES.layers, *other.layers]
    data = tar(
        *(entry(f"{number}/layer.tar", data=layer) for number, layer in enumerate(layers)),
        entry("1.json", data=FILES.config), entry("2.json", data=other.config),
        entry("manifest.json", data=json.dumps(saved).encode()),
    )  # fmt: skip
    images = await make_images()
    with pytest.raises(InvalidRequest, match=r"2 images, but not .*three.*acme/two:2"):
        await images.import_archive(in_pieces(data), name="acme/three")
    assert (await images.import_archive(in_pieces(data), name="acme/two:2")).name == "docker.io/acme/two:2"
    assert len(await images.list()) == 1
    assert (await images.import_archive(in_pieces(data))).name == "docker.io/acme/one:1"
    assert {image.name.rpartition("/")[2] for image in await images.list()} == {"one:1", "uno:1", "two:2"}
    for name in ("acme/one:1", "acme/uno:1", "acme/two:2"):
        assert (await images.wait_ready(name)).size > 0


def broken(name: str, tmp_path: Path) -> bytes:
    layout = FILES.write_layout(tmp_path / "oci")
    blobs = layout / "blobs" / "sha256"
    if name == "missing layer":
        (blobs / str(FILES.layer_descriptors[1]["digest"]).removeprefix("sha256:")).unlink()
    elif name == "changed blob":
        file = blobs / str(FILES.layer_descriptors[1]["digest"]).removeprefix("sha256:")
        file.write_bytes(file.read_bytes() + b"x")
    elif name == "no index":
        (layout / "index.json").unlink()
    elif name == "cut off":
        return archive_directory(layout)[:3000]
    elif name == "not a tar":
        return b"GIF89a" * 1000
    elif name == "empty":
        return b""
    return archive_directory(layout)


@pytest.mark.parametrize("name", ["missing layer", "changed blob", "no index", "cut off", "not a tar", "empty"])
async def test_broken_archives(name: str, make_images: Start, paths: Paths, tmp_path: Path) -> None:
    """Refused with the reason, and nothing is kept."""
    images = await make_images()
    with pytest.raises(InvalidRequest, match="the archive cannot be imported: "):
        await images.import_archive(in_pieces(broken(name, tmp_path)), name="x")
    assert blobs_of(paths) == set() and await images.list() == []


async def test_a_sender_that_hangs_up(make_images: Start, paths: Paths, tmp_path: Path) -> None:
    async def half() -> AsyncIterator[bytes]:
        yield archive_directory(FILES.write_layout(tmp_path / "oci"))[:5000]
        raise ConnectionResetError

    images = await make_images()
    with pytest.raises(ConnectionResetError):
        await images.import_archive(half(), name="x")
    assert blobs_of(paths) == set()


@pytest.mark.real
@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
async def test_archives_that_skopeo_writes(kind: str, make_images: Start, tmp_path: Path) -> None:
    need("skopeo")
    layout = FILES.write_layout(tmp_path / "oci")
    out = tmp_path / "x.tar"
    copy = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:latest", f"{kind}:{out}:acme/tool:3"]
    await trio.to_thread.run_sync(lambda: subprocess.run(copy, check=True))
    images = await make_images()
    await images.import_archive(in_pieces(out.read_bytes(), 65536), name="acme/tool:3")
    assert (await images.wait_ready("acme/tool:3")).config.cmd == ("/a/b",)
