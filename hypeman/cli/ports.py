"""Published ports on the command line: Docker's notation of a mapping, and the commands that show and change them."""

from __future__ import annotations

import re
from typing import Any

import click

from hypeman.cli.complete import complete_instance
from hypeman.cli.instances import path_of, update
from hypeman.cli.output import port_rows
from hypeman.cli.session import Session, fail, reports

_MAPPING = re.compile(
    r"(?:(?P<address>\[[^\]]+\]|\d+(?:\.\d+){3}):)?"
    r"(?:(?P<host>\d*|\d+-\d+):)?"
    r"(?P<guest>\d+(?:-\d+)?)"
    r"(?:/(?P<protocol>tcp|udp))?"
)
"""[ADDRESS:][[HOST]:]GUEST[/PROTOCOL]; an address needs the colon of an empty HOST after it, as in Docker."""

ports_option = click.option(
    "-p",
    "--publish",
    "ports",
    multiple=True,
    metavar="[IP:][HOST:]GUEST[/udp]",
    help="Publish a port of the guest, or a range, on the host; without HOST, on a free port. Repeatable.",
)


def parse_port(text: str) -> dict[str, Any]:
    """A PortMapping from ``[ip:][host:]guest[/protocol]``, where host and guest may be ranges. Raises BadParameter."""
    found = _MAPPING.fullmatch(text)
    if found is None or (found["address"] and found["host"] is None):
        raise click.BadParameter(f"{text!r} must be [IP:][HOST:]GUEST[/tcp|/udp], as in 127.0.0.1:53:53/udp")
    first, count = _range(text, found["guest"])
    mapping: dict[str, Any] = {"host_port": 0, "guest_port": first, "protocol": found["protocol"] or "tcp"}
    if found["host"]:
        mapping["host_port"], host_count = _range(text, found["host"])
        if host_count != count:
            raise click.BadParameter(f"{text!r} has ranges of different lengths")
        if mapping["host_port"] == 0:
            raise click.BadParameter(f"{text!r}: omit the host port to get a free one")
    if count > 1:
        mapping["count"] = count
    if found["address"]:
        mapping["host_address"] = found["address"].strip("[]")
    return mapping


def _range(text: str, part: str) -> tuple[int, int]:
    """First port and number of ports of ``8000`` or ``8000-8010``."""
    first, _, last = part.partition("-")
    low, high = int(first), int(last or first)
    if not low <= high <= 65535:
        raise click.BadParameter(f"{text!r}: {part} is not a port or range of ports")
    return low, high - low + 1


@click.command()
@click.argument("instance", shell_complete=complete_instance)
@click.argument("guest_port", required=False, metavar="[GUEST_PORT[/udp]]")
@reports
def port(session: Session, instance: str, guest_port: str | None) -> None:
    """Show the published ports of INSTANCE, or where one of them is."""
    mappings = session.client.get(path_of(instance)).get("ports") or []
    rows = [row for mapping in mappings for row in port_rows(mapping)]
    if guest_port is not None:
        wanted = guest_port if "/" in guest_port else f"{guest_port}/tcp"
        rows = [row for row in rows if row["guest"] == wanted]
        if not rows:
            fail(f"port {wanted} of {instance} is not published")
        session.show(rows, lambda: "\n".join(row["host"] for row in rows))
        return
    session.show(rows, lambda: _text(rows))


def _text(rows: list[dict[str, str]]) -> str:
    return "\n".join(f"{row['guest']} -> {row['host']}" for row in rows)


@update.command("ports")
@click.argument("instance", shell_complete=complete_instance)
@ports_option
@click.option("--none", "nothing", is_flag=True, help="Publish no ports.")
@reports
def update_ports(session: Session, instance: str, ports: tuple[str, ...], nothing: bool) -> None:
    """Replace the published ports with these."""
    if bool(ports) == nothing:
        raise click.UsageError("give all ports with -p, or --none")
    changed = session.client.call("PATCH", path_of(instance), {"ports": [parse_port(text) for text in ports]})
    session.show(changed, lambda: _text([row for mapping in changed.get("ports") or [] for row in port_rows(mapping)]))
