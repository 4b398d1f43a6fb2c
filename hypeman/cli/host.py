"""Commands on the server and its host. ``serve``, ``doctor`` and ``token`` run locally without a server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from hypeman.cli.output import render_table, size, use_colour
from hypeman.cli.session import Session, fail, present, reports
from hypeman.errors import InvalidRequest
from hypeman.units import parse_size

if TYPE_CHECKING:
    from hypeman.tokens import Grants

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Settings; default: /etc/hypeman/config.yaml.",
)


@click.command()
@reports
def health(session: Session) -> None:
    """Check whether the server answers."""
    found = session.client.get("/health")
    session.show(found, lambda: str(found["status"]))


@click.command()
@reports
def capabilities(session: Session) -> None:
    """Show what the server can do on its host."""
    session.show(session.client.get("/capabilities"))


@click.group(invoke_without_command=True)
@click.pass_context
def resources(context: click.Context) -> None:
    """Show the host's resources and what uses them."""
    if context.invoked_subcommand is None:
        context.invoke(_show_resources)


@reports
def _show_resources(session: Session) -> None:
    found = session.client.get("/resources")
    session.show(found, lambda: render_resources(found))


@resources.command("reclaim-memory")
@click.option(
    "--reclaim-bytes", required=True, metavar="SIZE", help="Memory to reclaim from all guests together; 0: none."
)
@click.option("--hold-for", help="Time until it is returned, e.g. 10m; up to 1h.  [default: 5m]")
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@click.option("--reason", help="For the server's log.")
@reports
def reclaim_memory(
    session: Session, reclaim_bytes: str, hold_for: str | None, dry_run: bool, reason: str | None
) -> None:
    """Reclaim memory that running guests do not need."""
    try:
        wanted = parse_size(reclaim_bytes)
    except InvalidRequest as error:
        raise click.BadParameter(error.message, param_hint="--reclaim-bytes") from None
    body = present(reclaim_bytes=wanted, hold_for=hold_for, dry_run=dry_run, reason=reason)
    found = session.client.post("/resources/memory/reclaim", body)
    session.show(found, lambda: _reclaim_text(found))


def _reclaim_text(found: dict[str, Any]) -> str:
    reclaimed, planned = size(found["applied_reclaim_bytes"]), size(found["planned_reclaim_bytes"])
    until = f" until {found['hold_until']}" if "hold_until" in found else ""
    text = f"reclaimed {reclaimed} of {planned} planned{until}; the host has {size(found['host_available_bytes'])} left"
    columns = [
        ("INSTANCE", lambda row: row["instance_name"]),
        ("STATUS", lambda row: row["status"]),
        ("HAS", lambda row: size(row["assigned_memory_bytes"])),
        ("KEEPS", lambda row: size(row["target_guest_memory_bytes"])),
        ("WHY", lambda row: row.get("error", "")),
    ]
    table = render_table(found["actions"], columns, colour=use_colour()) if found["actions"] else ""
    return f"{text}\n\n{table}".rstrip()


def render_resources(found: dict[str, Any]) -> str:
    kinds = [  # a rate that is not known limits nothing
        name for name in ("cpu", "memory", "disk", "network", "disk_io") if found.get(name) and found[name]["capacity"]
    ]

    def amount(kind: str, value: int) -> str:
        return str(value) if kind == "cpu" else size(value) + ("/s" if kind in ("network", "disk_io") else "")

    def column(key: str) -> Callable[[Any], str]:
        return lambda kind: amount(kind, found[kind][key])

    columns = [
        ("RESOURCE", lambda kind: kind),
        ("HAS", column("capacity")),
        ("LIMIT", column("effective_limit")),
        ("TAKEN", column("allocated")),
        ("FREE", column("available")),
    ]
    text = render_table(kinds, columns, colour=use_colour())
    if found["allocations"]:
        holders = [
            ("INSTANCE", lambda row: row.get("instance_name")),
            ("VCPUS", lambda row: row.get("cpu")),
            ("MEMORY", lambda row: size(row.get("memory_bytes"))),
            ("DISK", lambda row: size(row.get("disk_bytes"))),
        ]
        text += "\n\n" + render_table(found["allocations"], holders, colour=use_colour())
    if pools := found.get("pools"):
        kept = [
            ("POOL OF SNAPSHOT", lambda row: row["snapshot_id"]),
            ("FORKS", lambda row: row["members"]),
            ("MEMORY", lambda row: size(row["memory_bytes"])),
            ("DISK", lambda row: size(row["disk_bytes"])),
        ]
        text += "\n\n" + render_table(pools, kept, colour=use_colour())
    return text


@click.command()
@click.option("--user-id", "-user-id", default="test-user", show_default=True)
@click.option("--scopes", "-scopes", help="Comma-separated; default: everything.")
@click.option(
    "--repository",
    "-registry-push",
    "repositories",
    multiple=True,
    metavar="NAME[:ACTIONS]",
    help="For the registry alone, and there for this repository: pull, push, delete; default: pull,push. Repeatable.",
)
@click.option("--lifetime", type=click.IntRange(1), default=24, show_default=True, help="Hours.")
@click.option("--list-scopes", "-list-scopes", is_flag=True, help="Show all scopes.")
@config_option
def token(
    user_id: str,
    scopes: str | None,
    repositories: tuple[str, ...],
    lifetime: int,
    list_scopes: bool,
    config_file: Path | None,
) -> None:
    """Issue an API token with the server's secret (JWT_SECRET, or jwt_secret in its settings)."""
    from hypeman import tokens
    from hypeman.config import load_config
    from hypeman.errors import HypemanError

    if list_scopes:
        for scope in tokens.Scope:
            click.echo(str(scope))
        return
    if scopes is not None and repositories:
        raise click.UsageError("--scopes is for the API, --repository for the registry: give one of them")
    try:
        secret = load_config(config_file).jwt_secret
        grants = frozenset(grant for text in repositories for grant in _grants(text)) if repositories else None
        names = None if scopes is None else [name.strip() for name in scopes.split(",") if name.strip()]
        click.echo(tokens.mint(secret, subject=user_id, scopes=names, lifetime=lifetime * 3600, grants=grants))
    except HypemanError as error:
        fail(error.message)


def _grants(text: str) -> Grants:
    """Raises click.BadParameter."""
    from hypeman.registry.names import RegistryFailure, check_repository
    from hypeman.tokens import parse_grants

    grants = parse_grants(text)
    try:
        for repository, _ in grants:
            check_repository(repository)
    except RegistryFailure as failure:
        raise click.BadParameter(failure.message, param_hint="--repository") from None
    if not grants:
        raise click.BadParameter(f"{text!r}: actions are pull, push and delete", param_hint="--repository")
    return grants


@click.command()
@config_option
def serve(config_file: Path | None) -> None:
    """Run the server."""
    from hypeman.config import load_config
    from hypeman.errors import HypemanError

    messages: list[str] = []
    try:
        config = load_config(config_file)
        from hypeman.app import main

        main(config)
    except* HypemanError as failures:  # nurseries wrap exceptions in groups
        messages = failure_messages(failures)
    if messages:
        fail("; ".join(messages))


def failure_messages(failures: BaseExceptionGroup[Any]) -> list[str]:
    found: list[str] = []
    for error in failures.exceptions:
        found += failure_messages(error) if isinstance(error, BaseExceptionGroup) else [str(error)]
    return found


@click.command("clean-host", hidden=True)
@config_option
def clean_host(config_file: Path | None) -> None:
    """Remove the links, rules and devices of VMs that no longer exist. For removing the appliance."""
    from hypeman.config import load_config
    from hypeman.errors import HypemanError

    messages: list[str] = []
    try:
        config = load_config(config_file)
        import trio

        from hypeman import removal

        trio.run(removal.clean_host, config)
    except* HypemanError as failures:
        messages = failure_messages(failures)
    if messages:
        fail("; ".join(messages))


@click.command()
@config_option
@click.pass_obj
def doctor(session: Session, config_file: Path | None) -> None:
    """Report what this host can do, what is missing, and how to fix it. Exit code 1 if something cannot work."""
    from hypeman.config import load_config
    from hypeman.errors import HypemanError
    from hypeman.telemetry.findings import Verdict, worst

    try:
        config = load_config(config_file)
        from hypeman.doctor import examine

        findings = tuple(examine(config))
    except HypemanError as error:
        fail(error.message)
    rows = [msgspec.to_builtins(finding) for finding in findings]
    session.show(rows, lambda: _findings_text(rows))
    sys.exit(1 if worst(findings) is Verdict.FAIL else 0)


def _findings_text(rows: list[dict[str, str]]) -> str:
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    lines = []
    for row in rows:
        verdict = row["verdict"].ljust(4)
        if use_colour():
            verdict = click.style(verdict, fg=colours[row["verdict"]])
        lines.append(f"{verdict}  {row['name']}: {row['message']}")
        if row["remedy"]:
            lines.append(f"      → {row['remedy']}")
    return "\n".join(lines)
