"""SIGKILL at every write of a pull or an import: whatever was reached, a restart ends with the right image,
and with nothing beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from hypeman.config import ImagesConfig
from hypeman.errors import StoreError
from hypeman.images import worker
from hypeman.images.records import IMAGES
from hypeman.images.service import Images
from hypeman.images.types import CreateImageRequest, ImageStatus
from hypeman.paths import Paths
from hypeman.store import Store
from tests.crash import run_until_killed
from tests.images.conftest import need_root, push
from tests.images.crash_points import Points
from tests.images.layout import ImageFiles, archive_directory, directory, entry, in_pieces, tar
from tests.images.trees import make_disk

FILES = ImageFiles(
    [
        tar(directory("etc"), entry("etc/small", data=b"small"), entry("etc/gone", data=os.urandom(100_000))),
        tar(entry("etc/.wh.gone"), entry("etc/large", data=os.urandom(3 << 20))),
    ],
    compression="none",
)


def open_store(paths: Paths) -> Store:
    """The store, as soon as its lock is free: a worker that was being started when its server was killed
    has the server's descriptors until its exec."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return Store.open(paths.store)
        except StoreError:
            assert time.monotonic() < deadline, "the lock of a dead server is still held"
            time.sleep(0.01)


Ask = Callable[[Images], Awaitable[object]]


async def live(paths: Paths, config: ImagesConfig, name: str, ask: Ask | None) -> None:
    """One life of a server: start, ask for the image, wait until it is ready."""
    store = open_store(paths)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        images = Images(store=store, paths=paths, config=config)
        await nursery.start(images.run)
        if ask is not None:
            await ask(images)
        with trio.fail_after(60):
            image = await images.wait_final(name)
        assert image.status is ImageStatus.READY, image.error
        nursery.cancel_scope.cancel()
    store.close()


def life_that_is_killed(paths: Paths, config: ImagesConfig, name: str, ask: Ask, journal: Path, at: int) -> bool:
    """``live`` in a process that dies at write number ``at``, or whose worker does; whether it came so far."""
    workers = partial(kill_workers_too, journal, at)
    return run_until_killed(partial(live, paths, config, name, ask), journal, at, workers)


def kill_workers_too(journal: Path, at: int, points: Points) -> None:
    """The writes of workers that convert images count, too, and they die with their server."""
    script, server = str(Path(__file__).with_name("crash_worker.py")), str(os.getpid())
    run = ["env", f"PYTHONPATH={Path(__file__).parents[2]}", sys.executable, script]
    worker.argv = lambda fd: [*run, str(fd), str(journal), str(at), server]


def check_records(paths: Paths) -> None:
    """Nothing is called ready whose disk is not whole."""
    store = open_store(paths)
    try:
        for digest, row in store.read(lambda txn: list(txn.scan(IMAGES))):
            if row.status is ImageStatus.READY:
                disk = paths.images / digest.removeprefix("sha256:") / "root.erofs"
                assert disk.stat().st_size == row.size
    finally:
        store.close()


@pytest.mark.real
@pytest.mark.slow
def test_kill_at_every_write(registry_host: str, tmp_path: Path) -> None:
    need_root()
    name = f"{registry_host}/test/crash:1"
    push(FILES.write_layout(tmp_path / "oci"), name)
    config = ImagesConfig(insecure_registries=(registry_host,), docker_config="/nonexistent")
    visited = visit(tmp_path, config, name, lambda images: images.create(CreateImageRequest(name)))
    assert visited > 30


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("form", ["archive", "layout"])
def test_kill_at_every_write_of_an_import(form: str, tmp_path: Path) -> None:
    """Until the image is written down; from there on it is made as after a pull."""
    need_root()
    layout = FILES.write_layout(tmp_path / "oci")
    archive = archive_directory(layout)
    name = "localhost/crash:1"

    async def ask(images: Images) -> None:
        if form == "archive":
            await images.import_archive(in_pieces(archive, 1 << 20), name=name)
        else:
            await images.import_path(str(layout), name=name)

    config = ImagesConfig(import_paths=(str(tmp_path),), docker_config="/nonexistent")
    visited = visit(tmp_path, config, name, ask, until_asked=True)
    assert visited > 10


def visit(tmp_path: Path, config: ImagesConfig, name: str, ask: Ask, *, until_asked: bool = False) -> int:
    """Die at every write, or every one before the image is in the records; how many there were."""
    expected = make_disk(FILES.layers)
    at, visited, asked = 0, 0, False
    while not (until_asked and asked):
        at += 1
        paths = Paths(tmp_path / f"data-{at}", tmp_path / "run")
        reached = life_that_is_killed(paths, config, name, ask, tmp_path / f"journal-{at}", at)
        check_records(paths)
        store = open_store(paths)
        asked = bool(store.read(lambda txn: list(txn.scan(IMAGES))))
        store.close()
        trio.run(live, paths, config, name, None if asked else ask)
        (directory_,) = paths.images.iterdir()
        assert sorted(file.name for file in directory_.iterdir()) == ["config.json", "root.erofs"]
        disk = (directory_ / "root.erofs").read_bytes()
        assert disk[4096:] == expected[4096:], f"killed at write {at}: another disk"
        assert list(paths.tmp.iterdir()) == [] and list((paths.blobs / "partial").iterdir()) == []
        if not reached:
            break
        visited += 1
        subprocess.run(["rm", "-rf", paths.data_dir], check=True)
    print(f"killed at {visited} points; every restart ended with the same image")
    return visited
