"""Shell completion and manual pages, generated from the commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from hypeman import __version__

COMPLETION_VARIABLE = "_HYPEMAN_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print completions for a shell; for bash: eval "$(hypeman completion bash)"."""
    from click.shell_completion import get_completion_class

    wanted = shell or os.path.basename(os.environ.get("SHELL", "bash"))
    kind = get_completion_class(wanted)
    if kind is None:
        raise click.UsageError(f"no completions for {wanted}; there are bash, zsh and fish")
    click.echo(kind(context.find_root().command, {}, "hypeman", COMPLETION_VARIABLE).source())


@click.command()
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Directory for one page each.")
@click.pass_context
def man(context: click.Context, output: Path | None) -> None:
    """Print the manual page; with -o write a page for every command."""
    root = click.Context(context.find_root().command, info_name="hypeman")
    if output is None:
        click.echo(render_page(root))
        return
    output.mkdir(parents=True, exist_ok=True)
    for page in _walk(root):
        (output / f"{page.command_path.replace(' ', '-')}.1").write_text(render_page(page))


def render_page(context: click.Context) -> str:
    """The page of one command in roff. Pure."""
    command = context.command
    name = context.command_path.replace(" ", "-")
    lines = [f'.TH "{name.upper()}" "1" "" "hypeman {__version__}" "hypeman"']
    lines += [".SH NAME", f"{_escape(name)} \\- {_escape(command.get_short_help_str(200))}"]
    usage = " ".join(command.collect_usage_pieces(context))
    lines += [".SH SYNOPSIS", f".B {_escape(context.command_path)}", _escape(usage)]
    if command.help:
        lines += [".SH DESCRIPTION", *(_escape(line) or ".PP" for line in command.help.splitlines())]
    options = [found for parameter in command.get_params(context) if (found := parameter.get_help_record(context))]
    if options:
        lines.append(".SH OPTIONS")
        for flags, text in options:
            lines += [".TP", f".B {_escape(flags)}", _escape(text or "")]
    commands = list(_below(context))
    if commands:
        lines.append(".SH COMMANDS")
        for below in commands:
            lines += [".TP", f".B {_escape(below.info_name or '')}", _escape(below.command.get_short_help_str(200))]
    return "\n".join(lines) + "\n"


def _walk(context: click.Context) -> Iterator[click.Context]:
    yield context
    for below in _below(context):
        yield from _walk(below)


def _below(context: click.Context) -> Iterator[click.Context]:
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None and not command.hidden:
                yield click.Context(command, info_name=name, parent=context)


def _escape(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text
