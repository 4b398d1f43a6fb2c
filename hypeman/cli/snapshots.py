"""Commands on snapshots."""

from __future__ import annotations

from typing import Any

import click

from hypeman.cli.client import segment
from hypeman.cli.complete import complete_snapshot
from hypeman.cli.instances import HYPERVISORS, TARGETS, instance_argument, path_of, show_instance
from hypeman.cli.output import age, size
from hypeman.cli.policies import compression_body, compression_options
from hypeman.cli.session import Session, pairs, present, reports

_target_state = click.option("--target-state", type=click.Choice(TARGETS))
_target_hypervisor = click.option("--target-hypervisor", help="Only for snapshots of kind Stopped.")


@click.group("snapshot")
def snapshots() -> None:
    """Snapshots: captures that outlive their instances."""


@snapshots.command("create")
@instance_argument
@click.option("--kind", type=click.Choice(["Standby", "Stopped"]), default="Standby", show_default=True)
@click.option("--name")
@compression_options(delay=False)
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
def create_snapshot(
    session: Session, instance: str, kind: str, name: str | None, tags: tuple[str, ...], **flags: Any
) -> None:
    """Capture an instance; prints the snapshot's id."""
    body = present(kind=kind, name=name, tags=pairs(tags), compression=compression_body(flags))
    made = session.client.post(f"{path_of(instance)}/snapshots", body)
    session.show(made, lambda: str(made["id"]))


@snapshots.command("restore")
@instance_argument
@click.argument("snapshot", shell_complete=complete_snapshot)
@_target_state
@_target_hypervisor
@reports
def restore_snapshot(
    session: Session, instance: str, snapshot: str, target_state: str | None, target_hypervisor: str | None
) -> None:
    """Restore an instance to one of its snapshots."""
    path = f"{path_of(instance)}/snapshots/{segment(snapshot)}/restore"
    show_instance(session, session.client.post(path, _target(target_state, target_hypervisor)))


@snapshots.command("fork")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.argument("name")
@_target_state
@_target_hypervisor
@reports
def fork_snapshot(
    session: Session, snapshot: str, name: str, target_state: str | None, target_hypervisor: str | None
) -> None:
    """Make a new instance NAME from a snapshot; prints its id."""
    body = {"name": name, **_target(target_state, target_hypervisor)}
    made = session.client.post(f"/snapshots/{segment(snapshot)}/fork", body)
    session.show(made, lambda: str(made["id"]))


def _target(state: str | None, hypervisor: str | None) -> dict[str, Any]:
    return present(target_state=state, target_hypervisor=HYPERVISORS.get(hypervisor or "", hypervisor))


@snapshots.command("list")
@click.option("-q", "--quiet", is_flag=True, help="Only ids.")
@click.option("--name")
@click.option("--source-instance-id")
@click.option("--kind", type=click.Choice(["Standby", "Stopped"]))
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
def list_snapshots(session: Session, quiet: bool, tags: tuple[str, ...], **query: Any) -> None:
    """List snapshots."""
    columns = [
        ("ID", lambda row: row["id"]),
        ("NAME", lambda row: row.get("name")),
        ("KIND", lambda row: row["kind"]),
        ("SOURCE", lambda row: row["source_instance_name"]),
        ("SIZE", lambda row: size(row["size_bytes"])),
        ("AGE", lambda row: age(row["created_at"])),
    ]
    rows = session.client.get("/snapshots", tags=pairs(tags), **query)
    session.show_list(rows, columns, quiet="id" if quiet else None)


@snapshots.command("get")
@click.argument("snapshot", shell_complete=complete_snapshot)
@reports
def get_snapshot(session: Session, snapshot: str) -> None:
    """Show everything about a snapshot."""
    session.show(session.client.get(f"/snapshots/{segment(snapshot)}"))


@snapshots.command("delete")
@click.argument("snapshot", shell_complete=complete_snapshot)
@reports
def delete_snapshot(session: Session, snapshot: str) -> None:
    """Delete a snapshot; its forks are not affected."""
    session.client.call("DELETE", f"/snapshots/{segment(snapshot)}")
    click.echo(snapshot)
