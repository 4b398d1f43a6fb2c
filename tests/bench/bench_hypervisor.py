"""What a VMM costs: start, save, bring back, fork. Real QEMU, the guest of guest_init.c, 256 MB.

"Answers" is the first line back on the agent channel. The peer of a cold start is the same QEMU command
line started by hand with nothing of ours around it, as far as its QMP greeting: what is above is ours.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import msgspec
import trio

from hypeman.host.processes import Processes
from hypeman.hypervisor.interface import VmConfig
from hypeman.hypervisor.kvm import KvmProof
from hypeman.hypervisor.qemu import config as native
from hypeman.hypervisor.qemu.driver import QemuDriver
from tests.bench.harness import Result
from tests.conformance.check_driver import Guest, ending
from tests.hypervisor.conftest import MakeConfig, NoGuest, build_guest, config_maker

_ROUNDS = 5
_FORKS = 10
_MEMORY = 256 << 20


def run() -> list[Result]:
    if shutil.which("qemu-system-x86_64") is None:
        return []
    with tempfile.TemporaryDirectory(prefix="hv-bench-") as name:
        folder = Path(name)
        try:
            kernel, initrd = build_guest(folder)
        except NoGuest:
            return []
        return trio.run(_measure, folder, kernel, config_maker(folder, kernel, initrd))


async def _measure(folder: Path, kernel: Path, make_config: MakeConfig) -> list[Result]:
    processes = Processes()

    async def no_tap(name: str) -> int:
        raise OSError(f"no TAP {name} in this benchmark")

    kvm = KvmProof(processes, kernel=str(kernel))
    driver = QemuDriver(processes, no_tap, kvm=kvm, accelerator="tcg")
    await driver.probe()
    times: dict[str, list[float]] = {}

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        times.setdefault(name, []).append((time.perf_counter() - begin) * 1000)

    def config(name: str) -> VmConfig:
        return msgspec.structs.replace(make_config(name), memory_bytes=_MEMORY)

    async def first_answer(vmm: object) -> None:
        await Guest.of(vmm)  # type: ignore[arg-type]

    async def cycle(number: int) -> Path:
        directory = folder / f"capture-{number}"
        directory.mkdir()
        with clock("launch → answers"):
            with clock("launch"):
                vmm = await driver.launch(config("source"))
            async with ending(vmm):
                await first_answer(vmm)
                with clock("capture and end"):
                    capture = await vmm.capture(directory)
                    await vmm.kill()
        with clock("restore → answers"):
            vmm = await driver.restore(capture.config, directory, keep_capture=True)
            await first_answer(vmm)
        async with ending(vmm):
            pass
        return directory

    for number in range(_ROUNDS):
        template = await cycle(number)
    sizes = []
    async with AsyncExitStack() as stack:
        with clock(f"{_FORKS} forks, one after the other → all answer"):
            for number in range(_FORKS):
                with clock("fork → answers"):
                    vmm = await driver.restore(config(f"fork-{number}"), template, keep_capture=True)
                    await stack.enter_async_context(ending(vmm))
                    await first_answer(vmm)
                sizes.append(vmm.handle.pid)
        memory = statistics.median(pss(pid) for pid in sizes)
    binary = driver.capabilities.binary
    bare = statistics.median(_bare_start(binary, config("bare"), folder) for _ in range(_ROUNDS))
    processes.close()
    results = [
        Result(f"qemu: {name}", statistics.median(values), "ms") for name, values in times.items() if name != "launch"
    ]
    launch = statistics.median(times["launch"])
    results.append(Result("qemu: launch, until the vCPUs run", launch, "ms", "QEMU by hand, until QMP answers", bare))
    results.append(Result("qemu: memory of one fork (PSS)", memory, "MB"))
    return results


def pss(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no PSS of {pid}")


def _bare_start(binary: str, config: VmConfig, folder: Path) -> float:
    """ms from fork to the first answer over QMP of the very same command line, as root, without a driver."""
    with ExitStack() as opened:

        def keep(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        def listen(name: str) -> int:
            (folder / name).unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(folder / name))
                sock.listen()
                return keep(sock.detach())

        memory = keep(os.open(folder / "bare-memory", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
        os.ftruncate(memory, config.memory_bytes)
        fds = native.Descriptors(
            qmp=listen("bare-qmp"),
            agent=listen("bare-agent"),
            console=keep(os.open(folder / "bare-console", os.O_WRONLY | os.O_CREAT)),
            memory=memory,
            kernel=keep(os.open(config.kernel, os.O_RDONLY)),
            initrd=keep(os.open(str(config.initrd), os.O_RDONLY)),
            disks={
                disk.id: keep(os.open(disk.path, os.O_RDONLY if disk.readonly else os.O_RDWR)) for disk in config.disks
            },
            nics={},
        )
        argv = native.command_line(config, fds, binary=binary, board=native.Q35, accelerator=native.TCG)
        begin = time.perf_counter()
        process = subprocess.Popen(argv, pass_fds=fds.all(), stdin=subprocess.DEVNULL)
    with process, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "bare-qmp"))
        answers = client.makefile("rb")
        client.sendall(b'{"execute": "qmp_capabilities"}\n')
        for _ in ("greeting", "answer"):
            answers.readline()
        took = (time.perf_counter() - begin) * 1000
        process.kill()
    return took
