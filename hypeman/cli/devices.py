"""Commands on PCI devices."""

from __future__ import annotations

import click

from hypeman.cli.complete import complete_device
from hypeman.cli.groups import NounGroup
from hypeman.cli.session import Session, pairs, present, reports
from hypeman.urls import segment


@click.group("device", cls=NounGroup)
def devices() -> None:
    """Devices: PCI functions for passthrough to instances."""


@devices.command("available")
@click.option("-a", "--all", "everything", is_flag=True, help="Also what cannot be passed through, and why.")
@reports
def available_devices(session: Session, everything: bool) -> None:
    """List the devices that this host can pass through."""
    columns = [
        ("ADDRESS", lambda row: row["pci_address"]),
        ("ID", lambda row: f"{row['vendor_id']}:{row['device_id']}"),
        ("GROUP", lambda row: row["iommu_group"]),
        ("DRIVER", lambda row: row.get("current_driver")),
        ("NAME", lambda row: " ".join(filter(None, (row.get("vendor_name"), row.get("device_name"))))),
    ]
    if everything:
        columns.append(("WHY NOT", lambda row: row.get("reason")))
    session.show_list(session.client.get("/devices/available", all="true" if everything else None), columns)


@devices.command("register")
@click.argument("address", required=False)
@click.option("--pci-address", help="The same as ADDRESS.")
@click.option("--name")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
def register_device(
    session: Session, address: str | None, pci_address: str | None, name: str | None, tags: tuple[str, ...]
) -> None:
    """Register the PCI function at ADDRESS; prints its id."""
    wanted = address or pci_address
    if not wanted:
        raise click.UsageError("which one? `hypeman device available` lists the addresses")
    made = session.client.post("/devices", present(pci_address=wanted, name=name, tags=pairs(tags)))
    session.show(made, lambda: str(made["id"]))


@devices.command("list")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE")
@reports
def list_devices(session: Session, tags: tuple[str, ...]) -> None:
    """List registered devices."""
    columns = [
        ("ID", lambda row: row["id"]),
        ("NAME", lambda row: row.get("name")),
        ("TYPE", lambda row: row["type"]),
        ("ADDRESS", lambda row: row["pci_address"]),
        ("VFIO", lambda row: "yes" if row["bound_to_vfio"] else "no"),
        ("ATTACHED TO", lambda row: row.get("attached_to")),
    ]
    session.show_list(session.client.get("/devices", tags=pairs(tags)), columns)


def _which(device: str | None, wanted_id: str | None) -> str:
    if not (device or wanted_id):
        raise click.UsageError("which one? `hypeman device list` lists them")
    return f"/devices/{segment(device or wanted_id or '')}"


@devices.command("get")
@click.argument("device", required=False, shell_complete=complete_device)
@click.option("--id", "wanted_id", help="The same as DEVICE.")
@reports
def get_device(session: Session, device: str | None, wanted_id: str | None) -> None:
    """Show everything about a device."""
    session.show(session.client.get(_which(device, wanted_id)))


@devices.command("delete")
@click.argument("device", required=False, shell_complete=complete_device)
@click.option("--id", "wanted_id", help="The same as DEVICE.")
@reports
def delete_device(session: Session, device: str | None, wanted_id: str | None) -> None:
    """Unregister a device and give it back to its driver."""
    session.client.call("DELETE", _which(device, wanted_id))
    click.echo(device or wanted_id)
