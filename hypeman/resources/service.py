"""Host capacity and allocations: ``GET /resources`` and admission limits.

All numbers are stored with the records (accounting.py) or by the package that owns the bytes. Admission
does not iterate over instances; what ``GET /resources`` lists is read again only after a commit.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Literal

import msgspec
from msgspec import UNSET

from hypeman.config import CapacityConfig, OversubscriptionConfig
from hypeman.resources.accounting import HOLDINGS, Holding, Limits, Totals, pool_of, totals
from hypeman.resources.types import (
    DiskBreakdown,
    GPUResourceStatus,
    PoolAllocation,
    ResourceAllocation,
    Resources,
    ResourceStatus,
)
from hypeman.store import Store, Txn

Source = Literal["detected", "configured"]


class Capacity(msgspec.Struct, frozen=True):
    """vCPUs, bytes, bytes per second; 0 is unknown."""

    vcpus: int
    memory: int
    disk: int
    network: int
    disk_io: int


class _Allocated(msgspec.Struct, frozen=True):
    """What the store held after ``commits`` commits of this server."""

    commits: int
    sums: Totals
    rows: tuple[ResourceAllocation, ...]
    pools: tuple[PoolAllocation, ...]
    disk: DiskBreakdown


class ResourceService:
    """``detected`` is read from the host; configuration overrides it."""

    def __init__(
        self,
        *,
        store: Store,
        detected: Capacity,
        configured: CapacityConfig,
        oversubscription: OversubscriptionConfig,
        names: Callable[[Txn], Mapping[str, str]],
        disk_use: Callable[[], DiskBreakdown],
        gpu: Callable[[], Awaitable[GPUResourceStatus | None]],
        disk_free: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        """``disk_free``: bytes that are really free, no matter what uses the others."""
        self._store = store
        self._names = names
        self._disk_use = disk_use
        self._gpu = gpu
        self._disk_free = disk_free
        self._allocated: _Allocated | None = None
        overruled = {
            "vcpus": configured.cpu,
            "memory": configured.memory,
            "disk": configured.disk,
            "network": configured.network,
            "disk_io": configured.disk_io,
        }
        self._sources: Mapping[str, Source] = {
            name: "configured" if value else "detected" for name, value in overruled.items()
        }
        self.capacity = msgspec.structs.replace(detected, **{name: v for name, v in overruled.items() if v})
        self._ratios = {
            "vcpus": oversubscription.cpu,
            "memory": oversubscription.memory,
            "disk": oversubscription.disk,
            "network": oversubscription.network,
            "disk_io": oversubscription.disk_io,
        }
        limits = {name: int(getattr(self.capacity, name) * ratio) for name, ratio in self._ratios.items()}
        self.limits = Limits(**limits)

    def share(self, vcpus: int, capacity: int) -> int:
        """The part of ``capacity`` proportional to ``vcpus`` of the host's CPUs; 0 if unknown."""
        return capacity * vcpus // max(1, self.capacity.vcpus) if capacity else 0

    async def get(self) -> Resources:
        allocated = self._allocated
        if allocated is None or allocated.commits != self._store.commits:
            allocated = self._allocated = self._read()
        sums = allocated.sums
        disk = self._status("disk", "disk", sums.disk + _shared(allocated.disk))
        disk_io = self._status("disk_io", "disk_io", sums.disk_io)
        return Resources(
            cpu=self._status("cpu", "vcpus", sums.vcpus),
            memory=self._status("memory", "memory", sums.memory),
            disk=msgspec.structs.replace(disk, available=min(disk.available, self._disk_free())),
            network=self._status("network", "network", sums.network),
            disk_io=disk_io if disk_io.capacity else UNSET,
            disk_breakdown=allocated.disk,
            gpu=await self._gpu(),
            allocations=allocated.rows,
            pools=allocated.pools or UNSET,
        )

    def _read(self) -> _Allocated:
        commits = self._store.commits  # before the reading: a commit in between only makes us read again

        def read(txn: Txn) -> tuple[Totals, list[tuple[str, Holding]], Mapping[str, str]]:
            return totals(txn), list(txn.scan(HOLDINGS)), self._names(txn)

        sums, holdings, names = self._store.read(read)
        rows = tuple(
            ResourceAllocation(
                instance_id=holder,
                instance_name=names.get(holder, UNSET),
                cpu=holding.vcpus,
                memory_bytes=holding.memory,
                disk_bytes=holding.disk,
                network_download_bps=holding.download or UNSET,
                network_upload_bps=holding.upload or UNSET,
                disk_io_bps=holding.disk_io or UNSET,
            )
            for holder, holding in holdings
            if pool_of(holder) is None
        )
        return _Allocated(commits, sums, rows, _pools(holdings), self._disk_use())

    def _status(self, kind: str, name: str, allocated: int) -> ResourceStatus:
        limit = getattr(self.limits, name)
        return ResourceStatus(
            type=kind,
            capacity=getattr(self.capacity, name),
            effective_limit=limit,
            allocated=allocated,
            available=max(0, limit - allocated),
            oversub_ratio=self._ratios[name],
            source=self._sources[name],
        )


def _pools(holdings: Iterable[tuple[str, Holding]]) -> tuple[PoolAllocation, ...]:
    pools: dict[str, list[Holding]] = {}
    for holder, holding in holdings:
        if (snapshot := pool_of(holder)) is not None:
            pools.setdefault(snapshot, []).append(holding)
    return tuple(
        PoolAllocation(
            snapshot_id=snapshot,
            members=len(members),
            memory_bytes=sum(member.memory for member in members),
            disk_bytes=sum(member.disk for member in members),
        )
        for snapshot, members in pools.items()
    )


def _shared(disk: DiskBreakdown) -> int:
    """Bytes that no instance holds: images, their cache, volumes."""
    return (disk.images_bytes or 0) + (disk.oci_cache_bytes or 0) + (disk.volumes_bytes or 0)
