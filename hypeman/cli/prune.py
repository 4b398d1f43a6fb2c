"""Deleting what is not in use, after a question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import click

from hypeman.cli.client import ApiError, Client
from hypeman.cli.instances import path_of
from hypeman.cli.session import Session
from hypeman.urls import segment


class Target(NamedTuple):
    kind: str
    name: str
    path: str


def stopped_instances(instances: Iterable[Any]) -> list[Target]:
    return [Target("instance", row["name"], path_of(row["id"])) for row in instances if row["state"] == "Stopped"]


def unused_images(client: Client, instances: Iterable[Any]) -> list[Target]:
    """Images that none of ``instances`` has."""
    used = {row["image"] for row in instances}
    names = [row["name"] for row in client.get("/images")]
    return [Target("image", name, f"/images/{segment(name)}") for name in names if name not in used]


def unattached_volumes(client: Client) -> list[Target]:
    rows = [row for row in client.get("/volumes") if not row.get("attachments")]
    return [Target("volume", row["name"], f"/volumes/{segment(row['id'])}") for row in rows]


def delete_after_question(session: Session, targets: list[Target], *, force: bool) -> int:
    """The exit code: 1 if something could not be deleted. What has gone meanwhile is no failure."""
    if not targets:
        click.echo("nothing to delete", err=True)
        return 0
    for target in targets:
        click.echo(f"{target.kind} {target.name}", err=True)
    if not force:
        click.confirm("Delete these?", abort=True, err=True)
    failed = 0
    for target in targets:
        try:
            session.client.call("DELETE", target.path)
        except ApiError as error:
            if error.status != 404:
                session.report(error)
                failed = 1
        else:
            click.echo(target.name)
    return failed
