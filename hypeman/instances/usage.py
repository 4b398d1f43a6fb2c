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


def living_leases(store: Store) -> Sequence[Lease]:
    """Leases of instances whose record names a VMM. If the VMM has exited since, they are settled later."""

    def read(txn: Txn) -> list[Lease]:
        living = [record.id for _, record in txn.scan(INSTANCES) if record.handle is not None]
        return [lease for instance_id in living if (lease := get_lease(txn, instance_id)) is not None]

    return store.read(read)
