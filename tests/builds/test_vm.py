"""How a build's machine creates and removes its instance and volume, on fakes of these."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio.testing

from hypeman.builds.request import Borrowed, BuildSpec
from hypeman.builds.types import Builder, BuilderStatus
from hypeman.builds.vm import VmSettings, VmWorker
from hypeman.builds.work import SOURCE, BuildFailed, Job, Report
from hypeman.errors import AlreadyExists, Conflict, HypemanError, NotFound
from hypeman.guest.programs import ExecResult, Output
from hypeman.instances.model.types import InstanceState

BUILDER = Builder(id="b", disk_size_gb=1, status=BuilderStatus.READY, created_at=datetime(2026, 1, 1, tzinfo=UTC))


class FakeNeeds:
    """Instances and volumes; ``create`` of an instance fails with ``errors``, then stops."""

    def __init__(self, *errors: HypemanError) -> None:
        self.errors = list(errors)
        self.said: list[str] = []

    async def list(self, state: object = None, tags: object = None) -> Any:
        return []

    async def create(self, request: object) -> Any:
        await trio.lowlevel.checkpoint()
        if hasattr(request, "image") and self.errors:
            raise self.errors.pop(0)
        return SimpleNamespace(id="vm")

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        raise NotFound(ref)

    async def wait_state(self, *_: object) -> Any:
        return SimpleNamespace(state=SimpleNamespace(value="Stopped"), state_error="no room")

    def log(self, text: str) -> None:
        self.said.append(text)

    async def vm(self, instance_id: str) -> None: ...

    def find_ready(self, name: str, platform: str | None = None) -> Any:
        return SimpleNamespace() if name == "i" else None


async def build(needs: FakeNeeds, directory: Path = Path("/")) -> None:
    worker = VmWorker(
        guests=cast(Any, needs),
        volumes=needs,
        images=cast(Any, needs),
        registry=cast(Any, needs),
        settings=VmSettings("i"),
    )
    await worker.build(Job("one", BuildSpec(), (), directory, Borrowed(), {}, BUILDER, ""), cast(Report, needs))


async def test_the_last_build_may_hold_the_cache_a_moment_longer(autojump_clock: trio.testing.MockClock) -> None:
    needs = FakeNeeds(*[Conflict("volume 'builder-b' is attached read-write to instance x")] * 20)
    with pytest.raises(BuildFailed, match="the VM did not start"):
        await build(needs)
    assert [line for line in needs.said if "waiting" in line] == [
        "waiting for the builder's cache: volume 'builder-b' is attached read-write to instance x"
    ]


async def test_the_builder_image_is_pulled_first(autojump_clock: trio.testing.MockClock) -> None:
    """However long that takes; without a registry, the reason says what to do."""

    class WithoutImage(FakeNeeds):
        pulls = 0
        refusal: HypemanError | None = None

        def find_ready(self, name: str, platform: str | None = None) -> Any:
            return None

        async def wait_ready(self, name: str, platform: str | None = None) -> Any:
            await trio.sleep(500)
            if self.refusal is not None:
                raise self.refusal
            self.pulls += 1

    needs = WithoutImage()
    with pytest.raises(BuildFailed, match="the VM did not start: no room"):
        await build(needs)
    assert needs.pulls == 1 and needs.said[0] == "pulling the builder image i (build.image)"
    needs.refusal = NotFound("registry docker.io cannot be reached")
    with pytest.raises(BuildFailed, match=r"cannot be reached.*import one with `hypeman image import`"):
        await build(needs)


@pytest.mark.parametrize("error", [AlreadyExists("a name"), Conflict("held")])
async def test_what_does_not_pass_fails(error: HypemanError, autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(type(error)):
        await build(FakeNeeds(*[error] * 1000))
    assert trio.current_time() < 100


class Session:
    """A program in the guest: what it prints and its exit code, at once; ``forever``: until it gets a signal."""

    def __init__(self, said: list[str], argv: tuple[str, ...], output: bytes, code: int, *, forever: bool) -> None:
        self._said = said
        self._argv = argv
        self._output = [Output(output, True)] if output else []
        self._code = code
        self._ended = trio.Event()
        if not forever:
            self._ended.set()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._ended.is_set():
            self._said.append(f"{self._argv[0]} is killed")

    async def receive(self) -> Output | ExecResult:
        if self._output:
            return self._output.pop()
        await self._ended.wait()
        return ExecResult(self._code, 0, False, "")

    async def send_stdin(self, data: bytes) -> None: ...
    async def close_stdin(self) -> None: ...

    async def signal(self, number: int) -> None:
        self._said.append(f"{self._argv[0]} gets signal {number}")
        await trio.sleep(1)  # it ends what it is about
        self._said.append(f"{self._argv[0]} ends")
        self._ended.set()


class FakeMachine(FakeNeeds):
    """A guest that boots after ``hangs`` boots that do not end, in which ``buildctl`` fails with each of ``failures``
    and then succeeds, or, with ``forever``, does not end."""

    def __init__(self, *failures: str, forever: bool = False, hangs: int = 0) -> None:
        super().__init__()
        self.failures = list(failures)
        self.forever = forever
        self.hangs = hangs
        self.building = trio.Event()

    async def wait_state(self, *_: object) -> Any:
        self.hangs -= 1
        state = InstanceState.INITIALIZING if self.hangs >= 0 else InstanceState.RUNNING
        return SimpleNamespace(state=state, state_error=None)

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        if ref == "vm":
            self.said.append("the VM is deleted")
        else:
            await super().delete(ref, graceful=graceful)

    async def exec(self, ref: str, request: Any) -> Session:
        argv = request.command
        if argv[0] != "buildctl":
            if argv[0] in ("rm", "sync"):
                self.said.append(" ".join(argv))
            return Session(self.said, argv, b"", 0, forever="--config" in argv)
        self.building.set()
        failure = self.failures.pop(0) if self.failures else ""
        output = f"error: {failure}\n".encode() if failure else b""
        return Session(self.said, argv, output, int(bool(failure)), forever=self.forever)

    async def copy_to(self, ref: str, request: Any) -> Any:
        return FakeCopyIn()

    async def copy_from(self, ref: str, request: Any) -> Any:
        raise NotFound(ref)

    async def pushing(self) -> None:
        raise BuildFailed("built: this test ends here")


class FakeCopyIn:
    async def __aenter__(self) -> FakeCopyIn:
        return self

    async def __aexit__(self, *_: object) -> None: ...
    async def send(self, data: bytes) -> None: ...
    async def finish(self) -> None: ...


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / SOURCE).write_bytes(b"")
    return tmp_path


SNAPSHOTS = "/var/lib/buildkit/runc-overlayfs/snapshots/snapshots"
LEFT = (
    f"failed to solve: failed to prepare  as tmg6w1lxyge08zh9zughthfao: failed to rename: rename {SNAPSHOTS}/new-33 "
    f"{SNAPSHOTS}/4: file exists"
)


async def test_a_snapshot_that_a_killed_build_left_is_removed(
    source: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Seen after a build was cancelled while a layer was made: every later build of the builder failed."""
    machine = FakeMachine(LEFT, LEFT.replace("/4:", "/5:"))
    with pytest.raises(BuildFailed, match="built"):
        await build(machine, source)
    assert [line for line in machine.said if line.startswith("rm")] == [f"rm -rf {SNAPSHOTS}/{n}" for n in (4, 5)]


@pytest.mark.parametrize(
    "failure",
    [
        f'process "/bin/sh -c {LEFT}" did not complete successfully: exit code: 1',
        LEFT.replace(f"{SNAPSHOTS}/4", "/bin/4"),
        LEFT + " in a step",
    ],
)
async def test_nothing_is_removed_because_a_dockerfile_says_so(
    source: Path, failure: str, autojump_clock: trio.testing.MockClock
) -> None:
    machine = FakeMachine(failure)
    with pytest.raises(BuildFailed):
        await build(machine, source)
    assert not [line for line in machine.said if line.startswith("rm")]


async def test_a_cancelled_build_lets_buildkit_end(source: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Killed, it may leave a snapshot that is not recorded. Those that are must be on the disk before the VM ends."""
    machine = FakeMachine(forever=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(build, machine, source)
        await machine.building.wait()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert machine.said[-4:] == ["buildctl is killed", "buildkitd gets signal 15", "buildkitd ends", "sync"]


async def test_the_cache_of_a_build_that_fails_is_on_the_disk(
    source: Path, autojump_clock: trio.testing.MockClock
) -> None:
    machine = FakeMachine("exit code: 1")
    with pytest.raises(BuildFailed, match="exit code"):
        await build(machine, source)
    assert machine.said[-2:] == ["buildkitd ends", "sync"]


async def test_a_guest_that_hangs_while_it_boots_is_replaced_once(
    source: Path, autojump_clock: trio.testing.MockClock
) -> None:
    machine = FakeMachine(hangs=1)
    with pytest.raises(BuildFailed, match="built"):
        await build(machine, source)
    assert machine.said.count("the VM is deleted") == 1
    with pytest.raises(BuildFailed, match="did not start"):
        await build(FakeMachine(hangs=2), source)
