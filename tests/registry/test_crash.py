"""SIGKILL at every write and commit of uploads and of a push: what is there afterwards is whole, and the client's next
attempt ends as an undisturbed one does."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from hypeman.config import ImagesConfig
from hypeman.images.records import NAMES
from hypeman.images.reference import parse_reference
from hypeman.images.registry import RegistryClient
from hypeman.images.service import Images
from hypeman.images.types import ImageStatus
from hypeman.paths import Paths
from hypeman.registry.push_types import CreatePushRequest, Push, PushStatus
from hypeman.registry.pushes import PUSHES, Pushes
from hypeman.registry.records import BLOBS, TAGS, digests_in_use, forget_image
from hypeman.registry.service import Registry
from hypeman.store import Store
from tests.crash import run_until_killed
from tests.images.conftest import need_root
from tests.images.crash_points import Points
from tests.images.layout import OCI_MANIFEST, ImageFiles, archive_directory, entry, in_pieces, sha256, tar
from tests.images.test_crash import kill_workers_too, open_store

pytestmark = [pytest.mark.real, pytest.mark.slow]

IMAGE = ImageFiles([tar(entry("one", data=os.urandom(1000))), tar(entry("two", data=os.urandom(3000)))])
OTHER = "cached/elsewhere"
"""A repository from which a layer is mounted."""


class Life:
    """One life of a server."""

    def __init__(self, store: Store, images: Images, registry: Registry, host: str) -> None:
        self.store = store
        self.images = images
        self.registry = registry
        self.host = host
        """Of another registry."""

    @asynccontextmanager
    async def pushing(self) -> AsyncIterator[Pushes]:
        pushes = Pushes(
            store=self.store, images=self.images, blobs=self.images.blobs, client=self.images.client, delay=0.01
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(pushes.run)
            yield pushes
            nursery.cancel_scope.cancel()


Story = Callable[[Life], Awaitable[None]]


async def live(paths: Paths, host: str, *stories: Story) -> None:
    store = open_store(paths)
    config = ImagesConfig(docker_config="/nonexistent", insecure_registries=(host,))
    images = Images(store=store, paths=paths, config=config, kept=digests_in_use, on_delete=forget_image)
    registry = Registry(store=store, blobs=images.blobs, images=images, max_blob_bytes=1 << 20)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await nursery.start(images.run)
        await nursery.start(registry.run)
        for story in stories:
            with trio.fail_after(120):
                await story(Life(store, images, registry, host))
        nursery.cancel_scope.cancel()
    store.close()


def killed_at(at: int, journal: Path, paths: Paths, host: str, story: Story) -> bool:
    """``story`` in a process that dies at point number ``at``; whether it came so far."""
    workers = partial(kill_workers_too, journal, at)
    return run_until_killed(partial(live, paths, host, story), journal, at, _count_requests, workers)


def _count_requests(points: Points) -> None:
    RegistryClient.send = points.before(RegistryClient.send)  # type: ignore[method-assign]


async def upload(life: Life) -> None:
    """A layer at once, one in pieces, the config mounted from another repository, then the manifest."""
    registry = life.registry
    first, second, config = IMAGE.blobs.items()
    await registry.put_blob("team/app", first[0], in_pieces(first[1], 1 << 10))
    name = await registry.begin("team/app")
    at = len(second[1]) // 2
    await registry.receive("team/app", name, in_pieces(second[1][:at], 1 << 10), (0, at - 1))
    await registry.receive("team/app", name, in_pieces(second[1][at:], 1 << 10))
    await registry.finish("team/app", name, second[0])
    if not await registry.mount("team/app", config[0], OTHER):
        await registry.put_blob(OTHER, config[0], in_pieces(config[1], 1 << 10))
        assert await registry.mount("team/app", config[0], OTHER)
    await registry.put_manifest("team/app", "v1", IMAGE.manifest, OCI_MANIFEST)


async def upload_until_ready(life: Life) -> None:
    await upload(life)
    assert (await life.images.wait_final("team/app:v1")).status is ImageStatus.READY


async def check_upload(life: Life) -> None:
    """No tag without its image, nothing readable that is not whole, no file of an upload."""
    blobs = life.images.blobs
    for key, _ in life.store.read(lambda txn: list(txn.scan(BLOBS))):
        digest = key.rpartition("@")[2]
        assert sha256(blobs.read(digest, 1 << 20) or b"") == digest, key
    for key, row in life.store.read(lambda txn: list(txn.scan(TAGS))):
        assert (row.image, row.adopting) == ("docker.io/team/app:v1", False), f"{key} has no image"
    names = life.store.read(lambda txn: list(txn.keys(NAMES)))
    assert len(names) == len(life.store.read(lambda txn: list(txn.keys(TAGS))))
    for name in names:
        assert (await life.images.wait_final(name)).status is ImageStatus.READY
    assert list((blobs.path("sha256:").parent / "partial").iterdir()) == []
    assert not life.registry._uploads


async def check_image(life: Life) -> None:
    found = await life.images.wait_final("team/app:v1")
    assert (found.status, found.digest) == (ImageStatus.READY, IMAGE.digest)
    whole = {path.name for path in life.images.blobs.path("sha256:").iterdir()}
    assert whole == {digest.removeprefix("sha256:") for digest in (*IMAGE.blobs, IMAGE.digest)}


def test_an_upload_killed_at_every_write(tmp_path: Path) -> None:
    """Also while the image of it is made and stored."""
    need_root()
    at, reached = 0, True
    while reached:
        at += 1
        paths = Paths(tmp_path / f"data-{at}", tmp_path / "run")
        reached = killed_at(at, tmp_path / f"journal-{at}", paths, "none:1", upload_until_ready)
        try:
            trio.run(live, paths, "none:1", check_upload, upload, check_image)
        except BaseException as error:
            error.add_note(f"killed at point {at}")
            raise
    assert at > 40, "fewer than alone if commits are joined on a busy machine"


async def import_image(life: Life) -> None:
    archive = archive_directory(IMAGE.write_layout(life.images.blobs.path("").parent / "layout"))
    await life.images.import_archive(in_pieces(archive), name="local/app:v1")
    assert (await life.images.wait_final("local/app:v1")).status is ImageStatus.READY


async def push(target: str, life: Life) -> None:
    async with life.pushing() as pushes:
        await pushes.create(CreatePushRequest(image="local/app:v1", target=target))
        await all_ended(pushes)


async def check_push(target: str, life: Life) -> None:
    async with life.pushing() as pushes:
        assert [push.status for push in await all_ended(pushes)] == [PushStatus.PUSHED]
    assert (await life.images.client.manifest(parse_reference(target))).digest == IMAGE.digest


async def all_ended(pushes: Pushes) -> Sequence[Push]:
    while True:
        found = await pushes.list()
        if all(push.status.is_final for push in found):
            return found
        await trio.sleep(0.01)


def test_a_push_killed_at_every_commit_and_request(registry_host: str, tmp_path: Path) -> None:
    """The next server ends it, and the other registry has the same image; what was not accepted was not begun."""
    need_root()
    imported = Paths(tmp_path / "imported", tmp_path / "run")
    trio.run(live, imported, registry_host, import_image)
    at, reached = 0, True
    while reached:
        at += 1
        paths = Paths(tmp_path / f"data-{at}", tmp_path / "run")
        shutil.copytree(imported.data_dir, paths.data_dir)
        target = f"{registry_host}/crash/app:{at}"

        reached = killed_at(at, tmp_path / f"journal-{at}", paths, registry_host, partial(push, target))
        stories: list[Story] = [] if accepted(paths) else [partial(push, target)]
        stories.append(partial(check_push, target))
        trio.run(live, paths, registry_host, *stories)
    assert at > 8


def accepted(paths: Paths) -> bool:
    store = open_store(paths)
    try:
        return any(store.read(lambda txn: list(txn.keys(PUSHES))))
    finally:
        store.close()
