"""Commands on mediated egress: an instance's policy and its requests."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import click

from hypeman.cli.complete import complete_instance
from hypeman.cli.instances import instance_argument, path_of
from hypeman.cli.output import plain, render, render_table, size, use_colour
from hypeman.cli.session import Session, reports
from hypeman.urls import segment


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
@click.argument("url")
@click.option("-X", "--method", default="GET", show_default=True, help="Method of the request.")
@reports
def check(session: Session, instance: str, url: str, method: str) -> None:
    """Show what the rules of an instance decide about a request, without sending it; exit code 1 if refused."""
    found = session.client.get(f"{path_of(instance)}/egress/check", url=url, method=method)
    session.show(found, lambda: _check_text(found))
    if found["decision"] == "deny" and not found["observed"]:
        raise SystemExit(1)


def _check_text(found: dict[str, Any]) -> str:
    what = f"{found['decision']}: {found['method']} {found['scheme']}://{found['host']}:{found['port']}"
    why = "" if found["reason"] in ("ok", "approval_needed") else f", {found['reason']}"
    lines = [f"{what} (rule {found['rule']}{why})"]
    if found["observed"]:
        lines.append("The rules only observe: it would be carried, and recorded.")
    if not found["resolves"]:
        lines.append("The guest may not look up this name.")
    return "\n".join(lines)


@egress.command()
@instance_argument
@reports
def learn(session: Session, instance: str) -> None:
    """Propose the narrowest rules that cover what an instance reached since the server started.

    With observe, nothing is refused meanwhile. Use the output as a file for update egress-rules.
    """
    import json

    found = session.client.get(f"{path_of(instance)}/egress/proposal")
    if not found["complete"]:
        click.echo("The instance reached more hosts than are remembered: the rules cover only some.", err=True)
    rules = {"default": found["default"], "rules": found["rules"]}
    session.show(found, lambda: json.dumps(rules, indent=2))


@egress.command()
@click.argument("instance", required=False, shell_complete=complete_instance)
@reports
def pending(session: Session, instance: str | None) -> None:
    """List requests that are waiting for approval, of one instance or of all."""
    names = {} if instance else {each["id"]: each["name"] for each in session.client.get("/instances")}
    columns = [
        ("APPROVAL", lambda each: each["id"]),
        *([("INSTANCE", lambda each: names.get(each["instance_id"], each["instance_id"]))] if not instance else []),
        ("RULE", lambda each: each["rule"]),
        ("REQUEST", lambda each: f"{each['method']} {each['scheme']}://{each['host']}:{each['port']}{each['path']}"),
        ("WAITING", lambda each: each["waiting"]),
        ("UNTIL", lambda each: each["expires_at"]),
    ]
    found = session.client.get(f"{path_of(instance) if instance else ''}/egress/approvals")
    session.show(found, lambda: render_table(found, columns, colour=use_colour()))


_for_option = click.option(
    "--for", "time", metavar="DURATION", help="Also decide the same requests for this long, e.g. 10m."
)


@egress.command()
@instance_argument
@click.argument("approval")
@_for_option
@reports
def approve(session: Session, instance: str, approval: str, time: str | None) -> None:
    """Approve the requests that are waiting for an approval."""
    _decide(session, instance, approval, "approve", time)


@egress.command()
@instance_argument
@click.argument("approval")
@_for_option
@reports
def deny(session: Session, instance: str, approval: str, time: str | None) -> None:
    """Deny the requests that are waiting for an approval."""
    _decide(session, instance, approval, "deny", time)


def _decide(session: Session, instance: str, approval: str, verb: str, time: str | None) -> None:
    body = {"for": time} if time else {}
    found = session.client.post(f"{path_of(instance)}/egress/approvals/{segment(approval)}/{verb}", body)
    done = "approved" if verb == "approve" else "denied"
    session.show(found, lambda: f"{done}: {found['waiting']} × {found['method']} {found['host']}{found['path']}")


@egress.command()
@instance_argument
@click.option("-f", "--follow", is_flag=True, help="Continue with new requests.")
@click.option("--tail", type=click.IntRange(0), default=100, show_default=True, help="Requests from before.")
@reports
def requests(session: Session, instance: str, follow: bool, tail: int) -> None:
    """Show the requests of an instance as they complete; with --format, one JSON object per line."""
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
