"""Where the commands are. A command's module is imported when the command is first used.

All modules together take five times as long to import as one, most of it for the options that they declare.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from importlib.util import find_spec

import click

from hypeman.cli.refused import REFUSED, refusing

CLIENT = {
    "attach": "docker:attach",
    "auto-standby": "instances:auto_standby",
    "build": "builds:build",
    "builder": "builds:builder",
    "capabilities": "host:capabilities",
    "commit": "docker:commit",
    "completion": "shell:completion",
    "compose": "compose.commands:compose",
    "cp": "copy:copy",
    "device": "devices:devices",
    "egress": "egress:egress",
    "events": "events:events",
    "exec": "execute:execute",
    "fork": "instances:fork",
    "health": "host:health",
    "help": "docker:show_help",
    "image": "images:images",
    "info": "docker:info",
    "ingress": "ingress:ingresses",
    "inspect": "instances:inspect",
    "kill": "docker:kill",
    "login": "logins:login",
    "logout": "logins:logout",
    "logs": "instances:logs",
    "man": "shell:man",
    "port": "ports:port",
    "ps": "instances:ps",
    "pull": "images:pull",
    "push": "pushes:push",
    "resources": "host:resources",
    "restart": "docker:restart",
    "restore": "instances:restore",
    "rm": "instances:rm",
    "rmi": "docker:rmi",
    "run": "run:run",
    "snapshot": "snapshots:snapshots",
    "standby": "instances:standby",
    "start": "instances:start",
    "stats": "instances:stats",
    "stop": "instances:stop",
    "system": "docker:system",
    "tag": "docker:tag",
    "top": "docker:top",
    "trace": "traces:trace",
    "ui": "ui:ui",
    "update": "ports:update",
    "usage": "usage:usage",
    "version": "docker:version",
    "volume": "volumes:volumes",
    "wait": "instances:wait",
}
"""Names to ``module:attribute`` below ``hypeman.cli``."""
SERVER = {
    "backup": "backup:backup",
    "bundle": "bundle:bundle",
    "clean-host": "host:clean_host",
    "doctor": "host:doctor",
    "node": "node:node",
    "serve": "host:serve",
    "token": "host:token",
}
"""Those that want the server's code, which the client that is distributed alone does not have."""


class Tree(MutableMapping[str, click.Command]):
    """All commands by name; what click.Group takes as its ``commands``."""

    def __init__(self) -> None:
        self._places = {**CLIENT, **(SERVER if find_spec("hypeman.app") is not None else {})}
        self._names = dict.fromkeys((*self._places, *REFUSED))
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> click.Command:
        if name in REFUSED:
            return refusing(name)
        module, attribute = self._places[name].split(":")
        found = getattr(import_module(f"hypeman.cli.{module}"), attribute)
        assert isinstance(found, click.Command)
        return found

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._names[name] = None
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._loaded.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
