"""Queries on stored instances for other capabilities, answered from the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from hypeman.images.service import Images
from hypeman.instances.model.policies import standby_rules
from hypeman.instances.model.types import InstanceState, WakeOn
from hypeman.instances.rows import INSTANCES, NAMES
from hypeman.network.leases import get_lease
from hypeman.network.types import Lease
from hypeman.resources.types import DiskBreakdown
from hypeman.store import Store, Table, Txn
from hypeman.volumes.records import VOLUMES


class _Spec(msgspec.Struct, frozen=True):
    overlay_bytes: int


class _Size(msgspec.Struct, frozen=True):
    """The part of an InstanceRecord that is needed here; a whole one takes several times as long to decode."""

    spec: _Spec


_SIZES: Table[_Size] = Table(INSTANCES.name, _Size)


def instance_names(txn: Txn) -> Mapping[str, str]:
    """Id → name of all instances."""
    return {instance_id: name for name, instance_id in txn.scan(NAMES)}


def disk_use(store: Store, images: Images) -> DiskBreakdown:
    """Bytes allocated to overlays and volumes, and used by images."""

    def read(txn: Txn) -> tuple[int, int]:
        overlays = sum(record.spec.overlay_bytes for _, record in txn.scan(_SIZES))
        return overlays, sum(volume.size_gb for _, volume in txn.scan(VOLUMES)) << 30

    overlays, volumes = store.read(read)
    statistics = images.statistics()
    return DiskBreakdown(
        images_bytes=statistics["disk_bytes"],
        oci_cache_bytes=statistics.get("cache_bytes", 0),
        volumes_bytes=volumes,
        overlays_bytes=overlays,
    )


def leases_by_life(store: Store) -> tuple[Sequence[Lease], Sequence[Lease], Sequence[Lease]]:
    """Leases of instances whose record names a VMM, those of all others, and those of instances in standby that packets
    wake, which are among the others. If a VMM has exited since, they are settled later."""

    def read(txn: Txn) -> tuple[list[Lease], list[Lease], list[Lease]]:
        living, others, held = list[Lease](), list[Lease](), list[Lease]()
        for _, record in txn.scan(INSTANCES):
            if (lease := get_lease(txn, record.id)) is not None:
                (living if record.handle is not None else others).append(lease)
                wake = standby_rules(record.spec.auto_standby).wake
                if record.state is InstanceState.STANDBY and wake is not WakeOn.NONE:
                    held.append(lease)
        return living, others, held

    return store.read(read)
