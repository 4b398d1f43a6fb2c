"""What every driver must do, as one suite: on the fake and on each real VMM that is present.

    await check_driver(make_driver, make_config)

``make_driver()`` gives a new driver object that was probed already; all of them see the same VMMs.
``make_config(name)`` gives a complete config with a root disk (read-only, shared) and an overlay disk,
own for each name; its guest answers the lines of tests/hypervisor/guest_init.c on the channel.

Each check is a sentence. Checks of what a driver has not are turned round: it must say NotSupported.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import outcome
import pytest
import trio
import trio.testing

from hypeman.errors import HypemanError, InUse, InvalidRequest, NotFound, NotSupported
from hypeman.hypervisor.interface import (
    Capture,
    CaptureInvalid,
    Disk,
    Driver,
    ExitReason,
    LaunchFailed,
    VmConfig,
    Vmm,
    VmmBroken,
    VmmGone,
    VmmState,
)

MakeDriver = Callable[[], Driver]
MakeConfig = Callable[[str], VmConfig]
Check = Callable[["Bench"], Awaitable[None]]

_PATIENCE = 60.0 * float(os.environ.get("HYPEMAN_TEST_SLOWNESS", "1"))
"""Seconds for anything at all; a real guest under TCG boots in 2-5. HYPEMAN_TEST_SLOWNESS: so many times slower is
the host, which may be virtual itself."""


class Bench:
    """What the checks share: the makers, a place for captures, and a VM to fork instead of booting one."""

    def __init__(self, make_driver: MakeDriver, make_config: MakeConfig, directory: Path, warm: Path) -> None:
        self.make_driver = make_driver
        self.make_config = make_config
        self._directory = directory
        self._warm = warm
        self._count = 0

    def new_directory(self) -> Path:
        self._count += 1
        return _open_directory(self._directory / f"capture-{self._count}")

    def new_disk(self) -> Path:
        """One to plug in; it begins with "extra"."""
        path = self.new_directory() / "extra.raw"
        path.write_bytes(b"extra".ljust(1 << 20, b"\0"))
        return path

    @contextlib.asynccontextmanager
    async def launched(self, name: str, **changes: object) -> AsyncIterator[tuple[Driver, Vmm]]:
        """A VM that was booted, ended on the way out."""
        driver = self.make_driver()
        vmm = await driver.launch(msgspec.structs.replace(self.make_config(name), **changes))
        async with ending(vmm):
            yield driver, vmm

    @contextlib.asynccontextmanager
    async def running(self, name: str) -> AsyncIterator[tuple[Driver, Vmm]]:
        """A running VM, however it came to be: forked where that works, since a boot under TCG takes seconds."""
        driver = self.make_driver()
        if not driver.capabilities.fork:
            async with self.launched(name) as launched:
                yield launched
            return
        if not self._warm.exists():
            async with self.launched("warm") as (_, vmm):
                await Guest.of(vmm)
                await vmm.capture(_open_directory(self._warm))
        vmm = await driver.restore(self.make_config(name), self._warm, keep_capture=True)
        async with ending(vmm):
            yield driver, vmm


def _open_directory(path: Path) -> Path:
    """A new directory that the caller would give to the VMM's user; here it is accessible to all."""
    path.mkdir()
    path.chmod(0o777)
    return path


@contextlib.asynccontextmanager
async def ending(vmm: Vmm) -> AsyncIterator[Vmm]:
    try:
        yield vmm
    finally:
        with trio.CancelScope(shield=True):
            await vmm.kill()
            await vmm.aclose()


class Guest:
    """The line guest at the other end of a channel."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    @classmethod
    async def of(cls, vmm: Vmm) -> Guest:
        """On a new channel. Fails at once if the VM ends: such a guest never answers."""
        found: outcome.Outcome[Guest] = outcome.Error(AssertionError("the VM ended before its guest answered"))
        async with trio.open_nursery() as nursery:

            async def give_up_at_the_end() -> None:
                await vmm.wait_exit()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up_at_the_end)
            try:
                found = outcome.Value(await cls._of(vmm))
            except Exception as error:
                found = outcome.Error(error)
            nursery.cancel_scope.cancel()
        return found.unwrap()

    @classmethod
    async def _of(cls, vmm: Vmm) -> Guest:
        """A channel that a capture has ended is taken for another, as the server does it."""
        while True:
            guest = cls(await vmm.open_channel())
            with contextlib.suppress(EOFError, trio.BrokenResourceError):
                assert await guest.ask("ping there") == "pong there"
                return guest

    async def ask(self, question: str) -> str:
        await self.tell(question)
        answer = bytearray()
        while not answer.endswith(b"\n"):
            if not (chunk := await self._stream.receive_some(4096)):
                raise EOFError(f"the channel ended at {question!r}")
            answer += chunk
        return answer.decode().strip()

    async def tell(self, command: str) -> None:
        await self._stream.send_all(command.encode() + b"\n")

    async def disks(self) -> dict[str, int]:
        """Serial number → size in bytes."""
        pairs = (word.rpartition(":") for word in (await self.ask("disks")).split())
        return {serial: int(sectors) * 512 for serial, _, sectors in pairs}

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Ask until it is so; the time limit of the whole check bounds it."""
        while not await condition():
            await trio.sleep(0.01)


# Life and death


async def a_launched_vm_runs_and_talks(bench: Bench) -> None:
    async with bench.launched("talks") as (driver, vmm):
        assert await vmm.state() == VmmState.RUNNING
        assert vmm.handle.kind == driver.kind
        guest = await Guest.of(vmm)
        long = "x" * 1500
        assert await guest.ask(f"ping {long}") == f"pong {long}"


async def a_new_channel_replaces_the_old_one(bench: Bench) -> None:
    async with bench.running("channels") as (_, vmm):
        await Guest.of(vmm)
        await Guest.of(vmm)


async def a_power_off_is_told_from_a_reset(bench: Bench) -> None:
    expected = {"poweroff": ExitReason.POWEROFF, "reboot": ExitReason.RESET, "panic": ExitReason.RESET}
    if not bench.make_driver().capabilities.power_off:
        expected = dict.fromkeys(expected, ExitReason.POWEROFF)  # a guest can only reset, which counts as power-off
    for command, reason in expected.items():
        async with bench.running(command) as (_, vmm):
            await (await Guest.of(vmm)).tell(command)
            assert (await vmm.wait_exit()).reason == reason
            assert (await vmm.wait_exit()).reason == reason, "asked again"


async def several_tasks_may_wait_for_the_exit(bench: Bench) -> None:
    async with bench.running("waiting") as (_, vmm):
        seen = []

        async def wait() -> None:
            seen.append((await vmm.wait_exit()).reason)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await vmm.state()  # waiting does not get in the way of asking
            await vmm.kill()
        assert seen == [ExitReason.KILLED] * 3


async def kill_may_be_repeated(bench: Bench) -> None:
    async with bench.running("killed") as (_, vmm):
        await vmm.kill()
        await vmm.kill()
        assert (await vmm.wait_exit()).reason == ExitReason.KILLED
        with pytest.raises(VmmGone):
            await vmm.state()


async def a_launch_that_fails_leaves_nothing(bench: Bench) -> None:
    driver, config = bench.make_driver(), bench.make_config("broken")
    broken = msgspec.structs.replace(config, disks=(*config.disks, Disk("missing", config.run_dir + "/no-such-disk")))
    with pytest.raises(LaunchFailed, match="no-such-disk"):
        await driver.launch(broken)
    assert not await driver.kill_stray(config.run_dir)


async def a_cancelled_launch_leaves_nothing(bench: Bench) -> None:
    driver, config = bench.make_driver(), bench.make_config("cancelled")
    for delay in (0.0, 0.005, 0.02, 0.06, 0.15):
        with trio.move_on_after(delay):
            async with ending(await driver.launch(config)):
                pass
        assert not await driver.kill_stray(config.run_dir), f"cancelled after {delay} s"


async def a_stray_is_found_by_its_run_directory(bench: Bench) -> None:
    async with bench.running("stray") as (driver, vmm):
        assert not await driver.kill_stray(vmm.handle.run_dir + "-other")
        assert await driver.kill_stray(vmm.handle.run_dir)
        await vmm.wait_exit()
        assert not await driver.kill_stray(vmm.handle.run_dir)


async def another_driver_finds_the_vm_again(bench: Bench) -> None:
    async with bench.running("adopted") as (_, first):
        await (await Guest.of(first)).ask("keep this")
        handle = msgspec.json.decode(msgspec.json.encode(first.handle), type=type(first.handle))
        await first.aclose()
        async with ending(await bench.make_driver().reattach(handle)) as vmm:
            assert await vmm.state() == VmmState.RUNNING
            guest = await Guest.of(vmm)
            assert await guest.ask("kept") == "this"
            await guest.tell("poweroff")
            assert (await vmm.wait_exit()).reason == ExitReason.POWEROFF


async def a_vm_that_ended_is_not_found_again(bench: Bench) -> None:
    async with bench.running("ended") as (driver, vmm):
        handle = vmm.handle
        await vmm.kill()
        with pytest.raises(VmmGone):
            await driver.reattach(handle)
        with pytest.raises(VmmGone):  # some other process has that number today
            await driver.reattach(msgspec.structs.replace(handle, pid=os.getpid()))


# Standing still, coming back


async def a_paused_vm_stands_still(bench: Bench) -> None:
    async with bench.running("paused") as (driver, vmm):
        if not driver.capabilities.pause:
            with pytest.raises(NotSupported):
                await vmm.pause()
            return
        guest = await Guest.of(vmm)
        await vmm.pause()
        assert await vmm.state() == VmmState.PAUSED
        await vmm.resume()
        assert await vmm.state() == VmmState.RUNNING
        assert int(await guest.ask("count")) >= 0


async def _captured(
    bench: Bench, name: str, *, goes_on: bool = False, of_fork: bool = False
) -> tuple[Driver, Path, Capture]:
    """A capture of a VM that kept ``name``; the VM is gone. That of a fork has memory and devices in one file."""
    async with bench.running(name) if of_fork else bench.launched(name) as (driver, vmm):
        guest = await Guest.of(vmm)
        await guest.ask(f"keep {name}")
        directory = bench.new_directory()
        capture = await vmm.capture(directory)
        assert await vmm.state() == VmmState.PAUSED
        assert capture.config == vmm.handle.config
        if goes_on:
            await vmm.resume()
            await (await Guest.of(vmm)).ask("keep nothing")
        return driver, directory, capture


async def a_capture_comes_back_once(bench: Bench) -> None:
    driver, directory, capture = await _captured(bench, "once")
    for name in os.listdir(directory):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600, name
    async with ending(await driver.restore(capture.config, directory, keep_capture=False)) as vmm:
        assert await vmm.state() == VmmState.RUNNING
        guest = await Guest.of(vmm)
        assert await guest.ask("kept") == "once"
        with pytest.raises(CaptureInvalid):
            await driver.restore(capture.config, directory, keep_capture=True)
        # and goes to sleep again
        again = bench.new_directory()
        await vmm.capture(again)
        await vmm.kill()
        async with ending(await driver.restore(capture.config, again, keep_capture=False)) as second:
            assert await (await Guest.of(second)).ask("kept") == "once"


async def a_capture_is_whole_until_its_vm_runs_on(bench: Bench) -> None:
    driver, directory, capture = await _captured(bench, "whole")
    for _ in range(2):
        async with ending(await driver.restore(capture.config, directory, keep_capture=False, paused=True)) as vmm:
            assert await vmm.state() == VmmState.PAUSED
    vmm = await driver.restore(capture.config, directory, keep_capture=False, paused=True)
    handle = vmm.handle
    await vmm.aclose()
    async with ending(await bench.make_driver().reattach(handle)) as adopted:
        await adopted.resume()
        assert await (await Guest.of(adopted)).ask("kept") == "whole"
        assert not (directory / "capture.json").exists()


async def later_writes_do_not_reach_a_capture(bench: Bench) -> None:
    driver, directory, capture = await _captured(bench, "source", goes_on=True)
    async with ending(await driver.restore(capture.config, directory, keep_capture=True)) as vmm:
        assert await (await Guest.of(vmm)).ask("kept") == "source"


async def forks_of_a_capture_do_not_see_each_other(bench: Bench) -> None:
    driver, directory, _ = await _captured(bench, "template")
    if not driver.capabilities.fork:
        return
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    async with contextlib.AsyncExitStack() as stack:
        guests = []
        for name in ("left", "right"):
            vmm = await driver.restore(bench.make_config(name), directory, keep_capture=True)
            await stack.enter_async_context(ending(vmm))
            guests.append(await Guest.of(vmm))
        assert _opens_for_writing(driver) or not _writable_by_anybody(directory)
        assert await guests[0].ask("keep left") == "kept"
        assert await guests[1].ask("kept") == "template"
        # a fork is a VM like any other: it can be captured itself
        again = bench.new_directory()
        await vmm.capture(again)
        await vmm.resume()
        assert await (await Guest.of(vmm)).ask("kept") == "template"
        name = "grandchild"
        async with ending(await driver.restore(bench.make_config(name), again, keep_capture=True)) as child:
            assert await (await Guest.of(child)).ask("kept") == "template"
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in directory.iterdir())


def _opens_for_writing(driver: Driver) -> bool:
    """QEMU before 8.2 cannot map a file that it may only read (SECURITY.md says so)."""
    version = driver.capabilities.version.split(".")[:2]
    return "qemu" in driver.kind.value and tuple(map(int, version)) < (8, 2) and driver.capabilities.binary != ""


def _writable_by_anybody(directory: Path) -> list[str]:
    """The processes that have a file below ``directory`` open for writing."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.readlink(fd).startswith(f"{directory}/"):
                flags = (fd.parents[1] / "fdinfo" / fd.name).read_text().partition("flags:")[2].split()[0]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    found.append(str(fd))
    return found


async def a_torn_capture_is_refused(bench: Bench) -> None:
    driver, directory, capture = await _captured(bench, "torn", of_fork=True)

    async def refused(why: str, config: VmConfig = capture.config) -> None:
        with pytest.raises(CaptureInvalid, match=why):
            await driver.restore(config, directory, keep_capture=True)
        assert not await driver.kill_stray(config.run_dir)

    await refused("vcpus", msgspec.structs.replace(capture.config, vcpus=capture.config.vcpus + 1))
    await refused("disks", msgspec.structs.replace(capture.config, disks=capture.config.disks[:1]))
    for name in sorted(capture.checksums):  # by byte; memory is checked by its size alone
        path = directory / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        await refused("checksum")
        path.write_bytes(good[:-1])
        await refused("bytes instead of")
        path.unlink()
        await refused("No such file")
        path.write_bytes(good)
    record = (directory / "capture.json").read_bytes()
    (directory / "capture.json").write_bytes(record[: len(record) // 2])
    await refused("cannot be read")
    (directory / "capture.json").unlink()
    await refused("no complete capture")
    (directory / "capture.json").write_bytes(record)
    async with ending(await driver.restore(capture.config, directory, keep_capture=True)) as vmm:
        assert await (await Guest.of(vmm)).ask("kept") == "torn", "whole again, it comes back"


async def a_cancelled_capture_lets_the_vm_go_on(bench: Bench) -> None:
    async with bench.launched("undisturbed") as (_, vmm):
        await (await Guest.of(vmm)).ask("keep on")
        for delay in (0.0, 0.004, 0.01, 0.02, 0.04, 0.08):
            directory = bench.new_directory()
            with trio.move_on_after(delay) as scope:
                await vmm.capture(directory)
            if scope.cancelled_caught:
                assert not (directory / "capture.json").exists(), f"cancelled after {delay} s"
            await vmm.resume()
            assert await (await Guest.of(vmm)).ask("kept") == "on"
        await vmm.capture(bench.new_directory())


async def a_vmm_that_dies_while_it_saves_leaves_no_capture(bench: Bench) -> None:
    for delay in (0.0, 0.005, 0.02, 0.05):
        async with bench.running("dying") as (driver, vmm):
            directory = bench.new_directory()
            async with trio.open_nursery() as nursery:

                async def die(after: float, vmm: Vmm = vmm) -> None:
                    await trio.sleep(after)
                    await vmm.kill()

                nursery.start_soon(die, delay)
                try:
                    await vmm.capture(directory)
                except HypemanError:
                    assert not (directory / "capture.json").exists(), f"killed after {delay} s"
                else:
                    config = vmm.handle.config
                    await vmm.kill()
                    async with ending(await driver.restore(config, directory, keep_capture=True)) as back:
                        await Guest.of(back)


async def a_cancelled_restore_leaves_nothing(bench: Bench) -> None:
    driver, directory, capture = await _captured(bench, "unrestored", of_fork=True)
    for delay in (0.0, 0.01, 0.03, 0.06):
        with trio.move_on_after(delay):
            async with ending(await driver.restore(capture.config, directory, keep_capture=False, paused=True)):
                pass
        assert not await driver.kill_stray(capture.config.run_dir), f"cancelled after {delay} s"
    async with ending(await driver.restore(capture.config, directory, keep_capture=False)) as vmm:
        assert await (await Guest.of(vmm)).ask("kept") == "unrestored"


# Devices


async def a_disk_comes_and_goes(bench: Bench) -> None:
    async with bench.running("disks") as (driver, vmm):
        path = bench.new_disk()
        if not driver.capabilities.hotplug_disk:
            with pytest.raises(NotSupported):
                await vmm.add_disk(Disk("extra", str(path)))
            return
        guest = await Guest.of(vmm)
        before = await guest.disks()
        for _ in range(2):
            added = await vmm.add_disk(Disk("extra", str(path), bps=64 << 20))
            assert added.port > 0 and added in vmm.handle.config.disks

            async def there() -> bool:
                return "extra" in await guest.disks()

            await guest.until(there)
            assert await guest.ask("read extra") == "extra"
            with pytest.raises(InUse):
                await vmm.add_disk(Disk("extra", str(path)))
            await vmm.remove_disk("extra")
            assert await guest.disks() == before
            assert added not in vmm.handle.config.disks
        with pytest.raises(NotFound):
            await vmm.remove_disk("extra")
        with pytest.raises(NotSupported):
            await vmm.remove_disk(vmm.handle.config.disks[0].id)


async def a_disk_that_was_never_plugged_in_is_removed(bench: Bench) -> None:
    """The handle has it before the VM does, and the process that wrote the handle was killed in between."""
    async with bench.running("interrupted") as (driver, vmm):
        if not driver.capabilities.hotplug_disk:
            return
        path = bench.new_disk()
        disks = vmm.handle.config.disks
        config = msgspec.structs.replace(vmm.handle.config, disks=(*disks, Disk("extra", str(path), port=1)))
        await vmm.aclose()
        found = await bench.make_driver().reattach(msgspec.structs.replace(vmm.handle, config=config))
        async with ending(found):
            await found.remove_disk("extra")
            assert found.handle.config.disks == disks
            await found.add_disk(Disk("extra", str(path)))


async def a_plugged_disk_is_in_the_capture(bench: Bench) -> None:
    async with bench.running("plugged") as (driver, vmm):
        if not (driver.capabilities.hotplug_disk and driver.capabilities.standby):
            return
        path = bench.new_disk()
        guest = await Guest.of(vmm)

        async def there() -> bool:
            return "extra" in await guest.disks()

        await vmm.add_disk(Disk("extra", str(path), port=3))
        await guest.until(there)  # what the guest has not heard of yet may be lost with a capture
        directory = bench.new_directory()
        capture = await vmm.capture(directory)
        await vmm.kill()
        async with ending(await driver.restore(capture.config, directory, keep_capture=False)) as back:
            guest = await Guest.of(back)
            await guest.until(there)
            await back.remove_disk("extra")
            assert "extra" not in await guest.disks()


async def a_disk_grows_under_the_guest(bench: Bench) -> None:
    async with bench.running("growing") as (driver, vmm):
        disk = next(disk for disk in vmm.handle.config.disks if not disk.readonly)
        if not driver.capabilities.disk_resize:
            with pytest.raises(NotSupported):
                await vmm.resize_disk(disk.id, 1 << 24)
            return
        guest = await Guest.of(vmm)
        await vmm.resize_disk(disk.id, 1 << 24)

        async def grown() -> bool:
            return (await guest.disks())[disk.id] == 1 << 24

        await guest.until(grown)
        assert os.stat(disk.path).st_size == 1 << 24


async def memory_grows_and_shrinks(bench: Bench) -> None:
    config = bench.make_config("memory")
    more = 128 << 20
    if not bench.make_driver().capabilities.hotplug_memory:
        async with bench.running("memory") as (_, vmm):
            with pytest.raises(NotSupported):
                await vmm.resize_memory(config.memory_bytes + more)
        return
    async with bench.launched("memory", hotplug_bytes=2 * more) as (driver, vmm):
        guest = await Guest.of(vmm)

        async def total() -> int:
            return int((await guest.ask("memory")).split()[1]) * 1024

        start = await total()
        await vmm.resize_memory(config.memory_bytes + more)

        async def larger() -> bool:
            return await total() >= start + more

        await guest.until(larger)
        if driver.capabilities.standby:
            await guest.ask("keep large")
            directory = bench.new_directory()
            capture = await vmm.capture(directory)
            await vmm.kill()
            async with ending(await driver.restore(capture.config, directory, keep_capture=False)) as back:
                guest = await Guest.of(back)
                assert await guest.ask("kept") == "large"
                assert await total() >= start + more
                with contextlib.suppress(VmmBroken):  # a guest may hold on to a block or two
                    await back.resize_memory(config.memory_bytes)

                async def smaller() -> bool:
                    return await total() < start + more // 4

                await guest.until(smaller)


async def a_balloon_takes_free_memory_and_gives_it_back(bench: Bench) -> None:
    lent, some = 64 << 20, 48 << 20
    async with bench.launched("balloon") as (driver, vmm):
        if not driver.capabilities.balloon:
            with pytest.raises(NotSupported):
                await vmm.set_balloon(lent)
            return
        assert await vmm.can_lend()
        guest = await Guest.of(vmm)

        async def free() -> int:
            return int((await guest.ask("free")).split()[1]) * 1024

        start = await free()
        await vmm.set_balloon(lent)

        async def less() -> bool:
            return await free() < start - some

        await guest.until(less)
        await vmm.set_balloon(0)

        async def as_before() -> bool:
            return await free() > start - some // 4

        await guest.until(as_before)
        for wrong in (-(1 << 20), vmm.handle.config.memory_bytes, lent + 1):
            with pytest.raises(InvalidRequest):
                await vmm.set_balloon(wrong)


async def a_balloon_leaves_the_capture_of_a_fork_alone(bench: Bench) -> None:
    driver, directory, _ = await _captured(bench, "lender")
    if not (driver.capabilities.balloon and driver.capabilities.fork):
        return
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_blocks) for path in directory.iterdir()}
    for name in ("first", "second"):
        async with ending(await driver.restore(bench.make_config(name), directory, keep_capture=True)) as vmm:
            guest = await Guest.of(vmm)
            assert await guest.ask("kept") == "lender"
            if not await vmm.can_lend():
                with pytest.raises(NotSupported):
                    await vmm.set_balloon(64 << 20)
                continue
            start = await guest.ask("free")

            async def lending(start: str = start, guest: Guest = guest) -> bool:
                return await guest.ask("free") != start

            await vmm.set_balloon(64 << 20)
            await guest.until(lending)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_blocks) for path in directory.iterdir()} == before


async def a_rotated_console_goes_on_in_a_new_file(bench: Bench) -> None:
    async with bench.running("console") as (_, vmm):
        guest = await Guest.of(vmm)
        log = Path(vmm.handle.config.console_log)
        if log.exists():
            log.rename(log.with_suffix(".log.1"))
        await vmm.rotate_console()
        assert log.exists()
        await guest.tell("poweroff")
        await vmm.wait_exit()


CHECKS: tuple[Check, ...] = (
    a_launched_vm_runs_and_talks,
    a_new_channel_replaces_the_old_one,
    a_power_off_is_told_from_a_reset,
    several_tasks_may_wait_for_the_exit,
    kill_may_be_repeated,
    a_launch_that_fails_leaves_nothing,
    a_cancelled_launch_leaves_nothing,
    a_stray_is_found_by_its_run_directory,
    another_driver_finds_the_vm_again,
    a_vm_that_ended_is_not_found_again,
    a_paused_vm_stands_still,
    a_capture_comes_back_once,
    a_capture_is_whole_until_its_vm_runs_on,
    later_writes_do_not_reach_a_capture,
    forks_of_a_capture_do_not_see_each_other,
    a_torn_capture_is_refused,
    a_cancelled_capture_lets_the_vm_go_on,
    a_vmm_that_dies_while_it_saves_leaves_no_capture,
    a_cancelled_restore_leaves_nothing,
    a_disk_comes_and_goes,
    a_disk_that_was_never_plugged_in_is_removed,
    a_plugged_disk_is_in_the_capture,
    a_disk_grows_under_the_guest,
    memory_grows_and_shrinks,
    a_balloon_takes_free_memory_and_gives_it_back,
    a_balloon_leaves_the_capture_of_a_fork_alone,
    a_rotated_console_goes_on_in_a_new_file,
)

_WANT_STANDBY = (
    a_capture_comes_back_once,
    a_capture_is_whole_until_its_vm_runs_on,
    later_writes_do_not_reach_a_capture,
    forks_of_a_capture_do_not_see_each_other,
    a_torn_capture_is_refused,
    a_cancelled_capture_lets_the_vm_go_on,
    a_vmm_that_dies_while_it_saves_leaves_no_capture,
    a_cancelled_restore_leaves_nothing,
    a_balloon_leaves_the_capture_of_a_fork_alone,
)


async def check_driver(
    check: Check, make_driver: MakeDriver, make_config: MakeConfig, directory: Path, warm: Path
) -> None:
    """Hold a driver to one of CHECKS (parametrize over them).

    ``directory`` is for captures; ``warm`` does not exist at first, then holds the capture of a booted VM, and
    may be the same for all checks of one kind.
    """
    bench = Bench(make_driver, make_config, directory, warm)
    with trio.fail_after(_PATIENCE):
        if check in _WANT_STANDBY and not make_driver().capabilities.standby:
            async with bench.launched("no-standby") as (_, vmm):
                with pytest.raises(NotSupported):
                    await vmm.capture(bench.new_directory())
        else:
            await check(bench)
