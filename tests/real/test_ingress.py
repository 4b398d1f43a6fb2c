"""Requests from the world to a real guest by its host name, and to none that does not run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.real.appliance import PATIENCE, Namespace, check_host, short_directory
from tests.real.world import appliance_in_world

pytestmark = [pytest.mark.real, pytest.mark.slow]

HOST = "192.0.2.2"
SERVE = ["sh", "-c", "echo from the guest > /tmp/index.html; exec httpd -f -p 80 -h /tmp"]


@pytest.fixture
def directory() -> Iterator[Path]:
    check_host()
    yield from short_directory("ingress")


def status(where: Namespace, host: str, address: str) -> tuple[str, str]:
    """Status and page."""
    command = ["curl", "-sS", "--noproxy", "*", "--max-time", f"{PATIENCE:.0f}", "-w", "%{http_code}"]
    command += ["-H", f"Host: {host}", f"http://{address}/"]
    text = subprocess.run(where.command(*command), capture_output=True, text=True, check=True).stdout
    return text[-3:], text[:-3]


async def test_a_host_name_leads_to_a_real_guest(directory: Path) -> None:
    async with appliance_in_world(directory, NETWORK__DEFAULT_LIMITS="false") as (appliance, world):
        await appliance.create("web", cmd=SERVE)
        rule = {"match": {"hostname": "{name}.example.com"}, "target": {"instance": "{name}", "port": 80}}
        made = await appliance.ask("POST", "/ingresses", json={"name": "all", "rules": [rule]})
        assert made.status_code == 201, made.text
        with trio.fail_after(PATIENCE):
            while status(world, "web.example.com", HOST) != ("200", "from the guest\n"):
                await trio.sleep(0.2)
        assert status(appliance.namespace, "web.example.com", "127.0.0.1") == ("200", "from the guest\n")
        assert status(world, "nobody.example.com", HOST)[0] == "404"
        secure = rule | {"match": {"hostname": "{name}.vm.internal", "port": 443}, "tls": True, "redirect_http": True}
        made = await appliance.ask("POST", "/ingresses", json={"name": "secure", "rules": [secure]})
        assert made.json()["certificates"][0]["state"] == "valid", made.text
        root = directory / "root.pem"
        root.write_text((await appliance.ask("GET", "/ingress/ca.pem")).text)
        command = ["curl", "-sSL", "--noproxy", "*", "--max-time", f"{PATIENCE:.0f}", "--cacert", str(root)]
        command += ["--resolve", f"web.vm.internal:80:{HOST}", "--resolve", f"web.vm.internal:443:{HOST}"]
        text = subprocess.run(
            world.command(*command, "http://web.vm.internal/"), capture_output=True, check=True
        ).stdout
        assert text == b"from the guest\n", "redirected, and the internal CA is trusted"
        stopped = await appliance.ask("POST", "/instances/web/stop")
        assert stopped.status_code == 200, stopped.text
        assert status(world, "web.example.com", HOST)[0] == "503"
        assert (await appliance.ask("DELETE", "/ingresses/all")).status_code == 204
