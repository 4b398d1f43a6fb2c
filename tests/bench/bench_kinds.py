"""The kinds of VMM side by side, on KVM: boot, save, bring back, fork, and the memory of a fork.

Requires Cloud Hypervisor or Firecracker, and KVM. Where there is only virtual KVM (tests/metal), what counts is the
ratio to QEMU: ``python -m tests.metal.vmm_host`` boots such a host and runs this on it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import trio

from hypeman.host.processes import Processes
from hypeman.hypervisor.interface import Driver, Vmm
from hypeman.hypervisor.kinds import HypervisorKind
from tests.bench.bench_hypervisor import pss
from tests.bench.harness import Result
from tests.conformance.check_driver import Guest, ending
from tests.hypervisor.conftest import NoGuest, config_maker, guest_from
from tests.hypervisor.real import REAL_KINDS, guest_cmdline, real_driver

_ROUNDS = 3
_FORKS = 3

Times = dict[str, list[float]]


def run() -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="hv-kinds-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        try:
            kernel, initrd = guest_from(folder)
        except NoGuest:
            return []
        return trio.run(_measure, folder, kernel, initrd)


async def _measure(folder: Path, kernel: Path, initrd: Path) -> list[Result]:
    processes = Processes()
    drivers: dict[HypervisorKind, Driver] = {}
    for kind in reversed(REAL_KINDS):  # those first whose presence a look at the file system shows
        driver = real_driver(kind, processes, kernel=str(kernel), folder=str(folder))()
        if kind is HypervisorKind.QEMU_MICROVM and not drivers:
            return []  # neither of the others is here, or no KVM
        if (await driver.probe()).available and driver.capabilities.accelerator == "kvm":
            drivers[kind] = driver
    times = {kind: Times() for kind in drivers}
    for number in range(_ROUNDS):
        for kind, driver in drivers.items():
            place = folder / f"{kind.value}-{number}"
            place.mkdir(mode=0o711)
            await _round(driver, place, kernel, initrd, times[kind])
    processes.close()
    qemu = times.get(HypervisorKind.QEMU, {})
    return [
        Result(f"{kind.value}: {name}", statistics.median(values), _unit(name), *_peer(kind, name, qemu))
        for kind in REAL_KINDS
        for name, values in times.get(kind, {}).items()
    ]


def _unit(name: str) -> str:
    return "MB" if "PSS" in name else "ms"


def _peer(kind: HypervisorKind, name: str, qemu: Times) -> tuple[str, float] | tuple[()]:
    return ("qemu", statistics.median(qemu[name])) if kind is not HypervisorKind.QEMU and name in qemu else ()


async def _round(driver: Driver, place: Path, kernel: Path, initrd: Path, times: Times) -> None:
    make_config = config_maker(place, kernel, initrd, cmdline=guest_cmdline(driver))

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        times.setdefault(name, []).append((time.perf_counter() - begin) * 1000)

    def directory(name: str) -> Path:
        (place / name).mkdir()
        (place / name).chmod(0o777)
        return place / name

    async def forked(name: str) -> Vmm:
        with clock("fork → answers"):
            vmm = await driver.restore(make_config(name), asleep, keep_capture=True)
            await stack.enter_async_context(ending(vmm))
            await Guest.of(vmm)
        return vmm

    asleep = directory("asleep")
    async with AsyncExitStack() as stack:
        with clock("boot → answers"):
            source = await driver.launch(make_config("source"))
            await stack.enter_async_context(ending(source))
            await Guest.of(source)
        with clock("standby"):
            await source.capture(asleep)
            await source.kill()
        sizes = [pss((await forked(f"fork-{number}")).handle.pid) for number in range(_FORKS)]
        times.setdefault("memory of one fork (PSS)", []).append(statistics.median(sizes))
        with clock("restore → answers"):
            restored = await driver.restore(make_config("source"), asleep, keep_capture=False)
            await stack.enter_async_context(ending(restored))
            await Guest.of(restored)
