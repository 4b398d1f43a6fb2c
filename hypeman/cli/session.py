"""Shared by all commands: the client, the output format, and error handling."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import click
import msgspec

from hypeman.cli.client import ApiError, Client, Unreachable
from hypeman.cli.output import Columns, pick, render, render_table, use_colour
from hypeman.cli.settings import SettingsError, load_settings
from hypeman.text import lines, lines_with_colours, one_line

_HINTS = {
    401: "set HYPEMAN_API_KEY or api_key in ~/.config/hypeman/cli.yaml; `hypeman token` on the server mints a key",
    403: "this key may not do that; `hypeman token --scopes` mints one that may",
    501: "this server, host or hypervisor can not do it; see `hypeman capabilities`",
}


class Session:
    """The global options and the operations that depend on them."""

    def __init__(
        self,
        *,
        base_url: str | None = None,
        form: str = "auto",
        form_error: str = "auto",
        transform: str = "",
        transform_error: str = "",
        debug: bool = False,
    ) -> None:
        self.form = form
        self._base_url = base_url
        self._form_error = form_error
        self._transform = transform
        self._transform_error = transform_error
        self._debug = debug

    @functools.cached_property
    def client(self) -> Client:
        return Client(load_settings(self._base_url), debug=self._debug)

    def close(self) -> None:
        if "client" in vars(self):
            self.client.close()

    def show(self, value: Any, human: Callable[[], str] | None = None) -> None:
        """Print ``value`` in the selected format; ``human`` renders it for people if that is ``auto``."""
        if self._transform:
            value = pick(value, self._transform)
            form = "raw" if self.form == "auto" and isinstance(value, str) else self.form
            echo(render(value, form))
        elif self.form == "auto" and human is not None:
            text = human()
            if text:
                click.echo(lines_with_colours(text) if use_colour() else lines(text))
        else:
            echo(render(value, self.form))

    def show_list(self, rows: Sequence[Mapping[str, Any]], columns: Columns, *, quiet: str | None = None) -> None:
        """Print a table, or only the field ``quiet`` of each row."""
        if quiet is not None:
            for row in rows:
                click.echo(one_line(str(row[quiet])))
        else:
            self.show(rows, lambda: render_table(rows, columns, colour=use_colour()))

    def report(self, error: Exception) -> None:
        """Print on stderr what went wrong and what to do."""
        if isinstance(error, ApiError):
            self._report_refusal(error)
        elif isinstance(error, Unreachable):
            complain(str(error), "does `hypeman serve` run there? --base-url or HYPEMAN_BASE_URL says where it is")
        else:
            complain(str(error))

    def _report_refusal(self, error: ApiError) -> None:
        if self._form_error == "auto" and not self._transform_error:
            complain(error.message, _HINTS.get(error.status, ""))
            click.echo(one_line(f"  {error.request} → {error.status} {error.code}".rstrip()), err=True)
            return
        try:
            body = msgspec.json.decode(error.body)
        except msgspec.DecodeError:
            body = error.message
        form: str = "json" if self._form_error == "auto" else self._form_error
        click.echo(lines(render(pick(body, self._transform_error), form)), err=True)


def echo(text: str) -> None:
    """Print data from the server: unchanged to a file or pipe, with control characters escaped on a terminal."""
    click.echo(lines(text) if sys.stdout.isatty() else text)


def complain(message: str, hint: str = "") -> None:
    """Print one line on stderr about the error and, if there is a hint, one on what to do."""
    prefix = click.style("Error:", fg="red", bold=True) if use_colour(sys.stderr) else "Error:"
    click.echo(f"{prefix} {one_line(message)}", err=True)
    if hint:
        click.echo(f"  {one_line(hint)}", err=True)


def warn(message: str) -> None:
    """Print one line on stderr about what was not done."""
    click.echo(f"Warning: {one_line(message)}", err=True)


def fail(message: str, hint: str = "", code: int = 1) -> NoReturn:
    """End the command."""
    complain(message, hint)
    raise SystemExit(code)


def reports(command: Callable[..., Any]) -> Any:
    """Decorator: errors in communication with the server end the command with exit code 1 and a message."""

    @functools.wraps(command)
    def run(session: Session, *args: Any, **kwargs: Any) -> Any:
        try:
            return command(session, *args, **kwargs)
        except (ApiError, Unreachable, SettingsError) as error:
            session.report(error)
            raise SystemExit(1) from None

    return click.pass_obj(run)


def pairs(values: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE flags as a dict; anything else is skipped with a warning, as in older clients."""
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if key and equals:
            found[key] = text
        else:
            warn(f"{value!r} is not KEY=VALUE and is skipped")
    return found


def present(**fields: Any) -> dict[str, Any]:
    """The fields that were given, without None and empty text, lists or dicts. An explicit 0 or False stays."""
    return {key: value for key, value in fields.items() if value not in (None, "", (), [], {})}
