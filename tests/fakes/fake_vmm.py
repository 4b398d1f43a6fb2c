"""A hypervisor in memory: the interface, without a process.

    machine = FakeMachine()                  where the VMMs live; outlives drivers, as processes would
    driver = FakeDriver(machine)
    driver.fail("launch")                    the next launch raises
    driver.fail("capture", call=2, after=True)   the second capture from now raises after it has worked
    driver.hang("remove_disk")               it waits until it is cancelled
    driver.guest = script                    called with (vmm, stream) for each channel that is opened
    machine.journal                          ["launch a", "open_channel a", ...]

Captures and memory files are real files, so what a lifecycle leaves lying about is seen. Unless a test
sets ``guest``, a guest answers that speaks the lines of tests/hypervisor/guest_init.c.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import trio
import trio.testing

from hypeman.errors import InUse, InvalidRequest, NotFound, NotSupported
from hypeman.hypervisor import captures
from hypeman.hypervisor.interface import (
    Capabilities,
    Capture,
    Disk,
    ExitReason,
    HypervisorKind,
    LaunchFailed,
    VmConfig,
    VmmExit,
    VmmGone,
    VmmHandle,
    VmmState,
)

ALL = Capabilities(
    available=True,
    version="1.0.0",
    binary="/usr/bin/fake",
    accelerator="tcg",
    standby=True,
    fork=True,
    pause=True,
    hotplug_memory=True,
    hotplug_disk=True,
    hotplug_ports=24,
    balloon=True,
    pci_passthrough=True,
    disk_io_limit=True,
    disk_resize=True,
)
MACHINE = "fake-1"
_HANG = object()

GuestStream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]
GuestScript = Callable[["FakeVmm", GuestStream], None]


class Memory(msgspec.Struct):
    """What the line guest keeps."""

    kept: str = ""
    counter: int = 0
    plugged: int = 0
    lent: int = 0
    frozen: bool = False
    """The guest's workload is frozen; part of what a capture saves."""


class FakeProcess:
    """One VM, as long as it runs, whichever process holds it."""

    def __init__(self, pid: int, config: VmConfig, memory: Memory, *, private: bool) -> None:
        self.pid = pid
        self.config = config
        self.memory = memory
        self.private = private
        self.state = VmmState.PAUSED
        self.links = {nic.id: True for nic in config.nics}
        self.restored_from: Path | None = None
        self.turns: int | None = None
        """Of the vCPUs; None: unknown."""
        self.exit: VmmExit | None = None
        self.ended = trio.Event()

    def end(self, reason: ExitReason, message: str = "") -> None:
        """The process ends, for whichever reason."""
        if self.exit is None:
            self.exit = VmmExit(reason, message)
            self.ended.set()


class FakeMachine:
    """The host as far as VMMs are concerned."""

    def __init__(self) -> None:
        self.processes: dict[int, FakeProcess] = {}
        self.journal: list[str] = []
        self._pids = itertools.count(1000)

    def start(self, config: VmConfig, memory: Memory, *, private: bool = False) -> FakeProcess:
        process = FakeProcess(next(self._pids), config, memory, private=private)
        self.processes[process.pid] = process
        return process

    def alive(self) -> list[FakeProcess]:
        return [process for process in self.processes.values() if process.exit is None]

    def of(self, instance_id: str) -> FakeProcess:
        """The living VM of an instance."""
        return next(process for process in self.alive() if process.config.instance_id == instance_id)


class _Faults:
    """What shall go wrong, by operation and call."""

    def __init__(self) -> None:
        self._planned: dict[str, dict[int, tuple[object, bool]]] = {}
        self._calls: dict[str, int] = {}

    def plan(self, operation: str, call: int, fault: object, *, after: bool) -> None:
        self._planned.setdefault(operation, {})[self._calls.get(operation, 0) + call] = (fault, after)

    def calls(self, operation: str) -> int:
        """How often it was called so far."""
        return self._calls.get(operation, 0)

    @contextlib.asynccontextmanager
    async def visit(self, operation: str) -> AsyncIterator[None]:
        self._calls[operation] = call = self._calls.get(operation, 0) + 1
        fault, after = self._planned.get(operation, {}).pop(call, (None, False))
        if not after:
            await _break(fault)
        yield
        if after:
            await _break(fault)


async def _break(fault: object) -> None:
    if fault is _HANG:
        await trio.sleep_forever()
    elif isinstance(fault, BaseException):
        raise fault
    await trio.lowlevel.checkpoint()


class FakeVmm:
    """One live FakeProcess in the hands of one driver."""

    def __init__(self, driver: FakeDriver, process: FakeProcess) -> None:
        self.process = process
        self._driver = driver
        self._channel: trio.abc.Stream | None = None

    @property
    def config(self) -> VmConfig:
        return self.process.config

    @property
    def handle(self) -> VmmHandle:
        pid, boot_id = self.process.pid, self._driver.boot_id
        return VmmHandle(self._driver.kind, pid, 1, boot_id, self.config.run_dir, self.config)

    async def state(self) -> VmmState:
        async with self._visit("state"):
            return self.process.state

    async def open_channel(self) -> trio.abc.Stream:
        async with self._visit("open_channel"):
            if self._channel is not None:
                await trio.aclose_forcefully(self._channel)
            if self._driver.guest is None:
                self._channel = _line_channel(self.process)
            else:
                self._channel, guests = trio.testing.memory_stream_pair()
                self._driver.guest(self, guests)
            return self._channel

    def vcpu_turns(self) -> int | None:
        return self.process.turns

    async def pause(self) -> None:
        async with self._visit("pause"):
            self.process.state = VmmState.PAUSED

    async def resume(self) -> None:
        async with self._visit("resume"):
            if self.process.restored_from is not None:
                captures.consume(self.process.restored_from)
                self.process.restored_from = None
            self.process.state = VmmState.RUNNING

    async def capture(self, directory: Path, *, flush: bool = True) -> Capture:
        self._want(self._driver.capabilities.standby, "standby")
        if self.config.pci_devices:
            raise NotSupported("the state of a passed-through device cannot be saved")
        async with self._visit("capture"):
            self.process.state = VmmState.PAUSED
            _write(directory / captures.STATE, msgspec.json.encode(self.process.memory))
            if not self.process.private:
                _write(directory / captures.MEMORY, size=self.config.memory_bytes)
            return captures.publish(
                directory,
                kind=self._driver.kind,
                version=self._driver.capabilities.version,
                machine=MACHINE,
                config=self.config,
                summed=(captures.STATE,),
                flush=flush,
            )

    async def add_disk(self, disk: Disk) -> Disk:
        self._want(self._driver.capabilities.hotplug_disk, "hot-plug of disks")
        async with self._visit("add_disk"):
            if any(other.id == disk.id for other in self.config.disks):
                raise InUse(f"the VM has a disk {disk.id!r} already")
            taken = {other.port for other in self.config.disks}
            port = disk.port or next(n for n in itertools.count(1) if n not in taken)
            if port > self.config.disk_ports:
                raise InUse("all ports are taken")
            disk = msgspec.structs.replace(disk, port=port)
            self._set_disks((*self.config.disks, disk))
            return disk

    async def remove_disk(self, disk_id: str) -> None:
        self._want(self._driver.capabilities.hotplug_disk, "hot-plug of disks")
        async with self._visit("remove_disk"):
            if self._disk(disk_id).port == 0:
                raise NotSupported(f"disk {disk_id!r} is fixed")
            self._set_disks(tuple(disk for disk in self.config.disks if disk.id != disk_id))

    async def resize_disk(self, disk_id: str, size: int) -> None:
        self._want(self._driver.capabilities.disk_resize, "resizing disks")
        async with self._visit("resize_disk"):
            with open(self._disk(disk_id).path, "r+b") as file:
                file.truncate(size)

    async def resize_memory(self, size: int) -> None:
        self._want(self._driver.capabilities.hotplug_memory and self.config.hotplug_bytes > 0, "hot-plug of memory")
        async with self._visit("resize_memory"):
            if not 0 <= size - self.config.memory_bytes <= self.config.hotplug_bytes:
                raise InvalidRequest("memory out of bounds")
            self.process.memory.plugged = size - self.config.memory_bytes

    async def can_lend(self) -> bool:
        async with self._visit("can_lend"):
            return self._driver.capabilities.balloon and not self.config.pci_devices

    async def set_balloon(self, size: int) -> None:
        self._want(self._driver.capabilities.balloon, "balloon")
        async with self._visit("set_balloon"):
            if not 0 <= size < self.config.memory_bytes or size % (1 << 20):
                raise InvalidRequest("a balloon out of bounds")
            self.process.memory.lent = size

    async def set_link(self, nic_id: str, *, up: bool) -> None:
        async with self._visit("set_link"):
            self.process.links[nic_id] = up

    async def rotate_console(self) -> None:
        async with self._visit("rotate_console"):
            Path(self.config.console_log).touch()

    async def wait_exit(self) -> VmmExit:
        self._driver.machine.journal.append(f"wait_exit {self.config.instance_id}")
        await self.process.ended.wait()
        assert self.process.exit is not None
        return self.process.exit

    async def kill(self) -> None:
        async with self._visit("kill", gone_is_fine=True):
            self.process.end(ExitReason.KILLED)

    async def aclose(self) -> None:
        self._driver.machine.journal.append(f"aclose {self.config.instance_id}")
        if self._channel is not None:
            await trio.aclose_forcefully(self._channel)

    @contextlib.asynccontextmanager
    async def _visit(self, operation: str, *, gone_is_fine: bool = False) -> AsyncIterator[None]:
        self._driver.machine.journal.append(f"{operation} {self.config.instance_id}")
        async with self._driver.faults.visit(operation):
            if self.process.exit is not None and not gone_is_fine:
                raise VmmGone(f"pid {self.process.pid} has ended")
            yield

    def _want(self, able: bool, what: str) -> None:
        if not able:
            raise NotSupported(f"this hypervisor has no {what}")

    def _disk(self, disk_id: str) -> Disk:
        found = next((disk for disk in self.config.disks if disk.id == disk_id), None)
        if found is None:
            raise NotFound(f"the VM has no disk {disk_id!r}")
        return found

    def _set_disks(self, disks: tuple[Disk, ...]) -> None:
        self.process.config = msgspec.structs.replace(self.config, disks=disks)


class FakeDriver:
    """A kind of VMM that can do what its ``capabilities`` say."""

    def __init__(
        self,
        machine: FakeMachine | None = None,
        *,
        kind: HypervisorKind = HypervisorKind.QEMU,
        capabilities: Capabilities = ALL,
        opens_disks: bool = False,
    ) -> None:
        """With ``opens_disks`` a launch fails where a disk is not there, as it would in truth."""
        self.kind = kind
        self._opens_disks = opens_disks
        self.machine = machine or FakeMachine()
        self.capabilities = capabilities
        self.faults = _Faults()
        self.boot_id = "boot"
        self.guest: GuestScript | None = None

    def fail(self, operation: str, error: BaseException | None = None, *, call: int = 1, after: bool = False) -> None:
        """The ``call``-th such operation from now on raises; with ``after``, when it has done its work."""
        self.faults.plan(operation, call, error or LaunchFailed(f"{operation} was set to fail"), after=after)

    def hang(self, operation: str, *, call: int = 1, after: bool = False) -> None:
        self.faults.plan(operation, call, _HANG, after=after)

    async def probe(self) -> Capabilities:
        async with self.faults.visit("probe"):
            return self.capabilities

    def adopt_capabilities(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities

    def kernel_cmdline(self, *, hotplug_memory: bool) -> str:
        return "quiet"

    def validate(self, config: VmConfig) -> None:
        if not self.capabilities.available:
            raise NotSupported(self.capabilities.reason)
        if config.pci_devices and not self.capabilities.pci_passthrough:
            raise NotSupported("no passing through of devices")
        if len(config.disks) > self.capabilities.max_disks:
            raise InvalidRequest("too many disks")

    async def launch(self, config: VmConfig) -> FakeVmm:
        self.validate(config)
        self.machine.journal.append(f"launch {config.instance_id}")
        async with self._started("launch") as started:
            started.append(self._start(config, Memory()))
            started[0].state = VmmState.RUNNING
        return FakeVmm(self, started[0])

    async def restore(self, config: VmConfig, capture: Path, *, keep_capture: bool, paused: bool = False) -> FakeVmm:
        self.validate(config)
        self.machine.journal.append(f"restore {config.instance_id}")
        saved = captures.read(capture)
        captures.check_fits(saved, config, kind=self.kind, version=self.capabilities.version, machine=MACHINE)
        memory = msgspec.json.decode((capture / captures.STATE).read_bytes(), type=Memory)
        mapped = captures.MEMORY in saved.files
        async with self._started("restore") as started:
            process = self._start(config, memory, private=mapped and keep_capture)
            started.append(process)
            if not keep_capture:
                process.restored_from = capture
            process.links = {nic.id: not paused for nic in config.nics}
            vmm = FakeVmm(self, process)
            if not paused:
                await vmm.resume()
        return vmm

    async def reattach(self, handle: VmmHandle) -> FakeVmm:
        self.machine.journal.append(f"reattach {handle.config.instance_id}")
        async with self.faults.visit("reattach"):
            process = self.machine.processes.get(handle.pid)
            if process is None or process.exit is not None:
                raise VmmGone(f"pid {handle.pid} has ended")
            process.config = handle.config
            return FakeVmm(self, process)

    async def kill_stray(self, run_dir: str) -> bool:
        await trio.lowlevel.checkpoint()
        strays = [process for process in self.machine.alive() if process.config.run_dir == run_dir]
        for process in strays:
            process.end(ExitReason.KILLED)
        return bool(strays)

    def _start(self, config: VmConfig, memory: Memory, *, private: bool = False) -> FakeProcess:
        for disk in config.disks if self._opens_disks else ():
            if not os.path.exists(disk.path):
                raise LaunchFailed(f"{disk.path}: No such file or directory")
        Path(config.run_dir).mkdir(exist_ok=True)
        return self.machine.start(config, memory, private=private)

    @contextlib.asynccontextmanager
    async def _started(self, operation: str) -> AsyncIterator[list[FakeProcess]]:
        """A start leaves no process if it fails or is cancelled."""
        started: list[FakeProcess] = []
        try:
            async with self.faults.visit(operation):
                yield started
        except BaseException:
            for process in started:
                process.end(ExitReason.KILLED)
            raise


def _write(path: Path, data: bytes = b"", *, size: int | None = None) -> None:
    """A file of mode 0600 with ``data``, sparse up to ``size``."""
    path.write_bytes(data)
    path.chmod(0o600)
    if size is not None:
        os.truncate(path, size)


def _line_channel(process: FakeProcess) -> trio.abc.Stream:
    """A channel to the guest of guest_init.c; it answers as soon as something is sent and needs no task."""
    pending = bytearray()
    answers = trio.testing.MemoryReceiveStream()

    async def answer() -> None:
        pending.extend(requests.get_data_nowait())
        while b"\n" in pending and process.exit is None:
            line, _, rest = bytes(pending).partition(b"\n")
            pending[:] = rest
            if (said := _answer_to(process, line.decode())) is not None:
                answers.put_data(said.encode() + b"\n")
        if process.exit is not None:
            answers.put_eof()

    requests = trio.testing.MemorySendStream(send_all_hook=answer)
    return trio.StapledStream(requests, answers)


def _answer_to(process: FakeProcess, question: str) -> str | None:
    word, _, rest = question.partition(" ")
    disks = {disk.id: disk for disk in process.config.disks}
    match word:
        case "ping":
            return f"pong {rest}"
        case "count":
            process.memory.counter += 1
            return str(process.memory.counter)
        case "keep":
            process.memory.kept = rest
            return "kept"
        case "kept":
            return process.memory.kept
        case "disks":
            return " ".join(f"{disk.id}:{os.path.getsize(disk.path) // 512}" for disk in disks.values())
        case "read":
            with open(disks[rest].path, "rb") as file:
                return file.read(16).rstrip(b"\0").decode()
        case "write":
            serial, _, text = rest.partition(" ")
            with open(disks[serial].path, "r+b") as file:
                file.write(text.encode().ljust(17, b"\0"))
            return "wrote"
        case "memory":
            return f"MemTotal: {(process.config.memory_bytes + process.memory.plugged) // 1024} kB"
        case "free":
            return f"MemFree: {(process.config.memory_bytes - process.memory.lent) // 1024} kB"
        case "link":
            return str(int(all(process.links.values()))) if process.links else "none"
        case "mac":
            return process.config.nics[0].mac if process.config.nics else ""
        case "poweroff":
            process.end(ExitReason.POWEROFF, "guest-shutdown")
        case "reboot" | "panic":
            process.end(ExitReason.RESET, "guest-reset")
        case _:
            return "what?"
    return None
