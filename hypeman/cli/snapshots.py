"""Commands on snapshots."""

from __future__ import annotations

from typing import Any

import click

from hypeman.cli.complete import complete_snapshot
from hypeman.cli.groups import NounGroup
from hypeman.cli.instances import HYPERVISORS, TARGETS, instance_argument, path_of, show_instance
from hypeman.cli.output import age, size, until
from hypeman.cli.policies import compression_body, compression_options
from hypeman.cli.session import Session, pairs, present, reports
from hypeman.urls import segment

_target_state = click.option("--target-state", type=click.Choice(TARGETS))
_target_hypervisor = click.option("--target-hypervisor", help="Only for snapshots of kind Stopped.")


@click.group("snapshot", cls=NounGroup)
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
    """Create an instance NAME from a snapshot; prints its id."""
    body = {"name": name, **_target(target_state, target_hypervisor)}
    made = session.client.post(f"/snapshots/{segment(snapshot)}/fork", body)
    session.show(made, lambda: str(made["id"]))


@snapshots.command("pool")
@click.argument("snapshot", shell_complete=complete_snapshot)
@click.option("--size", "wanted", type=click.IntRange(0, 64), help="Forks to keep ready; 0: none.")
@reports
def pool(session: Session, snapshot: str, wanted: int | None) -> None:
    """Keep forks of a snapshot ready, so that a fork takes milliseconds; without --size, show them."""
    path = f"/snapshots/{segment(snapshot)}/pool"
    shown = session.client.get(path) if wanted is None else session.client.call("PUT", path, {"size": wanted})
    session.show(shown, lambda: _pool_line(shown))


def _pool_line(shown: dict[str, Any]) -> str:
    line = f"{shown['ready']} of {shown['size']} ready, {size(shown['memory_bytes'])}"
    return f"{line}; {shown['error']}" if shown.get("error") else line


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


@snapshots.group("schedule", cls=NounGroup)
def schedules() -> None:
    """Snapshots that the server makes regularly."""


@schedules.command("set")
@instance_argument
@click.option("--interval", required=True, help="As in 24h; at least 1m.")
@click.option("--max-age", help="Delete its snapshots older than this, as in 168h.")
@click.option("--max-count", type=click.IntRange(0), help="Keep this many of its snapshots; 0: no limit.")
@click.option("--name-prefix", help="Names are PREFIX-YYYYMMDD-HHMMSS.")
@click.option("--metadata", "--tag", "metadata", multiple=True, metavar="KEY=VALUE", help="Tags of its snapshots.")
@reports
def set_schedule(
    session: Session,
    instance: str,
    interval: str,
    max_age: str | None,
    max_count: int | None,
    name_prefix: str | None,
    metadata: tuple[str, ...],
) -> None:
    """Take snapshots of an instance regularly; they are deleted by age or count, but never the newest one."""
    if max_age is None and max_count is None:
        raise click.UsageError("say how long its snapshots are kept: --max-count or --max-age")
    body = present(
        interval=interval,
        retention=present(max_age=max_age, max_count=max_count),
        name_prefix=name_prefix,
        metadata=pairs(metadata),
    )
    _show_schedule(session, session.client.call("PUT", f"{path_of(instance)}/snapshot-schedule", body))


@schedules.command("get")
@instance_argument
@reports
def get_schedule(session: Session, instance: str) -> None:
    """Show the schedule of an instance."""
    session.show(session.client.get(f"{path_of(instance)}/snapshot-schedule"))


@schedules.command("delete")
@instance_argument
@reports
def delete_schedule(session: Session, instance: str) -> None:
    """Delete the schedule of an instance; the snapshots that it made stay."""
    session.client.call("DELETE", f"{path_of(instance)}/snapshot-schedule")
    click.echo(instance)


def _show_schedule(session: Session, schedule: dict[str, Any]) -> None:
    session.show(schedule, lambda: f"every {schedule['interval']}, next {until(schedule['next_run_at'])}")
