"""Volumes on a real file system: whole or not there, filled safely, shared by the rules."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
import tarfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial

import pytest
import trio

from hypeman.errors import AlreadyExists, Conflict, InsufficientResources, InvalidRequest, NotFound
from hypeman.host.disks import Disks
from hypeman.host.files import Files
from hypeman.host.processes import Processes
from hypeman.images.convert import fill_volume
from hypeman.paths import Paths
from hypeman.store import Store
from hypeman.volumes import records
from hypeman.volumes.records import Attachment
from hypeman.volumes.service import Volumes
from hypeman.volumes.types import CreateVolumeRequest


@pytest.fixture
def volumes(store: Store, paths: Paths) -> Volumes:
    files = Files()
    disks = Disks(files, Processes(), paths.templates)
    fill = partial(fill_volume, trio.CapacityLimiter(1))
    return Volumes(store=store, paths=paths, files=files, disks=disks, fill=fill, max_total=8 << 30)


async def test_a_volume_larger_than_the_free_space_is_refused(store: Store, paths: Paths) -> None:
    files = Files()
    small = Volumes(
        store=store, paths=paths, files=files, disks=Disks(files, Processes(), paths.templates),
        fill=partial(fill_volume, trio.CapacityLimiter(1)), room=lambda: 2 << 30,
    )  # fmt: skip
    with pytest.raises(InvalidRequest, match="3 GB does not fit: 2 GB are free") as refusal:
        await small.create(CreateVolumeRequest(name="big", size_gb=3))
    assert str(paths.data_dir) not in refusal.value.message
    await small.create(CreateVolumeRequest(name="fits", size_gb=1))


async def test_what_volumes_occupy(volumes: Volumes) -> None:
    assert await volumes.used_bytes() == 0
    await volumes.create(CreateVolumeRequest(name="empty", size_gb=1))
    empty = await volumes.used_bytes()
    assert 0 < empty < sum(volumes.sizes()) == 1 << 30, "disks are sparse"
    archive = tar_gz(("data", random.Random(1).randbytes(5 << 20)))
    await volumes.create_from_archive(CreateVolumeRequest(name="full", size_gb=1), in_chunks(archive, 1 << 16))
    assert await volumes.used_bytes() >= 2 * empty + (5 << 20)


def tar_gz(*entries: tuple[str, bytes | None], links: dict[str, str] | None = None) -> bytes:
    """An archive of files (None: a directory) and symbolic links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o750
                archive.addfile(info)
            else:
                info.size, info.mode = len(content), 0o640
                archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def hard_link_out_of_it() -> bytes:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = tarfile.LNKTYPE, "../../../../etc/passwd"
    return gzip.compress(info.tobuf() + bytes(1024))


async def in_chunks(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        await trio.lowlevel.checkpoint()
        yield data[start : start + size]


def debugfs(disk: object, command: str) -> str:
    return subprocess.run(["debugfs", "-R", command, str(disk)], capture_output=True, text=True, check=True).stdout


async def test_a_new_volume_is_a_clean_sparse_ext4(volumes: Volumes, paths: Paths) -> None:
    made = await volumes.create(CreateVolumeRequest(name="data", size_gb=1, tags={"team": "a"}))
    disk = paths.volume_disk(made.id)
    assert disk.stat().st_size == 1 << 30
    assert disk.stat().st_blocks * 512 < 32 << 20
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, capture_output=True)
    assert await volumes.get(made.id) == await volumes.get("data") == made
    assert list(await volumes.list(tags={"team": "a"})) == [made]
    assert list(await volumes.list(tags={"team": "b"})) == []


async def test_a_chosen_id_is_taken_once(volumes: Volumes, paths: Paths) -> None:
    await volumes.create(CreateVolumeRequest(name="one", size_gb=1, id="mine"))
    with pytest.raises(AlreadyExists):
        await volumes.create(CreateVolumeRequest(name="two", size_gb=1, id="mine"))
    assert [path.name for path in paths.volumes.iterdir()] == ["mine"]


async def test_of_two_creates_with_one_id_one_wins(volumes: Volumes, paths: Paths) -> None:
    outcomes: list[str] = []

    async def create(name: str) -> None:
        try:
            await volumes.create(CreateVolumeRequest(name=name, size_gb=1, id="mine"))
            outcomes.append("made")
        except AlreadyExists:
            outcomes.append("refused")

    async with trio.open_nursery() as nursery:
        for name in "abcde":
            nursery.start_soon(create, name)
    assert sorted(outcomes) == ["made"] + ["refused"] * 4
    assert paths.volume_disk("mine").exists()
    assert not list(paths.tmp.iterdir())


@pytest.mark.parametrize("identifier", ["../x", "a/b", "", "hm-x", "x" * 65, ".hidden", "a b"])
async def test_ids_that_are_no_file_names_are_refused(volumes: Volumes, identifier: str) -> None:
    request = CreateVolumeRequest(name="x", size_gb=1, id=identifier)
    if identifier == "":
        assert (await volumes.create(request)).id  # as if none was given
        return
    with pytest.raises(InvalidRequest):
        await volumes.create(request)


async def test_the_sum_of_all_is_bounded(volumes: Volumes) -> None:
    await volumes.create(CreateVolumeRequest(name="x", size_gb=7))
    with pytest.raises(InsufficientResources):
        await volumes.create(CreateVolumeRequest(name="y", size_gb=2))
    await volumes.create(CreateVolumeRequest(name="z", size_gb=1))


async def test_an_archive_fills_a_volume(volumes: Volumes, paths: Paths) -> None:
    data = tar_gz(("dir", None), ("dir/file", b"hello\n" * 1000), links={"dir/link": "file"})
    made = await volumes.create_from_archive(CreateVolumeRequest(name="x", size_gb=1), in_chunks(data))
    disk = paths.volume_disk(made.id)
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, capture_output=True)
    assert debugfs(disk, "cat /dir/file") == "hello\n" * 1000
    assert 'Fast link dest: "file"' in debugfs(disk, "stat /dir/link")
    assert "0750" in debugfs(disk, "stat /dir")
    assert not list(paths.tmp.iterdir())


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (hard_link_out_of_it(), "invalid_request"),
        (b"this is no archive", "invalid_request"),
        (tar_gz(("file", b"x" * 100_000))[:-50], "invalid_request"),
        (b"", "invalid_request"),
    ],
)
async def test_bad_archives_leave_nothing(volumes: Volumes, paths: Paths, data: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await volumes.create_from_archive(CreateVolumeRequest(name="x", size_gb=1), in_chunks(data))
    assert caught.value.code == code
    assert not list(paths.tmp.iterdir()) and not list(paths.volumes.iterdir())
    assert list(await volumes.list(tags={})) == []


async def test_an_archive_larger_than_its_volume_is_refused(volumes: Volumes, paths: Paths) -> None:
    """Refused by the announced sizes, before the bytes are written."""
    header = tarfile.TarInfo("big")
    header.size = 2 << 30
    data = gzip.compress(header.tobuf())
    with pytest.raises(InvalidRequest) as caught:
        await volumes.create_from_archive(CreateVolumeRequest(name="x", size_gb=1), in_chunks(data))
    assert caught.value.code == "archive_too_large"
    assert not list(paths.tmp.iterdir())


async def test_what_a_crash_left_is_removed_at_start(volumes: Volumes, paths: Paths) -> None:
    kept = await volumes.create(CreateVolumeRequest(name="x", size_gb=1))
    (paths.volumes / "orphan").mkdir()
    await volumes.start()
    assert [path.name for path in paths.volumes.iterdir()] == [kept.id]


def attachment(volume: str, instance: str, *, readonly: bool) -> Attachment:
    return Attachment(volume_id=volume, instance_id=instance, mount_path="/data", readonly=readonly)


async def test_read_write_is_exclusive_and_read_only_is_shared(volumes: Volumes, store: Store) -> None:
    made = await volumes.create(CreateVolumeRequest(name="x", size_gb=1))
    for instance in ("a", "b"):
        await store.write(partial(records.attach, attachment=attachment(made.id, instance, readonly=True)))
    with pytest.raises(Conflict):
        await store.write(lambda txn: records.attach(txn, attachment(made.id, "c", readonly=False)))
    for instance in ("a", "b"):
        await store.write(partial(records.detach, volume_id=made.id, instance_id=instance))
    await store.write(lambda txn: records.attach(txn, attachment(made.id, "c", readonly=False)))
    for readonly in (True, False):
        with pytest.raises(Conflict):
            await store.write(partial(records.attach, attachment=attachment(made.id, "d", readonly=readonly)))
    with pytest.raises(Conflict):
        await volumes.delete(made.id)
    await store.write(lambda txn: records.detach(txn, made.id, "c"))
    await volumes.delete(made.id)
    with pytest.raises(NotFound):
        await volumes.get(made.id)


def test_times_are_utc() -> None:
    row = records.VolumeRecord(id="a", name="a", size_gb=1, created_at=datetime.now(UTC))
    assert records.VOLUMES.decode(records.VOLUMES.encode(row)) == row
