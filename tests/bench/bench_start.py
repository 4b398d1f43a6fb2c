"""Start of the server and of a client command from the virtual environment: CPU time, what is imported, memory.

The bundle's start is in bench_appliance. The peer is an interpreter that imports nothing.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.bench.bench_appliance import COMMANDS, serving
from tests.bench.bench_http import cpu_of
from tests.bench.harness import Result, compare

ROUNDS = 5
PACKAGES = 6
"""How many of those that take longest are shown."""


def run() -> list[Result]:
    memory: list[float] = []

    def first_answer() -> float:
        with serving(COMMANDS["virtual environment"]) as (pid, _):
            memory.append(private_memory(pid))
            return cpu_of(pid) * 1000

    served = compare("start: server, until its first answer", "ms CPU", first_answer, "python -c pass", nothing, ROUNDS)
    commands = [
        compare(f"start: hypeman {name}", "ms CPU", lambda name=name: command(name), "python -c pass", nothing)  # type: ignore[misc]
        for name in ("--help", "ps")
    ]
    return [
        served,
        Result("start: private memory of the idle server", sorted(memory)[len(memory) // 2], "MB"),
        *commands,
        *imports(),
    ]


def children_cost(*arguments: str) -> float:
    """Milliseconds of CPU of an interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) * 1000


def nothing() -> float:
    return children_cost("-c", "pass")


def command(name: str) -> float:
    return children_cost("-m", "hypeman", "--base-url", "unix:///nowhere", name)


def private_memory(pid: int) -> float:
    """Megabytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def imports() -> list[Result]:
    """All imports of the server by ``-X importtime``, and the packages whose modules take most of it."""
    found = sorted((import_times() for _ in range(ROUNDS)), key=Counter.total)
    middle = found[ROUNDS // 2]
    return [
        Result("start: imports of the server", middle.total() / 1000, "ms"),
        *(Result(f"start: imports, {name}", spent / 1000, "ms") for name, spent in middle.most_common(PACKAGES)),
    ]


def import_times() -> Counter[str]:
    """Microseconds by package, without what its modules import."""
    command = [sys.executable, "-X", "importtime", "-c", "import hypeman.app"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    times: Counter[str] = Counter()
    for line in output.splitlines()[1:]:
        own, _, module = line.removeprefix("import time:").split("|")
        times[module.strip().partition(".")[0]] += int(own)
    return times
