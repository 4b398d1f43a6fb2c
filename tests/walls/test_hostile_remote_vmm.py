"""A Cloud Hypervisor and a Firecracker that were taken over: at every request they replace every name in their reach.

The programs are those of tests/hypervisor/test_remote_drivers.py, which answer like the real ones, with
``hostile_remote.py`` in them. Each operation of the driver either works or fails with an error of ours within its time;
nothing of root's or of another VM's is read, written, removed or given away; and the VMM can be killed and removed.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from hypeman.errors import HypemanError
from hypeman.host.files import Files
from hypeman.hypervisor.interface import Capture, Disk, Driver, Vmm
from tests.hypervisor import test_remote_drivers as stand_ins
from tests.hypervisor.conftest import MakeConfig, folder, processes
from tests.hypervisor.test_remote_drivers import KINDS, Make, make_config, make_driver
from tests.walls.hostile_vmm import Entry, differences, picture

__all__ = ["folder", "make_config", "make_driver", "processes"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="requires root: changes users")

PLANS = ("before", "after", "before everything", "after everything")
"""Attacks before the VMM does what it was asked, or before it answers; with everything, it does not spare itself."""
SECRET = "root's own"
MIB = 1 << 20


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def victims(folder: Path) -> Iterator[list[Path]]:
    """A file of root's, one that all may read, and a directory."""
    place = folder / "secrets"
    place.mkdir(mode=0o755)
    found = []
    for name, mode in (("private", 0o600), ("public", 0o644)):
        (place / name).write_text(SECRET)
        (place / name).chmod(mode)
        found.append(place / name)
    yield [*found, place]


@pytest.fixture(autouse=True)
def taken_over(plan: str, victims: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins' program with the attacks in it."""
    program = stand_ins._PROGRAM.read_text().removesuffix("main()\n")
    acts = Path(__file__).with_name("hostile_remote.py").read_text().replace("from __future__ import annotations\n", "")
    hooks = f"""
PLAN.update({{"everything": {" " in plan}, "when": {plan.split()[0]!r}, "victims": {[*map(str, victims)]!r}}})
for kind in (CloudHypervisor, Firecracker):
    def hostile(self, method, target, body, handle=kind.handle):
        if method != "GET":
            attack("before", body, running=self.state != "none")
        try:
            return handle(self, method, target, body)
        finally:
            if method != "GET":
                attack("after", body, running=self.state != "none")
    kind.handle = hostile
main()
"""

    class Program:
        def read_text(self) -> str:
            return program + acts + hooks

    monkeypatch.setattr(stand_ins, "_PROGRAM", Program())


class Scene:
    """One VM that was taken over, another one, and how to look at what is not the first one's."""

    def __init__(self, driver: Driver, make: MakeConfig, folder: Path, victims: list[Path]) -> None:
        self.driver = driver
        self.folder = folder
        self.config = make("mine")
        other = make("another")
        for name in ("console_log", "vmm_log"):
            Path(getattr(other, name)).write_text(SECRET)
        os.chown(Path(other.disks[1].path), other.uid, other.gid)
        os.chown(Path(self.config.disks[1].path), self.config.uid, self.config.gid)
        self._places = [victims[-1], folder / "another", folder / "root.raw", folder / "vmlinux", folder / "programs"]
        self._before = self._picture()
        self.vmm: Vmm | None = None
        self.capture: Capture | None = None
        self.captured = folder / "captures" / "one"

    def _picture(self) -> dict[str, Entry]:
        found = picture(*self._places)
        for shared in ("root.raw", "vmlinux"):  # our own hard links, in Firecracker's jail
            path = str(self.folder / shared)
            found[path] = found[path]._replace(links=0)
        return found

    def check(self, where: str) -> None:
        assert differences(self._before, self._picture()) == [], where
        for directory in (self.folder, self.folder / "mine", self.folder / "captures", self.captured):
            if directory.exists():
                found = directory.stat()
                assert found.st_uid == 0 and not found.st_mode & 0o022, f"{directory}: {where}"
        mine = [Path(self.config.console_log), Path(self.config.vmm_log), *self.captured.glob("*")]
        for file in mine if self.capture is not None else mine[:2]:
            assert not file.is_file() or SECRET.encode() not in file.read_bytes(), f"{file}: {where}"


Step = Callable[[Scene, Vmm], Awaitable[object]]


async def capture(scene: Scene, vmm: Vmm) -> None:
    scene.captured.mkdir(mode=0o711, parents=True)
    scene.capture = await vmm.capture(scene.captured)


async def restore(scene: Scene, vmm: Vmm) -> None:
    """In the place of the first one."""
    await vmm.kill()
    await vmm.aclose()
    scene.vmm = None
    scene.vmm = await scene.driver.restore(scene.config, scene.captured, keep_capture=True)


async def add_disk(scene: Scene, vmm: Vmm) -> None:
    path = scene.folder / "mine" / "more.raw"
    path.write_bytes(bytes(MIB))
    path.chmod(0o600)
    await vmm.add_disk(Disk("more", str(path)))


async def reattach(scene: Scene, vmm: Vmm) -> None:
    await vmm.aclose()
    scene.vmm = await scene.driver.reattach(vmm.handle)


async def channel(scene: Scene, vmm: Vmm) -> None:
    with trio.move_on_after(0.2):
        stream = await vmm.open_channel()
        await stream.send_all(b"ping me\n")
        await stream.receive_some()


async def rotate(scene: Scene, vmm: Vmm) -> None:
    log = Path(scene.config.console_log)
    log.rename(log.with_suffix(".log.1"))
    try:
        await vmm.rotate_console()
    finally:
        log.touch()


STEPS: dict[str, Step] = {
    "channel": channel,
    "state": lambda scene, vmm: vmm.state(),
    "pause": lambda scene, vmm: vmm.pause(),
    "resume": lambda scene, vmm: vmm.resume(),
    "add a disk": add_disk,
    "remove a disk": lambda scene, vmm: vmm.remove_disk("more"),
    "resize a disk": lambda scene, vmm: vmm.resize_disk("overlay", 2 * MIB),
    "balloon": lambda scene, vmm: vmm.set_balloon(16 * MIB),
    "rotate": rotate,
    "reattach": reattach,
    "capture": capture,
    "go on": lambda scene, vmm: vmm.resume(),
    "restore": restore,
    "channel again": channel,
}


@pytest.mark.parametrize("kind", KINDS)
async def test_no_operation_is_turned_against_others(
    kind: str, make_driver: Make, make_config: MakeConfig, folder: Path, victims: list[Path], plan: str
) -> None:
    driver = make_driver(kind)
    (folder / "captures").mkdir(mode=0o711)
    scene = Scene(driver, make_config, folder, victims)
    worked: list[str] = []
    with trio.fail_after(120):
        scene.vmm = await attempt(driver.launch(scene.config))
        scene.check("launch")
        for name, step in STEPS.items():
            if scene.vmm is None:
                break
            await attempt(step(scene, scene.vmm), worked, name)
            scene.check(name)
    print(f"{kind}, {plan}: {worked}")
    if scene.vmm is not None:
        await scene.vmm.kill()
        await scene.vmm.aclose()
    await driver.kill_stray(scene.config.run_dir)
    for path in (scene.config.run_dir, folder / "mine", scene.captured):
        await Files().remove(Path(path))
    scene.check("removed")
    assert not (folder / "mine").exists() and not scene.captured.exists()


async def attempt(what: Awaitable[Vmm | object], worked: list[str] | None = None, name: str = "") -> Vmm | None:
    """The result, or None where it failed with an error of ours."""
    try:
        result = await what
    except HypemanError as error:
        print(f"{name}: {error.message[:150]}")
        return None
    if worked is not None:
        worked.append(name)
    return result  # type: ignore[return-value]
