"""Published ports and names of a real guest: from the host, the world and a neighbour; through changes, standby, a
killed server and a delete."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.real.appliance import PATIENCE, Appliance, Namespace, check_host, short_directory
from tests.real.world import appliance_in_world

pytestmark = [pytest.mark.real, pytest.mark.slow]

HOST, GATEWAY = "192.0.2.2", "10.100.0.1"
SERVE = ["sh", "-c", "echo from the guest > /tmp/index.html; exec httpd -f -p 80 -h /tmp"]
HOLD = "import socket, time\ns = socket.create_server(('127.0.0.1', 9090))\nprint('ready')\ntime.sleep(1000)"


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("ports")


def curl(where: Namespace, address: str, port: int) -> str:
    """The page, or "" if the name is unknown or the connection is refused."""
    command = ["curl", "-sS", "--noproxy", "*", "--max-time", f"{PATIENCE:.0f}", f"http://{address}:{port}/"]
    result = subprocess.run(where.command(*command), capture_output=True, text=True)
    assert result.returncode in (0, 6, 7), result.stderr
    return result.stdout


async def serving(where: Namespace, address: str, port: int) -> None:
    """Wait for the guest's program to listen."""
    with trio.fail_after(PATIENCE):
        while curl(where, address, port) != "from the guest\n":
            await trio.sleep(0.2)


async def patch(appliance: Appliance, name: str, ports: list[dict[str, Any]]) -> Any:
    answer = await appliance.ask("PATCH", f"/instances/{name}", json={"ports": ports})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_ports_of_a_real_guest(directory: Path) -> None:
    settings = {"NETWORK__DEFAULT_LIMITS": "false", "NETWORK__HOSTS_FILE": "/etc/hosts"}  # of the namespace
    async with appliance_in_world(directory, **settings) as (appliance, world):
        host = appliance.namespace
        web = {"host_port": 8080, "guest_port": 80}
        made = await appliance.create("web", cmd=SERVE, ports=[web, {"host_port": 0, "guest_port": 80}])
        assert made["ports"][0] == {**web, "protocol": "tcp", "host_address": "", "count": 1}
        free = made["ports"][1]["host_port"]
        await appliance.create("neighbour")
        await serving(host, "127.0.0.1", 8080)
        for where, address, port in (
            (host, "127.0.0.1", free), (host, HOST, 8080), (host, GATEWAY, 8080), (host, "[::1]", 8080),
            (world, HOST, 8080), (world, HOST, free),
        ):  # fmt: skip
            assert curl(where, address, port) == "from the guest\n", (address, port)
        for address in (HOST, GATEWAY):
            for guest in ("neighbour", "web"):
                code, text = await appliance.exec(guest, "wget", "-q", "-O", "-", f"http://{address}:8080/")
                assert (code, text) == (0, "from the guest\n"), (guest, address)
        code, text = await appliance.exec(
            "neighbour", "wget", "-q", "-T", "5", "-O", "-", f"http://{made['network']['ip']}/"
        )
        assert code != 0, "a guest's own address is not published"

        # Names
        for guest, name, there in (
            ("neighbour", "gateway.hypeman.local", True), ("web", "web.hypeman.local", True), ("web", "web", True),
            ("neighbour", "web.hypeman.local", False),
        ):  # fmt: skip
            code, text = await appliance.exec(guest, "nslookup", "-type=a", name)
            assert (code == 0) == there, f"{guest} {name}: {text}"
            if there:
                assert (GATEWAY if "gateway" in name else made["network"]["ip"]) in text.partition(name)[2]
        code, text = await appliance.exec("neighbour", "wget", "-q", "-O", "-", "http://gateway.hypeman.local:8080/")
        assert (code, text) == (0, "from the guest\n")
        await serving(host, "web.hypeman.local", 80)

        # Whose a port is
        refusal = await appliance.ask("PATCH", "/instances/neighbour", json={"ports": [web]})
        assert (refusal.status_code, refusal.json()["code"]) == (409, "port_in_use")
        assert "8080/tcp is published by instance 'web'" in refusal.json()["message"]
        with host.serving(HOLD):
            body = {"name": "late", "image": "localhost/busybox:test", "ports": [{"host_port": 9090, "guest_port": 9}]}
            refusal = await appliance.ask("POST", "/instances", json=body)
            assert refusal.status_code == 409
            assert "9090/tcp is in use by python" in refusal.json()["message"]
        fork = await appliance.post("/instances/web/fork", {"name": "copy", "from_running": True})
        assert "ports" not in fork
        await appliance.delete("/instances/copy")

        # Changes
        changed = await patch(appliance, "web", [{"host_port": 9090, "guest_port": 80}])
        assert changed["ports"][0]["host_port"] == 9090
        for where, address in ((host, "127.0.0.1"), (host, "[::1]"), (world, HOST)):
            assert curl(where, address, 9090) == "from the guest\n"
            assert curl(where, address, 8080) == ""
        await appliance.post("/instances/web/standby", {})
        assert curl(world, HOST, 9090) == curl(host, "[::1]", 9090) == ""
        await appliance.post("/instances/web/restore")
        await serving(world, HOST, 9090)
        await patch(appliance, "neighbour", [web])

        # Restarts
        appliance.kill()
        assert curl(world, HOST, 9090) == curl(host, "127.0.0.1", 9090) == "from the guest\n"
        await appliance.start()
        assert (await appliance.get("/instances/web"))["ports"] == changed["ports"]
        for where, address in ((host, "127.0.0.1"), (host, "[::1]"), (world, HOST)):
            assert curl(where, address, 9090) == "from the guest\n"
        refusal = await appliance.ask("PATCH", "/instances/web", json={"ports": [web]})
        assert "8080/tcp is published by instance 'neighbour'" in refusal.json()["message"]
        await appliance.delete("/instances/web")
        assert curl(world, HOST, 9090) == ""
        with trio.fail_after(PATIENCE):
            while "web.hypeman.local" in host.run("cat", "/etc/hosts"):
                await trio.sleep(0.1)
        with host.serving(HOLD):
            pass
        code, text = await appliance.cli("port", "neighbour", "80")
        assert (code, text.split()) == (0, ["0.0.0.0:8080", "[::]:8080"])
