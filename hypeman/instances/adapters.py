"""Adapters between instances and the capabilities they use, where their types differ.

Capabilities do not know InstanceRecord. Here a record is converted to a lease's plan, an egress
policy or a claim, and sealed values and counters are mapped back to the instance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

import msgspec
from msgspec import UNSET

from hypeman import events
from hypeman.egress import policy
from hypeman.egress.approvals import Approvals
from hypeman.egress.broker import Broker
from hypeman.egress.guest_env import proxy_environment, trust_environment
from hypeman.egress.records import AuditRecord
from hypeman.egress.rules import DEFAULT, may_resolve, openings
from hypeman.egress.service import Egress
from hypeman.egress.types import EgressApproval, EgressPolicy
from hypeman.errors import Ambiguous, NotFound
from hypeman.events.types import Datum
from hypeman.guest.boot import CA_BUNDLE_PATH, CA_CERT_PATH, CaCertificate
from hypeman.ids import SERVICE_TAG, STACK_TAG, stack_member
from hypeman.instances.board import Board
from hypeman.instances.model.record import InstanceRecord, InstanceSpec
from hypeman.instances.rows import INSTANCES
from hypeman.network import leases
from hypeman.network.publishing import Claim
from hypeman.network.service import Network
from hypeman.network.types import EgressMode, Lease, NetworkPlan, Opening, PortMapping, PrivateReach, Reach
from hypeman.resources.service import ResourceService
from hypeman.store import Store, Table, Txn


class Leases:
    """Addresses for instances, and a share of the uplink for those that request no rates."""

    def __init__(
        self, network: Network, resources: ResourceService, store: Store, *, default_limits: bool, isolated: bool
    ) -> None:
        self._store = store
        self._network = network
        self._resources = resources
        self._default_limits = default_limits
        self._isolated = isolated

    def take(self, txn: Txn, record: InstanceRecord, ports: tuple[PortMapping, ...]) -> Lease:
        spec = record.spec
        plan = NetworkPlan(
            enabled=spec.network,
            download_bps=spec.download_bps,
            upload_bps=spec.upload_bps,
            egress_mode=_mode_of(spec),
            isolated=self._isolated,
            groups=tuple(f"{spec.tags.get(STACK_TAG, '')}/{name}" for name in spec.groups),
            ports=ports,
            reach=_reach_of(spec),
        )
        return leases.take_lease(txn, record.id, plan, self._network.subnet, partial(_name_of, txn))

    async def claim_ports(self, ports: tuple[PortMapping, ...], *, instance_id: str = "") -> Claim:
        """Raises PortInUse with the name of the instance or program that has a port."""
        if wanted := [mapping for mapping in ports if mapping.host_port]:
            self._store.read(
                lambda txn: leases.check_ports_free(txn, wanted, partial(_name_of, txn), instance_id=instance_id)
            )
        return await self._network.published.claim(ports, instance_id=instance_id)

    def set_ports(self, txn: Txn, instance_id: str, ports: tuple[PortMapping, ...]) -> None:
        leases.set_ports(txn, instance_id, ports, partial(_name_of, txn))

    async def publish(self, instance_id: str) -> None:
        """Let the ports in the store take effect. Raises HostError."""
        lease = self._store.read(lambda txn: leases.get_lease(txn, instance_id))
        if lease is not None:
            await self._network.set_ports(lease)

    def set_reach(self, txn: Txn, record: InstanceRecord) -> None:
        leases.set_reach(txn, record.id, _mode_of(record.spec), _reach_of(record.spec))

    async def enforce_reach(self, instance_id: str) -> None:
        """Raises HostError."""
        lease = self._store.read(lambda txn: leases.get_lease(txn, instance_id))
        if lease is not None:
            await self._network.set_egress(lease)

    def release_ports(self, instance_id: str) -> None:
        self._network.published.forget(instance_id)

    def drop(self, txn: Txn, instance_id: str) -> None:
        leases.drop_lease(txn, instance_id, self._network.subnet)

    def default_rates(self, spec: InstanceSpec) -> InstanceSpec:
        """Shares are proportional to vCPUs, and assigned only if the capacity is known."""
        capacity = self._resources.capacity
        if spec.network and self._default_limits:
            share = self._resources.share(spec.vcpus, self._resources.limits.network)
            spec = msgspec.structs.replace(
                spec, download_bps=spec.download_bps or share, upload_bps=spec.upload_bps or share
            )
        if not spec.disk_io_bps and capacity.disk_io:
            share = self._resources.share(spec.vcpus, self._resources.limits.disk_io)
            spec = msgspec.structs.replace(spec, disk_io_bps=share)
        return spec


def _mode_of(spec: InstanceSpec) -> EgressMode:
    if spec.egress is None:
        return EgressMode.NONE
    closes = spec.access is not None and spec.access.closes
    return EgressMode.ALL if closes else EgressMode(spec.egress.value)


def _reach_of(spec: InstanceSpec) -> Reach:
    access, redirected = spec.access, policy.redirected_ports(spec.credentials)
    if access is None:
        return Reach(redirected=redirected)
    opened = (Opening(each.protocol, each.network, each.first, each.last) for each in openings(access))
    return Reach(
        closed=access.closes,
        openings=tuple(opened) if access.closes else (),
        private=PrivateReach(access.private_networks.value if access.private_networks else ""),
        redirected=redirected,
    )


def _name_of(txn: Txn, instance_id: str) -> str:
    record = txn.get(INSTANCES, instance_id)
    return f"instance {record.name!r}" if record is not None else f"instance {instance_id}"


class Counters:
    """Bytes on the wire, as the guest counts them."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def of_all(self) -> Mapping[str, tuple[int, int]]:
        return self._network.counters()

    def of_instance(self, instance_id: str) -> tuple[int, int]:
        return self._network.counters().get(instance_id, (0, 0))


class SealedSecrets(msgspec.Struct, frozen=True):
    sealed: bytes


SECRETS: Table[SealedSecrets] = Table("egress-secrets", SealedSecrets)


class RotatedSecrets:
    """Values that change by being used: refresh tokens."""

    def __init__(self, egress: Egress, store: Store) -> None:
        self._sealer = egress.sealer
        self._store = store

    async def keep(self, instance_id: str, env: str, used: str, new: str) -> None:
        """Store ``new`` as the value of ``env`` if it is still ``used``; a value set by a client meanwhile stays."""

        def replace(txn: Txn) -> None:
            row = txn.get(SECRETS, instance_id)
            if row is None:
                return
            values = self._sealer.open(instance_id, row.sealed)
            if values.get(env) == used:
                sealed = self._sealer.seal(instance_id, {**values, env: new})
                txn.put(SECRETS, instance_id, SealedSecrets(sealed))

        await self._store.write(replace)


class EgressOfInstances:
    """Credential values sealed in the store, and egress policies in force while a VM runs."""

    def __init__(self, egress: Egress, broker: Broker, approvals: Approvals, store: Store) -> None:
        self._egress = egress
        self._broker = broker
        self._approvals = approvals
        self._store = store

    def check(self, spec: InstanceSpec, values: Mapping[str, str]) -> None:
        """Raise InvalidRequest unless these values can be inserted where the rules say."""
        sources = policy.sources_of(spec.credentials)
        concerned = {key: c for key, c in spec.credentials.items() if c.source.env in values}
        assert set(values) <= sources
        self._broker.check(concerned if len(values) < len(sources) else spec.credentials, values)

    def seal(self, txn: Txn, instance_id: str, values: Mapping[str, str]) -> None:
        """Store ``values``, merged over the stored ones."""
        if values:
            merged = {**self._open(txn, instance_id), **values}
            txn.put(SECRETS, instance_id, SealedSecrets(self._egress.sealer.seal(instance_id, merged)))

    def drop(self, txn: Txn, instance_id: str) -> None:
        txn.delete(SECRETS, instance_id)

    async def refresh(self, instance_id: str) -> None:
        """Make new values and rules take effect on the next request, if the instance is running."""
        self._approvals.forget(instance_id)

        def read(txn: Txn) -> tuple[InstanceRecord | None, Lease | None]:
            return txn.get(INSTANCES, instance_id), leases.get_lease(txn, instance_id)

        record, lease = self._store.read(read)
        if record is not None and lease is not None and record.handle is not None:
            await self.enforce(record, lease)

    async def enforce(self, record: InstanceRecord, lease: Lease) -> None:
        values = self._store.read(lambda txn: self._open(txn, record.id))
        await self._broker.set_policy(
            record.id,
            lease.ipv4,
            record.spec.credentials,
            values,
            web_only=lease.egress_mode is EgressMode.ALL,
            access=record.spec.access,
        )

    async def release(self, instance_id: str) -> None:
        await self._broker.remove(instance_id)

    def guest_setup(self, record: InstanceRecord) -> tuple[Mapping[str, str], tuple[CaCertificate, ...]]:
        proxy = proxy_environment(self._egress.settings.address, self._egress.port)
        trust = trust_environment(
            CA_BUNDLE_PATH, CA_CERT_PATH, postgres=policy.logs_in_to_postgres(record.spec.credentials)
        )
        return {**proxy, **trust}, (CaCertificate(pem=self._egress.ca_pem.decode()),)

    def _open(self, txn: Txn, instance_id: str) -> dict[str, str]:
        row = txn.get(SECRETS, instance_id)
        return self._egress.sealer.open(instance_id, row.sealed) if row is not None else {}


async def note_approval(store: Store, action: str, shown: EgressApproval) -> None:
    """Log an event about a request that needs an approval."""
    data: dict[str, Datum] = {
        "rule": shown.rule,
        "scheme": shown.scheme,
        "host": shown.host,
        "port": shown.port,
        "method": shown.method,
        "path": shown.path,
    }
    await store.write(
        lambda txn: events.record(txn, events.Kind.EGRESS, action, shown.id, instance_id=shown.instance_id, data=data)
    )


def of_stack(board: Board, instance_id: str, service: str) -> str | None:
    """The id of the instance of ``service`` in the stack of an instance, by their tags; None if there is none."""
    try:
        stack = board.find(instance_id).spec.tags.get(STACK_TAG)
        found = board.find(stack_member(stack, service)) if stack else None
    except (NotFound, Ambiguous):
        return None
    if found is None or found.spec.tags.get(STACK_TAG) != stack or found.spec.tags.get(SERVICE_TAG) != service:
        return None
    return found.id


class NamesOfInstances:
    """Which names guests may look up, by the egress rules of their instances."""

    def __init__(self, egress: Egress, board: Board) -> None:
        self._egress = egress
        self._board = board

    def may_look_up(self, instance_id: str, name: str) -> bool:
        try:
            access = self._board.find(instance_id).spec.access
        except NotFound:
            return False
        now = datetime.now(UTC)
        if access is None or (name and may_resolve(access, name, now)):
            return True
        self._egress.record(
            AuditRecord(
                time=now.timestamp(),
                instance=instance_id,
                kind="refused",
                host=name,
                port=53,
                method="",
                status=0,
                reason="no_rule",
                injected=False,
                credentials=(),
                bytes_up=0,
                bytes_down=0,
                seconds=0,
                http=0,
                decision="denied",
                rule=DEFAULT,
            )
        )
        return False

    def looked_up(self, instance_id: str, name: str, addresses: Sequence[str], seconds: float) -> None:
        self._egress.pin(instance_id, name, addresses, seconds)


class EgressGuests:
    """The instances with mediated egress, for the API view of the egress path."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def policy(self, ref: str) -> EgressPolicy:
        record = self._board.find(ref)
        if record.spec.egress is None:
            raise NotFound(f"the egress of instance {record.name} is not mediated", code="no_egress_policy")
        return EgressPolicy(
            instance_id=record.id,
            instance_name=record.name,
            mode=record.spec.egress,
            credentials=record.spec.credentials,
            access=record.spec.access or UNSET,
        )

    def web_only(self, instance_id: str) -> bool:
        return _mode_of(self._board.find(instance_id).spec) is EgressMode.ALL

    async def wait_deleted(self, instance_id: str) -> None:
        await self._board.wait_deleted(instance_id)
