"""What instances rely on in leases, as one suite: on the real adapter and on the fake of the crash matrix.

The subnet has five addresses for guests.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from hypeman.errors import HypemanError, InsufficientResources, NotFound, PortInUse
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.service import LeaseNeeds
from hypeman.network.leases import get_lease
from hypeman.network.types import Lease, PortMapping
from hypeman.store import Store

ADDRESSES = 5
HOST = "127.0.0.1"


class Bench:
    """``record(id)`` gives the record of an instance that is not stored."""

    def __init__(self, leases: LeaseNeeds, store: Store, record: Callable[[str], InstanceRecord]) -> None:
        self.leases = leases
        self.store = store
        self.record = record

    async def take(self, instance_id: str, *ports: PortMapping, network: bool = True) -> Lease:
        record = self.record(instance_id)
        record = msgspec.structs.replace(record, spec=msgspec.structs.replace(record.spec, network=network))
        return await self.store.write(lambda txn: self.leases.take(txn, record, ports))

    async def drop(self, instance_id: str) -> None:
        await self.store.write(lambda txn: self.leases.drop(txn, instance_id))
        self.leases.release_ports(instance_id)

    async def publish(self, instance_id: str, *ports: PortMapping) -> tuple[PortMapping, ...]:
        """As a create does: claim, record, keep."""
        with await self.leases.claim_ports(ports) as claim:
            await self.take(instance_id, *claim.ports)
            claim.keep(instance_id)
        return claim.ports


Check = Callable[[Bench], Awaitable[None]]


def free_port() -> PortMapping:
    with socket.create_server((HOST, 0)) as listener:
        return PortMapping(host_port=listener.getsockname()[1], guest_port=80, host_address=HOST)


async def check_an_instance_keeps_what_it_has(bench: Bench) -> None:
    first = await bench.take("one")
    assert await bench.take("one") == first == bench.store.read(lambda txn: get_lease(txn, "one"))


async def check_no_two_have_the_same(bench: Bench) -> None:
    leases = [await bench.take(f"vm{number}") for number in range(ADDRESSES)]
    for values in zip(*((lease.ipv4, lease.mac, lease.tap, lease.cid) for lease in leases), strict=True):
        assert len(set(values)) == ADDRESSES


async def check_addresses_end_and_come_back(bench: Bench) -> None:
    for number in range(ADDRESSES):
        await bench.take(f"vm{number}")
    with pytest.raises(InsufficientResources):
        await bench.take("more")
    assert bench.store.read(lambda txn: get_lease(txn, "more")) is None
    await bench.drop("vm2")
    assert (await bench.take("more")).enabled


async def check_without_network_there_is_no_address(bench: Bench) -> None:
    lease = await bench.take("one", network=False)
    assert not lease.enabled and not lease.ipv4 and lease.cid


async def check_a_drop_can_be_repeated(bench: Bench) -> None:
    await bench.take("one")
    for _ in range(2):
        await bench.drop("one")
    assert bench.store.read(lambda txn: get_lease(txn, "one")) is None


async def check_a_port_is_published_once(bench: Bench) -> None:
    port = free_port()
    assert await bench.publish("one", port) == (port,)
    with pytest.raises(PortInUse):
        await bench.publish("two", port)
    with await bench.leases.claim_ports((port,), instance_id="one"):
        pass  # its own
    await bench.drop("one")
    await bench.drop("two")
    assert await bench.publish("three", port) == (port,)
    await bench.drop("three")


async def check_a_claim_that_is_not_kept_is_free_again(bench: Bench) -> None:
    port = free_port()
    with await bench.leases.claim_ports((port,)):
        pass
    assert await bench.publish("one", port) == (port,)
    await bench.drop("one")


async def check_ports_are_replaced(bench: Bench) -> None:
    first, second = free_port(), free_port()
    await bench.publish("one", first)
    with await bench.leases.claim_ports((second,), instance_id="one") as claim:
        await bench.store.write(lambda txn: bench.leases.set_ports(txn, "one", claim.ports))
        claim.keep("one")
    lease = bench.store.read(lambda txn: get_lease(txn, "one"))
    assert lease is not None and lease.ports == (second,)
    assert await bench.publish("two", first) == (first,)
    for name in ("one", "two"):
        await bench.drop(name)


async def check_ports_need_a_network(bench: Bench) -> None:
    await bench.take("one", network=False)
    with pytest.raises(NotFound):
        await bench.store.write(lambda txn: bench.leases.set_ports(txn, "one", (free_port(),)))


async def check_rates_that_were_requested_stay(bench: Bench) -> None:
    spec = msgspec.structs.replace(bench.record("one").spec, download_bps=1000, upload_bps=2000, disk_io_bps=3000)
    assert bench.leases.default_rates(spec) == spec


async def check_errors_are_for_clients(bench: Bench) -> None:
    port = free_port()
    await bench.publish("one", port)
    with pytest.raises(HypemanError) as caught:
        await bench.leases.claim_ports((port,))
    assert caught.value.status == 409
    await bench.drop("one")


CHECKS: tuple[Check, ...] = tuple(check for name, check in list(globals().items()) if name.startswith("check_"))
