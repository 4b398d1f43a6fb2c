"""vGPUs: mediated devices, and the vendor's own files on kernels where the driver makes no mdevs.

The only place that writes ``mdev_supported_types/*/create``, ``remove`` and ``current_vgpu_type``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hypeman.host.files import HostError
from hypeman.host.sysfs import HostStuck, Sysfs


class TypeFacts(NamedTuple):
    """One directory of ``mdev_supported_types``, as text."""

    id: str
    name: str
    description: str
    available: int


class ParentFacts(NamedTuple):
    address: str
    physfn: str | None
    types: tuple[TypeFacts, ...]
    """Empty for the vendor kind."""
    creatable: str | None
    """``creatable_vgpu_types`` of the vendor kind; None for mdev parents."""
    made: tuple[str, ...]


class Mdev:
    """Parents of vGPUs below one sysfs root."""

    def __init__(self, sysfs: Sysfs) -> None:
        self.sysfs = sysfs

    async def parents(self, virtual: Sequence[str]) -> tuple[ParentFacts, ...]:
        """All there are, in order of address, as of now. ``virtual`` are the PCI functions that may be
        of the vendor kind."""
        return await self.sysfs.call(lambda: tuple(sorted(_parents(self.sysfs.root, virtual))), what="the vGPU scan")

    def path(self, uuid: str) -> str:
        """Where a VMM finds the mdev."""
        return str(self.sysfs.root / "bus/mdev/devices" / uuid)

    def exists(self, uuid: str) -> bool:
        return self.sysfs.exists(f"bus/mdev/devices/{uuid}")

    def group(self, uuid: str) -> int | None:
        name = self.sysfs.read_link(f"bus/mdev/devices/{uuid}/iommu_group")
        return int(name) if name and name.isdecimal() else None

    async def create(self, parent: str, type_id: str, uuid: str) -> None:
        """A no-op if it already exists. Raises HostError, e.g. if the card has no free slot."""
        if not self.exists(uuid):
            path = f"class/mdev_bus/{parent}/mdev_supported_types/{type_id}/create"
            await self.sysfs.write(path, uuid, subject=parent)

    async def remove(self, parent: str, uuid: str) -> None:
        """A no-op if there is none."""
        try:
            if self.exists(uuid):
                await self.sysfs.write(f"bus/mdev/devices/{uuid}/remove", "1", subject=parent)
        except HostStuck:
            raise
        except HostError:  # went away meanwhile, with its parent
            if self.exists(uuid):
                raise

    async def current_type(self, address: str) -> str:
        """Of the vendor kind; "0" for none."""
        return await self.sysfs.read(f"{_nvidia(address)}/current_vgpu_type", subject=address) or "0"

    async def set_type(self, address: str, type_id: str) -> None:
        """Of the vendor kind; "0" gives the slot back."""
        await self.sysfs.write(f"{_nvidia(address)}/current_vgpu_type", type_id, subject=address)


def _nvidia(address: str) -> str:
    return f"bus/pci/devices/{address}/nvidia"


def _parents(root: Path, virtual: Sequence[str]) -> Iterator[ParentFacts]:
    for name, path in _entries(root / "class/mdev_bus"):
        types = tuple(sorted(_types(path / "mdev_supported_types")))
        made = tuple(
            uuid for kind in types for uuid, _ in _entries(path / "mdev_supported_types" / kind.id / "devices")
        )
        yield ParentFacts(name, _physfn(path), types, None, made)
    for name in virtual:
        path = root / "bus/pci/devices" / name
        creatable = _read(path / "nvidia/creatable_vgpu_types")
        if creatable is not None:
            current = (_read(path / "nvidia/current_vgpu_type") or "0").strip()
            yield ParentFacts(name, _physfn(path), (), creatable, () if current == "0" else (current,))


def _types(path: Path) -> Iterator[TypeFacts]:
    for name, kind in _entries(path):
        available = (_read(kind / "available_instances") or "").strip()
        yield TypeFacts(
            name,
            (_read(kind / "name") or name).strip(),
            (_read(kind / "description") or "").strip(),
            int(available) if available.isdecimal() else 0,
        )


def _physfn(path: Path) -> str | None:
    try:
        return os.readlink(path / "physfn").rpartition("/")[2]
    except OSError:
        return None


def _entries(path: Path) -> list[tuple[str, Path]]:
    try:
        return [(name, path / name) for name in sorted(os.listdir(path))]
    except OSError:
        return []


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
