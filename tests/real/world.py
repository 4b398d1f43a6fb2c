"""The world beyond the appliance's uplink: another network namespace, joined by a veth pair, with
servers in it that guests can reach. 192.0.2.0/30 is for documentation, so it is unused."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.real.appliance import Appliance, Namespace, running_appliance

ADDRESS = "192.0.2.1"
_OUR_SIDE = "192.0.2.2"


class World(Namespace):
    """Reached through ``inside``, whose default route and /etc/hosts it becomes."""

    def __init__(self, inside: Namespace, *names: str) -> None:
        super().__init__()
        link = f"w{self.name[3:]}"
        subprocess.run(
            [
                "ip",
                "link",
                "add",
                link,
                "netns",
                inside.name,
                "type",
                "veth",
                "peer",
                "name",
                "wan",
                "netns",
                self.name,
            ],
            check=True,
        )
        self.run("ip", "addr", "add", f"{ADDRESS}/30", "dev", "wan")
        self.run("ip", "link", "set", "wan", "up")
        inside.run("ip", "addr", "add", f"{_OUR_SIDE}/30", "dev", link)
        inside.run("ip", "link", "set", link, "up")
        inside.run("ip", "route", "add", "default", "via", ADDRESS)
        # `ip netns exec` puts this file in the place of /etc/hosts for what it starts.
        self._etc = Path("/etc/netns") / inside.name
        self._etc.mkdir(parents=True)
        (self._etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESS} {name}\n" for name in names))
        (self._etc / "resolv.conf").write_text("")

    def add(self, address: str, *names: str) -> None:
        """Another address in it, and names for that."""
        self.run("ip", "addr", "add", f"{address}/32", "dev", "wan")
        with (self._etc / "hosts").open("a") as hosts:
            hosts.writelines(f"{address} {name}\n" for name in names)

    def remove(self) -> None:
        shutil.rmtree(self._etc)
        super().remove()


@asynccontextmanager
async def appliance_in_world(
    directory: Path, module: tuple[str, ...] = (), /, **environ: str
) -> AsyncIterator[tuple[Appliance, World]]:
    """A started server, or ``module`` in its place, with its uplink in a world."""
    async with running_appliance(directory, module, **environ) as appliance:
        appliance.stop()
        world = World(appliance.namespace)
        try:
            await appliance.start()
            yield appliance, world
        finally:
            appliance.kill()
            world.remove()
