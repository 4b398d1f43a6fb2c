"""``hypeman run`` as people know it from Docker, on a real guest."""

from __future__ import annotations

import pytest

from tests.real.appliance import IMAGE, Appliance

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
