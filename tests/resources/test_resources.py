"""Capacity: what is shown, what is refused and how, and what six idle guests take of a small host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from msgspec import UNSET

from hypeman.cli.host import render_resources
from hypeman.config import CapacityConfig, OversubscriptionConfig
from hypeman.errors import InsufficientResources
from hypeman.resources.accounting import Holding, hold
from hypeman.resources.service import Capacity, ResourceService
from hypeman.resources.types import DiskBreakdown
from hypeman.store import Store

GB = 1 << 30
SMALL = Capacity(vcpus=2, memory=8 * GB, disk=100 * GB, network=0, disk_io=0)
DISK = DiskBreakdown(images_bytes=3 * GB, oci_cache_bytes=2 * GB, volumes_bytes=10 * GB, overlays_bytes=5 * GB)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store.open(tmp_path / "store")
    async with store.serving():
        yield store
    store.close()


def service(store: Store, free: int = 60 * GB) -> ResourceService:
    async def no_gpu() -> None:
        return None

    return ResourceService(
        store=store, detected=SMALL, configured=CapacityConfig(), oversubscription=OversubscriptionConfig(),
        names=lambda txn: {}, disk_use=lambda: DISK, gpu=no_gpu, disk_free=lambda: free,
    )  # fmt: skip


async def test_six_guests_of_the_usual_size_do_not_fill_two_cores(store: Store) -> None:
    limits = service(store).limits
    for number in range(6):
        wanted = Holding(vcpus=2, memory=GB)
        await store.write(partial(hold, holder=f"vm{number}", wanted=wanted, limits=limits))


async def test_the_refusal_names_the_setting(store: Store) -> None:
    limits = service(store).limits
    for holding, name in ((Holding(vcpus=1000), "cpu"), (Holding(memory=1000 * GB), "memory")):
        with pytest.raises(InsufficientResources, match=rf"oversubscription\.{name}$"):
            await store.write(partial(hold, holder="vm", wanted=holding, limits=limits))


async def test_the_disk_is_what_all_take_and_what_is_really_free(store: Store) -> None:
    limits = service(store).limits
    await store.write(lambda txn: hold(txn, "vm", Holding(disk=5 * GB), limits))
    found = await service(store).get()
    assert (found.disk.allocated, found.disk.available) == (20 * GB, 60 * GB)
    assert (await service(store, free=90 * GB).get()).disk.available == 80 * GB


async def test_rates_that_are_not_known_are_absent(store: Store) -> None:
    limits = service(store).limits
    await store.write(lambda txn: hold(txn, "vm", Holding(vcpus=1, memory=GB), limits))
    found = await service(store).get()
    assert found.disk_io is UNSET
    assert found.allocations[0].disk_io_bps is UNSET and found.allocations[0].network_upload_bps is UNSET
    shown = render_resources(msgspec.json.decode(msgspec.json.encode(found)))
    assert "0B/s" not in shown and "network" not in shown
