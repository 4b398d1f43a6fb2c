"""Habits that only show with a server: how ends are reported, labels and tags, logs, and the time after everything."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import trio

from tests.real.appliance import IMAGE, PATIENCE, ROOT, Appliance
from tests.real.conftest import appliance, directory

pytestmark = [pytest.mark.real, pytest.mark.slow]

__all__ = ["appliance", "directory"]  # fixtures

ENDS = (
    # what runs, exit code, exit_message
    ({"cmd": ["true"]}, 0, "exited with code 0"),
    ({"cmd": ["sh", "-c", "exit 3"]}, 3, "exited with code 3"),
    ({"cmd": ["sh", "-c", "kill -9 $$"]}, 137, "killed by signal 9 (SIGKILL)"),
    ({"cmd": ["sh", "-c", "kill -37 $$"]}, 165, "killed by signal 37 (SIGRTMIN+3)"),
    ({"cmd": ["tail", "/dev/zero"]}, 137, "killed by signal 9 (SIGKILL) - OOM"),
    ({"cmd": ["sh", "-c", "exec no-such-program"]}, 127, "command not found"),
    (
        {"cmd": ["no-such-program"]},
        127,
        'command not found: exec "no-such-program": executable file not found in $PATH',
    ),
    ({"cmd": ["/etc/passwd"]}, 126, "command cannot be executed: exec /etc/passwd: Permission denied"),
)


async def test_ends_are_reported_in_the_words_of_the_contract(appliance: Appliance) -> None:
    found: dict[int, tuple[int, str]] = {}

    async def run_one(number: int) -> None:
        name = f"end{number}"
        await appliance.create(name, wait="", network={"enabled": False}, **ENDS[number][0])
        with trio.fail_after(240):  # short of memory, a guest may thrash for long before its kernel kills
            while (ended := await appliance.get(f"/instances/{name}"))["state"] != "Stopped":
                await trio.sleep(0.2)
        found[number] = (ended["exit_code"], ended["exit_message"])

    async with trio.open_nursery() as nursery:
        for number in range(len(ENDS)):
            nursery.start_soon(run_one, number)
    assert [found[number] for number in range(len(ENDS))] == [(code, message) for _, code, message in ENDS]


TAGS = {
    "hypeman.pid1": "true",
    "hypeman.volumes": "/srv/own",
    "hypeman.shm-size": "70MB",
    "hypeman.ulimit.nofile": "100:200",
    "hypeman.sysctl.vm.max_map_count": "99999",
}
REPORT = """
echo "process $$ of $(id -u):$(id -g)"
stat -c '%n %u %a' /data /srv/own
df -k /dev/shm | awk 'END {print $2}'
ulimit -n; ulimit -Hn
cat /proc/sys/vm/max_map_count
printf '\\377\\376\\n'; head -c 100000 /dev/zero | tr '\\0' x; echo
echo console > /proc/1/fd/1
trap 'exit 7' TERM
while :; do sleep 0.05; done
"""
PRINTED = (
    b"process 1 of 0:55\n/data 0 755\n/srv/own 0 755\n71680\n100\n200\n99999\n\xff\xfe\n"
    + b"x" * 100_000
    + b"\nconsole\n"
)


async def test_image_tags_logs_and_time(appliance: Appliance) -> None:
    """One instance of an image with VOLUME, USER and nulls, whose tags say the rest, and what becomes of its clock."""
    labels = {"hypeman.sysctl.vm.max_map_count": "88888"}
    await replace_image(appliance, Labels={"hypeman.pid1": "perhaps"})
    refused = await appliance.ask("POST", "/instances", json={"name": "x", "image": IMAGE, "size": "128MB", "vcpus": 1})
    assert refused.status_code == 400 and "the image's label hypeman.pid1: " in refused.json()["message"]
    assert await appliance.get("/instances") == []
    await replace_image(appliance, User=":55", Volumes={"/data": None}, Labels=labels, WorkingDir=None)
    await appliance.create("one", cmd=["sh", "-c", REPORT], tags=TAGS)
    with trio.fail_after(PATIENCE):
        while not (log := await raw_log(appliance, "one")).endswith(b"console\n"):
            await trio.sleep(0.1)
    assert log == PRINTED
    await check_time(appliance, "one")
    for tag, value in (("hypeman.ulimit.files", "1"), ("hypeman.pid1", "perhaps"), ("hypeman.volumes", "data")):
        refused = await appliance.ask("POST", "/instances", json={"name": "x", "image": "y", "tags": {tag: value}})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
        assert f"tag {tag}: " in refused.json()["message"]

    # the clock of the source of a fork, of the fork, after a snapshot and after a standby
    await appliance.post("/instances/one/fork", {"name": "two", "from_running": True})
    await appliance.wait("two", "Running")
    await check_time(appliance, "one")
    await check_time(appliance, "two")
    await appliance.post("/instances/two/snapshots", {"kind": "Standby"})
    await check_time(appliance, "two")
    await appliance.post("/instances/one/standby")
    await trio.sleep(2)
    await appliance.post("/instances/one/restore")
    await check_time(appliance, "one")

    stopped: Any = await appliance.post("/instances/one/stop")
    assert (stopped["exit_code"], stopped["exit_message"]) == (7, "exited with code 7"), "the program's own trap"


async def replace_image(appliance: Appliance, **config: Any) -> None:
    """Import the image again, with another configuration, and wait until its name leads to that."""
    path = "/images/localhost%2Fbusybox%3Atest"
    before = (await appliance.get(path))["digest"]
    await appliance.import_busybox(**config)
    with trio.fail_after(PATIENCE):
        while (await appliance.get(path))["digest"] == before:
            await trio.sleep(0.05)


async def raw_log(appliance: Appliance, name: str) -> bytes:
    """What ``hypeman logs`` prints."""
    argv = [sys.executable, "-m", "hypeman", "--base-url", f"unix://{appliance.socket}", "logs", name]
    return (await trio.run_process(argv, capture_stdout=True, stderr=subprocess.DEVNULL, check=False, cwd=ROOT)).stdout


async def check_time(appliance: Appliance, name: str) -> None:
    """The guest's clock reads a time between question and answer, give or take 50 ms."""
    before = time.time()
    code, text = await appliance.exec(name, "adjtimex")
    after = time.time()
    assert code == 0, text
    words = {line.split(":")[0].strip(): line.split(":")[1].split()[0] for line in text.splitlines() if ":" in line}
    guest = int(words["time.tv_sec"]) + int(words["time.tv_usec"]) / 1e6
    assert before - 0.05 < guest < after + 0.05, f"{name} is at {guest}, asked from {before} to {after}"
