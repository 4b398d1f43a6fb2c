"""Docker's commands that are refused by design, and what to use instead."""

from __future__ import annotations

import click

REFUSED = {
    "buildx": "`hypeman build` is BuildKit's, with the same flags",
    "container": "leave the word out: `hypeman ps`, `hypeman rm`, …",
    "context": "HYPEMAN_BASE_URL and HYPEMAN_API_KEY, or ~/.config/hypeman/cli.yaml, say which server is meant",
    "create": "`hypeman run -d` creates and boots; an instance that is stopped keeps its disk",
    "history": "`hypeman image inspect` shows an image; the steps of a build are in `hypeman build logs`",
    "import": "`hypeman image import` reads an archive of an image",
    "load": "`hypeman image import` reads an archive of an image",
    "search": "registries have search pages of their own; `hypeman pull NAME` pulls",
    "pause": "`hypeman standby` saves an instance's memory to disk and frees the host's; `hypeman restore` resumes it",
    "unpause": "`hypeman restore` resumes an instance that is in standby",
    "rename": "an instance keeps its name; `hypeman fork OLD NEW` makes a copy with another one",
    "save": "`hypeman backup create` saves images; a registry shares them",
    "export": "`hypeman cp INSTANCE:/ -` writes a guest's files as a tar",
    "diff": "`hypeman exec INSTANCE -- find / -xdev -newer /etc/hostname` lists what changed since the boot",
    "network": "each instance has its own network; see --network and --bandwidth-… of `hypeman run`",
    "swarm": "Hypeman runs on one host",
}


def refusing(name: str) -> click.Command:
    """The hidden command ``name`` of REFUSED."""

    @click.command(name, hidden=True, context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def refuse(arguments: tuple[str, ...]) -> None:
        raise click.UsageError(f"{name} is not supported: {REFUSED[name]}")

    return refuse
