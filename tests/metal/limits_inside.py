"""Run inside the virtual host by test_limits.py and test_neighbour.py: the control group of a VMM limits it and
protects its neighbours.

The latency of a neighbour is a ratio of medians, measured in one host in turn with the other VMM stopped and running,
since the load of the machine changes. Its absolute value means nothing.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hypeman.cli.execute import capture
from hypeman.cli.session import Session
from hypeman.host.cgroups import UNDER_SYSTEMD, CGroups
from hypeman.host.processes import Processes, Program
from tests.real.appliance import Appliance, check_host, running_appliance, short_directory

pytestmark = [pytest.mark.real, pytest.mark.slow]

PYTHON = "/usr/bin/python3"
SYSTEM = ("/usr", "/lib", "/lib64")
BOMB = """
import os, time
made = 0
try:
    while made < 5000:
        if os.fork() == 0:
            time.sleep(1000)
        made += 1
except OSError as error:
    print(made, error.errno, flush=True)
"""
HOG = "pieces = []\nwhile True: pieces.append(bytes(1 << 20) + b'x')"
SPIN = "import os\nfor _ in range(2): os.fork()\nwhile True: pass"
"""In four processes: threads of Python would take one processor together."""
ROUNDS, MEASUREMENTS = 4, 5
"""Rounds of each kind in turn, and calls in each."""


@pytest.fixture
def group() -> Iterator[Path]:
    groups = CGroups.detect()
    assert groups.root == UNDER_SYSTEMD, "the unit runs"
    yield Path(groups.make("test", vcpus=1, memory=0))
    while not groups.remove("test"):  # its processes are ending
        time.sleep(0.1)


def field(file: Path, name: str) -> int:
    return int(dict(line.split() for line in file.read_text().splitlines())[name])


async def run(tmp_path: Path, group: Path, script: str, seconds: float) -> tuple[int | None, str]:
    """Exit code (None: it did not end and was killed) and output of a program in place of a VMM."""
    log = tmp_path / "log"
    process = await Processes().spawn(
        Program(argv=(PYTHON, "-c", script), log=str(log), mark=str(tmp_path), uid=510017, gid=510017,
                root_files=SYSTEM, cgroup=str(group))
    )  # fmt: skip
    code: int | None = None
    with trio.move_on_after(seconds):
        code = await process.wait()
    process.kill()
    await process.wait()
    process.close()
    return code, log.read_text()


async def test_processes(tmp_path: Path, group: Path) -> None:
    code, output = await run(tmp_path, group, BOMB, 300)
    made, number = map(int, output.split())
    assert code == 0 and made < 1024 and number == 11, "EAGAIN"
    assert field(group / "pids.events", "max") > 0


async def test_memory(tmp_path: Path, group: Path) -> None:
    code, _ = await run(tmp_path, group, HOG, 300)
    assert code == -9, "killed as a whole when it exceeded its limit"
    assert field(group / "memory.events", "oom_group_kill") == 1
    assert int((group / "memory.peak").read_text()) <= 256 << 20


async def test_processors(tmp_path: Path, group: Path) -> None:
    """One and a half for a VM of one, so this requires a host with two."""
    assert (os.cpu_count() or 1) > 1
    await run(tmp_path, group, SPIN, 20)
    assert field(group / "cpu.stat", "nr_throttled") > 0


ATTACKS = {
    "fork bomb": "bomb() { bomb | bomb & }; bomb",
    "memory hog": "while :; do tail /dev/zero; done",
    "packet flood": "while :; do yes | nc -u -w 1 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') 9; done",
}


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("limits")


async def latencies(appliance: Appliance) -> list[float]:
    """Seconds that a program in the quiet guest takes, MEASUREMENTS times."""
    session = Session(base_url=f"unix://{appliance.socket}")

    def once() -> float:
        begun = time.monotonic()
        code, _ = capture(session, "quiet", ("true",))
        assert code == 0
        return time.monotonic() - begun

    times = [await trio.to_thread.run_sync(once) for _ in range(MEASUREMENTS)]
    session.close()
    return times


@pytest.fixture
def busy_processors() -> Iterator[None]:
    """Keeps all processors of the virtual host busy, at the lowest priority: the machine outside then divides its time
    between emulated processors in the same way whether the noisy VM is stopped or runs."""
    spin = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    processes = [subprocess.Popen([PYTHON, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("busy_processors")
async def test_a_guest_that_takes_all_it_can_leaves_its_neighbour_in_peace(directory: Path) -> None:
    async with running_appliance(directory) as appliance:
        await appliance.create("quiet")
        for what, script in ATTACKS.items():
            noisy = (await appliance.create("noisy"))["id"]
            (pid,) = (pid for pid, run in appliance.vmms().items() if run.endswith(noisy))
            await appliance.exec("noisy", "sh", "-c", f"({script}) > /dev/null 2>&1 &")
            await trio.sleep(10)
            alone, beside = list[float](), list[float]()
            for _ in range(ROUNDS):
                os.kill(pid, signal.SIGSTOP)
                alone += await latencies(appliance)
                os.kill(pid, signal.SIGCONT)
                beside += await latencies(appliance)
            before, during = statistics.median(alone), statistics.median(beside)
            print(
                f"{what}: {before * 1000:.0f} ms became {during * 1000:.0f} ms, {during / before:.2f} times", flush=True
            )
            assert during <= 2 * before, what
            await appliance.delete("/instances/noisy")
