"""Commands whose last arguments are another program and its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

_NETWORKS = frozenset(["host", "none", "bridge", "default", "container"])
"""Words after ``--network`` that are no image."""


def takes_anything(command: click.Command) -> bool:
    """Whether arguments after ``command`` may belong to another program."""
    return any(
        isinstance(found, click.Argument) and found.nargs == -1 and found.type is click.UNPROCESSED
        for found in command.params
    )


_FAILED = 125
"""Docker's exit code of a run that did not come to the program, whose own codes begin at 0."""


class ProgramEnded(SystemExit):
    """With the exit code of the program that was run."""


class RunCommand(click.Command):
    """A command whose options may also follow IMAGE, but not the program that is run: `run IMAGE --name web ls -l`.
    Its own failures have the exit code 125."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _failures():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> Any:
        with _failures():
            return super().invoke(context)

    def _plain_networks(self, args: list[str]) -> list[str]:
        """``args`` with Docker's ``--network VALUE`` as our flag: VALUE is not to be taken for the image. Raises
        UsageError for a network that no VM has."""
        plain: list[str] = []
        at, end = 0, self.program_at(args)
        while at < len(args):
            value, taken = _network_of(args[at:]) if at < end else ("", 0)
            if not taken or value in ("true", "false"):
                plain.append(args[at])
                at += 1
                continue
            if value not in ("none", "bridge", "default"):
                raise click.UsageError(
                    f"--network {value} is not supported: each instance has its own network; -p publishes ports, and "
                    "--network-group says which guests reach each other"
                )
            plain.append("--no-network" if value == "none" else "--network")
            at += taken
        return plain

    def program_at(self, args: list[str], others: Mapping[str, click.Option] = {}) -> int:
        """Index in ``args`` of the first word of COMMAND, or their number. ``others``: global options. Pure."""
        own = {text: found for found in self.params if isinstance(found, click.Option) for text in found.opts}
        options = {**others, **own}
        positional = at = 0
        while at < len(args):
            word = args[at]
            if word == "--":
                return at
            if word.startswith("-") and word != "-":
                at += 1 if _has_its_value(word, options) else 2
                continue
            positional += 1
            if positional == 2:
                return at
            at += 1
        return len(args)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        args = self._plain_networks(args)
        at = self.program_at(args)
        if args[at : at + 1] == ["--"] or at == len(args):
            return super().parse_args(context, args)
        return super().parse_args(context, [*args[:at], "--", *args[at:]])


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        error.exit_code = _FAILED  # type: ignore[misc]  # its own way to say it
        raise
    except ProgramEnded:
        raise
    except SystemExit as end:
        raise (SystemExit(_FAILED) if end.code == 1 else end) from None


def _network_of(words: Sequence[str]) -> tuple[str, int]:
    """The value of Docker's ``--network`` if ``words`` begin with it, and how many words it takes."""
    flag, equals, value = words[0].partition("=")
    if flag == "--network" and equals:
        return value, 1
    if flag == "--network" and len(words) > 1 and words[1].partition(":")[0] in _NETWORKS:
        return words[1], 2
    return "", 0


def _has_its_value(word: str, options: dict[str, click.Option]) -> bool:
    """Whether the option ``word`` needs no value in the next word."""
    if word.startswith("--"):
        flag, equals, _ = word.partition("=")
        return bool(equals) or flag not in options or options[flag].is_flag or options[flag].count
    for at, letter in enumerate(word[1:], 1):
        found = options.get(f"-{letter}")
        if found is not None and not found.is_flag:
            return at + 1 < len(word)
    return True
