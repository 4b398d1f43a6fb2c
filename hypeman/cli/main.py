"""The command ``hypeman``: global options, other names of commands, help by subject.

The same program is the client and the server. Client commands import neither Trio nor Quart, so that
they start fast (enforced by ``tests/cli/test_start.py``); ``serve`` imports them when it runs.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from hypeman import __version__
from hypeman.cli.output import FORMATS
from hypeman.cli.program import RunCommand, takes_anything
from hypeman.cli.session import Format, Session, complain
from hypeman.cli.shell import COMPLETION_VARIABLE
from hypeman.cli.tree import Tree

ALIASES = {
    "images": "image",
    "volumes": "volume",
    "snapshots": "snapshot",
    "devices": "device",
    "ingresses": "ingress",
    "resource": "resources",
    "pushes": "push",
    "builds": "build",
    "builders": "builder",
    "@completion": "completion",
    "@manpages": "man",
}
LISTS = frozenset(["images", "volumes", "snapshots", "devices", "ingresses", "builds", "builders"])
"""Without a command below it, the plural lists, as `docker images` does."""

_VALUES = {"true": True, "1": True, "false": False, "0": False}


SECTIONS = {
    "Run": ("run", "ps", "logs", "exec", "cp", "attach", "top", "stats", "wait", "port"),
    "Life cycle": ("start", "stop", "restart", "kill", "standby", "restore", "fork", "rm", "update", "auto-standby"),
    "Images": ("pull", "image", "tag", "push", "login", "logout", "build", "builder", "rmi"),
    "Data": ("volume", "snapshot", "commit", "backup", "bundle", "compose"),
    "Network and devices": ("ingress", "egress", "device"),
    "Host": (
        *("ui", "info", "health", "capabilities", "resources", "system"),
        *("events", "trace", "usage", "doctor", "serve", "node", "token"),
    ),
}
"""The commands of the help by subject; any other is listed at its end."""


class Commands(click.Group):
    """A group that also accepts command aliases, global options after the command, and ``--flag=false``,
    for compatibility with the original."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(context, self.in_front(context, args))

    def in_front(self, context: click.Context, args: list[str]) -> list[str]:
        """``args`` with the global options first, except those that may belong to another program. Pure."""
        options = {text: found for found in self.params if isinstance(found, click.Option) for text in found.opts}
        front: list[str] = []
        rest: list[str] = []
        command: click.Command = self
        at, end = 0, len(args)
        while at < end:
            word = args[at]
            if word == "--" or (takes_anything(command) and not isinstance(command, RunCommand)):
                break
            at += 1
            flag, equals, _ = word.partition("=")
            own = any(flag in found.opts for found in command.params)
            if flag.startswith("-") and flag in options and (command is self or not own):
                front.append(word)
                if not equals and not options[flag].is_flag:
                    front += args[at : at + 1]
                    at += 1
            else:
                rest.append(word)
                if isinstance(command, click.Group) and not word.startswith("-"):
                    command = command.get_command(context, word) or command
                    if isinstance(command, RunCommand):
                        end = at + command.program_at(args[at:], options)
        return [*front, *rest, *args[at:]]

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        visible = {name: found for name, found in self.commands.items() if not found.hidden}
        listed = {name for names in SECTIONS.values() for name in names}
        sections = {**SECTIONS, "Other": tuple(name for name in sorted(visible) if name not in listed)}
        limit = formatter.width - 6 - max(map(len, visible))
        for title, names in sections.items():
            rows = [(name, visible[name].get_short_help_str(limit)) for name in names if name in visible]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, name) or super().get_command(context, ALIASES.get(name, name))

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, args)
        if args[0] in LISTS and all(word.startswith("-") for word in rest) and not {"--help", "-h"} & set(rest):
            rest = ["list", *rest]
        below = command
        for word in rest:
            if isinstance(below, click.Group) and not word.startswith("-"):
                below = below.get_command(context, word)
        return name, command, plain_flags(below, rest) if below is not None else rest


def plain_flags(command: click.Command, args: list[str]) -> list[str]:
    """Translates ``--flag=true`` and ``--flag=false`` to the flags of ``command``. Pure."""
    if isinstance(command, RunCommand):
        end = command.program_at(args)
        args, program = args[:end], args[end:]
    elif takes_anything(command):
        return args
    else:
        program = []
    options = [found for found in command.params if isinstance(found, click.Option) and found.is_flag]
    flags = {text: option for option in options for text in option.opts}
    plain: list[str] = []
    for at, word in enumerate(args):
        if word == "--":
            return [*plain, *args[at:], *program]
        flag, _, value = word.partition("=")
        if flag not in flags or value not in _VALUES:
            plain.append(word)
        elif _VALUES[value]:
            plain.append(flag)
        else:
            plain += flags[flag].secondary_opts[:1]  # no such option: off by default
    return [*plain, *program]


@click.group(
    cls=Commands, commands=Tree(), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--base-url", help="http://…, https://… or unix:///path of the server.")
@click.option(
    "-o",
    "--output",
    "--format",
    "form",
    type=Format(FORMATS),
    default="auto",
    metavar="FORMAT",
    help=f"{', '.join(FORMATS)}, or a template of Docker's: '{{{{.Names}}}}'.",
)
@click.option("--format-error", "form_error", type=click.Choice(FORMATS), default="auto", help="Format of errors.")
@click.option(
    "--filter", "filters", multiple=True, metavar="FIELD=VALUE", help="Only rows of a list that match; * and ?."
)
@click.option("--transform", default="", help="Only this part of the output, as in network.ip or #.name.")
@click.option("--transform-error", default="", help="Only this part of an error.")
@click.option("--debug", is_flag=True, help="Show every request.")
@click.version_option(__version__, "-v", "--version", prog_name="hypeman")
@click.pass_context
def hypeman(context: click.Context, /, **options: Any) -> None:
    """OCI images as micro-VMs on this host, and the client for it."""
    session = context.obj = Session(**options)
    context.call_on_close(session.close)


def main() -> None:
    """The entry point of the program."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal of ISO 8859-1 shows no "→"
    try:
        hypeman.main(prog_name="hypeman", complete_var=COMPLETION_VARIABLE, standalone_mode=False)
    except click.exceptions.Abort as aborted:
        if not isinstance(aborted.__cause__, KeyboardInterrupt):  # but a question that was not answered
            click.echo("\nAborted: nothing was changed", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has exited, as with `| head`; write nothing more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UnicodeError as error:
        complain(f"what was given is not text in UTF-8: {error}")
        sys.exit(1)
    except OSError as error:
        complain(str(error))
        sys.exit(1)
