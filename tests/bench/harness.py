"""What benchmarks are made of: a Result, paired rounds against a peer, and clocks.

A figure alone says little on a shared machine, a ratio to a peer that ran in the same minute says
much. So `compare` runs both in turn, several rounds, each round in the other order than the one
before, and reports the median of the ratios round by round: what slows the machine down for a
while slows both. CPU time is steadier than wall time; prefer it where waiting is not the point.

Nothing here asserts: a benchmark reports, a test judges.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

Measure = Callable[[], float]
"""Does the work once and returns what it cost, in the Result's unit."""


class Result(msgspec.Struct, frozen=True):
    """One line of the table: what was measured, and what the peer needed for the same."""

    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    paired_ratio: float | None = None
    """Median of the ratios of paired rounds; without it the ratio of the two values is all there is."""
    spread: tuple[float, float] | None = None
    """The lowest and the highest of them."""

    @property
    def ratio(self) -> float | None:
        """Ours to the peer's; None without a peer."""
        if self.paired_ratio is not None:
            return self.paired_ratio
        return self.value / self.peer_value if self.peer_value else None


def compare(name: str, unit: str, ours: Measure, peer_name: str, peer: Measure, rounds: int = 7) -> Result:
    """Measures ``ours`` and ``peer`` in turn, ``rounds`` times after one warm-up of each."""
    ours()
    peer()
    pairs = []
    for number in range(rounds):
        if number % 2:
            theirs, mine = peer(), ours()
        else:
            mine, theirs = ours(), peer()
        pairs.append((mine, theirs))
    ratios = [mine / theirs for mine, theirs in pairs]
    return Result(
        name,
        statistics.median(mine for mine, _ in pairs),
        unit,
        peer_name,
        statistics.median(theirs for _, theirs in pairs),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
    )


def median(measure: Measure, rounds: int = 7) -> float:
    """The middle one of ``rounds`` measurements after a warm-up."""
    measure()
    return statistics.median(measure() for _ in range(rounds))


def wall_time(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes once."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def cpu_time(work: Callable[[], object]) -> float:
    """CPU seconds of this process and of children that ended meanwhile, while ``work`` runs once."""
    begin = os.times()
    work()
    end = os.times()
    return sum(end[:4]) - sum(begin[:4])


def per_call(
    work: Callable[[], object], at_least: float = 0.1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds per call of ``work``, called until ``at_least`` seconds have passed.

    Pass ``time.process_time`` as ``clock`` for CPU seconds.
    """
    calls = 1
    while True:
        begin = clock()
        for _ in range(calls):
            work()
        spent = clock() - begin
        if spent >= at_least:
            return spent / calls
        # aim a little beyond the mark; at most tenfold, since the first calls may be cold and slow
        calls = min(calls * 10, max(calls + 1, int(calls * 1.2 * at_least / max(spent, 1e-9))))


def process_cpu_time(pid: int) -> float:
    """CPU seconds that process ``pid`` has used so far, its ended children apart."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime


def cpu_of_tasks(pid: int) -> float:
    """The same with all its threads, to the nanosecond; 0 if it has ended."""
    try:
        return (
            sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9
        )
    except OSError:
        return 0.0


def process_memory(pid: int) -> int:
    """Bytes that process ``pid`` has for itself and its share of what it shares (PSS)."""
    with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:"))


def forget_peak(pid: int) -> int:
    """Have ``peak_memory`` of process ``pid`` begin anew; returns it."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_memory(pid)


def peak_memory(pid: int) -> int:
    """Bytes that process ``pid`` had in RAM at most. Not ru_maxrss, which it inherits from its parent."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:"))) * 1024


def run_area(area: str) -> list[Result]:
    """The results of ``bench_<area>.py``."""
    return list(importlib.import_module(f"tests.bench.bench_{area}").run())
