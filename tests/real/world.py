"""The world beyond the appliance's uplink: another network namespace, joined by a veth pair, with
servers in it that guests can reach. 192.0.2.0/30 is for documentation, so it is nobody's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.real.appliance import Namespace

ADDRESS = "192.0.2.1"
_OUR_SIDE = "192.0.2.2"


class World(Namespace):
    """Reached through ``inside``, whose default route and /etc/hosts it becomes."""

    def __init__(self, inside: Namespace, *names: str) -> None:
        super().__init__()
        self._inside = inside
        self._processes: list[subprocess.Popen[bytes]] = []
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

    @contextmanager
    def serving(self, program: str, *arguments: str) -> Iterator[None]:
        """A Python program that prints a line when it listens."""
        process = subprocess.Popen(
            self.command(sys.executable, "-u", "-c", program, *arguments), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline(), "the server did not start"
            yield
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def remove(self) -> None:
        shutil.rmtree(self._etc)
        super().remove()
