"""Commands on volumes."""

from __future__ import annotations

from typing import Any

import click

from hypeman.cli.complete import complete_instance, complete_volume
from hypeman.cli.groups import NounGroup
from hypeman.cli.images import upload_chunks
from hypeman.cli.instances import path_of, show_instance
from hypeman.cli.output import age
from hypeman.cli.prune import delete_after_question, unattached_volumes
from hypeman.cli.session import GIGABYTES, Session, fail, format_option, pairs, present, reports, templated
from hypeman.urls import segment

DEFAULT_GB = 10
"""Of a volume whose size is not given; the disk is sparse."""


@click.group("volume", cls=NounGroup)
def volumes() -> None:
    """Volumes: disks that outlive instances."""


@volumes.command("create")
@click.argument("positional", required=False, metavar="[NAME]")
@click.option("--name", help="The same as NAME.")
@click.option(
    "--size",
    "size_gb",
    type=GIGABYTES,
    default=DEFAULT_GB,
    show_default=True,
    help="As in 10GB; a number alone counts GB.",
)
@click.option("--id", "wanted_id", help="Default: a new one.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@click.option(
    "--from-archive", metavar="FILE", help="A tar, also with gzip or Zstandard, to fill it from; - is standard input."
)
@reports
def create_volume(
    session: Session,
    positional: str | None,
    name: str | None,
    size_gb: int,
    wanted_id: str | None,
    tags: tuple[str, ...],
    from_archive: str | None,
) -> None:
    """Make a volume; prints its id."""
    if bool(name) == bool(positional):
        raise click.UsageError("give the volume one name: hypeman volume create NAME [--size 10GB]")
    name = name or positional
    fields = present(name=name, size_gb=size_gb, id=wanted_id, tags=pairs(tags))
    if from_archive is None:
        made = session.client.post("/volumes", fields)
    else:
        try:
            chunks = upload_chunks(from_archive)
            made = session.client.upload("/volumes/from-archive", chunks, "application/gzip", fields)
        except OSError as error:
            fail(f"{from_archive}: {error.strerror or error}")
    session.show(made, lambda: str(made["id"]))


@volumes.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
@templated("volume")
def list_volumes(session: Session, quiet: bool, tags: tuple[str, ...]) -> None:
    """List volumes."""
    columns = [
        ("ID", lambda row: row["id"]),
        ("NAME", lambda row: row["name"]),
        ("SIZE", lambda row: f"{row['size_gb']}GB"),
        ("USED BY", _users),
        ("AGE", lambda row: age(row["created_at"])),
    ]
    session.show_list(session.client.get("/volumes", tags=pairs(tags)), columns, quiet="id" if quiet else None)


def _users(row: Any) -> str:
    return ", ".join(f"{one['instance_id'][:12]}:{one['mount_path']}" for one in row.get("attachments") or ())


@volumes.command("get")
@click.argument("volume", shell_complete=complete_volume)
@format_option
@reports
@templated("one_volume")
def get_volume(session: Session, volume: str) -> None:
    """Show everything about a volume."""
    session.show(session.client.get(f"/volumes/{segment(volume)}"))


@volumes.command("delete")
@click.argument("volume", shell_complete=complete_volume)
@reports
def delete_volume(session: Session, volume: str) -> None:
    """Delete a volume that is not in use."""
    session.client.call("DELETE", f"/volumes/{segment(volume)}")
    click.echo(volume)


@volumes.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Needed: every volume has a name, none is anonymous.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@reports
def prune_volumes(session: Session, everything: bool, force: bool) -> None:
    """Delete all volumes that are not attached."""
    targets = unattached_volumes(session.client) if everything else []
    if not everything:
        click.echo("every volume has a name: --all deletes those that are not attached", err=True)
    raise SystemExit(delete_after_question(session, targets, force=force))


@volumes.command("attach")
@click.argument("volume", shell_complete=complete_volume)
@click.option("-i", "--instance", required=True, shell_complete=complete_instance)
@click.option("--mount-path", required=True, help="Absolute path in the guest.")
@click.option("--readonly", is_flag=True)
@reports
def attach_volume(session: Session, volume: str, instance: str, mount_path: str, readonly: bool) -> None:
    """Attach a volume to an instance and mount it."""
    body = {"mount_path": mount_path, "readonly": readonly}
    show_instance(session, session.client.post(f"{path_of(instance)}/volumes/{segment(volume)}", body))


@volumes.command("detach")
@click.argument("volume", shell_complete=complete_volume)
@click.option("-i", "--instance", required=True, shell_complete=complete_instance)
@reports
def detach_volume(session: Session, volume: str, instance: str) -> None:
    """Unmount a volume and detach it."""
    show_instance(session, session.client.call("DELETE", f"{path_of(instance)}/volumes/{segment(volume)}"))
