"""PCI functions: seen, unbound, bound, and their VFIO nodes made accessible to a VMM's user.

The only place that writes below ``bus/pci``. What to write is decided in devices/plan.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import trio

from hypeman._native.pciscan import Row, Scanner
from hypeman.host.files import HostError
from hypeman.host.sysfs import HostStuck, Sysfs

log = logging.getLogger(__name__)

_NVIDIA_SMI_SECONDS = 20.0


class Pci:
    """The functions of one sysfs root; ``dev_root`` is where its device nodes are."""

    def __init__(self, sysfs: Sysfs, dev_root: Path) -> None:
        self.sysfs = sysfs
        self.dev_root = dev_root
        self._scanner = Scanner(str(sysfs.root))
        self._rows: dict[str, Row] | None = None
        self._lock = trio.Lock()

    async def functions(self) -> dict[str, Row]:
        """All functions by address, as of now: read once, then only what has changed."""
        async with self._lock:
            self._rows = await self.sysfs.call(self._look, what="the PCI scan")
            return self._rows

    def _look(self) -> dict[str, Row]:
        try:
            if self._rows is None:
                return {row[0]: row for row in self._scanner.scan()}
            changed, gone, new = self._scanner.look()
        except FileNotFoundError:  # a machine without PCI
            return {}
        if not (changed or gone or new):
            return self._rows
        rows = dict(self._rows)
        for address in gone:
            del rows[address]
        for address, driver in changed:
            row = rows[address]
            rows[address] = (*row[:6], driver, *row[7:])
        rows |= {row[0]: row for row in new}
        return dict(sorted(rows.items(), key=lambda item: (len(item[0]), item[0])))

    def path(self, address: str) -> str:
        """Sysfs path of the function, for a VMM."""
        return str(self.sysfs.root / _of(address))

    def exists(self, address: str) -> bool:
        return self.sysfs.exists(_of(address))

    def driver(self, address: str) -> str | None:
        """The driver that has the function now. A look at one link; never blocks."""
        return self.sysfs.read_link(f"{_of(address)}/driver")

    def group(self, address: str) -> int | None:
        """The IOMMU group as of now."""
        name = self.sysfs.read_link(f"{_of(address)}/iommu_group")
        return int(name) if name and name.isdecimal() else None

    async def override(self, address: str) -> str:
        """``driver_override``; empty for none."""
        text = await self.sysfs.read(f"{_of(address)}/driver_override", subject=address)
        return "" if text in (None, "(null)") else str(text)

    async def strangers(self, group: int) -> tuple[str, ...]:
        """Members of a group that are not PCI functions (a platform device behind the same IOMMU)."""

        def read() -> tuple[str, ...]:
            names = os.listdir(self.sysfs.root / "kernel/iommu_groups" / str(group) / "devices")
            return tuple(sorted(name for name in names if not self.exists(name)))  # exists: as a PCI function

        try:
            return await self.sysfs.call(read, what=f"IOMMU group {group}")
        except HostError:
            return ()  # made-up trees need not have the directory

    # Changes: plan.Hands

    async def set_override(self, address: str, driver: str) -> None:
        await self.sysfs.write(f"{_of(address)}/driver_override", driver + "\n", subject=address)

    async def unbind(self, address: str, driver: str) -> None:
        """A no-op if the function has no driver, or no longer exists."""
        try:
            await self.sysfs.write(f"bus/pci/drivers/{driver}/unbind", address, subject=address)
        except HostStuck:
            raise
        except HostError:
            if self.driver(address) == driver:
                raise

    async def probe(self, address: str, driver: str) -> None:
        """Let the kernel look for a driver. Raises HostError unless it is ``driver`` in the end."""
        await self._probe("bus/pci/drivers_probe", address)
        found = self.driver(address)
        if found is None and self.sysfs.exists(f"bus/pci/drivers/{driver}"):
            await self._probe(f"bus/pci/drivers/{driver}/bind", address)
            found = self.driver(address)
        if found != driver:
            raise HostError(f"PCI function {address} has driver {found or 'none'} where {driver} was wanted")

    async def _probe(self, path: str, address: str) -> None:
        """The kernel's error is not of interest (a driver that refused: "no such device"), the result is."""
        try:
            await self.sysfs.write(path, address, subject=address)
        except HostStuck:
            raise
        except HostError as error:
            log.info("%s", error)

    async def set_persistence(self, address: str, *, on: bool) -> None:
        """Of this GPU only. Without nvidia-smi there is no daemon either."""
        if shutil.which("nvidia-smi"):
            await self._run(["nvidia-smi", "-i", address, "-pm", "1" if on else "0"])

    async def persistence(self, address: str) -> bool:
        """Whether nvidia-smi's persistence mode is on for this GPU."""
        if not shutil.which("nvidia-smi"):
            return False
        query = ["nvidia-smi", "-i", address, "--query-gpu=persistence_mode", "--format=csv,noheader"]
        return (await self._run(query)).strip() == "Enabled"

    async def load_vfio(self) -> None:
        """Have the vfio-pci driver registered. Raises HostError if the kernel has none."""
        await self.load_module("vfio-pci", until=lambda: self.sysfs.exists("bus/pci/drivers/vfio-pci"))

    async def load_module(self, name: str, *, until: Callable[[], bool]) -> None:
        if until():
            return
        with contextlib.suppress(HostError):
            await self._run(["modprobe", "--", name])
        if not until():
            raise HostError(f"the kernel has no module {name}, or it could not be loaded")

    async def lend_group(self, group: int, *, uid: int, gid: int) -> None:
        """Give ``/dev/vfio/<group>`` to the VMM's user."""
        node = self._node(group)

        def own() -> None:
            os.chown(node, uid, gid)
            node.chmod(0o600)

        await self.sysfs.call(own, what=f"lending {node}")

    async def reclaim_group(self, address: str) -> None:
        """Take the node back where it outlives the lending (mostly it is gone with the VFIO driver)."""
        group = self.group(address)
        if group is not None and self._node(group).exists():
            await self.lend_group(group, uid=0, gid=0)

    def _node(self, group: int) -> Path:
        return self.dev_root / "vfio" / str(group)

    async def _run(self, argv: list[str]) -> str:
        def run() -> str:
            result = subprocess.run(argv, capture_output=True, timeout=_NVIDIA_SMI_SECONDS, check=False)
            if result.returncode:
                raise OSError(0, f"exit code {result.returncode}: {result.stderr.decode('utf-8', 'replace').strip()}")
            return result.stdout.decode("utf-8", "replace")

        try:
            return await self.sysfs.call(run, what=" ".join(argv))
        except subprocess.TimeoutExpired:
            raise HostError(f"{' '.join(argv)} did not end") from None


def _of(address: str) -> str:
    return f"bus/pci/devices/{address}"
