"""A backup made beside a living server, and a server on what was restored from it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
import zstandard

from hypeman import backup
from hypeman.cli.backup import counted
from hypeman.errors import Conflict, HypemanError, InvalidRequest, NotFound, StoreError
from hypeman.host.files import HostError
from hypeman.host.tarballs import pack
from hypeman.images.records import IMAGES, ImageRow
from hypeman.images.types import ImageStatus
from hypeman.instances.model.snapshot_types import CreateSnapshotRequest, SnapshotKind
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    InstanceState,
    StandbyInstanceRequest,
    StartInstanceRequest,
)
from hypeman.instances.rows import INSTANCES, INTENTS
from hypeman.instances.service import Instances
from hypeman.network.leases import LEASES
from hypeman.paths import Paths
from hypeman.store import Store, Txn
from hypeman.store.schema import SCHEMA, SchemaRow
from hypeman.volumes.records import ATTACHMENTS, VOLUMES, VolumeRecord
from tests.images.layout import directory, entry, hard_link, symlink, tar
from tests.instances.fake_world import DIGEST, Lab, request

MEGABYTE = 1 << 20


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "host.tar.zst"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "restored", tmp_path / "restored-run")


async def command(verb: str, file: Path, paths: Paths) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, as beside a server."""
    argv = [sys.executable, "-m", "hypeman", "--format", "json", "backup", verb, str(file)]
    environment = {**os.environ, "DATA_DIR": str(paths.data_dir), "RUN_DIR": str(paths.run_dir)}
    return await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False, env=environment)


async def fill(lab: Lab) -> None:
    """An image, two volumes, a stopped instance with one of them, and an egress authority."""

    def write(txn: Txn) -> None:
        image = ImageRow(DIGEST, ImageStatus.READY, datetime.now(UTC), "")
        txn.put(IMAGES, DIGEST, image)
        for name in ("kept", "busy"):
            txn.put(VOLUMES, name, VolumeRecord(id=name, name=name, size_gb=1, created_at=datetime.now(UTC)))

    await lab.store.write(write)
    image = lab.paths.images / DIGEST.partition(":")[2]
    image.mkdir(parents=True)
    (image / "root.erofs").write_bytes(b"root")
    for name in ("kept", "busy"):
        disk = lab.paths.volume_disk(name)
        disk.parent.mkdir(parents=True)
        with disk.open("wb") as data:
            data.write(b"begin")
            data.truncate(64 * MEGABYTE)
    lab.paths.egress.mkdir(mode=0o700)
    (lab.paths.egress / "seal.key").write_bytes(b"key")
    lab.paths.ingress.mkdir(mode=0o700)
    (lab.paths.ingress / "ca.key").write_bytes(b"ca")


async def run(instances: Instances, name: str) -> str:
    """The id of a new instance, once it runs."""
    made = await instances.create(request(name))
    await instances.wait_state(made.id, InstanceState.RUNNING, 60)
    return made.id


@asynccontextmanager
async def server_on(paths: Paths) -> AsyncIterator[tuple[Lab, Instances]]:
    store = Store.open(paths.store)
    try:
        async with store.serving():
            lab = Lab(store, paths)
            async with lab.running() as instances:
                yield lab, instances
    finally:
        store.close()


async def test_what_rests_is_there_again_and_what_ran_is_not(lab: Lab, file: Path, elsewhere: Paths) -> None:
    await fill(lab)
    async with lab.running() as instances:
        stopped = await run(instances, "stopped")
        await instances.stop(stopped)
        lab.paths.instance(stopped).overlay.write_bytes(b"written by the guest")
        waiting = await run(instances, "waiting")
        await instances.standby(waiting, StandbyInstanceRequest())
        running = await run(instances, "running")
        kept = await lab.snapshots(instances).create(running, CreateSnapshotRequest(kind=SnapshotKind.STANDBY))
        await instances.attach_volume(running, "busy", AttachVolumeRequest(mount_path="/data"))

        result = await command("create", file, lab.paths)
        assert result.returncode == 0, result.stderr.decode()
        assert b"running" in result.stderr
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.stat().st_size < MEGABYTE, "holes are not packed"

    result = await command("restore", file, elsewhere)
    assert result.returncode == 0, result.stderr.decode()
    about = json.loads(result.stdout)
    assert set(about["instances"]) == {"stopped", "waiting"}
    assert about["left_out"] == ["running"] and about["volumes_left_out"] == ["busy"]
    found = {kind: len(list((elsewhere.data_dir / kind).iterdir())) for kind in ("images", "snapshots")}
    assert {kind: about[kind] for kind in found} == found and min(found.values()) > 0

    assert (elsewhere.images / DIGEST.partition(":")[2] / "root.erofs").read_bytes() == b"root"
    volume = elsewhere.volume_disk("kept")
    assert volume.read_bytes()[:5] == b"begin" and volume.stat().st_blocks * 512 < MEGABYTE
    assert not elsewhere.volume_disk("busy").exists()
    assert (elsewhere.egress / "seal.key").read_bytes() == b"key"
    assert (elsewhere.ingress / "ca.key").read_bytes() == b"ca"
    assert elsewhere.egress.stat().st_mode & 0o777 == 0o700
    assert elsewhere.instance(stopped).overlay.read_bytes() == b"written by the guest"
    assert not elsewhere.instance(running).root.exists()

    async with server_on(elsewhere) as (restored, instances):
        with pytest.raises(NotFound):
            await instances.get(running)
        for table in (INSTANCES, INTENTS, LEASES):
            assert running not in restored.store.read(lambda txn, table=table: list(txn.keys(table)))  # type: ignore[misc]
        assert restored.store.read(lambda txn: list(txn.keys(VOLUMES))) == ["kept"]
        assert restored.store.read(lambda txn: list(txn.keys(ATTACHMENTS))) == []
        assert (await instances.start(stopped, StartInstanceRequest())).state is not InstanceState.STOPPED
        assert (await instances.restore(waiting)).state is not InstanceState.STANDBY
        assert (await instances.create(request("running"))).name == "running"
        assert (await restored.snapshots(instances).get(kept.id)).id == kept.id


async def test_a_file_that_changes_during_a_backup_fails_it(
    lab: Lab, paths: Paths, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(lab)
    lab.store.close()

    def pack_slowly(*arguments: Any) -> None:
        pack(*arguments)
        paths.volume_disk("kept").write_bytes(b"a guest was here")

    monkeypatch.setattr(backup, "pack", pack_slowly)
    with pytest.raises(Conflict, match=r"volumes/kept/disk\.raw changed"):
        await trio.to_thread.run_sync(backup.create, paths, file)
    assert not file.exists()
    assert [path.name for path in paths.data_dir.glob(".backup*")] == []


def make_backup(paths: Paths, file: Path) -> None:
    Store.open(paths.store).close()
    backup.create(paths, file)


def test_no_file_is_replaced(paths: Paths, file: Path) -> None:
    file.write_bytes(b"another backup")
    with pytest.raises(HostError, match="already exists"):
        make_backup(paths, file)
    assert file.read_bytes() == b"another backup"
    assert [path.name for path in file.parent.glob("*.part")] == []


def test_a_host_that_was_never_used_has_nothing_to_back_up(paths: Paths, file: Path) -> None:
    with pytest.raises(InvalidRequest, match="nothing to back up"):
        backup.create(paths, file)


def test_nothing_is_restored_over_something(paths: Paths, file: Path) -> None:
    make_backup(paths, file)
    with pytest.raises(Conflict, match="is not empty"):
        backup.restore(paths, file)


@pytest.mark.parametrize("spoil", ["cut", "altered", "something else"])
def test_a_damaged_backup_restores_nothing(paths: Paths, file: Path, elsewhere: Paths, spoil: str) -> None:
    make_backup(paths, file)
    data = bytearray(file.read_bytes())
    if spoil == "cut":
        del data[-10:]
    elif spoil == "altered":
        data[len(data) // 2] ^= 1
    else:
        data[:] = b"\x7fELF"
    file.write_bytes(data)
    with pytest.raises(HypemanError):
        backup.restore(elsewhere, file)
    assert list(elsewhere.data_dir.iterdir()) == []
    assert trio.run(trio.to_thread.run_sync, make_backup, paths, file.with_name("again")) is None
    backup.restore(elsewhere, file.with_name("again"))


FOREIGN = {
    "a symlink": (symlink("volumes", "/etc"), "neither a regular file nor a directory"),
    "a hard link": (hard_link("volumes", "backup.json"), "neither a regular file nor a directory"),
    "a device": (entry("disk", tarfile.BLKTYPE, devmajor=8), "neither a regular file nor a directory"),
    "a pipe": (entry("disk", tarfile.FIFOTYPE), "neither a regular file nor a directory"),
    "an absolute name": (entry("/tmp/x"), "which no backup has"),
    "a name that climbs": (entry("volumes/../../x"), "which no backup has"),
    "a hidden name": (entry(".ssh"), "which no backup has"),
    "a name with a newline": (entry("a\nb"), "which no backup has"),
    "a name beyond PATH_MAX": (entry("/".join(["d" * 200] * 30)), "which no backup has"),
    "the same name twice": (entry("backup.json"), "exists"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_no_backup_has_is_refused(case: str, file: Path, elsewhere: Paths, tmp_path: Path) -> None:
    foreign, reason = FOREIGN[case]
    data = tar(entry("backup.json", data=b"{}"), foreign)
    file.write_bytes(zstandard.compress(data))
    with pytest.raises(HypemanError, match=reason):
        backup.restore(elsewhere, file)
    assert list(elsewhere.data_dir.iterdir()) == []


def test_modes_of_a_backup_are_ours(paths: Paths, file: Path, elsewhere: Paths) -> None:
    """No setuid, no execution, no write access for others, whatever the archive says."""
    make_backup(paths, file)
    good = zstandard.ZstdDecompressor().decompressobj().decompress(file.read_bytes())
    more = tar(
        directory("volumes", mode=0o7777), directory("volumes/a", mode=0o6777), entry("volumes/a/x", mode=0o6777)
    )
    file.write_bytes(zstandard.compress(good.rstrip(b"\0") + bytes(512 - len(good.rstrip(b"\0")) % 512) + more))
    backup.restore(elsewhere, file)
    assert stat.S_IMODE((elsewhere.volumes / "a").stat().st_mode) == 0o711
    assert stat.S_IMODE((elsewhere.volumes / "a" / "x").stat().st_mode) == 0o644


async def test_the_backup_of_a_newer_version_is_refused(
    store: Store, paths: Paths, file: Path, elsewhere: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.write(lambda txn: txn.put(SCHEMA, "schema", SchemaRow(999, "9.9")))
    store.close()
    with pytest.raises(StoreError, match="newer"):
        await trio.to_thread.run_sync(backup.create, paths, file)


def test_it_is_said_what_a_backup_has() -> None:
    about = {"instances": ["web"], "images": 3, "volumes": 0, "snapshots": 1}
    assert counted(about) == "1 instance, 3 images, 0 volumes and 1 snapshot"
