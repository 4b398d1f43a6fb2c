"""What people type who know Docker: what Docker answers, and what ``hypeman`` does.

``tests/habits/test_typed.py`` types them all, at a server with fake guests; ``tests/real/test_command_line.py`` has
what needs a guest.
"""

from __future__ import annotations

import shlex
from typing import NamedTuple


class Typed(NamedTuple):
    command: str
    """After ``docker`` or ``hypeman``. There are the running instance web, the stopped instance old, the image nginx:1
    and the volume data."""
    docker: str
    code: int
    shows: str = ""
    """Part of the output, standard error included; empty: nothing is expected in particular."""
    prints_nothing: bool = False

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)


TYPED = (
    Typed("run", "125 (1 in older ones), usage", 125, "Missing argument 'IMAGE'"),
    Typed("run --nmae x nginx:1", "125, unknown flag", 125, "Did you mean one of: '--name'"),
    Typed("run -d --name web nginx:1", "125, the name is in use", 125, "already"),
    Typed("run -d -m lots nginx:1", "125, invalid size", 125, "as in 512MB or 1.5GB"),
    Typed("run -d -p 99999:80 nginx:1", "125, invalid hostPort", 125, "99999 is not a port"),
    Typed("run -d -v new:/srv nginx:1", "makes the volume", 0, "made the volume new, 10GB"),
    Typed(
        "run -d -v /host:/srv nginx:1", "mounts the host's directory; here: what to do instead", 125, "make a volume"
    ),
    Typed("run --rm --restart always nginx:1", "125, conflicting options", 125, "exclude each other"),
    Typed("run --privileged nginx:1", "every capability; a VM's root has them", 125, "a kernel of its own"),
    Typed("pss", "1, unknown command", 2, "Did you mean 'ps'"),
    Typed("logs gone", "1, no such container", 1, "gone"),
    Typed("stop gone web", "1, but web is stopped", 1, "web is Stopped"),
    Typed("rm web", "1, cannot remove a running container", 1, "stop it first, or say --force"),
    Typed("rm -f web old", "removes both", 0, "web\nold\n"),
    Typed("inspect web gone", "1, shows web", 1, '"name": "web"'),
    Typed("inspect nginx:1", "the image", 0, '"digest"'),
    Typed("inspect data", "the volume", 0, '"size_gb"'),
    Typed("inspect -f {{.State.Status}} web old", "running and exited", 0, "running\nexited\n"),
    Typed("inspect -f {{.State.Pid}} web", "the process; a VM has none", 2, "there is no field .Pid"),
    Typed("ps -aq --no-trunc", "ids alone", 0, "\n"),
    Typed("ps --format {{.Names}}", "names alone", 0, "web\n"),
    Typed("ps -a --filter status=exited --format {{.Names}}", "stopped ones", 0, "old\n"),
    Typed("ps --format 'table {{.Names}}\\t{{.Image}}'", "a table", 0, "NAMES   IMAGE\nweb     nginx:1"),
    Typed("images --format {{.Repository}}:{{.Tag}}", "nginx:1", 0, "nginx:1\n"),
    Typed("tag nginx:1 other:2", "prints nothing", 0, prints_nothing=True),
    Typed("volume create other", "made; prints the name (here its id)", 0, "\n"),
    Typed("volume ls -q", "names (here ids)", 0, "\n"),
    Typed("volume rm gone", "1, no such volume", 1, "gone"),
    Typed("cp a b", "1, must be container:path", 2, "one side must be INSTANCE:/PATH"),
    Typed("cp /nope web:/", "1, no such file", 1, "/nope does not exist"),
    Typed("port web 80", "1, no public port", 1, "port 80/tcp of web is not published"),
    Typed("exec web", "1, requires a command; here a shell", 0),
    Typed("pause web", "pauses; here: what does more", 2, "hypeman standby"),
    Typed("rename web x", "renames; here: why not", 2, "an instance keeps its name"),
    Typed("network ls", "networks; here: what there is instead", 2, "its own network"),
    Typed("container ls", "as ps", 2, "leave the word out"),
    Typed("create nginx:1", "makes without starting", 2, "hypeman run -d"),
    Typed("search nginx", "searches Docker Hub", 2, "hypeman pull NAME"),
    Typed("logs --since foo web", "1, invalid time", 1, "since"),
    Typed("logs --tail -1 web", "all lines", 2, "neither a number of lines nor all"),
    Typed("version -f {{.Client.Version}}", "the version", 0, "."),
    Typed("info -f {{.Containers}}", "how many", 0, "2\n"),
    Typed("system prune -f", "deletes what is stopped", 0, "old\n"),
)


def render() -> list[str]:
    """The lines of the table."""
    lines = ["| typed | Docker | here |", "|---|---|---|"]
    for row in TYPED:
        shows = "nothing" if row.prints_nothing else " / ".join(row.shows.strip().split("\n"))
        shown = f"exit code {row.code}" if row.code else ""
        command = row.command.replace("|", "\\|")
        output = f"`{shows}`" if row.shows.strip() else shows
        here = ", ".join(filter(None, (shown, output))) or "the same"
        lines.append(f"| `{command}` | {row.docker} | {here} |")
    return lines
