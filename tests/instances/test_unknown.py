"""Unknown is not final: an instance that could be neither completed nor rolled back is retried until it can be, and
other instances are not affected."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from hypeman.captures import compression
from hypeman.captures.records import CAPTURES
from hypeman.captures.types import CompressionAlgorithm, SnapshotCompressionConfig
from hypeman.errors import HypemanError, StoreError
from hypeman.guest.types import Exited
from hypeman.hypervisor.interface import ExitReason, VmmBroken, VmmGone
from hypeman.instances.life import lifecycle
from hypeman.instances.life.operations.boot import start
from hypeman.instances.life.owned import Owned
from hypeman.instances.model.record import Operation
from hypeman.instances.model.snapshot_types import CreateSnapshotRequest, SnapshotKind
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    ForkInstanceRequest,
    InstanceState,
    StandbyInstanceRequest,
    TargetState,
)
from hypeman.instances.rows import INTENTS
from hypeman.instances.service import Instances
from hypeman.paths import Paths
from hypeman.store import Store
from tests.fakes.fake_vmm import FakeProcess, FakeVmm
from tests.instances.fake_world import FakeGuest, HostFailed, Lab
from tests.instances.owned import check_owned
from tests.instances.situations import clean_up, in_standby, rows, running, until_state, with_volume


def no_answer() -> VmmBroken:
    return VmmBroken("QEMU did not answer")


@pytest.fixture
def lab(store: Store, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(lifecycle, "RETRY_MIN", 0.01)
    monkeypatch.setattr(lifecycle, "RETRY_MAX", 0.05)
    return Lab(store, paths)


async def until(instances: Instances, state: InstanceState) -> None:
    await until_state(instances, state)
    assert (await instances.get("one")).state_error is None


async def is_unknown(instances: Instances, reason: str) -> None:
    view = await instances.get("one")
    assert view.state is InstanceState.UNKNOWN and reason in str(view.state_error)


async def unknown_after_standby(lab: Lab, instances: Instances, *, unanswered: int) -> FakeProcess:
    """The VMM of an instance that answered neither the capture nor the resume, nor answers the next ``unanswered``
    questions for its state."""
    await running(lab, instances)
    (process,) = lab.machine.alive()
    lab.driver.fail("capture", no_answer())
    lab.driver.fail("resume", no_answer())
    for call in range(1, unanswered + 1):
        lab.driver.fail("state", no_answer(), call=call)
    with pytest.raises(HypemanError):
        await instances.standby("one", StandbyInstanceRequest())
    await is_unknown(instances, "did not answer")
    return process


async def test_a_vmm_that_answers_again_after_a_start(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
    lab.driver.fail("reattach", no_answer())
    async with lab.running() as instances:
        await is_unknown(instances, "did not answer")
        await until(instances, InstanceState.RUNNING)
        check_owned(lab, "came back")
        await instances.standby("one", StandbyInstanceRequest())
        await clean_up(lab, instances)


async def test_a_vmm_that_ends_while_its_instance_is_unknown(lab: Lab) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
    for call in range(1, 4):
        lab.driver.fail("reattach", no_answer(), call=call)
    async with lab.running() as instances:
        await is_unknown(instances, "did not answer")
        (process,) = lab.machine.alive()
        process.end(ExitReason.KILLED)
        await until(instances, InstanceState.STOPPED)
        check_owned(lab, "ended meanwhile")
        await clean_up(lab, instances)


async def test_it_comes_back_as_what_it_was(lab: Lab) -> None:
    """A guest that was shutting down is not running again, however often its VMM did not answer."""
    async with lab.running() as instances:
        await running(lab, instances)
        lab.guests[instances.board.find("one").id].tell(Exited(3))
        await until(instances, InstanceState.SHUTDOWN)
    for call in range(1, 4):
        lab.driver.fail("reattach", no_answer(), call=call)
    async with lab.running() as instances:
        await is_unknown(instances, "did not answer")
        await until(instances, InstanceState.SHUTDOWN)
        journal = lab.paths.instance(instances.board.find("one").id).log("hypeman").read_text()
        assert "the VMM answers again: Shutdown" in journal

        async def lose(owned: Owned) -> None:
            await owned.lost(no_answer())

        task = instances.tasks.of("one")
        with trio.fail_after(60):
            while task._looking:  # until then, the first series of looks would find it
                await trio.sleep(0.001)
        await task.perform(None, lose)
        await is_unknown(instances, "did not answer")
        await until(instances, InstanceState.SHUTDOWN)
        await clean_up(lab, instances)


@pytest.mark.parametrize("verb", ["standby", "fork"])
async def test_a_capture_during_which_the_vmm_fell_silent(lab: Lab, verb: str) -> None:
    """Neither the capture nor the resume is answered; when the VMM answers again, its VM is resumed."""
    async with lab.running() as instances:
        await running(lab, instances)
        before = lab.world_as_text()
        lab.driver.fail("capture", no_answer())
        lab.driver.fail("resume", no_answer())
        lab.driver.fail("state", no_answer())
        with pytest.raises(HypemanError):
            if verb == "standby":
                await instances.standby("one", StandbyInstanceRequest())
            else:
                await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))
        await is_unknown(instances, "did not answer")
        await until(instances, InstanceState.RUNNING)
        assert lab.world_as_text() == before
        assert not lab.guests[instances.board.find("one").id].frozen
        assert not lab.store.read(lambda txn: list(txn.keys(INTENTS)))
        await clean_up(lab, instances)


async def test_a_capture_after_which_the_vmm_ended(lab: Lab) -> None:
    """Neither the capture nor the resume is answered, and then the VMM ends."""
    async with lab.running() as instances:
        process = await unknown_after_standby(lab, instances, unanswered=3)
        process.end(ExitReason.KILLED)
        await until(instances, InstanceState.STOPPED)
        assert (await instances.get("one")).exit_message == "the VMM was killed"
        check_owned(lab, "ended")
        await clean_up(lab, instances)


@pytest.mark.parametrize("verb", ["standby", "fork", "snapshot"])
async def test_a_vmm_that_ends_during_a_capture(
    lab: Lab, verb: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to undo: the caller gets the reason, and the instance is Stopped as after any end of its VMM."""

    async def end(vmm: FakeVmm, *_: object, **__: object) -> None:
        vmm.process.end(ExitReason.KILLED)
        raise VmmGone("QEMU closed its QMP socket")

    monkeypatch.setattr(FakeVmm, "capture", end)
    async with lab.running() as instances:
        await running(lab, instances)
        with pytest.raises(VmmGone, match="lost while the VM was saved: QEMU closed"):
            match verb:
                case "standby":
                    await instances.standby("one", StandbyInstanceRequest())
                case "fork":
                    await instances.fork("one", ForkInstanceRequest(name="two", from_running=True))
                case _:
                    await lab.snapshots(instances).create("one", CreateSnapshotRequest(kind=SnapshotKind.STANDBY))
        await until(instances, InstanceState.STOPPED)
        assert (await instances.get("one")).exit_message == "the VMM was killed"
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        assert not lab.store.read(lambda txn: [*txn.keys(INTENTS), *txn.keys(CAPTURES)])
        check_owned(lab, "ended")
        await clean_up(lab, instances)


async def test_a_vmm_that_only_closes_its_connection_during_a_capture(lab: Lab) -> None:
    """It may still be paused, so that the instance is Unknown until it is known to run."""
    async with lab.running() as instances:
        await running(lab, instances)
        lab.driver.fail("capture", VmmGone("closed"))
        lab.driver.fail("resume", VmmGone("closed"))
        lab.driver.fail("state", no_answer())
        with pytest.raises(HypemanError):
            await instances.standby("one", StandbyInstanceRequest())
        await is_unknown(instances, "closed")
        await until(instances, InstanceState.RUNNING)
        await clean_up(lab, instances)


async def test_a_capture_after_which_the_vmm_ended_with_the_server(lab: Lab) -> None:
    async with lab.running() as instances:
        process = await unknown_after_standby(lab, instances, unanswered=99)
    process.end(ExitReason.KILLED)
    async with lab.running() as instances:
        ended = await instances.get("one")
        assert (ended.state, ended.exit_message) == (
            InstanceState.STOPPED,
            "the VMM ended while the server was away",
        )
        check_owned(lab, "ended")
        await clean_up(lab, instances)


async def test_a_restore_that_the_next_server_cannot_finish_ends_stopped(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has run, so there is no way back; that its guest cannot be awakened is no reason to try it forever."""

    def unfinished() -> list[Operation]:
        return lab.store.read(lambda txn: [intent.operation for _, intent in txn.scan(INTENTS)])

    for moment in itertools.count():
        async with lab.running() as instances:
            await in_standby(lab, instances)
            lab.crash_at(moment)
            with contextlib.suppress(HypemanError):
                await instances.restore("one")
        assert lab.bomb.dead
        if unfinished() == [Operation.RESUME]:
            break
        async with lab.running() as instances:
            await clean_up(lab, instances)

    async def refuse(*_: object, **__: object) -> None:
        raise HostFailed("it does not wake up")

    monkeypatch.setattr(FakeGuest, "set_identity", refuse)
    async with lab.running() as instances:
        ended = await instances.get("one")
        assert ended.state is InstanceState.STOPPED and "could not be awakened" in str(ended.exit_message)
        assert not unfinished()
        check_owned(lab, "restore")
        await clean_up(lab, instances)


async def test_a_volume_that_the_vmm_did_not_release(lab: Lab) -> None:
    async with lab.running() as instances:
        await with_volume(lab, instances)
        lab.driver.fail("add_disk", no_answer(), after=True)
        lab.driver.fail("remove_disk", no_answer())
        with pytest.raises(HypemanError):
            await instances.attach_volume("one", "vol", AttachVolumeRequest(mount_path="/data"))
        await is_unknown(instances, "did not answer")
        await until(instances, InstanceState.RUNNING)
        assert not (await instances.get("one")).volumes
        await instances.attach_volume("one", "vol", AttachVolumeRequest(mount_path="/data"))
        await clean_up(lab, instances)


async def test_a_capture_of_a_stopped_instance_that_could_not_be_undone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.stop("one")

        async def refuse(*paths: object, **owner: object) -> None:
            raise HostFailed("the disk is broken")

        with monkeypatch.context() as broken:
            broken.setattr(instances.machine.context.files, "copy_all", refuse)
            broken.setattr(instances.machine.context.files, "remove", refuse)
            with pytest.raises(HypemanError):
                await instances.fork("one", ForkInstanceRequest(name="two", target_state=TargetState.STOPPED))
            await is_unknown(instances, "broken")
        await until(instances, InstanceState.STOPPED)
        check_owned(lab, "fork")
        await clean_up(lab, instances)


# ── Drivers that break ───────────────────────────────────────────────────────────────────────────


async def test_a_watch_that_fails_is_restarted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    broke = trio.Event()
    wait_exit = FakeVmm.wait_exit

    async def break_once(vmm: FakeVmm) -> Any:
        if broke.is_set():
            return await wait_exit(vmm)
        await trio.lowlevel.checkpoint()
        broke.set()
        raise ValueError("unforeseen")

    async with lab.running() as instances:
        await running(lab, instances)
        monkeypatch.setattr(FakeVmm, "wait_exit", break_once)
    async with lab.running() as instances:
        await broke.wait()
        await until(instances, InstanceState.RUNNING)
        lab.machine.of(instances.board.find("one").id).end(ExitReason.KILLED)
        await until(instances, InstanceState.STOPPED)
        await clean_up(lab, instances)


async def test_a_vmm_whose_connections_cannot_be_closed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(vmm: FakeVmm) -> None:
        raise ValueError("unforeseen")

    async with lab.running() as instances:
        await running(lab, instances)
        with monkeypatch.context() as broken:
            broken.setattr(FakeVmm, "aclose", refuse)
            lab.machine.of(instances.board.find("one").id).end(ExitReason.KILLED)
            with trio.fail_after(60):
                while instances.board.find("one").state is InstanceState.RUNNING:
                    await trio.sleep(0.01)
        await until(instances, InstanceState.STOPPED)
        await clean_up(lab, instances)


async def test_an_unused_capture_that_cannot_be_removed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server starts all the same, and the others are removed."""
    for name in ("a-stuck", "b"):
        (lab.paths.captures / name).mkdir(parents=True)
    build = lab._build

    def with_stuck_file() -> Instances:
        instances = build()
        remove = instances.machine.context.files.remove

        async def refuse(path: Any) -> None:
            if path.name == "a-stuck":
                raise OSError("the disk is broken")
            await remove(path)

        instances.machine.context.files.remove = refuse  # type: ignore[method-assign]
        return instances

    with monkeypatch.context() as broken:
        broken.setattr(lab, "_build", with_stuck_file)
        async with lab.running():
            assert [path.name for path in lab.paths.captures.iterdir()] == ["a-stuck"]
    async with lab.running() as instances:
        await clean_up(lab, instances)


# ── A store that cannot be written ──────────────────────────────────────────────────────────────


class _Full:
    """A store on a full disk, as long as it is full."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.full = False
        self.first = 0
        """Writes that still work."""

    def read(self, fn: Any) -> Any:
        return self._store.read(fn)

    async def write(self, fn: Any) -> Any:
        await trio.lowlevel.checkpoint()
        self.first -= 1
        if self.full and self.first < 0:
            raise StoreError("the disk is full")
        return await self._store.write(fn)


@contextlib.contextmanager
def full_disk(instances: Instances, *, after: int = 0) -> Iterator[None]:
    store = _Full(instances.ledger.store)
    instances.ledger.store = store  # type: ignore[assignment]
    store.full, store.first = True, after
    try:
        yield
    finally:
        store.full = False


@pytest.mark.parametrize("after", [0, 1])
async def test_an_end_that_cannot_be_stored(lab: Lab, after: int) -> None:
    """Neither the server nor the instance goes on as if nothing had been; later all is well."""
    async with lab.running() as instances:
        await running(lab, instances)
        record = instances.board.find("one")
        with full_disk(instances, after=after):
            lab.guests[record.id].tell(Exited(7))
            lab.machine.of(record.id).end(ExitReason.POWEROFF)
            with trio.fail_after(60):
                while instances.board.find("one").state is not InstanceState.UNKNOWN:
                    await trio.sleep(0.01)
            await is_unknown(instances, "full")
        await until(instances, InstanceState.STOPPED)
        check_owned(lab, "ended")
        await clean_up(lab, instances)


@pytest.mark.parametrize("verb", ["stop", "standby", "delete"])
async def test_a_verb_whose_result_cannot_be_stored(lab: Lab, verb: str) -> None:
    """It did its work and could not say so: finished as soon as it can be written."""
    async with lab.running() as instances:
        await running(lab, instances)
        work = {
            "stop": lambda: instances.stop("one"),
            "standby": lambda: instances.standby("one", StandbyInstanceRequest()),
            "delete": lambda: instances.delete("one"),
        }[verb]
        intents = 2 if verb == "standby" else 1
        with full_disk(instances, after=intents), pytest.raises(HypemanError):
            await work()  # type: ignore[no-untyped-call]
        assert not lab.machine.alive()
        if verb == "delete":
            with trio.fail_after(60):
                while list(instances.board.records()):
                    await trio.sleep(0.01)
        else:
            await until(instances, InstanceState.STOPPED if verb == "stop" else InstanceState.STANDBY)
            check_owned(lab, verb)
        assert not lab.store.read(lambda txn: list(txn.keys(INTENTS)))
        await clean_up(lab, instances)


@pytest.mark.parametrize("verb", ["attach", "detach"])
async def test_an_attachment_that_cannot_be_stored(lab: Lab, verb: str) -> None:
    """An attach is taken back, a detach is finished: the record and the VM agree in the end."""
    async with lab.running() as instances:
        await with_volume(lab, instances)
        before = rows(lab.store)
        attach = AttachVolumeRequest(mount_path="/data")
        if verb == "detach":
            await instances.attach_volume("one", "vol", attach)
        with full_disk(instances, after=1), pytest.raises(HypemanError):
            if verb == "attach":
                await instances.attach_volume("one", "vol", attach)
            await instances.detach_volume("one", "vol")
        await until(instances, InstanceState.RUNNING)
        assert not (await instances.get("one")).volumes
        assert rows(lab.store) == before
        assert not any(disk.id.startswith("v") for disk in lab.machine.alive()[0].config.disks)
        assert not lab.guests[instances.board.find("one").id].mounted
        await instances.attach_volume("one", "vol", attach)
        await clean_up(lab, instances)


async def test_a_start_of_the_workload_that_cannot_be_stored(lab: Lab) -> None:
    """The agent says so once; it is remembered."""
    async with lab.running() as instances:
        await running(lab, instances)
        await instances.stop("one")
        before = rows(lab.store)
        with full_disk(instances, after=2):
            await instances.tasks.of("one").perform(None, start)
            with trio.fail_after(60):
                while instances.board.find("one").state is not InstanceState.UNKNOWN:
                    await trio.sleep(0.01)
        await until(instances, InstanceState.RUNNING)
        assert rows(lab.store) != before
        await clean_up(lab, instances)


# ── Compression ──────────────────────────────────────────────────────────────────────────────────

ZSTD = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.ZSTD)


async def test_a_compression_that_a_fork_interrupts_is_restarted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pump = compression._pump
    begun: list[str] = []

    async def linger(chunks: Any, target: Any, **size: Any) -> int:
        begun.append(target.name)
        if len(begun) == 1:
            await trio.sleep_forever()
        return await pump(chunks, target, **size)

    monkeypatch.setattr(compression, "_pump", linger)
    async with lab.running() as instances:
        await in_standby(lab, instances)
        await instances.restore("one")
        await instances.standby("one", StandbyInstanceRequest(compression=ZSTD))
        with trio.fail_after(60):
            while not begun:
                await trio.sleep(0.01)
        fork = await instances.fork("one", ForkInstanceRequest(name="two", target_state=TargetState.RUNNING))
        assert fork.state is InstanceState.RUNNING
        capture = instances.board.find("one").capture
        with trio.fail_after(60):
            while not lab.store.read(lambda txn: txn.get(CAPTURES, str(capture)).compressed_bytes):  # type: ignore[union-attr]
                await trio.sleep(0.01)
        assert (await instances.restore("one")).state is InstanceState.RUNNING
        await clean_up(lab, instances)


async def test_a_compression_for_which_the_disk_is_too_full(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither it nor its failure can be written: the server and the capture live on."""
    failed = trio.Event()

    async def refuse(*arguments: Any, **size: Any) -> int:
        failed.set()
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(compression, "_pump", refuse)
    async with lab.running() as instances:
        await running(lab, instances)
        compressor = instances.machine.captures.compressor
        store = compressor._store = _Full(compressor._store)  # type: ignore[attr-defined]
        store.full = True
        await instances.standby("one", StandbyInstanceRequest(compression=ZSTD))
        await failed.wait()
        with trio.fail_after(60):
            while compressor.is_busy(str(instances.board.find("one").capture)):
                await trio.sleep(0.01)
        assert (await instances.restore("one")).state is InstanceState.RUNNING
        await clean_up(lab, instances)
