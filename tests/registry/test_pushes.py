"""Pushes to Debian's docker-registry, with and without a login, interrupted and refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec import UNSET

from hypeman.errors import Conflict, InvalidRequest, NotFound
from hypeman.images.types import ImageStatus, PushCredentials
from hypeman.registry.names import Code, RegistryFailure
from hypeman.registry.push_types import CreatePushRequest, Push, PushStatus
from hypeman.registry.pushes import PUSHES, Pushes, PushRow
from tests.images.conftest import need_root
from tests.images.layout import OCI_INDEX, OCI_MANIFEST, ImageFiles, archive_directory, entry, in_pieces, tar
from tests.registry.conftest import Served

pytestmark = [pytest.mark.real, pytest.mark.slow]

IMAGE = ImageFiles([tar(entry("one", data=b"1")), tar(entry("two", data=b"2" * 5000))])


@asynccontextmanager
async def working(served: Served) -> AsyncIterator[Pushes]:
    pushes = Pushes(
        store=served.store, images=served.images, blobs=served.images.blobs, client=served.images.client, delay=0.01
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(pushes.run)
        yield pushes
        nursery.cancel_scope.cancel()


async def imported(served: Served, tmp_path: Path) -> None:
    need_root()
    archive = archive_directory(IMAGE.write_layout(tmp_path / "layout"))
    await served.images.import_archive(in_pieces(archive), name="local/app:v1")
    assert (await served.images.wait_final("local/app:v1")).status is ImageStatus.READY


async def ended(pushes: Pushes, push: Push) -> Push:
    with trio.fail_after(30):
        while not (found := await pushes.get(push.id)).status.is_final:
            await trio.sleep(0.02)
    return found


async def test_an_image_is_pushed_and_is_the_same(served: Served, registry_host: str, tmp_path: Path) -> None:
    await imported(served, tmp_path)
    async with working(served) as pushes:
        target = f"{registry_host}/pushed/app:v2"
        made = await pushes.create(CreatePushRequest(image="local/app:v1", target=target))
        done = await ended(pushes, made)
        assert (done.status, done.error, done.layers) == (PushStatus.PUSHED, None, 2)
        assert done.bytes == sum(layer["size"] for layer in IMAGE.layer_descriptors)
        raw = await served.skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{target}")
        assert raw.encode() == IMAGE.manifest
        again = await ended(pushes, await pushes.create(CreatePushRequest(image="local/app:v1", target=target)))
        assert [push.id for push in await pushes.list()] == [again.id, made.id]


async def test_an_image_of_an_index_is_pushed_with_all_of_it(served: Served, registry_host: str) -> None:
    """Platforms and attestations; once another image has the name, that alone."""
    need_root()
    statement = ImageFiles([b"a statement"], compression="none", media_type="application/vnd.in-toto+json")
    index = json.dumps({
        "schemaVersion": 2, "mediaType": OCI_INDEX,
        "manifests": [
            {"mediaType": OCI_MANIFEST, "digest": each.digest, "size": len(each.manifest), "platform": platform}
            for each, platform in (
                (IMAGE, {"os": "linux", "architecture": "amd64"}),
                (statement, {"os": "unknown", "architecture": "unknown"}),
            )
        ],
    }).encode()  # fmt: skip
    registry = served.registry
    for each in (IMAGE, statement):
        for digest, data in each.blobs.items():
            await registry.put_blob("team/attested", digest, in_pieces(data))
        await registry.put_manifest("team/attested", each.digest, each.manifest, OCI_MANIFEST)
    await registry.put_manifest("team/attested", "v1", index, OCI_INDEX)
    assert (await served.images.wait_final("team/attested:v1")).status is ImageStatus.READY
    target = f"{registry_host}/pushed/attested"
    async with working(served) as pushes:
        done = await ended(
            pushes, await pushes.create(CreatePushRequest(image="team/attested:v1", target=f"{target}:v1"))
        )
        assert (done.status, done.error, done.layers) == (PushStatus.PUSHED, None, 3)
        assert await raw(served, f"{target}:v1") == index
        assert await raw(served, f"{target}@{statement.digest}") == statement.manifest
        await registry.put_manifest("team/attested", "v1", IMAGE.manifest, OCI_MANIFEST)
        assert (await served.images.wait_final("team/attested:v1")).status is ImageStatus.READY
        await ended(pushes, await pushes.create(CreatePushRequest(image="team/attested:v1", target=f"{target}:v2")))
        assert await raw(served, f"{target}:v2") == IMAGE.manifest


async def raw(served: Served, name: str) -> bytes:
    """The manifest that a registry has."""
    return (await served.skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{name}")).encode()


async def test_logins(served: Served, tmp_path: Path) -> None:
    """The peer is this server's own registry, whose login is a token."""
    await imported(served, tmp_path)
    async with working(served) as pushes:

        async def pushed(password: str) -> Push:
            request = CreatePushRequest(
                image="local/app:v1",
                target=f"{served.host}/mirror/app:v1",
                insecure=True,
                credentials=PushCredentials(username="any", password=password),
            )
            return await ended(pushes, await pushes.create(request))

        refused = await pushed("wrong")
        assert (refused.status, "login" in (refused.error or "")) == (PushStatus.FAILED, True)
        done = await pushed(served.token)
        assert (done.status, done.error) == (PushStatus.PUSHED, None)
        assert (await served.images.wait_final("mirror/app:v1")).digest == IMAGE.digest
        kept = repr(served.store.read(lambda txn: list(txn.scan(PUSHES))))
        assert served.token not in kept and "wrong" not in kept


async def test_refusals(served: Served, tmp_path: Path) -> None:
    await imported(served, tmp_path)
    async with working(served) as pushes:
        with pytest.raises(NotFound):
            await pushes.create(CreatePushRequest(image="none", target="quay.io/a:v1"))
        for wrong in ("UPPER CASE", f"quay.io/a@sha256:{'0' * 64}"):
            with pytest.raises(InvalidRequest) as failure:
                await pushes.create(CreatePushRequest(image="local/app:v1", target=wrong))
            assert failure.value.code == "invalid_target"
        nobody = CreatePushRequest(image="local/app:v1", target="localhost:1/a:v1", insecure=True)
        failed = await ended(pushes, await pushes.create(nobody))
        assert (failed.status, "localhost:1" in (failed.error or "")) == (PushStatus.FAILED, True)


async def to_ourselves(served: Served, pushes: Pushes, tag: str) -> Push:
    """A push to this server's own registry."""
    request = CreatePushRequest(
        image="local/app:v1",
        target=f"{served.host}/mirror/app:{tag}",
        insecure=True,
        credentials=PushCredentials(username="any", password=served.token),
    )
    return await pushes.create(request)


async def test_progress_and_cancellation(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the queue, while a layer is sent, and not once the image appears."""
    await imported(served, tmp_path)
    held, received = trio.Event(), served.registry.receive

    async def hold(*arguments: Any) -> int:
        size = await received(*arguments)
        await held.wait()
        return size

    monkeypatch.setattr(served.registry, "receive", hold)
    async with working(served) as pushes:
        first, second, waiting, last = [await to_ourselves(served, pushes, f"v{number}") for number in range(4)]
        layer = IMAGE.layer_descriptors[0]["size"]
        with trio.fail_after(30):
            while (running := await pushes.get(first.id)).bytes_done != layer:
                await trio.sleep(0.01)
        assert running.bytes == sum(layer["size"] for layer in IMAGE.layer_descriptors)
        assert (await pushes.get(last.id)).queue_position == 2
        await pushes.cancel(waiting.id)
        await pushes.cancel(first.id)
        for cancelled in (waiting, first):
            done = await ended(pushes, cancelled)
            assert (done.status, done.error, done.bytes_done) == (PushStatus.FAILED, "cancelled", UNSET)
            with pytest.raises(Conflict, match="is over"):
                await pushes.cancel(cancelled.id)
        with pytest.raises(NotFound):
            await pushes.cancel("none")
        held.set()
        for continued in (second, last):
            assert (await ended(pushes, continued)).status is PushStatus.PUSHED
        assert pushes._logins == {} and pushes._running == {}
        assert await served.registry.tags("mirror/app", last="", limit=None) == (["v1", "v3"], False)


async def test_an_image_that_appears_is_not_cancelled(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await imported(served, tmp_path)
    begun, held, put = trio.Event(), trio.Event(), served.registry.put_manifest

    async def hold(*arguments: Any) -> tuple[str, str]:
        begun.set()
        await held.wait()
        return await put(*arguments)

    monkeypatch.setattr(served.registry, "put_manifest", hold)
    async with working(served) as pushes:
        made = await to_ourselves(served, pushes, "v1")
        with trio.fail_after(30):
            await begun.wait()
        with pytest.raises(Conflict, match="appearing"):
            await pushes.cancel(made.id)
        held.set()
        assert (await ended(pushes, made)).status is PushStatus.PUSHED


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.TOOMANYREQUESTS])
async def test_what_passes_is_tried_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code
) -> None:
    await imported(served, tmp_path)
    failures, received = [2, 1, 1, 0], served.registry.receive

    async def fail(*arguments: Any) -> int:
        if failures[0]:
            failures[0] -= 1
            raise RegistryFailure(code, "not now", headers={"Retry-After": "0"})
        failures.pop(0)
        return await received(*arguments)

    monkeypatch.setattr(served.registry, "receive", fail)
    async with working(served) as pushes:
        done = await ended(pushes, await to_ourselves(served, pushes, "v1"))
        assert (done.status, done.error, failures) == (PushStatus.PUSHED, None, [0])


async def test_an_interrupted_push_is_begun_again_unless_its_login_is_gone(
    served: Served, registry_host: str, tmp_path: Path
) -> None:
    await imported(served, tmp_path)
    image = await served.images.get("local/app:v1")

    def interrupted(name: str) -> Push:
        return Push(
            id=name,
            image=image.name,
            digest=image.digest,
            target=f"{registry_host}/again/{name}:v1",
            status=PushStatus.PUSHING,
            created_at=image.created_at,
        )

    await served.store.write(lambda txn: txn.put(PUSHES, "a", PushRow(interrupted("a"))))
    await served.store.write(lambda txn: txn.put(PUSHES, "b", PushRow(interrupted("b"), borrowed=True)))
    async with working(served) as pushes:
        assert (await ended(pushes, interrupted("a"))).status is PushStatus.PUSHED
        lost = await ended(pushes, interrupted("b"))
        assert (lost.status, "login was not kept" in (lost.error or "")) == (PushStatus.FAILED, True)


async def test_an_image_that_is_not_ready(served: Served, tmp_path: Path) -> None:
    need_root()
    broken = ImageFiles([b"no tar"])
    archive = archive_directory(broken.write_layout(tmp_path / "layout"))
    await served.images.import_archive(in_pieces(archive), name="local/broken:v1")
    await served.images.wait_final("local/broken:v1")
    async with working(served) as pushes:
        with pytest.raises(Conflict) as failure:
            await pushes.create(CreatePushRequest(image="local/broken:v1", target="quay.io/a:v1"))
        assert failure.value.code == "image_not_ready"
