"""``hypeman run`` as people know it from Docker, on a real guest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import trio

from tests.cli.test_exec import Terminal
from tests.real.appliance import IMAGE, PATIENCE, ROOT, Appliance

pytestmark = [pytest.mark.real, pytest.mark.slow]


async def test_run_in_this_terminal_and_to_its_end(appliance: Appliance) -> None:
    options = ("--rm", "--memory", "256MB", "--overlay-size", "1GB")
    to_end = await appliance.cli("run", *options, IMAGE, "sh", "-c", "echo printed; exit 3")
    assert to_end == (3, "printed\n")
    more = (*options, "-i", "-u", "7:8", "-w", "/srv/new", "--hostname", "db.example", "-e", "A=b")
    script = "read line; echo $line $A $(id -u):$(id -g) $(pwd) $(hostname); exit 4"
    here = await appliance.cli("run", *more, IMAGE, "sh", "-c", script, stdin=b"typed\n")
    assert here == (4, "typed b 7:8 /srv/new db.example\n")
    assert await appliance.get("/instances") == []


async def test_an_idle_instance_runs_until_it_is_stopped(appliance: Appliance) -> None:
    made = await appliance.create("one", idle=True)
    assert made["state"] == "Running"
    assert await appliance.exec("one", "echo", "hello") == (0, "hello\n")
    assert await appliance.cli("exec", "-u", "7", "one", "id", "-u") == (0, "7\n")
    assert await appliance.cli("kill", "-s", "TERM", "one") == (0, "one\n")
    ended = await appliance.wait("one", "Stopped")
    assert ended["exit_code"] == 143
    await appliance.post("/instances/one/start")
    await appliance.wait("one", "Running")
    stopped = await appliance.post("/instances/one/stop")
    assert (stopped["state"], stopped["exit_code"]) == ("Stopped", 143)


SMALL = ("--memory", "128MB", "--cpus", "1", "--overlay-size", "64MB")


def in_terminal(appliance: Appliance, *arguments: str) -> Terminal:
    return Terminal(sys.executable, "-m", "hypeman", "--base-url", f"unix://{appliance.socket}", *arguments)


async def wait_gone(appliance: Appliance) -> None:
    with trio.fail_after(PATIENCE):
        while await appliance.get("/instances"):
            await trio.sleep(0.2)


async def test_a_program_in_this_terminal_is_left_and_attached_again(appliance: Appliance) -> None:
    """Also after its machine was in standby meanwhile."""
    first = in_terminal(appliance, "run", "-it", "--rm", "--name", "one", *SMALL, IMAGE, "sh")
    await trio.to_thread.run_sync(first.wait_for, b"# ", PATIENCE)
    first.type(b"A=kept; echo re${A}y\n")
    await trio.to_thread.run_sync(first.wait_for, b"rekepty", PATIENCE)
    first.type(b"\x10\x11")
    await trio.to_thread.run_sync(first.wait_for, b"one continues", PATIENCE)
    assert first.exit_code() == 0
    assert (await appliance.cli("standby", "one"))[0] == 0
    assert (await appliance.cli("restore", "one"))[0] == 0
    second = in_terminal(appliance, "attach", "one")
    second.type(b"echo still $A; exit 4\n")
    await trio.to_thread.run_sync(second.wait_for, b"still kept", PATIENCE)
    assert second.exit_code() == 4
    await wait_gone(appliance)
    for terminal in (first, second):
        os.close(terminal.fd)


async def test_what_is_to_be_removed_goes_without_its_client(appliance: Appliance) -> None:
    """A client that is killed, one that is detached, and a stop."""
    options = ("--rm", *SMALL)
    code, _ = await appliance.cli("run", "-d", *options, IMAGE, "sh", "-c", "echo done; exit 3")
    assert code == 0
    await wait_gone(appliance)
    argv = [sys.executable, "-m", "hypeman", "--base-url", f"unix://{appliance.socket}", "run", *options]
    script = "echo here; sleep 3"
    with subprocess.Popen([*argv, IMAGE, "sh", "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        assert await trio.to_thread.run_sync(killed.stdout.readline) == b"here\n"
        killed.send_signal(signal.SIGKILL)
    await wait_gone(appliance)
    await appliance.cli("run", "-d", "--name", "two", *options, IMAGE)
    await appliance.wait("two", "Running")
    assert (await appliance.cli("stop", "-t", "1", "two"))[0] == 0
    await wait_gone(appliance)


async def test_a_signal_is_for_the_program_alone(appliance: Appliance) -> None:
    script = "trap 'echo got it' USR1; sleep 100000 & echo ready; while :; do wait; done"
    await appliance.create("one", cmd=["sh", "-c", script])
    with trio.fail_after(PATIENCE):
        while "ready" not in (await appliance.cli("logs", "one"))[1]:
            await trio.sleep(0.2)
        assert await appliance.cli("kill", "-s", "USR1", "one") == (0, "one\n")
        while "got it" not in (await appliance.cli("logs", "one"))[1]:
            await trio.sleep(0.2)
    assert (await appliance.exec("one", "pidof", "sleep"))[0] == 0
    assert (await appliance.cli("kill", "one"))[0] == 0
    assert (await appliance.wait("one", "Stopped"))["exit_code"] == 137
