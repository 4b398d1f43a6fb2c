"""Shared by all commands: the client, the output format, and error handling."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
import msgspec

from hypeman.cli.client import ApiError, Client, Unreachable
from hypeman.cli.output import (
    FORMATS,
    Columns,
    matching,
    pick,
    render,
    render_table,
    terminal_width,
    unknown_fields,
    use_colour,
)
from hypeman.cli.settings import SettingsError, load_settings
from hypeman.errors import InvalidRequest
from hypeman.text import lines, lines_with_colours, one_line
from hypeman.units import format_size, parse_size

_T = TypeVar("_T")

_HINTS = {
    401: "set HYPEMAN_API_KEY or api_key in ~/.config/hypeman/cli.yaml; `hypeman token` on the server issues a token",
    403: "this token lacks the scope; `hypeman token --scopes` issues one that has it",
    501: "this server, host or hypervisor cannot do it; see `hypeman capabilities`",
}


class Session:
    """The global options and the operations that depend on them."""

    def __init__(
        self,
        *,
        base_url: str | None = None,
        form: str | Template = "auto",
        form_error: str = "auto",
        transform: str = "",
        transform_error: str = "",
        debug: bool = False,
        filters: Sequence[str] = (),
    ) -> None:
        self.set_form(form)
        self.fields = ""
        """The function of ``docker_fields`` for what the command shows."""
        self.filters = filters
        """``FIELD=VALUE``; a command may translate Docker's names of fields."""
        self._base_url = base_url
        self._form_error = form_error
        self._transform = transform
        self._transform_error = transform_error
        self._debug = debug

    def set_form(self, form: str | Template) -> None:
        """One of FORMATS, or a template."""
        self.template = None if isinstance(form, str) else form
        self.form = form if isinstance(form, str) and form != "table" else "auto"

    @functools.cached_property
    def client(self) -> Client:
        return Client(load_settings(self._base_url), debug=self._debug)

    def close(self) -> None:
        if "client" in vars(self):
            self.client.close()

    def show(self, value: Any, human: Callable[[], str] | None = None) -> None:
        """Print ``value`` in the selected format; ``human`` renders it for people if that is ``auto``."""
        if self.template is not None:
            self._fill(value if isinstance(value, list) else [value])
        elif self._transform:
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
        """Print a table of the rows that match ``--filter``, or only the field ``quiet`` of each."""
        found = matching(rows, self.filters)
        for field in unknown_fields(rows, self.filters):
            known = sorted({key for row in rows for key in row})
            warn(f"--filter {field}: none of the {len(rows)} has this field; there are {', '.join(known)}")
        rows = found
        if quiet is not None:
            for row in rows:
                click.echo(one_line(str(row[quiet])))
        else:
            self.show(rows, lambda: render_table(rows, columns, colour=use_colour(), width=terminal_width()))

    def _fill(self, values: Sequence[Any]) -> None:
        """Print the template for each of ``values``. Raises UsageError for a field that they do not have."""
        from hypeman.cli import docker_fields, templates

        assert self.template is not None
        objects = [getattr(docker_fields, self.fields)(value) for value in values]
        try:
            text = self.template.lines(objects, docker_fields.HEADERS)
        except templates.TemplateError as error:
            raise click.UsageError(f"--format: {error}") from None
        if values or text:
            echo(text)

    def report(self, error: Exception) -> None:
        """Print on stderr what went wrong and what to do."""
        if isinstance(error, ApiError):
            self._report_refusal(error)
        elif isinstance(error, Unreachable):
            complain(str(error), "does `hypeman serve` run there? --base-url or HYPEMAN_BASE_URL says where it is")
        else:
            complain(str(error))

    def each(self, names: Iterable[_T], act: Callable[[_T], object]) -> None:
        """``act`` on all of ``names``, also after one that fails; then end the command with exit code 1 if one did."""
        failed = False
        for name in names:
            try:
                act(name)
            except ApiError as error:
                self.report(error)
                failed = True
            except SystemExit as end:  # reported already
                failed = failed or bool(end.code)
        if failed:
            raise SystemExit(1)

    def delete_each(self, names: Iterable[str], path: Callable[[str], str]) -> None:
        """As ``each``: delete what is at the ``path`` of each name, and print the names of those that are deleted."""

        def one(name: str) -> None:
            self.client.call("DELETE", path(name))
            click.echo(one_line(name))

        self.each(names, one)

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


def write_log(line: bytes, ends: bool) -> None:
    """Print a line of a log, or a piece of one that does not end it: the bytes that were printed in the guest."""
    sys.stdout.buffer.write(line + b"\n" if ends else line)
    sys.stdout.buffer.flush()


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
        session.fields = getattr(command, "docker_fields", "")
        if session.template is not None and not session.fields:
            raise click.UsageError(
                "templates are not supported by this command: --transform shows a part, as in --transform network.ip "
                "or, of a list, --transform '#.name'; -o json shows everything"
            )
        try:
            return command(session, *args, **kwargs)
        except (ApiError, Unreachable, SettingsError) as error:
            session.report(error)
            raise SystemExit(1) from None

    return click.pass_obj(run)


def templated(fields: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator below ``reports``: the command takes templates, whose names of fields are those of that function of
    ``docker_fields``."""

    def mark(command: Callable[..., Any]) -> Callable[..., Any]:
        command.docker_fields = fields  # type: ignore[attr-defined]
        return command

    return mark


def another_name(command: click.Command, name: str, *, hidden: bool = False) -> click.Command:
    """The same command under another name."""
    return click.Command(name, params=command.params, callback=command.callback, help=command.help, hidden=hidden)


def pairs(values: Sequence[str], flag: str = "--tag") -> dict[str, str]:
    """KEY=VALUE flags as a dict. Raises UsageError for anything else: a filter that is skipped selects everything."""
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise click.UsageError(f"{flag} {value}: must be KEY=VALUE")
        found[key] = text
    return found


def environment(values: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``-e KEY=VALUE``, and ``-e KEY`` for the caller's value; a variable that the caller does not have is skipped with
    a warning. Raises UsageError if a name is missing."""
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key:
            raise click.UsageError(f"--env {value}: the name is missing")
        if equals:
            found[key] = text
        elif key in environ:
            found[key] = environ[key]
        else:
            warn(f"--env {key}: there is no such variable in the environment; it is skipped")
    return found


if TYPE_CHECKING:
    from hypeman.cli.templates import Template

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # not generic in older versions


class Format(click.Choice[str]):
    """One of FORMATS, or one of Docker's templates."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if "{{" not in value:
            return super().convert(value, parameter, context)
        from hypeman.cli.templates import Template, TemplateError

        try:
            return Template(value)
        except TemplateError as error:
            self.fail(f"the template is not understood: {error}", parameter, context)


class Size(ParamType):
    """A size as text of the API: ``512MB``, and for people ``1.5GB``, which is sent as ``1536MB``."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        return format_size(self.size_of(str(value), parameter, context))

    def size_of(self, text: str, parameter: click.Parameter | None, context: click.Context | None) -> int:
        """In bytes."""
        whole, dot, rest = text.strip().partition(".")
        digits = len(rest) - len(rest.lstrip("0123456789"))
        try:
            value, remainder = divmod(parse_size(whole + rest), 10**digits)
        except InvalidRequest:
            remainder = 1
        if remainder or (dot and not (whole.isdigit() and digits)):
            self.fail(f"{text!r} is not a size; write a number and a unit, as in 512MB or 1.5GB", parameter, context)
        return int(value)


class Gigabytes(Size):
    """A whole number of GB: ``10`` or ``10GB``."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        text = str(value).strip()
        found, rest = divmod(self.size_of(f"{text}GB" if text.isdigit() else text, parameter, context), 1 << 30)
        if rest or not found:
            self.fail(f"{text!r} must be a whole number of GB and at least 1GB", parameter, context)
        return found


SIZE, GIGABYTES = Size(), Gigabytes()


def _choose_format(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        context.ensure_object(Session).set_form(value)


format_option = click.option(
    "-f", type=Format(FORMATS), hidden=True, expose_value=False, callback=_choose_format, is_eager=True
)
"""Docker's short form of the global ``--format``, for commands that have one there."""


@contextmanager
def interrupted(what: str) -> Iterator[None]:
    """Ctrl-C within the block ends the command with ``what`` continues on the server, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted: {one_line(what)}", err=True)
        raise SystemExit(130) from None


def present(**fields: Any) -> dict[str, Any]:
    """The fields that were given, without None and empty text, lists or dicts. An explicit 0 or False stays."""
    return {key: value for key, value in fields.items() if value not in (None, "", (), [], {})}
