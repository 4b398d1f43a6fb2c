"""Commands on mediated egress: an instance's policy and its requests."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import click

from hypeman.cli.instances import instance_argument, path_of
from hypeman.cli.output import plain, render, render_table, size, use_colour
from hypeman.cli.session import Session, reports


@click.group()
def egress() -> None:
    """Mediated egress: policies, live requests, the CA that guests trust."""


@egress.command()
@instance_argument
@reports
def policy(session: Session, instance: str) -> None:
    """Show which credentials go to which hosts; never their values."""
    found = session.client.get(f"{path_of(instance)}/egress")
    session.show(found, lambda: _policy_text(found))


def _policy_text(found: dict[str, Any]) -> str:
    lines = [f"{found['instance_name']}: enforcement {found['mode']}"]
    rows = [
        (name, credential["source"], rule)
        for name, credential in found["credentials"].items()
        for rule in credential["inject"]
    ]
    columns = [
        ("CREDENTIAL", lambda row: row[0]),
        ("VALUE OF", lambda row: row[1].get("env") or f"source {row[1].get('named')}"),
        ("HOSTS", lambda row: "every" if row[2].get("hosts") is None else ", ".join(row[2]["hosts"])),
        ("HEADER", lambda row: row[2]["as"].get("header", "-")),
        ("FORMAT", lambda row: row[2]["as"].get("format") or _other_form(row[2]["as"])),
    ]
    return "\n".join(lines + ([render_table(rows, columns, colour=use_colour())] if rows else []))


def _other_form(shape: dict[str, Any]) -> str:
    """A form other than header and format: its name and settings, none of which is secret."""
    name, settings = next(iter(shape.items()))
    if not isinstance(settings, dict):
        return f"{name} {settings}"
    return " ".join([name, *(f"{key}={value}" for key, value in settings.items() if value)])


@egress.command()
@instance_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with new requests.")
@click.option("--tail", type=click.IntRange(0), default=100, show_default=True, help="Requests from before.")
@reports
def requests(session: Session, instance: str, follow: bool, tail: int) -> None:
    """Show the requests of an instance as they end; with --format one JSON object a line."""
    for record in session.client.events(f"{path_of(instance)}/egress/requests", follow=follow, tail=tail):
        sys.stdout.write((_record_line(record) if session.form == "auto" else render(record, "jsonl")) + "\n")
        sys.stdout.flush()


def _record_line(record: dict[str, Any]) -> str:
    """Time, method, host, outcome, credentials, bytes, duration."""
    time = datetime.fromisoformat(record["time"]).astimezone().strftime("%H:%M:%S")
    what = record["method"] or record["kind"].replace("_", " ")
    outcome = record["status"] or "-"
    if record["reason"] != "ok":
        outcome = f"{outcome} {record['reason']}"
    used = ",".join(record["credentials"])
    host = record["host"] if record["port"] == 443 else f"{record['host']}:{record['port']}"
    traffic = f"↑{size(record['bytes_up'])} ↓{size(record['bytes_down'])}"
    line = f"{time} {what:7} {host:32} {outcome} {used or '-'} {traffic} {record['ms']:.1f}ms"
    return plain(line)


@egress.command()
@reports
def ca(session: Session) -> None:
    """Print the certificate of the authority that guests trust."""
    click.echo(session.client.text("/egress/ca.pem"), nl=False)
