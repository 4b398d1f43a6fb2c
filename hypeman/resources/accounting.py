"""How much of the host each instance has allocated, stored with the records.

A Holding is one instance's allocation. It is written in the same transaction as the instance itself
and added to one row of totals, so that admission costs one look-up and ``GET /resources`` does not
iterate. vCPUs, memory and bandwidths are held while there is a VMM; disk as long as the instance
exists.

    limit = capacity × oversubscription; exceeding it is refused with 409 insufficient_resources
"""

from __future__ import annotations

import msgspec

from hypeman.errors import InsufficientResources
from hypeman.store import Table, Txn
from hypeman.units import format_size


class Holding(msgspec.Struct, frozen=True):
    """vCPUs; bytes; bytes per second."""

    vcpus: int = 0
    memory: int = 0
    disk: int = 0
    download: int = 0
    upload: int = 0
    disk_io: int = 0

    @property
    def network(self) -> int:
        """The larger of the two directions, since both share one link."""
        return max(self.download, self.upload)

    def without_vmm(self) -> Holding:
        """What stays allocated without a VMM."""
        return Holding(disk=self.disk)


class Totals(msgspec.Struct, frozen=True):
    """Sums of all holdings."""

    vcpus: int = 0
    memory: int = 0
    disk: int = 0
    network: int = 0
    disk_io: int = 0

    def exchanged(self, old: Holding, new: Holding) -> Totals:
        return Totals(
            vcpus=self.vcpus - old.vcpus + new.vcpus,
            memory=self.memory - old.memory + new.memory,
            disk=self.disk - old.disk + new.disk,
            network=self.network - old.network + new.network,
            disk_io=self.disk_io - old.disk_io + new.disk_io,
        )


class Limits(msgspec.Struct, frozen=True):
    """Limits on the totals; 0 is unknown and therefore unlimited."""

    vcpus: int = 0
    memory: int = 0
    disk: int = 0
    network: int = 0
    disk_io: int = 0


HOLDINGS: Table[Holding] = Table("holdings", Holding)
TOTALS: Table[Totals] = Table("holding-totals", Totals)

_POOL = "pool/"
_TOTALS_KEY = "all"
_CONFIGURED = {"vcpus": "cpu"}
"""Names in the configuration, where they differ."""
_UNITS = {"vcpus": "vCPUs", "memory": "memory", "disk": "disk", "network": "network bandwidth", "disk_io": "disk I/O"}


def pool_holder(snapshot: str, member: str) -> str:
    """The holder of what a member of a snapshot's pool holds; other holders are instances."""
    return f"{_POOL}{snapshot}/{member}"


def pool_of(holder: str) -> str | None:
    """The snapshot to whose pool ``holder`` belongs; None for an instance."""
    return holder.split("/")[1] if holder.startswith(_POOL) else None


def totals(txn: Txn) -> Totals:
    return txn.get(TOTALS, _TOTALS_KEY) or Totals()


def hold(txn: Txn, holder: str, wanted: Holding, limits: Limits) -> None:
    """Replace the allocation of ``holder`` with ``wanted``.

    Raises InsufficientResources, naming the resource, if an increase would make its total exceed
    the limit. Releasing never fails.
    """
    held = txn.get(HOLDINGS, holder) or Holding()
    before = totals(txn)
    after = before.exchanged(held, wanted)
    for name, label in _UNITS.items():
        limit, now, then = getattr(limits, name), getattr(before, name), getattr(after, name)
        if limit and then > now and then > limit:
            raise InsufficientResources(
                f"not enough {label}: {_amount(name, then - now)} more wanted, "
                f"{_amount(name, max(0, limit - now))} of {_amount(name, limit)} free; "
                f"the limit is what the host has, times oversubscription.{_CONFIGURED.get(name, name)}",
                resource=name,
                amount=then - limit,
            )
    txn.put(TOTALS, _TOTALS_KEY, after)
    if wanted == Holding():
        txn.delete(HOLDINGS, holder)
    else:
        txn.put(HOLDINGS, holder, wanted)


def _amount(name: str, value: int) -> str:
    if name == "vcpus":
        return str(value)
    return format_size(value) + ("/s" if name in ("network", "disk_io") else "")
