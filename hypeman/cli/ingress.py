"""Commands on ingresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from hypeman.cli.complete import complete_ingress, complete_instance
from hypeman.cli.groups import NounGroup
from hypeman.cli.output import age
from hypeman.cli.session import Session, pairs, present, reports
from hypeman.urls import segment

_RULE = "HOST[:HOST_PORT]=INSTANCE:PORT[,tls][,tls-passthrough][,redirect-http][,request-header-auth=HEADER:VALUE]"
_HIDDEN = "(hidden)"


@click.group("ingress", cls=NounGroup)
def ingresses() -> None:
    """Ingresses: route requests for host names to instances."""


@ingresses.command("create")
@click.argument("instance", required=False, shell_complete=complete_instance)
@click.option("-H", "--hostname", help="Host name, or a pattern such as {instance}.example.com.")
@click.option("-p", "--port", type=click.IntRange(1, 65535), help="Port of the guest.")
@click.option("--host-port", type=click.IntRange(1, 65535), help="Port of the host. Default: 80; with TLS 443.")
@click.option("--tls", is_flag=True, help="Terminate TLS.")
@click.option("--tls-passthrough", is_flag=True, help="Carry TLS to the instance, which has the certificate.")
@click.option("--redirect-http", is_flag=True, help="Redirect HTTP on port 80 to HTTPS; with TLS.")
@click.option("--request-header-auth-header", metavar="NAME", help="A header that requests must have.")
@click.option("--request-header-auth-value", metavar="VALUE", help="Its value, 32 to 256 characters.")
@click.option("--rule", "rules", multiple=True, metavar=_RULE, help="Instead of INSTANCE and the options for one rule.")
@click.option("--name", help="Name of the ingress. Default: from the host name.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
def create_ingress(
    session: Session,
    instance: str | None,
    hostname: str | None,
    port: int | None,
    host_port: int | None,
    tls: bool,
    tls_passthrough: bool,
    redirect_http: bool,
    request_header_auth_header: str | None,
    request_header_auth_value: str | None,
    rules: tuple[str, ...],
    name: str | None,
    tags: tuple[str, ...],
) -> None:
    """Route requests for a host name to INSTANCE; prints the ingress's id."""
    auth = (request_header_auth_header, request_header_auth_value)
    if rules:
        if any((instance, hostname, port, host_port, tls, tls_passthrough, redirect_http, *auth)):
            raise click.UsageError("--rule cannot be combined with INSTANCE and the options for one rule")
        wanted = [parse_rule(text) for text in rules]
    else:
        if not (instance and hostname and port):
            raise click.UsageError("INSTANCE, --hostname and --port are required, or --rule")
        if bool(auth[0]) != bool(auth[1]):
            raise click.UsageError(
                "--request-header-auth-header and --request-header-auth-value must be given together"
            )
        flags = {"tls": tls, "tls_passthrough": tls_passthrough, "redirect_http": redirect_http}
        wanted = [_rule(hostname, host_port, instance, port, flags, auth)]
    called = name or name_from(str(wanted[0]["match"]["hostname"]))
    made = session.client.post("/ingresses", present(name=called, rules=wanted, tags=pairs(tags)))
    session.show(_hidden(made), lambda: str(made["id"]))


def parse_rule(text: str) -> dict[str, Any]:
    """A rule in its short form. Raises click.UsageError."""
    left, equals, right = text.partition("=")
    target, *options = right.split(",")
    hostname, _, host_port = left.partition(":")
    instance, colon, port = target.rpartition(":")
    flags = dict.fromkeys(("tls", "tls_passthrough", "redirect_http"), False)
    auth: tuple[str | None, str | None] = (None, None)
    for option in options:
        key, _, value = option.partition("=")
        header, _, secret = value.partition(":")
        if (flag := option.replace("-", "_")) in flags:
            flags[flag] = True
        elif key == "request-header-auth" and header and secret:
            auth = (header, secret)
        else:
            raise click.UsageError(f"--rule: {key!r} is not recognised; the form is {_RULE}")
    if not (equals and colon and hostname and instance and port.isdecimal() and (host_port or "80").isdecimal()):
        raise click.UsageError(f"--rule: {left!r} is not recognised; the form is {_RULE}")
    return _rule(hostname, int(host_port) if host_port else None, instance, int(port), flags, auth)


def _rule(
    hostname: str,
    host_port: int | None,
    instance: str,
    port: int,
    flags: Mapping[str, bool],
    auth: tuple[str | None, str | None],
) -> dict[str, Any]:
    default = 443 if flags["tls"] or flags["tls_passthrough"] else 80
    rule: dict[str, Any] = {
        "match": {"hostname": hostname, "port": default if host_port is None else host_port},
        "target": {"instance": instance, "port": port},
        **{name: True for name, chosen in flags.items() if chosen},
    }
    if auth[0]:
        rule["request_header_auth"] = {"header": auth[0], "value": auth[1]}
    return rule


def name_from(hostname: str) -> str:
    """A legal name: what is not a letter or digit becomes a dash."""
    text = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in hostname.lower())
    return "-".join(part for part in text.split("-") if part)[:63].strip("-") or "ingress"


def _hidden(ingress: Any) -> Any:
    """Without the secrets that requests must carry."""
    shown = {**ingress, "rules": [dict(rule) for rule in ingress["rules"]]}
    for rule in shown["rules"]:
        if rule.get("request_header_auth"):
            rule["request_header_auth"] = {**rule["request_header_auth"], "value": _HIDDEN}
    return shown


def _scheme(rule: Any) -> str:
    return "tls" if rule.get("tls_passthrough") else "https" if rule["tls"] else "http"


def _rules(row: Any) -> str:
    return ", ".join(
        f"{_scheme(rule)}://{rule['match']['hostname']}:{rule['match']['port']}"
        f" → {rule['target']['instance']}:{rule['target']['port']}"
        for rule in row["rules"]
    )


def _states(row: Any) -> str:
    """Of the certificates, without repetitions."""
    return ", ".join(sorted({each["state"] for each in row.get("certificates") or ()})) or "-"


@ingresses.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
def list_ingresses(session: Session, quiet: bool, tags: tuple[str, ...]) -> None:
    """List ingresses."""
    columns = [
        ("ID", lambda row: row["id"]),
        ("NAME", lambda row: row["name"]),
        ("RULES", _rules),
        ("TLS", _states),
        ("AGE", lambda row: age(row["created_at"])),
    ]
    found = [_hidden(row) for row in session.client.get("/ingresses", tags=pairs(tags))]
    session.show_list(found, columns, quiet="id" if quiet else None)


@ingresses.command("get")
@click.argument("ingress", shell_complete=complete_ingress)
@reports
def get_ingress(session: Session, ingress: str) -> None:
    """Show everything about an ingress, apart from the values of its headers."""
    session.show(_hidden(session.client.get(f"/ingresses/{segment(ingress)}")))


@ingresses.command("delete")
@click.argument("ingress", shell_complete=complete_ingress)
@reports
def delete_ingress(session: Session, ingress: str) -> None:
    """Delete an ingress and end its connections."""
    session.client.call("DELETE", f"/ingresses/{segment(ingress)}")
    click.echo(ingress)


@ingresses.command("ca")
@reports
def show_ca(session: Session) -> None:
    """Print the certificate of the internal CA, for clients to trust."""
    click.echo(session.client.text("/ingress/ca.pem"), nl=False)
