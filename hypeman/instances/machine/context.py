"""What all effects share: look-ups in the store, and the running VMs.

Data is read when an effect needs it, so that a step read back after a crash does the same as the one that was planned.
"""

from __future__ import annotations

from collections.abc import Mapping

from hypeman.errors import InternalError
from hypeman.host.files import Files
from hypeman.hypervisor.interface import Driver, VmmGone
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.instances.machine.live import Live
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.rows import INSTANCES, MEMBERS
from hypeman.network.leases import get_lease
from hypeman.network.types import Lease
from hypeman.paths import Paths
from hypeman.store import Store, Txn


class Context:
    """One per server."""

    def __init__(
        self,
        *,
        store: Store,
        paths: Paths,
        files: Files,
        drivers: Mapping[HypervisorKind, Driver],
        uid_base: int,
    ) -> None:
        self.store = store
        self.paths = paths
        self.files = files
        self.live: dict[str, Live] = {}
        """Instance → its running VM. Set by launch, restore and adoption; removed when the VM ends."""
        self._drivers = drivers
        self._uid_base = uid_base
        self._overtaken: set[str] = set()
        """Instances whose guests are not waited for, since a stop or delete is queued."""

    def record(self, instance_id: str) -> InstanceRecord:
        """Of an instance, or of the member of a pool that will be one."""

        def read(txn: Txn) -> InstanceRecord | None:
            member = txn.get(MEMBERS, instance_id)
            return member.record if member is not None else txn.get(INSTANCES, instance_id)

        record = self.store.read(read)
        if record is None:
            raise InternalError(f"instance {instance_id} has no record")
        return record

    def lease(self, instance_id: str) -> Lease | None:
        return self.store.read(lambda txn: get_lease(txn, instance_id))

    def uid(self, record: InstanceRecord) -> int:
        """The user id of this instance's VMM: each has its own; 0 is the server's."""
        return self._uid_base + record.number if self._uid_base else 0

    def driver(self, record: InstanceRecord) -> Driver:
        return self._drivers[record.spec.hypervisor]

    def living(self, instance_id: str) -> Live:
        """The running VM. Raises VmmGone if there is none."""
        live = self.live.get(instance_id)
        if live is None:
            raise VmmGone(f"the VM of instance {instance_id} is gone")
        return live

    def watch(self, instance_id: str, live: Live) -> None:
        """Register a VM that was launched, restored or found."""
        live.give_up(instance_id in self._overtaken)
        self.live[instance_id] = live

    def give_up_guest(self, instance_id: str, given_up: bool) -> None:
        """Abort all waits for the guest of an instance, including its next VM's, until called with False."""
        if given_up:
            self._overtaken.add(instance_id)
        else:
            self._overtaken.discard(instance_id)
        live = self.live.get(instance_id)
        if live is not None:
            live.give_up(given_up)
