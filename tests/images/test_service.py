"""Names, digests, tags, the queue, deletion and pins: what the records promise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from hypeman.errors import InternalError, InUse, InvalidRequest, InvalidState, NotFound
from hypeman.images.service import Images
from hypeman.images.types import CreateImageRequest, Image, ImageStatus, PushCredentials
from hypeman.paths import Paths
from hypeman.store import Store
from tests.images.conftest import QUICK, Start
from tests.images.faults import FaultyRegistry, Request, Response
from tests.images.layout import OCI_INDEX, OCI_MANIFEST, ImageFiles, entry, in_pieces, tar

ONE = ImageFiles([tar(entry("one", data=b"1" * 9000))], config={"Entrypoint": ["/one"], "ExposedPorts": {"80/tcp": {}}})
TWO = ImageFiles([tar(entry("two", data=b"2" * 9000))])


PATIENT = msgspec.structs.replace(QUICK, silence=600, grace=600)


def hold(request: Request) -> Response | None:
    """Configs and layers never come."""
    stalled = Response(200, {}, b"x" * 100, cut=0, then="stall")
    return stalled if "/blobs/" in request.path else None


async def ready(images: Images, name: str, **fields: Any) -> Image:
    await images.create(CreateImageRequest(name, **fields))
    with trio.fail_after(30):
        image = await images.wait_final(name)
    assert image.status is ImageStatus.READY, image.error
    return image


async def test_as_the_contract_writes_it(registry: FaultyRegistry, make_images: Start) -> None:
    """Nullable fields are there as null, optional ones are left out."""
    registry.serve("one", ONE)
    images = await make_images(insecure_registries=(registry.host,))
    name = f"{registry.host}/one"
    await images.create(CreateImageRequest(name))
    pending = json.loads(msgspec.json.encode(await images.get(name)))
    assert {"queue_position", "error", "size_bytes", "entrypoint", "cmd", "working_dir"} <= pending.keys()
    assert pending["size_bytes"] is None and "tags" not in pending and "env" not in pending
    await images.wait_final(name)
    image = json.loads(msgspec.json.encode(await images.get(name)))
    assert image["name"] == f"{name}:latest" and image["status"] == "ready" and image["entrypoint"] == ["/one"]
    assert image["cmd"] is None and image["queue_position"] is None and image["size_bytes"] > 0
    assert "T" in image["created_at"]


async def test_idempotent(registry: FaultyRegistry, make_images: Start) -> None:
    """Asking again gives the same record, tags apart, and fetches no layer twice."""
    registry.serve("one", ONE)
    images = await make_images(insecure_registries=(registry.host,))
    first = await ready(images, f"{registry.host}/one", tags={"a": "1"})
    again = await images.create(CreateImageRequest(f"{registry.host}/one"))
    assert again == first
    retagged = await images.create(CreateImageRequest(f"{registry.host}/one", tags={"b": "2"}))
    assert retagged.tags == {"b": "2"}
    assert len(registry.blob_requests()) == 2
    assert [image.name for image in await images.list(tags={"b": "2"})] == [f"{registry.host}/one:latest"]
    assert await images.list(tags={"a": "1"}) == []


async def test_one_digest_under_several_names(registry: FaultyRegistry, make_images: Start, paths: Paths) -> None:
    """Asked for at once under many names, converted once; each name can go, the disk goes with the last."""
    names = [f"{registry.host}/{name}" for name in ("a", "b", "c")]
    for name in "abc":
        registry.serve(name, ONE)
    images = await make_images(insecure_registries=(registry.host,))
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(ready, images, name)
    assert len(registry.blob_requests()) == 2 and images.statistics()["made"] == 1
    assert len(await images.list()) == 3
    for name in names[:2]:
        await images.delete(name)
        with pytest.raises(NotFound):
            await images.get(name)
    assert (await images.wait_ready(names[2])).disk.exists()
    await images.delete(names[2])
    assert os.listdir(paths.images) == []


async def test_an_image_is_tagged_without_a_pull(registry: FaultyRegistry, make_images: Start) -> None:
    """The new name stands for the same digest, whatever it stood for before; the old name stays."""
    registry.serve("one", ONE)
    registry.serve("two", TWO)
    images = await make_images(insecure_registries=(registry.host,))
    one = await ready(images, f"{registry.host}/one", tags={"a": "1"})
    two = await ready(images, f"{registry.host}/two")
    requests = len(registry.requests)
    tagged = await images.tag(f"{registry.host}/one", "mine:1")
    assert (tagged.name, tagged.digest, tagged.tags) == ("docker.io/library/mine:1", one.digest, {"a": "1"})
    assert (await images.tag(f"{registry.host}/two", "mine:1")).digest == two.digest
    assert (await images.get(f"{registry.host}/one")).digest == one.digest
    assert len(registry.requests) == requests
    await images.delete(f"{registry.host}/two")
    assert (await images.get("mine:1")).status is ImageStatus.READY
    await images.tag(f"{registry.host}/one", "mine:1")  # the last name of the second image
    with pytest.raises(NotFound):
        await images.get(f"{registry.host}/two")
    for source, target, error in (
        ("nobody", "mine:2", NotFound),
        (f"{registry.host}/one", "UPPER", InvalidRequest),
        (f"{registry.host}/one", f"mine@{one.digest}", InvalidRequest),
    ):
        with pytest.raises(error):
            await images.tag(source, target)


async def test_a_tag_moves_when_the_new_image_is_ready(registry: FaultyRegistry, make_images: Start) -> None:
    """Until then the old one is what the name stands for; one that fails changes nothing."""
    name = f"{registry.host}/app"
    registry.serve("app", ONE)
    images = await make_images(insecure_registries=(registry.host,))
    old = await ready(images, name)
    registry.serve("app", TWO)
    registry.rules.append(hold)
    answer = await images.create(CreateImageRequest(name))
    assert answer.digest == TWO.digest and not answer.status.is_final
    assert (await images.get(name)).digest == old.digest
    assert (await images.wait_ready(name)).digest == old.digest
    with trio.fail_after(30):
        assert (await images.wait_final(name)).digest == old.digest, "the pull failed: nothing came"
    registry.rules.clear()
    await images.create(CreateImageRequest(name))
    with trio.fail_after(30):
        assert (await images.wait_final(name)).digest == TWO.digest
    await images.collect()
    with pytest.raises(NotFound):
        await images.get(f"{registry.host}/app@{ONE.digest}")


async def test_by_digest(registry: FaultyRegistry, make_images: Start) -> None:
    """A digest finds the image also under a tag of the same repository, and needs no registry then."""
    registry.serve("app", ONE)
    images = await make_images(insecure_registries=(registry.host,))
    await ready(images, f"{registry.host}/app:latest")
    registry.requests.clear()
    found = await images.get(f"{registry.host}/app:ignored@{ONE.digest}")
    assert found.name == f"{registry.host}/app:latest"
    await images.create(CreateImageRequest(f"{registry.host}/app@{ONE.digest}"))
    assert not registry.requests
    with pytest.raises(NotFound):
        await images.get(f"{registry.host}/ap@{ONE.digest}")


async def test_platforms(registry: FaultyRegistry, make_images: Start) -> None:
    """An index is resolved to the platform asked for; one that is not there is said before anything begins."""
    amd, arm = ONE, ImageFiles([tar(entry("arm"))], architecture="arm64")
    for files in (amd, arm):
        registry.serve("multi", files, tag=files.digest)
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": files.digest, "size": len(files.manifest), "platform": platform}
        for files, platform in (
            (arm, {"os": "linux", "architecture": "arm64", "variant": "v8"}),
            (amd, {"os": "linux", "architecture": "amd64"}),
        )
    ]
    registry.serve_manifest("multi", {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}, OCI_INDEX)
    registry.serve_manifest("none", {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries[:1]}, OCI_INDEX)
    images = await make_images(insecure_registries=(registry.host,))
    assert (await ready(images, f"{registry.host}/multi", platform="linux/amd64")).digest == amd.digest
    other = await ready(images, f"{registry.host}/multi", platform="linux/arm64")
    assert (other.digest, other.platform) == (arm.digest, "linux/arm64")
    assert (await images.wait_ready(f"{registry.host}/multi", "linux/amd64")).digest == amd.digest
    with pytest.raises(NotFound) as caught:
        await images.create(CreateImageRequest(f"{registry.host}/none", platform="linux/amd64"))
    assert caught.value.code == "platform_not_available"
    registry.serve("single", arm)
    await images.create(CreateImageRequest(f"{registry.host}/single", platform="linux/amd64"))
    failed = await images.wait_final(f"{registry.host}/single")
    assert failed.status is ImageStatus.FAILED and "made for linux/arm64" in (failed.error or "")


async def test_queue_position(registry: FaultyRegistry, make_images: Start) -> None:
    """More pulls than are done at once wait in the order in which they came, and say where."""
    names = []
    for number in range(7):
        registry.serve(f"n{number}", ImageFiles([tar(entry(f"{number}"))]))
        names.append(f"{registry.host}/n{number}")
    registry.rules.append(hold)
    images = await make_images(insecure_registries=(registry.host,), patience=PATIENT)
    for name in names:
        await images.create(CreateImageRequest(name))
    with trio.fail_after(20):
        while images.statistics()["active"] < 4:
            await trio.sleep(0.01)
    waiting = [image.queue_position for name in names for image in [await images.get(name)]]
    assert waiting == [None] * 4 + [1, 2, 3]
    await images.delete(names[4])
    assert (await images.get(names[5])).queue_position == 1


async def test_delete_while_pulling(registry: FaultyRegistry, make_images: Start, paths: Paths) -> None:
    """The pull is cancelled, its waiters get an error, nothing is left, and it can be asked for again."""
    registry.serve("one", ONE)
    registry.rules.append(hold)
    images = await make_images(insecure_registries=(registry.host,), patience=PATIENT)
    name = f"{registry.host}/one"
    await images.create(CreateImageRequest(name))
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(NotFound, match="deleted meanwhile"):
                await images.wait_ready(name)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await images.delete(name)
    registry.rules.clear()
    await ready(images, name)
    assert os.listdir(paths.tmp) == []


async def test_pins(registry: FaultyRegistry, make_images: Start, store: Store, paths: Paths) -> None:
    """A pinned image is not deleted; one that lost its name only to a newer image stays until let go."""
    registry.serve("app", ONE)
    images = await make_images(insecure_registries=(registry.host,))
    name = f"{registry.host}/app"
    one = await images.wait_ready(name)
    await store.write(lambda txn: images.pin(txn, one.digest, "instance-1"))
    await store.write(lambda txn: images.pin(txn, one.digest, "instance-2"))
    with pytest.raises(InUse):
        await images.delete(name)
    registry.serve("app", TWO)
    assert (await ready(images, name)).digest == TWO.digest
    assert images.disk(one.digest).exists() and images.config(one.digest).exposed_ports == ("80/tcp",)
    await store.write(lambda txn: images.unpin(txn, "instance-1"))
    await images.collect()
    assert images.disk(one.digest).exists()
    await store.write(lambda txn: images.unpin(txn, "instance-2"))
    await store.write(lambda txn: images.unpin(txn, "instance-2"))
    await images.collect()
    assert os.listdir(paths.images) == [TWO.digest.removeprefix("sha256:")]
    with pytest.raises(InvalidState):
        await store.write(lambda txn: images.pin(txn, one.digest, "instance-3"))


async def test_a_failed_image_is_tried_again(registry: FaultyRegistry, make_images: Start) -> None:
    registry.serve("one", ONE)
    registry.rules.append(lambda request: Response(404) if "/blobs/" in request.path else None)
    images = await make_images(insecure_registries=(registry.host,))
    name = f"{registry.host}/one"
    with pytest.raises(InternalError, match="cannot be used"):
        await images.wait_ready(name)
    assert (await images.get(name)).status is ImageStatus.FAILED
    registry.rules.clear()
    assert (await images.wait_ready(name)).size > 0


async def test_progress(registry: FaultyRegistry, make_images: Start) -> None:
    registry.serve("one", ONE)
    registry.rules.append(hold)
    images = await make_images(insecure_registries=(registry.host,))
    name = f"{registry.host}/one"
    await images.create(CreateImageRequest(name))
    registry.rules.clear()
    await images.wait_final(name)
    assert (await images.progress(name)).status is ImageStatus.READY


async def test_restart(
    registry: FaultyRegistry, make_images: Start, store: Store, paths: Paths, nursery: trio.Nursery
) -> None:
    """What was under way begins again, unless it needs a login that was only lent; what was ready stays."""
    for name in ("done", "open", "lent"):
        registry.serve(name, ImageFiles([tar(entry(name))]))
    async with trio.open_nursery() as first:
        images = await make_images(insecure_registries=(registry.host,), nursery=first)
        await ready(images, f"{registry.host}/done")
        registry.rules.append(hold)
        await images.create(CreateImageRequest(f"{registry.host}/open"))
        await images.create(CreateImageRequest(f"{registry.host}/lent", credentials=PushCredentials("u", "p")))
        first.cancel_scope.cancel()
    (paths.tmp / "image-left-over").mkdir()
    (paths.blobs / "partial" / "left-over").write_bytes(b"x")
    (paths.images / ("0" * 64)).mkdir()
    registry.rules.clear()
    images = await make_images(insecure_registries=(registry.host,))
    assert (await images.get(f"{registry.host}/done")).status is ImageStatus.READY
    lent = await images.get(f"{registry.host}/lent")
    assert lent.status is ImageStatus.FAILED and "login was not kept" in (lent.error or "")
    with trio.fail_after(30):
        assert (await images.wait_final(f"{registry.host}/open")).status is ImageStatus.READY
    assert os.listdir(paths.tmp) == [] and os.listdir(paths.blobs / "partial") == []
    assert len(os.listdir(paths.images)) == 2


async def test_a_disk_that_is_gone(registry: FaultyRegistry, make_images: Start, paths: Paths) -> None:
    registry.serve("one", ONE)
    async with trio.open_nursery() as first:
        images = await make_images(insecure_registries=(registry.host,), nursery=first)
        found = await images.wait_ready(f"{registry.host}/one")
        first.cancel_scope.cancel()
    found.disk.unlink()
    images = await make_images(insecure_registries=(registry.host,))
    assert "its disk is gone" in ((await images.get(f"{registry.host}/one")).error or "")
    assert (await images.wait_ready(f"{registry.host}/one")).disk.exists()


async def test_the_cache_of_blobs_is_bounded(registry: FaultyRegistry, make_images: Start, paths: Paths) -> None:
    images = await make_images(insecure_registries=(registry.host,), blob_cache_size=1 << 20)
    for number in range(4):
        layer = tar(entry("x", data=os.urandom(400_000)))
        registry.serve(f"n{number}", ImageFiles([layer]))
        await ready(images, f"{registry.host}/n{number}")
    await images.collect()
    sizes = [file.stat().st_size for file in (paths.blobs / "sha256").iterdir()]
    assert 0 < sum(sizes) <= 1 << 20


async def test_layers_are_fetched_once_for_several_images(registry: FaultyRegistry, make_images: Start) -> None:
    base = tar(entry("base", data=os.urandom(50_000)))
    for number in range(3):
        registry.serve(f"n{number}", ImageFiles([base, tar(entry(f"{number}"))]))
    images = await make_images(insecure_registries=(registry.host,))
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(ready, images, f"{registry.host}/n{number}")
    assert len({request.path.rpartition("/")[2] for request in registry.blob_requests()}) == 7
    assert len(registry.blob_requests()) == 7


async def test_ext4_by_configuration(registry: FaultyRegistry, make_images: Start, tmp_path: Path) -> None:
    from tests.images.conftest import need_root
    from tests.images.trees import mounted

    need_root()
    registry.serve("one", ONE)
    images = await make_images(insecure_registries=(registry.host,), root_fs="ext4")
    found = await images.wait_ready(f"{registry.host}/one")
    assert found.fs == "ext4" and found.disk.name == "root.ext4"
    (tmp_path / "d").symlink_to(found.disk)
    with mounted(tmp_path / "d", "ext4") as root:
        assert (root / "one").read_bytes() == b"1" * 9000


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (CreateImageRequest("UPPER"), "invalid_name"),
        (CreateImageRequest("x", platform="linux/mips"), "invalid_platform"),
        (CreateImageRequest("x", platform="windows/amd64"), "invalid_platform"),
        (CreateImageRequest("x", tags={"": "v"}), "invalid_request"),
    ],
)
async def test_refused(request_: CreateImageRequest, code: str, make_images: Start) -> None:
    images = await make_images()
    with pytest.raises(InvalidRequest) as caught:
        await images.create(request_)
    assert caught.value.code == code


async def test_a_blob_that_was_damaged_on_disk(registry: FaultyRegistry, make_images: Start, paths: Paths) -> None:
    """It costs one failure, which says so, and is fetched again the next time; whole ones are kept."""
    base, top = tar(entry("base", data=b"b" * 999)), tar(entry("top"))
    registry.serve("one", ImageFiles([base]))
    registry.serve("two", ImageFiles([base, top]))
    images = await make_images(insecure_registries=(registry.host,))
    await ready(images, f"{registry.host}/one")
    (blob,) = (paths.blobs / "sha256").iterdir()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    await images.create(CreateImageRequest(f"{registry.host}/two"))
    failed = await images.wait_final(f"{registry.host}/two")
    assert failed.status is ImageStatus.FAILED and blob.name in (failed.error or "")
    assert not blob.exists()
    await ready(images, f"{registry.host}/two")


async def test_layers_at_once(registry: FaultyRegistry, make_images: Start) -> None:
    """Several, but never more than configured, over all images together; a stalled one delays no other image
    that is already here."""
    for name in ("a", "b"):
        registry.serve(name, ImageFiles([tar(entry(f"{name}{n}", data=b"x" * 999)) for n in range(5)]))
    layers = {str(layer["digest"]) for name in "ab" for layer in manifest_of(registry, name)["layers"]}

    def hold_layers(request: Request) -> Response | None:
        digest = request.path.rpartition("/")[2]
        return Response(200, {}, registry.blobs[digest], cut=0, then="stall") if digest in layers else None

    registry.rules.append(hold_layers)
    images = await make_images(insecure_registries=(registry.host,), patience=PATIENT, max_concurrent_downloads=3)
    for name in "ab":
        await images.create(CreateImageRequest(f"{registry.host}/{name}"))

    def asked() -> int:
        return sum(request.path.rpartition("/")[2] in layers for request in registry.requests)

    with trio.fail_after(20):
        while asked() < 3:
            await trio.sleep(0.01)
    await images.import_archive(in_pieces(ONE.docker_archive("x")), name="here")
    with trio.fail_after(20):
        assert (await images.wait_final("here")).status is ImageStatus.READY
    assert asked() == 3
    progress = await images.progress(f"{registry.host}/a")
    assert progress.status is ImageStatus.PULLING and len(progress.layers) == 5


def manifest_of(registry: FaultyRegistry, name: str) -> dict[str, list[dict[str, object]]]:
    document: dict[str, list[dict[str, object]]] = json.loads(registry.manifests[f"{name}/latest"][0])
    return document
