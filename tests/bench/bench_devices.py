"""The PCI scan against a plain Python one, lspci and its own twin, on made-up trees in memory.

A made-up tree has no drivers behind its files, so real figures are all larger; the ratios
are what counts. CPU time, since all of them do nothing but system calls and computing; lspci is a process of
its own, as its callers pay for that too.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hypeman._native import pciscan_py
from hypeman._native.pciscan import NATIVE, Scanner
from tests.bench.harness import Measure, Result, compare, median
from tests.devices.trees import Tree, server

FUNCTIONS = 512
SIZES = (8, 64, 512, 4096)
_FILES = ("vendor", "device", "class", "subsystem_vendor", "subsystem_device", "numa_node", "sriov_totalvfs",
          "reset_method")  # fmt: skip
_UNIT = "µs CPU/function"
_LINKS = ("driver", "iommu_group", "physfn")


def plain_scan(root: str) -> list[tuple[str | None, ...]]:
    """As one writes it down: listdir, open, readlink."""
    base = f"{root}/bus/pci/devices"
    return [
        (address, *(_read(f"{base}/{address}/{name}") for name in _FILES),
         *(_link(f"{base}/{address}/{name}") for name in _LINKS))
        for address in sorted(os.listdir(base))
    ]  # fmt: skip


def _read(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None


def lspci(root: str) -> None:
    subprocess.run(
        ["lspci", "-Dnnk", "-A", "linux-sysfs", "-O", f"sysfs.path={root}/bus/pci"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def run() -> list[Result]:
    results = []
    with _tree(FUNCTIONS) as root:
        scanner, twin = Scanner(root), pciscan_py.Scanner(root)
        scanner.scan()
        twin.scan()
        plain = _per_function(lambda: plain_scan(root), FUNCTIONS)
        scan = _per_function(scanner.scan, FUNCTIONS)
        look = _per_function(scanner.look, FUNCTIONS)
        kind = "compiled" if NATIVE else "NOT COMPILED: the twin"
        results.append(compare(f"full scan, {kind}", _UNIT, scan, "plain Python", plain))
        if shutil.which("lspci"):
            process = _per_function(lambda: lspci(root), FUNCTIONS)
            results.append(compare(f"full scan, {kind}", _UNIT, scan, "lspci -Dnnk", process))
        results.append(compare(f"full scan, {kind}", _UNIT, scan, "Python twin", _per_function(twin.scan, FUNCTIONS)))
        results.append(compare(f"later look, {kind}", _UNIT, look, "plain Python", plain))
    for size in SIZES:
        with _tree(size) as root:
            scanner = Scanner(root)
            scanner.scan()
            for what, work in (("full scan", scanner.scan), ("later look", scanner.look)):
                value = median(_per_function(work, size))
                results.append(Result(f"{what}, {size} functions", value, _UNIT))
    return results


def _per_function(work: Callable[[], object], functions: int) -> Measure:
    """CPU microseconds per function; small trees are gone through several times, so that the clock resolves it."""
    times = max(1, 512 // functions)

    def measure() -> float:
        begin = _cpu_seconds()
        for _ in range(times):
            work()
        return (_cpu_seconds() - begin) * 1e6 / times / functions

    return measure


def _cpu_seconds() -> float:
    """Of this process and its ended children; finer than os.times, which counts ticks."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextlib.contextmanager
def _tree(functions: int) -> Iterator[str]:
    """A server's functions below a directory in memory."""
    memory = Path("/dev/shm")
    root = tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
    try:
        Tree(Path(root)).add_all(server(functions))
        yield root
    finally:
        shutil.rmtree(root)
