"""Volumes, snapshots and compression when something fails, ends early or happens at the same time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from hypeman.captures.records import CAPTURES
from hypeman.captures.types import CompressionAlgorithm, SnapshotCompressionConfig
from hypeman.errors import Conflict, HypemanError, NotFound
from hypeman.host.files import allocated_bytes
from hypeman.hypervisor.interface import ExitReason
from hypeman.images.types import ReadyImage
from hypeman.instances.model.snapshot_types import (
    CompressionState,
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    SnapshotKind,
)
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    ForkInstanceRequest,
    InstanceState,
    SnapshotPolicy,
    StandbyInstanceRequest,
    StartInstanceRequest,
)
from hypeman.instances.rows import INSTANCES, NAMES, SNAPSHOTS
from hypeman.instances.service import Instances
from hypeman.paths import Paths
from hypeman.store import Store
from hypeman.volumes.records import VOLUMES, VolumeRecord
from tests.instances.fake_world import HostFailed, Lab, request
from tests.instances.owned import check_owned
from tests.instances.situations import (
    clean_up,
    in_standby,
    running,
    settled,
    with_volume,
)
from tests.instances.test_trouble import Interposed


@pytest.fixture
def lab(store: Store, paths: Paths) -> Lab:
    return Lab(store, paths)


async def make_volume(lab: Lab, name: str) -> None:
    row = VolumeRecord(id=name, name=name, size_gb=1, created_at=datetime.now(UTC))
    await lab.store.write(lambda txn: txn.put(VOLUMES, name, row))
    lab.paths.volume_disk(name).parent.mkdir(parents=True, exist_ok=True)
    lab.paths.volume_disk(name).write_bytes(b"x")


async def remove_volumes(lab: Lab) -> None:
    await lab.store.write(lambda txn: [txn.delete(VOLUMES, key) for key in list(txn.keys(VOLUMES))])


async def test_a_forks_disks_sit_where_its_sources_sat(lab: Lab) -> None:
    """Else the saved devices would not fit: the first of two volumes is detached before the fork."""
    async with lab.running() as instances:
        await running(lab, instances)
        for name in ("a", "b"):
            await make_volume(lab, name)
            await instances.attach_volume("one", name, AttachVolumeRequest(mount_path=f"/{name}", readonly=True))
        await instances.detach_volume("one", "a")
        fork = await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))
        assert fork.state is InstanceState.RUNNING
        assert instances.board.find("two").ports == instances.board.find("one").ports == {"b": 2}
        await clean_up(lab, instances)
        await remove_volumes(lab)


async def test_a_volume_is_attached_once(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        await make_volume(lab, "a")
        await instances.attach_volume("one", "a", AttachVolumeRequest(mount_path="/a"))
        with pytest.raises(Conflict):
            await instances.attach_volume("one", "a", AttachVolumeRequest(mount_path="/b"))
        await clean_up(lab, instances)
        await remove_volumes(lab)


async def compressed(lab: Lab, capture: str | None) -> None:
    assert capture is not None
    with trio.fail_after(10):
        while not lab.store.read(lambda txn: (txn.get(CAPTURES, capture) or never()).compressed_bytes):
            await trio.sleep(0.01)


def never() -> Any:
    raise AssertionError("the capture is gone")


async def test_a_snapshot_asks_for_another_compression_than_the_memory_has(lab: Lab) -> None:
    """What is packed already stays as it is, and is unpacked with what it was packed with."""
    lz4 = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.LZ4)
    zstd = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.ZSTD)
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.standby("one", StandbyInstanceRequest(compression=lz4))
        await compressed(lab, instances.board.find("one").capture)
        made = await lab.snapshots(instances).create(
            "one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY, compression=zstd)
        )
        assert made.compression == lz4
        assert (await instances.restore("one")).state is InstanceState.RUNNING
        await clean_up(lab, instances)


async def test_a_snapshot_is_compressed_as_its_source_says(lab: Lab) -> None:
    zstd = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.ZSTD)
    async with lab.running() as instances:
        await instances.create(request("one", snapshot_policy=SnapshotPolicy(compression=zstd)))
        assert await settled(instances, "one") == "Running"
        made = await lab.snapshots(instances).create("one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY))
        assert made.compression == zstd
        await clean_up(lab, instances)


async def test_a_fork_of_a_snapshot_that_is_just_deleted(lab: Lab) -> None:
    """The delete is quicker, by a transaction: not found, and nothing left."""
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.stop("one")
        snapshots = lab.snapshots(instances)
        made = await snapshots.create("one", CreateSnapshotRequest(kind=SnapshotKind.STOPPED))
        whole = instances.ledger.store

        async def delete_row() -> None:
            instances.ledger.store = whole
            await instances.ledger.remove_snapshot(made.id, is_read=lambda _: False)

        instances.ledger.store = Interposed(whole, before=delete_row)  # type: ignore[assignment]
        with pytest.raises(NotFound):
            await snapshots.fork(made.id, ForkSnapshotRequest(name="two"))
        assert not lab.store.read(lambda txn: txn.exists(NAMES, "two"))
        await snapshots.start()
        await clean_up(lab, instances)


async def test_a_snapshot_that_is_read_is_not_deleted(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.stop("one")
        snapshots = lab.snapshots(instances)
        made = await snapshots.create("one", CreateSnapshotRequest(kind=SnapshotKind.STOPPED))
        copying, go_on = trio.Event(), trio.Event()
        copy_all = instances.machine.context.files.copy_all

        async def slowly(*args: Any, **options: Any) -> None:
            copying.set()
            await go_on.wait()
            await copy_all(*args, **options)

        instances.machine.context.files.copy_all = slowly  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(snapshots.fork, made.id, ForkSnapshotRequest(name="two"))
            with trio.fail_after(5):
                await copying.wait()
            with pytest.raises(Conflict, match="read"):
                await snapshots.delete(made.id)
            go_on.set()
        await snapshots.delete(made.id)
        assert instances.board.find("two").state is InstanceState.STOPPED
        check_owned(lab, "fork")
        await clean_up(lab, instances)


async def test_forks_of_one_compressed_snapshot_unpack_it_once(lab: Lab) -> None:
    zstd = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.ZSTD)
    async with lab.running() as instances:
        await running(lab, instances)
        snapshots = lab.snapshots(instances)
        made = await snapshots.create("one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY, compression=zstd))
        row = lab.store.read(lambda txn: txn.get(SNAPSHOTS, made.id))
        assert row is not None
        await compressed(lab, row.capture)
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(snapshots.fork, made.id, ForkSnapshotRequest(name=f"fork{number}"))
        assert {record.state for record in instances.board.records()} == {InstanceState.RUNNING}
        shown = await snapshots.get(made.id)
        assert (shown.compression_state, shown.compression) == (CompressionState.COMPRESSED, zstd)
        places = lab.paths.snapshot(made.id), lab.paths.capture(str(row.capture))
        assert shown.size_bytes == sum(allocated_bytes(place) for place in places)
        assert not (lab.paths.capture(str(row.capture)) / "memory").exists(), "the plain copy was for the restores"
        await clean_up(lab, instances)


async def test_what_waits_for_its_compression_is_not_compressing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    zstd = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.ZSTD)
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.standby("one", StandbyInstanceRequest(compression=zstd, compression_delay="1h"))
        snapshots = lab.snapshots(instances)
        made = await snapshots.create("one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY))
        assert (await snapshots.get(made.id)).compression_state is CompressionState.NONE
        await clean_up(lab, instances)


async def test_halves_of_a_compression_do_not_outlive_a_start(lab: Lab) -> None:
    lz4 = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.LZ4)
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.standby("one", StandbyInstanceRequest(compression=lz4))
        capture = instances.board.find("one").capture
        await compressed(lab, capture)
    (directory,) = lab.paths.captures.iterdir()
    with trio.fail_after(5):
        while (directory / "memory").exists():
            await trio.sleep(0.01)
    whole = {path.name for path in directory.iterdir()}
    for name in ("memory", "memory.packing", "memory.new"):  # killed before the plain file was removed, or earlier
        (directory / name).write_bytes(b"half")
    async with lab.running() as instances:
        assert {path.name for path in directory.iterdir()} == whole
        assert (await instances.restore("one")).state is InstanceState.RUNNING
        await clean_up(lab, instances)


async def test_a_start_keeps_what_it_does_not_name(lab: Lab) -> None:
    async with lab.running() as instances:
        await instances.create(request("one", entrypoint=("/bin/sh",), cmd=("-c", "true")))
        await settled(instances, "one")
        await instances.stop("one")
        await instances.start("one", StartInstanceRequest(entrypoint=("/bin/bash",)))
        spec = instances.board.find("one").spec
        assert (spec.entrypoint, spec.cmd) == (("/bin/bash",), ("-c", "true"))
        await clean_up(lab, instances)


async def test_a_disk_that_may_be_plugged_in_is_written_down_before(lab: Lab) -> None:
    """A server finds its VMs by what is stored: at no moment may a VM have a disk that the record does not tell of."""
    for moment in itertools.count():
        async with lab.running() as instances:
            await with_volume(lab, instances)
            lab.crash_at(moment)
            with contextlib.suppress(HypemanError):
                await instances.attach_volume("one", "vol", AttachVolumeRequest(mount_path="/data"))
        if not lab.bomb.dead:
            break
        (process,) = lab.machine.alive()
        (record,) = lab.store.read(lambda txn: [row for _, row in txn.scan(INSTANCES)])
        assert record.handle is not None
        assert {disk.id for disk in process.config.disks} <= {disk.id for disk in record.handle.config.disks}
        async with lab.running() as instances:
            await clean_up(lab, instances)
    assert moment > 3


@pytest.mark.parametrize("verb", ["attach", "detach"])
async def test_a_vm_that_ended_with_the_server_is_not_running(lab: Lab, verb: str) -> None:
    """Both were killed in the middle of an attach or detach."""
    async with lab.running() as instances:
        await with_volume(lab, instances)
        if verb == "detach":
            await instances.attach_volume("one", "vol", AttachVolumeRequest(mount_path="/data"))
        lab.crash_at(2)
        with contextlib.suppress(HypemanError):
            if verb == "attach":
                await instances.attach_volume("one", "vol", AttachVolumeRequest(mount_path="/data"))
            else:
                await instances.detach_volume("one", "vol")
    assert lab.bomb.dead
    (process,) = lab.machine.alive()
    process.end(ExitReason.KILLED)
    async with lab.running() as instances:
        assert (await instances.get("one")).state is InstanceState.STOPPED
        check_owned(lab, verb)
        await clean_up(lab, instances)


async def test_a_ttl_counts_from_creation_not_from_the_pull(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = lab.images.wait_ready

    async def pull(name: str, platform: str | None = None) -> ReadyImage:
        await trio.sleep(0.05)
        return await ready(name, platform)

    monkeypatch.setattr(lab.images, "wait_ready", pull)
    async with lab.running() as instances:
        made = await instances.create(request("one", ttl="1h"))
        assert made.expires_at == made.created_at + timedelta(hours=1)
        await clean_up(lab, instances)


async def test_a_restore_that_waits_meets_the_compression_and_ends_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the other way round: begun after the restore looked, it would take the memory away."""
    zstd = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.ZSTD)
    async with lab.running() as instances:
        await running(lab, instances)
        seen: list[bool] = []
        restorable = instances.machine.restorable

        def watch(capture: str) -> AbstractAsyncContextManager[None]:
            seen.append(instances.machine.captures.compressor.is_busy(capture))
            return restorable(capture)

        monkeypatch.setattr(instances.machine, "restorable", watch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(instances.standby, "one", StandbyInstanceRequest(compression=zstd))
            await trio.testing.wait_all_tasks_blocked()
            await instances.restore("one")
        assert seen == [True]
        await clean_up(lab, instances)


@pytest.mark.parametrize("prepare", [in_standby, running])
async def test_a_capture_that_could_not_be_taken_back_is_by_the_next_server(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Lab, Instances], Awaitable[None]]
) -> None:
    """Copying fails, and so does removing what was copied: Unknown for now, but nothing is lost."""
    async with lab.running() as instances:
        await prepare(lab, instances)
        before = instances.board.find("one").state

        async def refuse(*paths: Path | str, **owner: int) -> None:
            raise HostFailed("the disk is broken")

        monkeypatch.setattr(instances.machine.context.files, "copy_all", refuse)
        monkeypatch.setattr(instances.machine.context.files, "remove", refuse)
        with pytest.raises(HypemanError):
            await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))
        assert instances.board.find("one").state is InstanceState.UNKNOWN
    async with lab.running() as instances:
        assert instances.board.find("one").state is before
        check_owned(lab, "capture")
        await clean_up(lab, instances)
