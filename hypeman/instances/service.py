"""Public interface: every operation on instances, by id, name or prefix.

A request is validated, and a record with everything it reserves written in one transaction. The rest, also the pull of
a missing image, is done by the instance's own task; a caller that disconnects does not affect it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import trio
from msgspec import UNSET

from hypeman.config import Config
from hypeman.egress.policy import sources_of
from hypeman.errors import Conflict, HypemanError, InvalidRequest, InvalidState, NotFound
from hypeman.guest.client import GuestClient
from hypeman.guest.copies import CopyIn, CopyOut
from hypeman.guest.failures import GuestLost
from hypeman.guest.programs import ExecSession
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.sessions import open_copy_from, open_copy_to, open_exec
from hypeman.guest.types import Metrics, PathInfo
from hypeman.host import facts
from hypeman.host.usage import read_pss, read_usage
from hypeman.hypervisor.catalog import Catalog
from hypeman.hypervisor.interface import VmmGone
from hypeman.ids import check_name, new_id
from hypeman.images.types import ReadyImage
from hypeman.instances.board import Board
from hypeman.instances.expiry import Reaper
from hypeman.instances.forks import Forks
from hypeman.instances.ledger import (
    AddInstance,
    Change,
    DeviceClaims,
    ImagePins,
    LeaseRows,
    Ledger,
    NoteUpdated,
    SealSecrets,
    SecretRows,
    SetPorts,
    SetReach,
)
from hypeman.instances.life.operations.boot import create, new_nonce, start
from hypeman.instances.life.operations.standby import restore, standby
from hypeman.instances.life.operations.stop import delete, stop
from hypeman.instances.life.operations.volumes import attach, detach
from hypeman.instances.life.owned import ImagePulls, Owned
from hypeman.instances.machine.machine import Machine
from hypeman.instances.model.admission import Command, check_legal
from hypeman.instances.model.guest_boot import STOP_GRACE
from hypeman.instances.model.phases import PULLING, Phases, utc_now
from hypeman.instances.model.plan import plan_create
from hypeman.instances.model.policies import check_policies, restart_rules, standby_rules
from hypeman.instances.model.record import InstanceRecord, InstanceSpec, Intent, Operation, StopCause
from hypeman.instances.model.states import NO_VMM, SETTLED
from hypeman.instances.model.steps import HoldTraffic
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    CreateInstanceRequest,
    ForkInstanceRequest,
    Instance,
    InstanceState,
    InstanceStats,
    LogSource,
    StandbyInstanceRequest,
    StartInstanceRequest,
    StopInstanceRequest,
    UpdateInstanceRequest,
    UsageOfAll,
    WaitForStateResponse,
    WakeOn,
)
from hypeman.instances.model.validate import (
    changed_access,
    check_compression,
    check_create,
    check_grace,
    check_instance_tags,
    check_mount_path,
    check_same_stack,
    expiry,
    usual_compression,
)
from hypeman.instances.model.view import render_instance, shown_error
from hypeman.instances.pools import Pools
from hypeman.instances.reclaim import Reclaim
from hypeman.instances.rows import INSTANCES, INTENTS, MEMBERS
from hypeman.instances.sampler import Sampler, usage_of
from hypeman.instances.tasks import Tasks
from hypeman.network.leases import get_lease
from hypeman.network.ports import check_ports
from hypeman.network.types import PortMapping
from hypeman.resources.accounting import Limits
from hypeman.resources.types import MemoryReclaimRequest, MemoryReclaimResponse
from hypeman.store import Store, Txn
from hypeman.units import parse_duration
from hypeman.volumes import records as volumes

MOST_WAIT = 300.0
"""Maximum duration of a ``wait``, in seconds."""

SECONDS_FOR_AGENT = 5.0
"""A running instance's agent answers at once; this covers a channel that is being reopened."""

SECONDS_FOR_METRICS = 1.0
"""An agent answers within milliseconds; without it the statistics contain less."""

LOG_INTERVAL = 1.0
"""Between looks at how logs have grown, which is how exact the times of their lines are."""
ROTATION_INTERVAL = 5.0
"""Seconds between checks of log sizes. A guest prints at most about 10 MB/s through its serial console."""

log = logging.getLogger(__name__)

R = TypeVar("R")


class LeaseNeeds(LeaseRows, Protocol):
    async def claim_ports(
        self, ports: tuple[PortMapping, ...], *, instance_id: str = ""
    ) -> AbstractContextManager[PortClaim]:
        """Hold ports of the host within the block, and beyond if they are kept. Raises PortInUse."""
        ...

    async def publish(self, instance_id: str) -> None:
        """Let the ports in the store take effect."""
        ...

    async def enforce_reach(self, instance_id: str) -> None:
        """Let what the store says that the instance may reach take effect."""
        ...

    def release_ports(self, instance_id: str) -> None: ...
    def default_rates(self, spec: InstanceSpec) -> InstanceSpec:
        """``spec`` with unset rates replaced by a share of the uplink."""
        ...


class PortClaim(Protocol):
    @property
    def ports(self) -> tuple[PortMapping, ...]:
        """The ports, with those that were found where a free one was requested."""
        ...

    def keep(self, instance_id: str) -> None:
        """The ports are recorded for this instance, instead of those that it had."""
        ...


class DeviceNeeds(DeviceClaims, Protocol):
    async def prepare(self) -> None:
        """Rescan the host's devices, so that a claim uses current data."""
        ...

    def mdev_uuid(self, instance_id: str) -> str: ...


class SecretNeeds(SecretRows, Protocol):
    def check(self, spec: InstanceSpec, values: Mapping[str, str]) -> None: ...
    async def refresh(self, instance_id: str) -> None:
        """Let new values take effect on the next request."""
        ...


class ImageNeeds(ImagePins, ImagePulls, Protocol):
    def platform(self, text: str | None) -> str: ...
    def find_ready(self, name: str, platform: str | None = None) -> ReadyImage | None:
        """The image of that name, if it need not be pulled."""
        ...


class Counters(Protocol):
    def of_all(self) -> Mapping[str, tuple[int, int]]:
        """Bytes that each guest received and sent."""
        ...

    def of_instance(self, instance_id: str) -> tuple[int, int]:
        """Bytes that the guest received and sent."""
        ...


class Instances:
    """All operations on instances. ``run`` in a nursery adopts running VMs and serves until cancelled."""

    def __init__(
        self,
        *,
        config: Config,
        store: Store,
        machine: Machine,
        images: ImageNeeds,
        leases: LeaseNeeds,
        devices: DeviceNeeds,
        secrets: SecretNeeds,
        counters: Counters,
        limits: Callable[[], Limits],
        catalog: Catalog,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.machine = machine
        self.details: Callable[[InstanceRecord], Mapping[str, object]] = lambda record: {}
        """Further fields of an Instance, which others keep: the status of its policies. Must be fast."""
        self.board = Board(self._render)
        self.ledger = Ledger(store, leases=leases, images=images, devices=devices, secrets=secrets, limits=limits)
        self._reaper = Reaper(self.board.records, self.delete, now=now)
        self.tasks = Tasks(
            machine=machine,
            ledger=self.ledger,
            images=images,
            board=self.board,
            added=self._reaper.look,
            gone=leases.release_ports,
            now=now,
        )
        self.forks = Forks(tasks=self.tasks, ledger=self.ledger, machine=machine, now=now)
        self.pools = Pools(store=store, tasks=self.tasks, ledger=self.ledger, machine=machine, now=now)
        self._config = config
        self._store = store
        self._images = images
        self._leases = leases
        self._devices = devices
        self._secrets = secrets
        self._counters = counters
        self._sampler = Sampler(self.board.records, counters.of_all, now)
        self._catalog = catalog
        self._now = now
        self._reclaim = Reclaim(config.reclaim, records=self.board.records, live=machine.context.live, now=now)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own all instances. Reports started when each is settled (adopted, finished or undone)."""
        async with trio.open_nursery() as nursery:
            with self.tasks.run_in(nursery):
                await self._run(nursery, task_status)

    async def _run(self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        found = self._store.read(_sort_for_start)
        for record in found.known:
            self.board.post(record)
        if found.unsettled or found.pooled:
            await self._catalog.wait_ready()  # returns at once, unless the probe's inputs have changed
        async with trio.open_nursery() as settling:
            for record in found.unsettled:
                settling.start_soon(self.tasks.settle, record)
        for record in found.pulling:
            self.tasks.continue_create(record)
        await self.pools.start()
        await self.machine.captures.collect()
        nursery.start_soon(self.pools.run)
        nursery.start_soon(self._reaper.run)
        nursery.start_soon(self._reclaim.run)
        nursery.start_soon(self._keep_logs)
        task_status.started()
        await trio.sleep_forever()

    # Reading

    async def list(self, state: InstanceState | None, tags: Mapping[str, str]) -> bytes:
        return self.board.encoded_list(state, tags)

    async def get(self, ref: str) -> Instance:
        return self.view(self.board.find(ref))

    async def get_encoded(self, ref: str) -> bytes | Instance:
        """``get``, encoded if that is kept: it is of the record alone, and a silent guest changes no record."""
        record = self.board.find(ref)
        return self.board.encoded(ref) if self._silent_since(record) is None else self.view(record)

    async def check_running(self, ref: str) -> str:
        record = self.board.find(ref)
        if record.state is not InstanceState.RUNNING:
            raise InvalidState(f"instance {record.name} is {record.state}; it must be Running for this")
        return record.id

    async def wait_state(self, ref: str, state: InstanceState, timeout: float) -> WaitForStateResponse:
        """Wait for ``state``, or for one from which it cannot be reached without a command. Raises NotFound
        if the instance is deleted meanwhile."""
        if state is InstanceState.UNKNOWN:
            raise InvalidRequest("Unknown is not a state to wait for", code="invalid_state")
        if timeout <= 0:
            raise InvalidRequest("timeout must be above 0", code="invalid_timeout")
        record = self.board.find(ref)
        with trio.move_on_after(min(timeout, MOST_WAIT)) as scope:
            while record.state is not state and not _is_final(record):
                changed = await self.board.wait_change(record)
                if changed is None:
                    raise NotFound(f"instance {ref!r} was deleted")
                record = changed
        return WaitForStateResponse(
            state=record.state,
            timed_out=scope.cancelled_caught,
            state_error=shown_error(record),
        )

    async def stats(self, ref: str) -> InstanceStats:
        record = self.board.find(ref)
        usage = read_usage(record.handle.pid) if record.handle is not None else read_usage(0)
        outside = usage_of(record, usage, self._counters.of_instance(record.id), facts.booted_at())
        inside = await self._guest_metrics(record.id)
        pss = await trio.to_thread.run_sync(read_pss, record.handle.pid) if record.handle is not None else None
        return InstanceStats(
            **msgspec.structs.asdict(outside),
            memory_pss_bytes=UNSET if pss is None else pss,
            guest_memory_used_bytes=inside.memory_total - inside.memory_available if inside is not None else UNSET,
            guest_memory_total_bytes=inside.memory_total if inside is not None else UNSET,
        )

    async def usage(self) -> UsageOfAll:
        return await self._sampler.get()

    async def _guest_metrics(self, instance_id: str) -> Metrics | None:
        """None if the guest has no agent, or one that does not answer at once."""
        live = self.machine.live(instance_id)
        if live is None or live.guest is None:
            return None
        with trio.move_on_after(SECONDS_FOR_METRICS), suppress(HypemanError):
            return await live.guest.metrics()
        return None

    async def reclaim_memory(self, request: MemoryReclaimRequest) -> MemoryReclaimResponse:
        return await self.tasks.run_detached(lambda: self._reclaim.order(request))

    async def log_path(self, ref: str, source: LogSource) -> Path:
        return self.machine.paths.instance(self.board.find(ref).id).log(source.value)

    # Creating

    async def create(self, request: CreateInstanceRequest) -> Instance:
        check_name(request.name)
        ports = check_ports(request.ports)
        await self._catalog.wait_ready()
        kind = request.hypervisor or self._catalog.default()
        driver = self._catalog.driver(kind)
        now = self._now()
        platform = self._images.platform(request.platform)
        spec = check_create(
            request,
            limits=self._config.limits,
            kind=kind,
            capabilities=driver.capabilities,
            platform=platform,
        )
        real = {name: request.env[name] for name in sources_of(request.credentials)}
        spec = msgspec.structs.replace(spec, env={k: v for k, v in spec.env.items() if k not in real})
        self._secrets.check(spec, real)
        expires_at = expiry(request.ttl, request.expires_at, now=now)
        spec = self._leases.default_rates(spec)
        if spec.devices or spec.gpu_profile:
            await self._devices.prepare()
        image = self._images.find_ready(request.image, request.platform)
        record = InstanceRecord(
            id=new_id(),
            name=request.name,
            number=0,
            spec=spec,
            digest=image.digest if image is not None else "",
            state=InstanceState.CREATED,
            created_at=now,
            phases=Phases(PULLING if image is None else InstanceState.CREATED.value.lower(), now),
            expires_at=expires_at,
            boots=1,
            nonce=new_nonce(),
        )
        intent = Intent(Operation.PULL, ()) if image is None else Intent(Operation.CREATE, plan_create(record))
        new = AddInstance(record, intent, running=True, ports=ports)
        with trio.CancelScope(shield=True):  # a caller that leaves finds it by its name, or it is not made
            with await self._leases.claim_ports(ports) as claim:
                record = await self.ledger.add(
                    msgspec.structs.replace(new, ports=claim.ports), SealSecrets(record.id, real)
                )
                claim.keep(record.id)
            task, created = self.tasks.begin(record, create)
        await created.wait()
        return self.view(task.record)

    # Verbs

    async def start(self, ref: str, request: StartInstanceRequest) -> Instance:
        await self._catalog.wait_ready()
        task = self.tasks.of(ref)
        return self.view(await task.perform(Command.START, lambda owned: start(owned, request.entrypoint, request.cmd)))

    def device_vanished(self, instance_id: str, text: str) -> None:
        """Journal that a device of a running instance has disappeared from the host."""
        self.machine.journal(instance_id, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ} {text}")

    async def plug_in_again(self, instance_id: str) -> None:
        """Reconnect a running instance whose TAP was deleted externally and has been recreated."""
        try:
            await self.machine.network.plug_in_again(instance_id)
        except Exception as error:  # on any error, the network must still handle other instances
            log.error("instance %s is without network until it is started or restored again: %s", instance_id, error)
            self.machine.journal(instance_id, f"the network is lost until the next start or restore: {error}")

    async def stop(self, ref: str, request: StopInstanceRequest | None = None) -> Instance:
        """Stop the instance. One that waits to be restarted by its policy stays stopped."""
        grace = check_grace(request.grace if request is not None else None, STOP_GRACE)
        task = self.tasks.of(ref)
        try:
            return self.view(await task.perform(Command.STOP, partial(stop, grace=grace)))
        except InvalidState:
            if not _awaits_restart(task.record):
                raise
        return self.view(await task.perform(None, _stay_stopped))

    async def stop_to_restart(self, instance_id: str, boots: int) -> None:
        """Stop the boot number ``boots`` of an instance, whose policy will start it again. Raises InvalidState if
        something else has happened to it meanwhile."""

        async def stop_it(owned: Owned) -> None:
            if owned.record.boots != boots:
                raise InvalidState("it was started again")
            await stop(owned, cause=StopCause.POLICY)

        await self.tasks.of(instance_id).perform(Command.STOP, stop_it)

    async def settle_traffic(self, instance_id: str) -> None:
        """Have packets to an instance in standby, or stopped, held or not, as its policy says. Between commands, so
        that none of them changes the state meanwhile."""

        async def settle_it(owned: Owned) -> None:
            step = HoldTraffic(instance_id)
            if owned.record.state not in (InstanceState.STANDBY, InstanceState.STOPPED):
                return
            wake = standby_rules(owned.record.spec.auto_standby).wake
            if owned.record.state is InstanceState.STANDBY and wake is not WakeOn.NONE:
                await self.machine.do(step)
            else:
                await self.machine.undo(step)

        await self.tasks.of(instance_id).perform(None, settle_it)

    async def start_again(self, instance_id: str, boots: int) -> None:
        """Start an instance as its restart policy says, if it has not been started or stopped by anyone since
        its boot number ``boots`` ended. Raises InvalidState otherwise."""
        await self._catalog.wait_ready()

        async def start_it(owned: Owned) -> None:
            if owned.record.boots != boots or not _awaits_restart(owned.record):
                raise InvalidState("it was started or stopped by someone else")
            await start(owned)

        await self.tasks.of(instance_id).perform(Command.START, start_it)

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        """Delete the instance. Without ``graceful`` its guest is not asked to shut down first."""
        task = self.tasks.of(ref)
        await task.perform(Command.DELETE, partial(delete, graceful=graceful))

    async def delete_ended(self, instance_id: str, boots: int) -> None:
        """Delete an instance whose boot number ``boots`` has ended. A start that is under way, which ``delete`` would
        overtake, is waited for. Raises InvalidState if it was started again."""

        async def delete_it(owned: Owned) -> None:
            if owned.record.state is not InstanceState.STOPPED or owned.record.boots != boots:
                raise InvalidState("it was started again")
            await delete(owned)

        await self.tasks.of(instance_id).perform(None, delete_it)

    async def standby(self, ref: str, request: StandbyInstanceRequest) -> Instance:
        """Save the VM; compress later if the request, the instance or the server says so (in this order)."""
        await self._catalog.wait_ready()
        check_compression(request.compression)
        delay = request.compression_delay
        seconds = parse_duration(delay, code="invalid_compression_delay") if delay is not None else None
        task = self.tasks.of(ref)
        policy = task.record.spec.snapshot_policy
        compression = request.compression or usual_compression(task.record.spec, self._config.snapshots)
        if seconds is None:
            seconds = parse_duration((policy.standby_compression_delay if policy else None) or "0")

        async def save(owned: Owned) -> InstanceRecord:
            record = await standby(owned, compression)
            if record.capture is not None:  # scheduled before the next command, so that a queued restore can cancel it
                self.machine.captures.compressor.schedule(record.capture, delay=seconds)
            return record

        return self.view(await task.perform(Command.STANDBY, save))

    async def restore(self, ref: str) -> Instance:
        await self._catalog.wait_ready()
        task = self.tasks.of(ref)
        return self.view(await task.perform(Command.RESTORE, restore))

    async def update(self, ref: str, request: UpdateInstanceRequest) -> Instance:
        task = self.tasks.of(ref)
        spec = task.record.spec
        check_policies(
            request.auto_standby,
            request.health_check,
            request.restart_policy,
            network=spec.network,
            agent=not spec.skip_guest_agent,
        )
        ports = check_ports(request.ports) if request.ports is not None else None
        return self.view(await task.perform(None, lambda owned: self._update(owned, request, ports)))

    async def _update(
        self, owned: Owned, request: UpdateInstanceRequest, ports: tuple[PortMapping, ...] | None
    ) -> InstanceRecord:
        now = self._now()
        record = owned.record
        tags = check_instance_tags(request.tags) if request.tags is not None else None
        changes: dict[str, object] = {}
        if request.ttl is not None or request.expires_at is not None:
            if record.expires_at is not None and record.expires_at <= now:
                raise Conflict(f"instance {record.name!r} has expired", code="instance_expired")
            changes["expires_at"] = expiry(request.ttl, request.expires_at, now=now)
        policies = {
            field: policy
            for field in ("auto_standby", "health_check", "restart_policy")
            if (policy := getattr(request, field)) is not None
        }
        spec = msgspec.structs.replace(record.spec, **policies)
        if tags is not None:
            check_same_stack(record.spec, tags)
            spec = msgspec.structs.replace(spec, tags=tags)
        if request.network is not None:
            spec = msgspec.structs.replace(spec, access=changed_access(record.spec, request.network.egress))
        if spec != record.spec:
            changes["spec"] = spec
        values = dict(request.env or {})
        sources = sources_of(record.spec.credentials)
        for key in values:
            if key not in sources:
                raise InvalidRequest(f"env {key!r} is not the source of a credential of this instance")
        if request.env is not None and not values:
            raise InvalidRequest("env names no credential")
        if values:
            self._secrets.check(record.spec, values)

        changed = msgspec.structs.replace(record, **changes)
        fields = [name for name in ("expires_at", *policies) if name in changes or name in policies]
        given = {
            "env": bool(values),
            "ports": ports is not None,
            "network": request.network is not None,
            "tags": tags is not None,
        }
        fields += [name for name, is_given in given.items() if is_given]
        also: list[Change] = [SealSecrets(record.id, values)] if values else []
        if request.network is not None:
            also.append(SetReach(changed))
        if fields:
            also.append(NoteUpdated(changed, tuple(fields)))
        if ports is None:
            await owned.save(changed, *also)
        else:
            await self._publish(owned, changed, ports, *also)
        if request.network is not None:
            await self._enforce_access(owned, changed, record)
        elif values:
            await self._secrets.refresh(record.id)
        self._reaper.look()
        return changed

    async def _enforce_access(self, owned: Owned, record: InstanceRecord, before: InstanceRecord) -> None:
        """Let the saved access of ``record`` take effect; if the host refuses, save and enforce the one before."""
        try:
            await self._leases.enforce_reach(record.id)
            await self._secrets.refresh(record.id)
        except HypemanError:
            spec = msgspec.structs.replace(record.spec, access=before.spec.access)
            restored = msgspec.structs.replace(record, spec=spec)
            await owned.save(restored, SetReach(restored))
            with suppress(HypemanError):
                await self._leases.enforce_reach(record.id)
                await self._secrets.refresh(record.id)
            raise

    async def _publish(
        self, owned: Owned, record: InstanceRecord, ports: tuple[PortMapping, ...], *changes: Change
    ) -> None:
        """Save ``record`` with its new ``ports``, and let them take effect; if the host refuses, with the old ones."""
        if not record.spec.network:
            raise InvalidRequest(f"instance {record.name!r} has no network", code="invalid_ports")
        lease = self._store.read(lambda txn: get_lease(txn, record.id))
        before = lease.ports if lease is not None else ()
        await self._save_ports(owned, record, ports, *changes)
        try:
            await self._leases.publish(record.id)
        except HypemanError:
            await self._save_ports(owned, record, before)
            with suppress(HypemanError):  # the rules are as they were; relays may have to be served again
                await self._leases.publish(record.id)
            raise

    async def _save_ports(
        self, owned: Owned, record: InstanceRecord, ports: tuple[PortMapping, ...], *changes: Change
    ) -> None:
        with await self._leases.claim_ports(ports, instance_id=record.id) as claim:
            await owned.save(record, *changes, SetPorts(record.id, claim.ports))
            claim.keep(record.id)

    async def attach_volume(self, ref: str, volume: str, request: AttachVolumeRequest) -> Instance:
        await self._catalog.wait_ready()
        path = check_mount_path(request.mount_path)
        found = self._store.read(lambda txn: volumes.find_volume(txn, volume))
        task = self.tasks.of(ref)
        return self.view(
            await task.perform(Command.ATTACH, lambda owned: attach(owned, found.id, path, readonly=request.readonly))
        )

    async def detach_volume(self, ref: str, volume: str) -> Instance:
        found = self._store.read(lambda txn: volumes.find_volume(txn, volume))
        task = self.tasks.of(ref)
        return self.view(await task.perform(Command.DETACH, lambda owned: detach(owned, found.id)))

    async def fork(self, ref: str, request: ForkInstanceRequest) -> Instance:
        await self._catalog.wait_ready()
        return self.view(await self.forks.of_instance(ref, request))

    # Inside the guest

    async def stat(self, ref: str, path: str, follow_links: bool) -> PathInfo:
        return await self._use(ref, lambda guest: guest.stat(path, follow_links=follow_links), again=True)

    async def exec(self, ref: str, request: ExecRequest) -> ExecSession:
        seconds = max(SECONDS_FOR_AGENT, float(request.wait_for_agent))
        return await self._use(ref, lambda guest: open_exec(guest, request), seconds)

    async def copy_to(self, ref: str, request: CpRequest) -> CopyIn:
        return await self._use(ref, lambda guest: open_copy_to(guest, request))

    async def copy_from(self, ref: str, request: CpRequest) -> CopyOut:
        return await self._use(ref, lambda guest: open_copy_from(guest, request), again=True)

    async def _use(
        self,
        ref: str,
        do: Callable[[GuestClient], Awaitable[R]],
        seconds: float = SECONDS_FOR_AGENT,
        *,
        again: bool = False,
    ) -> R:
        """What ``do`` returns, given the guest's agent; ``again``: it may be done twice.

        The connection ends if the instance stops, goes into standby or is captured; after a capture the agent
        reconnects. Raises InvalidState.
        """
        guest = None
        while True:
            guest = await self._guest(ref, seconds, instead_of=guest)
            try:
                return await do(guest)
            except GuestLost as lost:
                if not again:
                    raise InvalidState(f"{lost.message}, and whether it did what was asked is not known") from None
                again = False

    async def _guest(
        self, ref: str, seconds: float = SECONDS_FOR_AGENT, *, instead_of: GuestClient | None = None
    ) -> GuestClient:
        record = self.board.find(ref)
        check_legal(Command.USE, record.state, name=record.name)
        if record.spec.skip_guest_agent:
            raise InvalidState(f"instance {record.name!r} was made without guest agent (skip_guest_agent)")
        try:
            if (live := self.machine.live(record.id)) is not None:
                return await live.wait_guest(seconds, instead_of=instead_of)
        except VmmGone:
            check_legal(Command.USE, self.board.find(record.id).state, name=record.name)
        raise InvalidState(f"instance {record.name!r} is stopping or going into standby", retryable=True)

    # Helpers

    def view(self, record: InstanceRecord) -> Instance:
        shown = self._render(record, self._now())
        since = self._silent_since(record)  # not in lists, which are rendered only when a record changes
        return shown if since is None else msgspec.structs.replace(shown, guest_silent_since=since)

    def silent_guests(self) -> int:
        """Number of running guests that do not answer."""
        return sum(self._silent_since(record) is not None for record in self.board.records())

    def _silent_since(self, record: InstanceRecord) -> datetime | None:
        live = self.machine.live(record.id)
        return live.silent_since if live is not None and record.state is InstanceState.RUNNING else None

    def _render(self, record: InstanceRecord, now: datetime) -> Instance:
        lease = self._store.read(lambda txn: get_lease(txn, record.id))
        uuid = self._devices.mdev_uuid(record.id) if record.spec.gpu_profile else ""
        shown = render_instance(record, lease, mdev_uuid=uuid, now=now)
        details = self.details(record)
        return msgspec.structs.replace(shown, **details) if details else shown

    async def _keep_logs(self) -> None:
        """Note when guests print, and keep logs bounded, so that one that prints indefinitely cannot fill the disk."""
        limit = self._config.limits.max_log_size
        rotate_at = trio.current_time() + ROTATION_INTERVAL
        while True:
            await trio.sleep(LOG_INTERVAL)
            large = await self.machine.logs.note_times(limit)
            if trio.current_time() >= rotate_at:
                large = [record.id for record in self.board.records()]
                rotate_at = trio.current_time() + ROTATION_INTERVAL
            for instance_id in large:
                try:
                    await self.machine.logs.rotate(instance_id, limit)
                except (HypemanError, OSError) as error:
                    log.warning("logs of instance %s cannot be rotated: %s", instance_id, error)


class _Found(NamedTuple):
    known: list[InstanceRecord]
    pulling: list[InstanceRecord]
    """Their image was being pulled; they have nothing to settle."""
    unsettled: list[InstanceRecord]
    """With a VM or unfinished work."""
    pooled: bool
    """An earlier server has left forks in pools."""


def _sort_for_start(txn: Txn) -> _Found:
    """All instances, by what a starting server has to do with them."""
    found = _Found([], [], [], next(txn.keys(MEMBERS), None) is not None)
    intents = dict(txn.scan(INTENTS))
    for key, record in txn.scan(INSTANCES):
        found.known.append(record)
        intent = intents.get(key)
        if intent is not None and intent.operation is Operation.PULL and record.state is InstanceState.CREATED:
            found.pulling.append(record)
        elif intent is not None or record.handle is not None or record.state not in NO_VMM:
            found.unsettled.append(record)
    return found


def _awaits_restart(record: InstanceRecord) -> bool:
    """Whether the restart policy may still start a stopped instance."""
    return (
        record.state is InstanceState.STOPPED
        and record.stop_cause not in (None, StopCause.REQUESTED)
        and restart_rules(record.spec.restart_policy).active
    )


async def _stay_stopped(owned: Owned) -> InstanceRecord:
    record = owned.record
    if not _awaits_restart(record):
        raise InvalidState(f"instance {record.name!r} is {record.state.value}")
    owned.journal("stop: not started again by its restart policy")
    await owned.save(msgspec.structs.replace(record, stop_cause=StopCause.REQUESTED))
    return owned.record


def _is_final(record: InstanceRecord) -> bool:
    """Whether no other state can be reached without a command. What ran when the host rebooted, or is to be restarted
    as unhealthy, is about to be started by its policy."""
    is_restarted = _awaits_restart(record) and record.stop_cause in (StopCause.HOST, StopCause.POLICY)
    return record.state in SETTLED and not is_restarted
