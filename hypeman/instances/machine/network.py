"""Effects on an instance's network: its TAP with rules and limits, and the policy of mediated egress."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from hypeman.guest.boot import CaCertificate
from hypeman.instances.machine.context import Context
from hypeman.instances.model.policies import standby_rules
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.model.steps import AttachNetwork, AwakenGuest, HoldTraffic, SetEgress
from hypeman.instances.model.types import InstanceState, WakeOn
from hypeman.network.types import GuestNetwork, Lease

log = logging.getLogger(__name__)


class NetworkNeeds(Protocol):
    async def attach(self, lease: Lease, *, uid: int = 0, boots: bool = False) -> None: ...
    async def detach(self, lease: Lease) -> None: ...
    async def hold(self, lease: Lease) -> None: ...
    async def release(self, lease: Lease) -> None: ...
    async def plug_in_again(self, lease: Lease, pid: int) -> bool: ...
    def guest_network(self, lease: Lease) -> GuestNetwork | None: ...


class EgressNeeds(Protocol):
    async def enforce(self, record: InstanceRecord, lease: Lease) -> None: ...
    async def release(self, instance_id: str) -> None: ...
    def guest_setup(self, record: InstanceRecord) -> tuple[Mapping[str, str], tuple[CaCertificate, ...]]:
        """Environment and CA certificates for a guest with mediated egress."""
        ...


class Network:
    def __init__(self, context: Context, network: NetworkNeeds, egress: EgressNeeds) -> None:
        self._context = context
        self._network = network
        self._egress = egress

    async def attach(self, step: AttachNetwork) -> None:
        lease = self._context.lease(step.instance)
        if lease is not None:
            record = self._context.record(step.instance)
            boots = record.state is not InstanceState.STANDBY
            await self._network.attach(lease, uid=self._context.uid(record), boots=boots)

    async def detach(self, step: AttachNetwork) -> None:
        lease = self._context.lease(step.instance)
        if lease is not None:
            await self._network.detach(lease)

    async def hold(self, step: HoldTraffic) -> None:
        lease = self._context.lease(step.instance)
        policy = self._context.record(step.instance).spec.auto_standby
        if lease is not None and standby_rules(policy).wake is not WakeOn.NONE:
            await self._network.hold(lease)

    async def release(self, step: HoldTraffic | AwakenGuest) -> None:
        lease = self._context.lease(step.instance)
        if lease is not None:
            await self._network.release(lease)

    async def plug_in_again(self, instance_id: str) -> None:
        """Reconnect the guest's NIC to its TAP, which was deleted externally and has been recreated."""
        live, lease = self._context.live.get(instance_id), self._context.lease(instance_id)
        if live is not None and lease is not None and await self._network.plug_in_again(lease, live.vmm.handle.pid):
            log.warning("instance %s was attached to its TAP again, which had been deleted", instance_id)

    async def set_egress(self, step: SetEgress) -> None:
        lease = self._context.lease(step.instance)
        if lease is not None:
            await self._egress.enforce(self._context.record(step.instance), lease)

    async def remove_egress(self, step: SetEgress) -> None:
        await self._egress.release(step.instance)

    def of_guest(self, instance_id: str) -> GuestNetwork | None:
        lease = self._context.lease(instance_id)
        return self._network.guest_network(lease) if lease is not None else None

    def egress_setup(self, record: InstanceRecord) -> tuple[Mapping[str, str], tuple[CaCertificate, ...]]:
        """Environment and CA certificates; none unless the instance's egress is mediated."""
        lease = self._context.lease(record.id)
        return self._egress.guest_setup(record) if record.spec.egress and lease is not None else ({}, ())
