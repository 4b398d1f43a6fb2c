"""Ingresses in the store: plain functions on a transaction."""

from __future__ import annotations

from msgspec import Struct

from hypeman import events
from hypeman.errors import AlreadyExists, Ambiguous, Conflict, NotFound
from hypeman.ingress.hostnames import shape
from hypeman.ingress.types import IngressRecord, ports_of
from hypeman.store import Table, Txn


class Owner(Struct, frozen=True):
    ingress_id: str


INGRESSES: Table[IngressRecord] = Table("ingresses", IngressRecord)
NAMES: Table[Owner] = Table("ingress_names", Owner)
HOSTS: Table[Owner] = Table("ingress_hosts", Owner)
"""``port/shape of the host name``: one ingress has it."""
_MAX_REF = 63
"""Of a name; ids are shorter."""


def find(txn: Txn, ref: str) -> IngressRecord:
    """By exact id, exact name, then unique id prefix. Raises NotFound or Ambiguous."""
    found: IngressRecord | None = None
    if 0 < len(ref) <= _MAX_REF:
        owner = txn.get(NAMES, ref)
        found = txn.get(INGRESSES, ref) or (txn.get(INGRESSES, owner.ingress_id) if owner is not None else None)
        if found is None:
            fitting = list(txn.keys(INGRESSES, ref))
            if len(fitting) > 1:
                raise Ambiguous(f"{ref!r} matches {len(fitting)} ingresses; give more of the id")
            found = txn.get(INGRESSES, fitting[0]) if fitting else None
    if found is None:
        raise NotFound(f"no ingress {ref[:_MAX_REF]!r}")
    return found


def all_records(txn: Txn) -> list[IngressRecord]:
    """Oldest first."""
    return sorted((record for _, record in txn.scan(INGRESSES)), key=lambda record: (record.created_at, record.id))


def check_free(txn: Txn, record: IngressRecord) -> None:
    """Raises AlreadyExists for the name, Conflict ``hostname_in_use`` for a host name and port."""
    if txn.exists(NAMES, record.name):
        raise AlreadyExists(f"an ingress named {record.name} already exists")
    for hostname, port in _places(record):
        owner = txn.get(HOSTS, _key(hostname, port))
        if owner is not None:
            other = txn.get(INGRESSES, owner.ingress_id)
            raise Conflict(
                f"{hostname} on port {port} is already routed by ingress "
                f"{other.name if other is not None else owner.ingress_id}",
                code="hostname_in_use",
            )


def insert(txn: Txn, record: IngressRecord) -> None:
    """Raises as ``check_free``."""
    check_free(txn, record)
    owner = Owner(record.id)
    txn.put(INGRESSES, record.id, record)
    txn.put(NAMES, record.name, owner)
    for hostname, port in _places(record):
        txn.put(HOSTS, _key(hostname, port), owner)
    _note(txn, record, "created")


def remove(txn: Txn, ref: str) -> IngressRecord:
    """Raises NotFound or Ambiguous."""
    record = find(txn, ref)
    txn.delete(INGRESSES, record.id)
    txn.delete(NAMES, record.name)
    for hostname, port in _places(record):
        txn.delete(HOSTS, _key(hostname, port))
    _note(txn, record, "deleted")
    return record


def _places(record: IngressRecord) -> list[tuple[str, int]]:
    """Host names and ports that are the ingress's alone."""
    return [(rule.match.hostname, port) for rule in record.rules for port in ports_of(rule)]


def _key(hostname: str, port: int) -> str:
    return f"{port:05}/{shape(hostname)}"


def _note(txn: Txn, record: IngressRecord, action: str) -> None:
    hosts = ", ".join(f"{rule.match.hostname}:{rule.match.port}" for rule in record.rules[:10])
    events.record(
        txn, events.Kind.INGRESS, action, record.id, name=record.name, tags=record.tags, data={"hosts": hosts}
    )
