"""The adapter of leases and the fake that stands for it in the crash matrix, held to the same suite."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from hypeman.config import CapacityConfig, NetworkConfig, OversubscriptionConfig
from hypeman.instances.adapters import Leases
from hypeman.instances.model.record import InstanceRecord
from hypeman.network.service import Network
from hypeman.resources.service import Capacity, ResourceService
from hypeman.resources.types import DiskBreakdown
from hypeman.store import Store
from tests.conformance.check_leases import CHECKS, Bench, Check
from tests.instances.fake_world import Bomb, FakeLeases, FakeNetwork
from tests.instances.test_plans import record as any_record


def record(instance_id: str) -> InstanceRecord:
    return msgspec.structs.replace(any_record(everything=False), id=instance_id, name=instance_id)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_fake(check: Check, store: Store) -> None:
    bomb = Bomb()
    await check(Bench(FakeLeases(store, FakeNetwork(bomb), bomb), store, record))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_real(check: Check, store: Store) -> None:
    """The host's links and rules are not touched before a VM runs."""
    untouched: Any = Mock(spec=[])
    config = NetworkConfig(subnet_cidr="10.0.0.0/29", gateway="10.0.0.1")
    network = Network(config, links=untouched, rules=untouched)
    resources = ResourceService(
        store=store,
        detected=Capacity(vcpus=4, memory=1 << 30, disk=1 << 40, network=10**9, disk_io=10**9),
        configured=CapacityConfig(),
        oversubscription=OversubscriptionConfig(),
        names=lambda txn: {},
        disk_use=lambda: DiskBreakdown(images_bytes=0, oci_cache_bytes=0, volumes_bytes=0, overlays_bytes=0),
        gpu=Mock(),
    )
    try:
        await check(Bench(Leases(network, resources, store, default_limits=True, isolated=True), store, record))
    finally:
        network.aclose()
