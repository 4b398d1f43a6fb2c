"""The machine's devices as last seen: functions, what keeps each from being given away, vGPU parents.

A look costs what has changed (host/pci.py) plus the walk over vGPU parents and the host's own mounts
and routes: 2 ms on a server, 16 ms more with 500 guests and their routes; it runs in threads. Between
looks the last picture stands, an immutable value that also a transaction in another thread may read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from hypeman.devices.facts import obstacles
from hypeman.devices.types import PciFunction, VgpuKind, VgpuParent, VgpuType
from hypeman.devices.vgpu import parse_creatable, parse_framebuffer, profile_name
from hypeman.host.holders import holders
from hypeman.host.mdev import Mdev, ParentFacts
from hypeman.host.pci import Pci

log = logging.getLogger(__name__)


class View(msgspec.Struct, frozen=True):
    """One picture of the machine."""

    functions: Mapping[str, PciFunction] = {}
    obstacles: Mapping[str, str] = {}
    """Address → why it can not be passed through."""
    parents: tuple[VgpuParent, ...] = ()


class Watcher:
    """Makes Views, and says in the log what has become possible or impossible."""

    def __init__(self, pci: Pci, mdev: Mdev, *, proc_root: Path, uplink: str) -> None:
        self._pci = pci
        self._mdev = mdev
        self._proc_root = proc_root
        self._uplink = uplink
        self.view = View()
        """The last picture."""

    async def look(self) -> View:
        """A fresh picture. Raises HostError if the machine does not answer in time."""
        rows = await self._pci.functions()
        functions = {address: PciFunction(*row) for address, row in rows.items()}
        virtual = [function.address for function in functions.values() if function.physfn is not None]
        parents = tuple(_parent(facts) for facts in await self._mdev.parents(virtual))
        held = await self._pci.sysfs.call(
            lambda: holders(self._pci.sysfs.root, self._proc_root, uplink=self._uplink), what="the host's own devices"
        )
        divided = [p.address for p in parents if p.address in functions and (p.made or p.gpu != p.address)]
        view = View(functions, obstacles(functions, held, divided), parents)
        self._tell(view)
        self.view = view
        return view

    def _tell(self, view: View) -> None:
        for address, reason in view.obstacles.items():
            if self.view.obstacles.get(address) != reason:
                log.info("PCI function %s can not be passed through: %s", address, reason)
        for address in self.view.obstacles.keys() - view.obstacles.keys():
            if address in view.functions:
                log.info("PCI function %s can be passed through now", address)


def _parent(facts: ParentFacts) -> VgpuParent:
    gpu = facts.physfn or facts.address
    if facts.creatable is not None:
        return VgpuParent(facts.address, gpu, VgpuKind.VENDOR, parse_creatable(facts.creatable), facts.made)
    types = tuple(
        VgpuType(kind.id, profile_name(kind.name), parse_framebuffer(kind.name, kind.description), kind.available)
        for kind in facts.types
    )
    return VgpuParent(facts.address, gpu, VgpuKind.MDEV, types, facts.made)
