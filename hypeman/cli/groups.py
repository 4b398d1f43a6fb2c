"""Groups whose commands have other names too, or may be left out, as in ``push IMAGE`` besides ``push list``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import click


class NounGroup(click.Group):
    """Commands below a noun, also by Docker's names, as in ``image rm`` for ``image delete``; the help has only one."""

    aliases: ClassVar[Mapping[str, str]] = {"rm": "delete", "ls": "list", "inspect": "get", "unregister": "delete"}

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, name) or super().get_command(context, self.aliases.get(name, name))


class DefaultGroup(click.Group):
    """A first word that is no command, or an option, belongs to the command ``create``."""

    aliases: ClassVar[Mapping[str, str]] = {"ls": "list", "inspect": "get"}

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(context, args[0]) is None:
            return "create", self.get_command(context, "create"), args
        return super().resolve_command(context, args)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["create", *args]
        return super().parse_args(context, args)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, self.aliases.get(name, name))
