"""``push``: images of the server to other registries."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import click

from hypeman.cli.complete import complete_image
from hypeman.cli.groups import DefaultGroup
from hypeman.cli.logins import sent_login
from hypeman.cli.output import age, size
from hypeman.cli.session import Session, fail, interrupted, present, reports
from hypeman.text import one_line
from hypeman.urls import segment

_POLL_SECONDS = 1.0


class PushGroup(DefaultGroup):
    aliases: ClassVar[Mapping[str, str]] = {**DefaultGroup.aliases, "remote": "create"}


@click.group("push", cls=PushGroup)
def push() -> None:
    """Push an image of the server to another registry: push IMAGE [TARGET]."""


@push.command("create")
@click.argument("image", shell_complete=complete_image)
@click.argument("target", required=False)
@click.option("--insecure", is_flag=True, help="Plain HTTP.")
@click.option("--username")
@click.option("--password", help="Visible to every user of this host; prefer --password-stdin.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@click.option("--registry-token", help="Sent as bearer token.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait until it is pushed.")
@reports
def create(
    session: Session,
    image: str,
    target: str | None,
    insecure: bool,
    username: str | None,
    password: str | None,
    password_stdin: bool,
    registry_token: str | None,
    detach: bool,
) -> None:
    """Push IMAGE to TARGET; without TARGET, to the registry in its name."""
    if password_stdin:
        if password:
            raise click.UsageError("give either --password or --password-stdin")
        password = sys.stdin.readline().rstrip("\n")
    target = target or image
    given = present(username=username, password=password, registry_token=registry_token)
    body = present(image=image, target=target, insecure=insecure, credentials=given or sent_login(target))
    made = session.client.post("/pushes", body)
    if not detach:
        with interrupted(f"the server continues; to stop it: hypeman push cancel {made['id']}"):
            made = _wait(session, made)
    session.show(made, lambda: f"{made['id']} {made['status']} {made['target']}")


def _wait(session: Session, made: dict[str, Any]) -> dict[str, Any]:
    visible = sys.stderr.isatty()
    while made["status"] not in ("pushed", "failed"):
        if visible:
            total = f" {size(made.get('bytes_done') or 0)} of {size(made['bytes'])}" if made.get("bytes") else ""
            sys.stderr.write("\r\x1b[K" + one_line(f"{made['image']}: {made['status']}{total}"))
            sys.stderr.flush()
        time.sleep(_POLL_SECONDS)
        made = session.client.get(f"/pushes/{segment(made['id'])}")
    if visible:
        sys.stderr.write("\r\x1b[K")
    if made["status"] == "failed":
        fail(f"{made['image']} was not pushed: {made.get('error') or 'no reason given'}")
    return made


@push.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@reports
def list_pushes(session: Session, quiet: bool) -> None:
    """List pushes, newest first."""
    columns = [
        ("ID", lambda row: row["id"]),
        ("IMAGE", lambda row: row["image"]),
        ("TARGET", lambda row: row["target"]),
        ("STATUS", lambda row: row["status"]),
        ("SIZE", lambda row: size(row.get("bytes"))),
        ("AGE", lambda row: age(row["created_at"])),
    ]
    session.show_list(session.client.get("/pushes"), columns, quiet="id" if quiet else None)


@push.command("get")
@click.argument("push_id", metavar="ID")
@reports
def get_push(session: Session, push_id: str) -> None:
    """Show everything about a push."""
    session.show(session.client.get(f"/pushes/{segment(push_id)}"))


@push.command("cancel")
@click.argument("push_ids", metavar="ID", nargs=-1, required=True)
@reports
def cancel(session: Session, push_ids: Sequence[str]) -> None:
    """Cancel queued or running pushes."""
    session.delete_each(push_ids, lambda push_id: f"/pushes/{segment(push_id)}")
