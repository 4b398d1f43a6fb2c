"""What instances used, and whether the ledger of it is as it was written."""

from __future__ import annotations

from typing import Any

import click

from hypeman.cli.output import render_table, size, use_colour
from hypeman.cli.session import Session, pairs, present, reports


@click.group(invoke_without_command=True)
@click.option("--since", help="A duration such as 720h, or an RFC 3339 time. Default: all that is kept.")
@click.option("--until", help="Likewise; default: now.")
@click.option("--by", type=click.Choice(["instance", "day"]), help="What a row is; default instance.")
@click.option("--by-tag", metavar="KEY", help="One row for each value of this tag.")
@click.option("--instance", help="Only this instance, by id or name; it may have been deleted.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Only instances with this tag.")
@reports
def usage(session: Session, by: str | None, by_tag: str | None, tags: tuple[str, ...], **query: Any) -> None:
    """Show what instances used: CPU time, memory, disk, traffic; also those that were deleted."""
    if click.get_current_context().invoked_subcommand is not None:
        return
    by = "tag" if by_tag else by or "instance"
    found = session.client.get("/usage", by=by, **present(tag=by_tag, tags=pairs(tags), **query))
    rows = [*found["rows"], {**found["total"], "total": True}]
    session.show(found, lambda: render_table(rows, _columns(by, by_tag), colour=use_colour()))


def _columns(by: str, tag: str | None) -> list[Any]:
    key = {"instance": "instance_name", "tag": "value", "day": "day"}[by]
    return [
        ((tag or by).upper(), lambda row: "TOTAL" if row.get("total") else row.get(key) or "-"),
        ("CPU HOURS", lambda row: f"{row['cpu_seconds'] / 3600:.3f}"),
        ("MEMORY GB·H", lambda row: f"{row['memory_gb_hours']:.3f}"),
        ("DISK GB·H", lambda row: f"{row['disk_gb_hours']:.3f}"),
        ("IN", lambda row: size(row["network_rx_bytes"])),
        ("OUT", lambda row: size(row["network_tx_bytes"])),
    ]


@usage.command()
@click.option("--block", type=click.IntRange(1), help="Number of a block that was noted before.")
@click.option("--hash", "expected", help="Its hash.")
@reports
def verify(session: Session, block: int | None, expected: str | None) -> None:
    """Check that the ledger is as it was written; exit code 1 if not.

    Note the last block and its hash elsewhere: given again, they show that nothing up to it was changed since.
    """
    found = session.client.get("/usage/verify", **present(block=block, hash=expected))
    session.show(found, lambda: _verdict(found))
    if not found["valid"]:
        raise SystemExit(1)


def _verdict(found: dict[str, Any]) -> str:
    if not found["valid"]:
        return f"not valid: block {found['block']}: {found['fault']}"
    kept = f"blocks {found['first']} to {found['last']}" if found["last"] >= found["first"] else "no block yet"
    return f"valid: {kept}, {found['entries']} entries\nlast block {found['last']} {found['hash']}"
