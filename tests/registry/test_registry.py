"""The registry with other people's clients, and what the specification asks of it step by step."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgspec
import pytest
import trio

from hypeman.actor import Actor, acting, set_actor
from hypeman.errors import Conflict, StoreError
from hypeman.images import making, outcomes
from hypeman.images import service as image_service
from hypeman.images.manifest import Manifest
from hypeman.images.types import CreateImageRequest, ImageStatus
from hypeman.paths import Paths
from hypeman.registry import records, service
from hypeman.registry.names import Code, RegistryFailure, is_digest, parse_byte_range, parse_content_range, parse_path
from hypeman.registry.service import MAX_UPLOADS_EACH, Registry
from hypeman.tokens import mint, parse_grants
from tests.images.conftest import need_root, push
from tests.images.layout import OCI_INDEX, OCI_MANIFEST, ImageFiles, directory, entry, in_pieces, tar
from tests.registry.conftest import SECRET, Served

IMAGE = ImageFiles([tar(directory("etc"), entry("etc/name", data=b"pushed"))], config={"Cmd": ["/bin/true"]})


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def upload(client: httpx.AsyncClient, repository: str, data: bytes) -> None:
    started = await client.post(f"/v2/{repository}/blobs/uploads/")
    assert started.status_code == 202
    done = await client.put(started.headers["location"], params={"digest": digest(data)}, content=data)
    assert done.status_code == 201, done.text


async def upload_blobs(client: httpx.AsyncClient, repository: str, image: ImageFiles) -> None:
    for data in image.blobs.values():
        await upload(client, repository, data)


async def push_image(client: httpx.AsyncClient, repository: str, tag: str, image: ImageFiles = IMAGE) -> None:
    await upload_blobs(client, repository, image)
    path = f"/v2/{repository}/manifests/{tag}"
    done = await client.put(path, content=image.manifest, headers={"Content-Type": OCI_MANIFEST})
    assert (done.status_code, done.headers["docker-content-digest"]) == (201, image.digest), done.text


@pytest.mark.slow
@pytest.mark.real
async def test_skopeo_pushes_an_image_and_pulls_it_again(served: Served, tmp_path: Path) -> None:
    need_root()  # images are converted by a worker that gives up its user
    layout = IMAGE.write_layout(tmp_path / "layout")
    remote = f"docker://{served.host}/team/app:v1"
    login = ("--dest-tls-verify=false", f"--dest-creds=any:{served.token}")
    await served.skopeo("copy", "-q", *login, f"oci:{layout}:latest", remote)
    image = await served.images.wait_final("team/app:v1")
    assert (image.name, image.status) == ("docker.io/team/app:v1", ImageStatus.READY)
    assert image.digest == IMAGE.digest
    back = tmp_path / "back"
    await served.skopeo(
        "copy", "-q", "--src-tls-verify=false", f"--src-registry-token={served.token}", remote, f"dir:{back}"
    )
    assert (back / "manifest.json").read_bytes() == IMAGE.manifest
    assert served.images.tags("team/app") == ["v1"]
    listed = await served.skopeo(
        "list-tags", "--tls-verify=false", f"--registry-token={served.token}", f"docker://{served.host}/team/app"
    )
    assert json.loads(listed)["Tags"] == ["v1"]
    await served.images.delete("team/app:v1")
    async with served.client() as client:
        assert (await client.get("/v2/team/app/manifests/v1")).status_code == 404
        await push_image(client, "team/app", "v2")
        await served.images.wait_final("team/app:v2")
        assert (await client.delete("/v2/team/app/manifests/v2")).status_code == 202
        assert await served.images.list() == []


@pytest.mark.slow
@pytest.mark.real
async def test_what_was_pulled_can_be_pulled_from_here(served: Served, registry_host: str, tmp_path: Path) -> None:
    """Also when its layers have left the cache."""
    need_root()
    push(IMAGE.write_layout(tmp_path / "layout"), f"{registry_host}/borrowed:1")
    await served.images.create(CreateImageRequest(f"{registry_host}/borrowed:1"))
    ready = await served.images.wait_final(f"{registry_host}/borrowed:1")
    assert ready.status is ImageStatus.READY
    served.images.blobs.trim(0, set())
    async with served.client() as client:
        assert (await client.get(f"/v2/{registry_host}/borrowed/tags/list")).json()["tags"] == ["1"]
        found = await client.get(f"/v2/{registry_host}/borrowed/manifests/1")
        assert found.content == IMAGE.manifest
        for name, data in IMAGE.blobs.items():
            assert (await client.get(f"/v2/{registry_host}/borrowed/blobs/{name}")).content == data


async def test_uploads_in_pieces(served: Served) -> None:
    data = os.urandom(1000)
    async with served.client() as client:
        started = await client.post("/v2/a/b/blobs/uploads/")
        at = started.headers["location"]
        assert started.headers["range"] == "0-0"
        first = await client.patch(at, content=data[:400], headers={"Content-Range": "0-399"})
        assert (first.status_code, first.headers["range"]) == (202, "0-399")
        again = await client.patch(at, content=data[:400], headers={"Content-Range": "0-399"})
        assert (again.status_code, again.headers["range"]) == (416, "0-399")
        state = await client.get(at)
        assert (state.status_code, state.headers["range"]) == (204, "0-399")
        done = await client.put(
            at, params={"digest": digest(data)}, content=data[400:], headers={"Content-Range": "400-999"}
        )
        assert done.status_code == 201
        assert (await client.get(at)).status_code == 404, "the upload is over"
        path = f"/v2/a/b/blobs/{digest(data)}"
        assert (await client.get(path)).content == data
        head = await client.head(path)
        assert (head.headers["content-length"], head.headers["docker-content-digest"]) == ("1000", digest(data))
        part = await client.get(path, headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content, part.headers["content-range"]) == (206, data[10:20], "bytes 10-19/1000")
        assert (await client.get(path, headers={"Range": "bytes=1000-"})).status_code == 416
        assert (await client.get(f"/v2/other/blobs/{digest(data)}")).status_code == 404, "not in that repository"


async def test_wrong_uploads_leave_nothing(served: Served) -> None:
    async with served.client() as client:
        monolithic = await client.post(f"/v2/a/blobs/uploads/?digest={digest(b'x')}", content=b"y")
        assert (monolithic.status_code, monolithic.json()["errors"][0]["code"]) == (400, "DIGEST_INVALID")
        with pytest.raises(RegistryFailure) as big:
            await served.registry.receive("a", await served.registry.begin("a"), in_pieces(bytes(2 << 20), 1 << 19))
        assert big.value.code is Code.SIZE_INVALID
        started = (await client.post("/v2/a/blobs/uploads/")).headers["location"]
        assert (await client.put(started)).status_code == 400
        assert (await client.delete(started)).status_code == 204
        assert (await client.delete(started)).status_code == 404
    assert not served.registry._uploads
    assert not served.images.blobs.downloads()


async def test_an_upload_that_is_cancelled_while_it_receives_closes_its_file_once(served: Served) -> None:
    """Its descriptor may belong to another file at once, into which the rest of the body must not go."""
    registry = served.registry
    name = await registry.begin("a")
    other: list[int] = []

    async def body() -> AsyncGenerator[bytes]:
        yield b"first"
        await registry.cancel("a", name)
        with open(os.devnull, "rb") as file:
            other.append(file.fileno())
            yield b"second"

    with pytest.raises(RegistryFailure) as unknown:
        async with aclosing(body()) as chunks:
            await registry.receive("a", name, chunks)
    assert unknown.value.code is Code.BLOB_UPLOAD_UNKNOWN
    waiting = await registry.begin("a")
    fd = registry.upload("a", waiting).fd
    assert other != [fd], "it was open as long as it was written to"
    os.fstat(fd)


async def test_a_client_that_leaves_a_whole_upload_leaves_nothing(served: Served) -> None:
    async def torn() -> AsyncGenerator[bytes]:
        yield b"first"
        raise ConnectionError

    async with aclosing(torn()) as chunks:
        with pytest.raises(ConnectionError):
            await served.registry.put_blob("a", digest(b"first and more"), chunks)
    assert not served.registry._uploads
    assert not list((served.images.blobs.path("sha256:").parent / "partial").iterdir())


async def test_a_full_disk_leaves_an_upload_that_can_be_continued(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(fd: int, data: bytes) -> None:
        os.write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with served.client() as client:
        at = (await client.post("/v2/a/blobs/uploads/")).headers["location"]
        await client.patch(at, content=b"first ")
        with monkeypatch.context() as full:
            full.setattr(service, "write_all", write_half)
            assert (await client.patch(at, content=b"second")).status_code == 500
        assert (await client.get(at)).headers["range"] == "0-5"
        done = await client.put(at, params={"digest": digest(b"first second")}, content=b"second")
        assert done.status_code == 201
        assert (await client.get(f"/v2/a/blobs/{digest(b'first second')}")).content == b"first second"


async def test_uploads_do_not_fill_the_disk(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was received stays, and can be continued when there is room."""
    data = b"first second"
    async with served.client() as client:
        at = (await client.post("/v2/a/blobs/uploads/")).headers["location"]
        await client.patch(at, content=b"first ")
        for name, value, status in (("_room", lambda: 5, 403), ("_max_uploads_bytes", 11, 429)):
            with monkeypatch.context() as full:
                full.setattr(served.registry, name, value)
                refused = await client.patch(at, content=b"second")
            assert (refused.status_code, len(refused.json()["errors"])) == (status, 1), refused.text
        assert (await client.get(at)).headers["range"] == "0-5"
        assert (await client.put(at, params={"digest": digest(data)}, content=b"second")).status_code == 201


async def test_what_the_registry_keeps_is_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob counts once, in however many repositories it is."""
    monkeypatch.setattr(served.registry, "_max_kept_bytes", 10)
    async with served.client() as client:
        await upload(client, "a", b"123456")
        await upload(client, "b", b"123456")
        at = (await client.post("/v2/a/blobs/uploads/")).headers["location"]
        refused = await client.put(at, params={"digest": digest(b"67890")}, content=b"67890")
        assert (refused.status_code, "max_registry_size" in refused.text) == (403, True)
        assert (await client.get(f"/v2/a/blobs/{digest(b'67890')}")).status_code == 404
        await upload(client, "a", b"6789")


async def test_no_caller_takes_all_uploads(served: Served) -> None:
    registry = served.registry
    set_actor(Actor("greedy"))
    for _ in range(MAX_UPLOADS_EACH):
        await registry.begin("a")
    with pytest.raises(RegistryFailure) as refused:
        await registry.begin("a")
    assert refused.value.code is Code.TOOMANYREQUESTS
    with acting(Actor("other")):
        await registry.begin("a")
    for upload in registry._uploads.values():
        upload.touched -= timedelta(minutes=2)
    await registry.begin("a")
    assert len(registry._uploads) == 1, "empty ones have made room"


async def test_uploads_count_for_the_token_that_begins_them(served: Served) -> None:
    async with served.client() as client:
        assert (await client.post("/v2/a/blobs/uploads/")).status_code == 202
    assert [upload.owner for upload in served.registry._uploads.values()] == ["tester"]


async def test_mounts(served: Served) -> None:
    async with served.client() as client:
        await upload(client, "from/here", b"shared")
        mounted = await client.post(f"/v2/to/there/blobs/uploads/?mount={digest(b'shared')}&from=from/here")
        assert (mounted.status_code, mounted.headers["location"]) == (201, f"/v2/to/there/blobs/{digest(b'shared')}")
        assert (await client.get(mounted.headers["location"])).content == b"shared"
        unknown = await client.post(f"/v2/to/there/blobs/uploads/?mount={digest(b'none')}&from=from/here")
        assert unknown.status_code == 202, "an ordinary upload begins"


async def test_manifests_are_checked(served: Served) -> None:
    headers = {"Content-Type": OCI_MANIFEST}
    async with served.client() as client:
        missing = await client.put("/v2/a/manifests/v1", content=IMAGE.manifest, headers=headers)
        assert (missing.status_code, missing.json()["errors"][0]["code"]) == (400, "MANIFEST_BLOB_UNKNOWN")
        for bad in (b"no json", b"{}", b"[]", b'{"config": 1}'):
            assert (await client.put("/v2/a/manifests/v1", content=bad, headers=headers)).status_code == 400
        wrong = await client.put(f"/v2/a/manifests/{digest(b'x')}", content=IMAGE.manifest, headers=headers)
        assert wrong.json()["errors"][0]["code"] == "DIGEST_INVALID"
        other = await client.put("/v2/a/manifests/v1", content=IMAGE.manifest, headers={"Content-Type": OCI_INDEX})
        assert other.json()["errors"][0]["code"] == "MANIFEST_INVALID"
        assert (await client.get("/v2/a/manifests/v1")).status_code == 404


async def test_tags_are_listed_in_pages(served: Served) -> None:
    async with served.client() as client:
        assert (await client.get("/v2/none/tags/list")).status_code == 404
        for tag in ("v3", "v1", "v2"):
            await push_image(client, "a", tag)
        assert (await client.get("/v2/a/tags/list")).json() == {"name": "a", "tags": ["v1", "v2", "v3"]}
        page = await client.get("/v2/a/tags/list?n=2")
        assert page.json()["tags"] == ["v1", "v2"]
        assert page.headers["link"] == '</v2/a/tags/list?n=2&last=v2>; rel="next"'
        assert (await client.get("/v2/a/tags/list?n=2&last=v2")).json()["tags"] == ["v3"]
        assert (await client.delete("/v2/a/manifests/v1")).status_code == 202
        assert (await client.delete(f"/v2/a/manifests/{IMAGE.digest}")).status_code == 202
        assert (await client.get("/v2/a/tags/list")).json()["tags"] == []


async def test_a_pushed_image_that_cannot_be_made_at_the_start_is_left_to_the_next(
    served: Served, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adopting() -> list[bool]:
        return served.store.read(lambda txn: [row.adopting for _, row in txn.scan(records.TAGS)])

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    async with served.client() as client:
        await push_image(client, "a", "v1")
    row = served.store.read(lambda txn: txn.get(records.TAGS, "a:v1"))
    assert row is not None and not row.adopting
    stored = msgspec.structs.replace(row, adopting=True)
    await served.store.write(lambda txn: txn.put(records.TAGS, "a:v1", stored))
    blobs, images = served.images.blobs, served.images
    with monkeypatch.context() as patch:
        patch.setattr(blobs, "read", broken)
        await nursery.start(Registry(store=served.store, blobs=blobs, images=images, max_blob_bytes=1).run)
    assert adopting() == [True]
    await nursery.start(Registry(store=served.store, blobs=blobs, images=images, max_blob_bytes=1).run)
    assert adopting() == [False]


@pytest.mark.parametrize(
    "error",
    [
        StoreError("store cannot be used: No space left on device"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        Conflict("is being pulled with another login", code="credential_conflict"),
    ],
)
async def test_a_tag_whose_image_was_not_begun_gets_it_later(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The client gets an error if it is a failure, and the server tries again by itself."""
    monkeypatch.setattr(service, "_RETRY_SECONDS", 0.01)
    images, failures = served.images, 2
    adopt = images.adopt

    async def fail_twice(name: str, manifest: Manifest, digest: str) -> str:
        nonlocal failures
        if failures:
            failures -= 1
            raise error
        return await adopt(name, manifest, digest)

    monkeypatch.setattr(images, "adopt", fail_twice)
    shorter = Registry(store=served.store, blobs=images.blobs, images=images, max_blob_bytes=1 << 20)
    async with trio.open_nursery() as nursery, served.client() as client:
        await upload_blobs(client, "a", IMAGE)
        put = await client.put("/v2/a/manifests/v1", content=IMAGE.manifest, headers={"Content-Type": OCI_MANIFEST})
        assert put.status_code == (201 if isinstance(error, Conflict) else 500)
        await nursery.start(shorter.run)
        with trio.fail_after(30):
            while not any(image.name == "docker.io/library/a:v1" for image in await images.list()):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert (await images.wait_final("a:v1")).status is ImageStatus.READY
    assert failures == 0


@pytest.mark.slow
@pytest.mark.real
async def test_an_image_that_failed_for_lack_of_disk_is_made_again(
    served: Served, nursery: trio.Nursery, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose name leads to an older image meanwhile; and at once if it is needed for a start."""
    need_root()
    images = served.images
    first = (ImageFiles([tar(entry(name, data=b"x"))]) for name in ("first", "second"))
    second = [ImageFiles([tar(entry(name, data=b"y"))]) for name in ("first", "second")]
    async with served.client() as client:
        for tag, image in zip(("kept", "other"), first, strict=True):
            await push_image(client, "a", tag, image)
            assert (await images.wait_final(f"a:{tag}")).status is ImageStatus.READY
        await images.delete("a:other")
        with monkeypatch.context() as full:
            full.setattr(making, "_SPARE_BYTES", 1 << 60)
            for tag, image in zip(("kept", "other"), second, strict=True):
                await push_image(client, "a", tag, image)
                await images.wait_final(f"a:{tag}")
            failed = await images.get("a:other")
            assert (failed.status, failed.error) == (ImageStatus.FAILED, "the disk is full")
            kept = await images.get("a:kept")
            assert kept.status is ImageStatus.READY and kept.digest != second[0].digest
            await images.collect()
    assert (await images.wait_ready("a:other")).digest == second[1].digest
    await images._retry(trio.current_time())
    with trio.fail_after(30):
        while (await images.get("a:kept")).digest != second[0].digest:
            await trio.sleep(0.01)
    assert (await images.get("a:kept")).status is ImageStatus.READY


async def test_an_image_is_tried_again_at_growing_intervals(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "_SPARE_BYTES", 1 << 60)
    images, now = served.images, trio.current_time()
    async with served.client() as client:
        await push_image(client, "a", "v1")
    made = []
    for _ in range(10):
        await images.wait_final("a:v1")
        failed = images.statistics()["failed"]
        await images._retry(now)
        await images.wait_final("a:v1")
        made.append(images.statistics()["failed"] > failed)
        now += 600
    assert made == [True, True, False, True, False, False, False, True, False, False]


async def test_a_store_that_takes_no_changes_ends_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk that was full for the image is full for the store, too, when it is made again."""
    images = served.images
    monkeypatch.setattr(making, "_SPARE_BYTES", 1 << 60)
    async with served.client() as client:
        await push_image(client, "a", "v1")
        await images.wait_final("a:v1")

    async def refuse(change: object) -> None:
        raise StoreError("the store could not be written: No space left on device")

    with monkeypatch.context() as full:
        full.setattr(served.store, "write", refuse)
        await images._tidy(trio.current_time())
    assert caplog.text.count("No space left on device") == 2
    assert (await images.get("a:v1")).status is ImageStatus.FAILED
    await images._tidy(trio.current_time())
    await images.wait_final("a:v1")
    assert images.statistics()["failed"] == 2


async def test_collecting_on_a_full_disk_ends_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(change: object) -> None:
        raise StoreError("the store could not be written: No space left on device")

    monkeypatch.setattr(served.store, "write", refuse)
    again = Registry(store=served.store, blobs=served.images.blobs, images=served.images, max_blob_bytes=1 << 20)
    with trio.move_on_after(0.5) as scope:
        await again.run()
    assert scope.cancelled_caught
    assert "No space left on device" in caplog.text


async def test_an_outcome_is_recorded_when_the_store_takes_changes_again(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(making, "_SPARE_BYTES", 1 << 60)
    monkeypatch.setattr(image_service, "_RECORD_SECONDS", 0.01)
    settle, refusals = outcomes.settle_image, 2

    def refuse_twice(*outcome: Any) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise StoreError("the store could not be written: No space left on device")
        settle(*outcome)

    monkeypatch.setattr(image_service, "settle_image", refuse_twice)
    async with served.client() as client:
        await push_image(client, "a", "v1")
        with trio.fail_after(30):
            failed = await served.images.wait_final("a:v1")
    assert (failed.error, refusals, caplog.text.count("was not recorded")) == ("the disk is full", 0, 2)


async def test_referrers(served: Served) -> None:
    async with served.client() as client:
        await push_image(client, "a", "v1")
        await upload(client, "a", b"{}")
        document: dict[str, Any] = {
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "application/x.sbom",
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"), "size": 2},
            "layers": [], "subject": {"mediaType": OCI_MANIFEST, "digest": IMAGE.digest, "size": len(IMAGE.manifest)},
            "annotations": {"about": "v1"},
        }  # fmt: skip
        data = json.dumps(document).encode()
        put = await client.put(f"/v2/a/manifests/{digest(data)}", content=data, headers={"Content-Type": OCI_MANIFEST})
        assert (put.status_code, put.headers["oci-subject"]) == (201, IMAGE.digest)
        found = (await client.get(f"/v2/a/referrers/{IMAGE.digest}")).json()["manifests"]
        assert [(one["digest"], one["artifactType"], one["annotations"]) for one in found] == [
            (digest(data), "application/x.sbom", {"about": "v1"})
        ]
        filtered = await client.get(f"/v2/a/referrers/{IMAGE.digest}?artifactType=other")
        assert (filtered.json()["manifests"], filtered.headers["oci-filters-applied"]) == ([], "artifactType")
        assert (await client.get(f"/v2/a/referrers/{digest(b'none')}")).json()["manifests"] == []


async def test_what_nothing_refers_to_is_collected_later(served: Served) -> None:
    async with served.client() as client:
        await push_image(client, "a", "v1")
        await upload(client, "a", b"alone")
        untagged = ImageFiles([tar(entry("other", data=b"x"))])
        await push_image(client, "a", untagged.digest, untagged)
        later = served.registry._now() + timedelta(days=2)
        await served.store.write(lambda txn: records.collect(txn, later))
        assert (await client.get(f"/v2/a/manifests/{IMAGE.digest}")).status_code == 200
        assert (await client.get(f"/v2/a/blobs/{digest(IMAGE.config)}")).status_code == 200
        assert (await client.get(f"/v2/a/manifests/{untagged.digest}")).status_code == 404
        assert (await client.get(f"/v2/a/blobs/{digest(b'alone')}")).status_code == 404


async def test_what_is_just_received_is_not_evicted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection between the bytes of a blob or manifest and its record, and one that had begun before both. In a
    registry that is larger than the cache, each collection removes everything that nothing seems to need."""
    blobs, publish, trim = served.images.blobs, served.images.blobs.publish, served.images.blobs.trim
    served.images._cache_size = 0

    def publish_and_collect(fd: int, partial: Path, name: str) -> None:
        publish(fd, partial, name)
        trio.from_thread.run(served.images.collect)

    async with served.client() as client:
        with monkeypatch.context() as racing:
            racing.setattr(blobs, "publish", publish_and_collect)
            await push_image(client, "a", "v1")

        def trim_late(limit: int, keep: Any) -> int:
            racing.undo()
            trio.from_thread.run(push_image, client, "b", "v1", other)
            return trim(limit, keep)

        other = ImageFiles([tar(entry("other", data=b"x"))])
        racing.setattr(blobs, "trim", trim_late)
        await served.images.collect()
        await served.images.collect()
        for repository, image in (("a", IMAGE), ("b", other)):
            assert (await client.get(f"/v2/{repository}/manifests/v1")).content == image.manifest
            for name, data in image.blobs.items():
                assert (await client.get(f"/v2/{repository}/blobs/{name}")).content == data
    assert not blobs._claims


async def test_logging_in(served: Served) -> None:
    async with httpx.AsyncClient(base_url=f"http://{served.host}") as client:
        refused = await client.get("/v2/")
        assert (refused.status_code, refused.json()["errors"][0]["code"]) == (401, "UNAUTHORIZED")
        realm = f'Bearer realm="http://{served.host}/v2/token",service="hypeman"'
        assert refused.headers["www-authenticate"] == realm
        assert (await client.get("/v2/token")).status_code == 401
        for login in (f"user:{served.token}", f"{served.token}:"):
            basic = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
            given = await client.get("/v2/token?scope=repository:a:pull,push&service=hypeman", headers=basic)
            assert given.json()["expires_in"] == 300
            exchanged = {"Authorization": f"Bearer {given.json()['token']}"}
            for headers in (basic, exchanged):
                assert (await client.get("/v2/", headers=headers)).status_code == 200
                assert (await client.get("/v2/a/tags/list", headers=headers)).status_code == 404
        wrong = {"Authorization": "Basic " + base64.b64encode(b"user:wrong").decode()}
        assert (await client.get("/v2/token?scope=repository:a:pull", headers=wrong)).status_code == 401
        guest = (await client.get("/v2/token?scope=repository:a:pull")).json()
        assert guest["expires_in"] == 60
        denied = await client.get("/v2/a/tags/list", headers={"Authorization": f"Bearer {guest['token']}"})
        assert (denied.status_code, denied.json()["errors"][0]["code"]) == (401, "UNAUTHORIZED")
    reader = mint(SECRET, subject="reader", scopes=["image:read"])
    async with served.client(reader) as client:
        assert (await client.get("/v2/")).status_code == 200
        assert (await client.post("/v2/a/blobs/uploads/")).status_code == 403


async def exchanged(served: Served, login: str, *scopes: str) -> str:
    """What the token service gives for a login and scopes."""
    async with served.client(login) as client:
        answer = await client.get("/v2/token", params={"scope": list(scopes), "service": "hypeman"})
        assert answer.status_code == 200, answer.text
        token = answer.json()["token"]
        assert isinstance(token, str)
        return token


async def test_a_token_of_the_token_service_is_for_what_was_asked(served: Served) -> None:
    """For these repositories and actions, and not for the API."""
    async with served.client() as client:
        await upload(client, "team/app", b"one")
        await upload(client, "other/app", b"two")
    one, two = digest(b"one"), digest(b"two")
    narrow = await exchanged(served, served.token, "repository:team/app:pull,push repository:team/lib:pull")
    async with served.client(narrow) as client:
        assert (await client.get("/v2/")).status_code == 200
        assert (await client.get(f"/v2/team/app/blobs/{one}")).content == b"one"
        at = (await client.post("/v2/team/app/blobs/uploads/")).headers["location"]
        assert (await client.delete(at)).status_code == 204, "an upload is cancelled by who may push"
        for method, path, scope in (
            ("GET", f"/v2/other/app/blobs/{two}", "repository:other/app:pull"),
            ("POST", "/v2/team/lib/blobs/uploads/", "repository:team/lib:pull,push"),
            ("DELETE", f"/v2/team/app/blobs/{one}", "repository:team/app:delete"),
        ):
            refused = await client.request(method, path)
            assert refused.status_code == 401, path
            assert f'scope="{scope}",error="insufficient_scope"' in refused.headers["www-authenticate"]
        for source in ("&from=other/app", ""):
            answer = await client.post(f"/v2/team/app/blobs/uploads/?mount={two}{source}")
            assert answer.status_code == 202, "a blob of a repository that the token does not open is uploaded"
        assert (await client.get(f"/v2/team/app/blobs/{two}")).status_code == 404
        for path in ("/images", "/instances", "/pushes"):
            assert (await client.get(path)).status_code == 403, path


async def test_a_login_may_be_for_one_repository(served: Served) -> None:
    """It is narrowed, not widened, by the token service."""
    grants = parse_grants("team/app:pull") | parse_grants("localhost:5000/x")
    login = mint(SECRET, subject="ci", grants=grants, lifetime=100)
    async with served.client() as client:
        await upload(client, "team/app", b"one")
    wide = await exchanged(served, login, "repository:team/app:*", "repository:other:pull,push", "registry:catalog:*")
    for token in (login, wide):
        async with served.client(token) as client:
            assert (await client.get(f"/v2/team/app/blobs/{digest(b'one')}")).status_code == 200
            assert (await client.post("/v2/team/app/blobs/uploads/")).status_code == 401
            assert (await client.post("/v2/other/blobs/uploads/")).status_code == 401
    claims = jwt.decode(wide, options={"verify_signature": False})
    assert claims["repo_access"] == [{"repo": "team/app", "scope": "pull"}] and claims["exp"] - claims["iat"] <= 100
    async with served.client(login) as client:
        assert (await client.post("/v2/localhost:5000/x/blobs/uploads/")).status_code == 202
    reader = mint(SECRET, subject="reader", scopes=["image:read"])
    async with served.client(await exchanged(served, reader, "repository:team/app:pull,push")) as client:
        assert (await client.get(f"/v2/team/app/blobs/{digest(b'one')}")).status_code == 200
        assert (await client.post("/v2/team/app/blobs/uploads/")).status_code == 401


async def test_unknown_paths_and_methods(served: Served) -> None:
    async with served.client() as client:
        assert (await client.get("/v2/a/what")).status_code == 404
        assert (await client.get("/v2/UPPER/Case/tags/list")).status_code == 400
        wrong = await client.delete("/v2/a/tags/list")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize("repository", ["..", "../a", "./a", "-/a", ".:80/a", "a/../b", "A"])
def test_what_is_no_repository(repository: str) -> None:
    with pytest.raises(RegistryFailure, match="not a repository name"):
        parse_path(f"{repository}/tags/list")


@pytest.mark.parametrize(
    ("rest", "kind", "repository", "reference"),
    [
        ("a/blobs/uploads/", "uploads", "a", ""),
        ("a/b/blobs/uploads/1", "upload", "a/b", "1"),
        ("quay.io:5000/a/manifests/v1", "manifest", "quay.io:5000/a", "v1"),
        ("a/blobs/manifests/v1", "manifest", "a/blobs", "v1"),
    ],
)
def test_paths(rest: str, kind: str, repository: str, reference: str) -> None:
    found = parse_path(rest)
    assert (found.kind, found.repository, found.reference) == (kind, repository, reference)


def test_ranges_and_references() -> None:
    assert parse_byte_range("bytes=0-", 10) == (0, 10)
    assert parse_byte_range("bytes=-3", 10) == (7, 10)
    assert parse_byte_range("bytes=5-100", 10) == (5, 10)
    assert parse_byte_range("items=0-1", 10) is None
    with pytest.raises(RegistryFailure):
        parse_byte_range("bytes=10-", 10)
    assert parse_content_range("0-99") == (0, 99)
    with pytest.raises(RegistryFailure) as wrong:
        parse_content_range("9-0")
    assert (wrong.value.code, wrong.value.status) == (Code.RANGE_INVALID, 416)
    assert is_digest(f"sha256:{'0' * 64}") and not is_digest("v1.0")
    for bad in ("sha256:short", "sha512:abc", ".hidden", "a b"):
        with pytest.raises(RegistryFailure):
            is_digest(bad)
