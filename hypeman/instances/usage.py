"""Queries on stored instances for other capabilities, answered from the store."""

from __future__ import annotations

from collections.abc import Sequence

from hypeman.images.service import Images
from hypeman.instances.rows import INSTANCES
from hypeman.network.leases import get_lease
from hypeman.network.types import Lease
from hypeman.resources.types import DiskBreakdown
from hypeman.store import Store, Txn
from hypeman.volumes.records import VOLUMES


def instance_name(store: Store, instance_id: str) -> str | None:
    record = store.read(lambda txn: txn.get(INSTANCES, instance_id))
    return record.name if record is not None else None


def disk_use(store: Store, images: Images) -> DiskBreakdown:
    """Bytes allocated to overlays and volumes, and used by images."""

    def read(txn: Txn) -> tuple[int, int]:
        overlays = sum(record.spec.overlay_bytes for _, record in txn.scan(INSTANCES))
        return overlays, sum(volume.size_gb for _, volume in txn.scan(VOLUMES)) << 30

    overlays, volumes = store.read(read)
    statistics = images.statistics()
    return DiskBreakdown(
        images_bytes=statistics["disk_bytes"],
        oci_cache_bytes=statistics.get("cache_bytes", 0),
        volumes_bytes=volumes,
        overlays_bytes=overlays,
    )


def leases_by_life(store: Store) -> tuple[Sequence[Lease], Sequence[Lease]]:
    """Leases of instances whose record names a VMM, and those of all others. If a VMM has exited since, they are
    settled later."""

    def read(txn: Txn) -> tuple[list[Lease], list[Lease]]:
        living, others = list[Lease](), list[Lease]()
        for _, record in txn.scan(INSTANCES):
            if (lease := get_lease(txn, record.id)) is not None:
                (living if record.handle is not None else others).append(lease)
        return living, others

    return store.read(read)
