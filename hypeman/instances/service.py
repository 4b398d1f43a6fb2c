"""Public interface: every operation on instances, by id, name or prefix.

A request is validated, its image found or pulled, and a record with everything it reserves written in
one transaction. The rest is done by the instance's own task; a caller that disconnects does not
affect it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import trio

from hypeman.captures import records as captures
from hypeman.captures.records import CaptureRow
from hypeman.captures.types import CompressionAlgorithm, SnapshotCompressionConfig
from hypeman.config import Config
from hypeman.errors import Conflict, HypemanError, InvalidRequest, InvalidState, NotFound, NotSupported
from hypeman.guest.client import CopyIn, GuestClient
from hypeman.guest.types import PathInfo
from hypeman.host.usage import read_usage
from hypeman.hypervisor.catalog import Catalog
from hypeman.ids import check_name, new_id
from hypeman.images.service import Images
from hypeman.instances import rows
from hypeman.instances.board import Board
from hypeman.instances.expiry import Reaper
from hypeman.instances.life.lifecycle import Job, Lifecycle
from hypeman.instances.life.operations.boot import create, new_nonce, start
from hypeman.instances.life.operations.copies import adopt_disks, copy_out
from hypeman.instances.life.operations.standby import restore, standby
from hypeman.instances.life.operations.stop import delete, stop
from hypeman.instances.life.operations.volumes import attach, detach
from hypeman.instances.life.owned import Also, Hooks, Owned, holding_of
from hypeman.instances.machine.machine import Machine
from hypeman.instances.model.admission import Command, check_legal
from hypeman.instances.model.phases import Phases, utc_now
from hypeman.instances.model.plan import plan_adopt_disks, plan_create
from hypeman.instances.model.policies import check_policies, restart_rules
from hypeman.instances.model.record import InstanceRecord, InstanceSpec, Intent, Operation, StopCause
from hypeman.instances.model.states import NO_VMM, SETTLED
from hypeman.instances.model.steps import Step
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
    TargetState,
    UpdateInstanceRequest,
    WaitForStateResponse,
)
from hypeman.instances.model.validate import (
    check_compression,
    check_create,
    check_mount_path,
    expiry,
)
from hypeman.instances.model.view import render_instance
from hypeman.instances.model.vm import assign_ports
from hypeman.instances.reclaim import Reclaim
from hypeman.instances.rows import INSTANCES, INTENTS
from hypeman.instances.session_types import CpRequest, ExecRequest
from hypeman.instances.sessions import CopyOut, ExecSession, open_copy_to, open_exec
from hypeman.network.leases import get_lease
from hypeman.network.ports import check_ports
from hypeman.network.types import Lease, PortMapping
from hypeman.resources.accounting import Holding, Limits, hold
from hypeman.resources.types import MemoryReclaimRequest, MemoryReclaimResponse
from hypeman.store import Store, Txn
from hypeman.units import parse_duration
from hypeman.volumes import records as volumes

MOST_WAIT = 300.0
"""Maximum duration of a ``wait``, in seconds."""

SECONDS_FOR_AGENT = 5.0
"""A running instance's agent answers at once; this covers a channel that is being reopened."""

LOG_INTERVAL = 5.0
"""Seconds between checks of log sizes. A guest prints at most about 10 MB/s through its serial console."""

R = TypeVar("R")

log = logging.getLogger(__name__)


class LeaseNeeds(Protocol):
    """Allocates addresses, in the caller's transaction, and ports of the host."""

    def take(self, txn: Txn, record: InstanceRecord, ports: tuple[PortMapping, ...]) -> Lease: ...
    async def claim_ports(
        self, ports: tuple[PortMapping, ...], *, instance_id: str = ""
    ) -> AbstractContextManager[PortClaim]:
        """Hold ports of the host within the block, and beyond if they are kept. Raises PortInUse."""
        ...

    def set_ports(self, txn: Txn, instance_id: str, ports: tuple[PortMapping, ...]) -> None: ...
    async def publish(self, instance_id: str) -> None:
        """Let the ports in the store take effect."""
        ...

    def release_ports(self, instance_id: str) -> None: ...
    def drop(self, txn: Txn, instance_id: str) -> None: ...
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


class DeviceClaims(Protocol):
    async def prepare(self) -> None:
        """Rescan the host's devices, so that a claim uses current data."""
        ...

    def claim(self, txn: Txn, instance_id: str, devices: tuple[str, ...], gpu_profile: str) -> tuple[str, ...]: ...
    def release(self, txn: Txn, instance_id: str) -> None: ...
    def mdev_uuid(self, instance_id: str) -> str: ...


class Secrets(Protocol):
    """Credential values: checked, sealed and stored by the egress capability."""

    def check(self, spec: InstanceSpec, values: Mapping[str, str]) -> None: ...
    def seal(self, txn: Txn, instance_id: str, values: Mapping[str, str]) -> None: ...
    def drop(self, txn: Txn, instance_id: str) -> None: ...
    async def refresh(self, instance_id: str) -> None:
        """Let new values take effect on the next request."""
        ...


class Counters(Protocol):
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
        images: Images,
        leases: LeaseNeeds,
        devices: DeviceClaims,
        secrets: Secrets,
        counters: Counters,
        limits: Callable[[], Limits],
        catalog: Catalog,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.config = config
        self.store = store
        self.machine = machine
        self.images = images
        self.leases = leases
        self.devices = devices
        self.secrets = secrets
        self.counters = counters
        self.limits = limits
        self.catalog = catalog
        self.board = Board(self._render)
        self._now = now
        self._tasks: dict[str, Lifecycle] = {}
        self.hooks = Hooks(
            store=store, limits=limits, changed=self.board.post, gone=self._forget, release=self._release
        )
        self._nursery: trio.Nursery | None = None
        self.details: Callable[[InstanceRecord], Mapping[str, object]] = lambda record: {}
        """Further fields of an Instance, which others keep: the status of its policies. Must be fast."""
        self._reaper = Reaper(self.board.records, self.delete, now=now)
        self._reclaim = Reclaim(config.reclaim, records=self.board.records, live=machine.context.live, now=now)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own all instances. Reports started when each is settled (adopted, finished or undone)."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            known, unsettled = self.store.read(_all_and_unsettled)
            for record in known:
                self.board.post(record)
            if unsettled:
                await self.catalog.wait_ready()  # returns at once, unless the probe's inputs have changed
            async with trio.open_nursery() as settling:
                for record in unsettled:
                    settling.start_soon(self._settle, record)
            await self.machine.captures.collect()
            nursery.start_soon(self._reaper.run)
            nursery.start_soon(self._reclaim.run)
            nursery.start_soon(self._rotate_logs)
            task_status.started()
            await trio.sleep_forever()

    # Reading

    async def list(self, state: InstanceState | None, tags: Mapping[str, str]) -> bytes:
        return self.board.encoded_list(state, tags)

    async def get(self, ref: str) -> Instance:
        return self.view(self.board.find(ref))

    async def get_encoded(self, ref: str) -> bytes:
        return self.board.encoded(ref)

    async def wait_state(self, ref: str, state: InstanceState, timeout: float) -> WaitForStateResponse:
        """Wait for ``state``, or for one from which it cannot be reached without a command. Raises NotFound
        if the instance is deleted meanwhile."""
        if state is InstanceState.UNKNOWN:
            raise InvalidRequest("Unknown is no state to wait for", code="invalid_state")
        if timeout <= 0:
            raise InvalidRequest("timeout must be above 0", code="invalid_timeout")
        record = self.board.find(ref)
        with trio.move_on_after(min(timeout, MOST_WAIT)) as scope:
            while record.state is not state and not _is_final(record.state, state):
                changed = await self.board.wait_change(record)
                if changed is None:
                    raise NotFound(f"instance {ref!r} was deleted")
                record = changed
        return WaitForStateResponse(
            state=record.state,
            timed_out=scope.cancelled_caught,
            state_error=record.state_error if record.state is InstanceState.UNKNOWN else None,
        )

    async def stats(self, ref: str) -> InstanceStats:
        record = self.board.find(ref)
        usage = read_usage(record.handle.pid) if record.handle is not None else read_usage(0)
        received, sent = self.counters.of_instance(record.id)
        memory = record.spec.memory_bytes
        return InstanceStats(
            instance_id=record.id,
            instance_name=record.name,
            cpu_seconds=usage.cpu_seconds,
            memory_rss_bytes=usage.rss_bytes,
            memory_vms_bytes=usage.vms_bytes,
            network_rx_bytes=received,
            network_tx_bytes=sent,
            allocated_vcpus=record.spec.vcpus,
            allocated_memory_bytes=memory,
            memory_utilization_ratio=usage.rss_bytes / memory if memory else None,
        )

    async def reclaim_memory(self, request: MemoryReclaimRequest) -> MemoryReclaimResponse:
        return await self.see_through(lambda: self._reclaim.order(request))

    async def log_path(self, ref: str, source: LogSource) -> Path:
        return self.machine.paths.instance(self.board.find(ref).id).log(source.value)

    # Creating

    async def create(self, request: CreateInstanceRequest) -> Instance:
        check_name(request.name)
        ports = check_ports(request.ports)
        await self.catalog.wait_ready()
        kind = request.hypervisor or self.catalog.default()
        driver = self.catalog.driver(kind)
        now = self._now()
        platform = self.images.platform(request.platform)
        spec = check_create(
            request,
            limits=self.config.limits,
            kind=kind,
            capabilities=driver.capabilities,
            platform=platform,
        )
        real = {policy.source.env: request.env[policy.source.env] for policy in request.credentials.values()}
        spec = msgspec.structs.replace(spec, env={k: v for k, v in spec.env.items() if k not in real})
        self.secrets.check(spec, real)
        expires_at = expiry(request.ttl, request.expires_at, now=now)
        self._check_free(request.name)
        with await self.leases.claim_ports(ports):
            pass  # an early check, to avoid a useless pull
        spec = self.leases.default_rates(spec)
        image = await self.images.wait_ready(request.image, request.platform)
        if spec.devices or spec.gpu_profile:
            await self.devices.prepare()
        now = self._now()
        if request.ttl is not None:  # counts from here, regardless of how long the pull took
            expires_at = expiry(request.ttl, None, now=now)
        record = InstanceRecord(
            id=new_id(),
            name=request.name,
            number=0,
            spec=spec,
            digest=image.digest,
            state=InstanceState.CREATED,
            created_at=now,
            phases=Phases(InstanceState.CREATED.value.lower(), now),
            expires_at=expires_at,
            boots=1,
            nonce=new_nonce(),
        )

        def write(txn: Txn, ports: tuple[PortMapping, ...]) -> InstanceRecord:
            written = self._insert(txn, record, plan_create(record), ports)
            hold(txn, record.id, holding_of(record), self.limits())
            self.secrets.seal(txn, record.id, real)
            return written

        async def make() -> Lifecycle:
            with await self.leases.claim_ports(ports) as claim:
                written = await self.store.write(partial(write, ports=claim.ports))
                claim.keep(record.id)
            return await self._adopt(written, create)

        return self.view((await self.see_through(make)).record)

    def _check_free(self, name: str) -> None:
        """Early check, to avoid a useless pull; the transaction checks again."""
        self.store.read(lambda txn: rows.check_name_free(txn, name))

    def _insert(
        self, txn: Txn, record: InstanceRecord, steps: tuple[Step, ...], ports: tuple[PortMapping, ...] = ()
    ) -> InstanceRecord:
        """Record a new instance and everything it reserves, with the plan that creates it. A fork publishes no ports:
        those of its source are taken."""
        claimed = self.devices.claim(txn, record.id, record.spec.devices, record.spec.gpu_profile)
        mounts = tuple(
            msgspec.structs.replace(mount, volume_id=volumes.find_volume(txn, mount.volume_id).id)
            for mount in record.spec.volumes
        )
        spec = msgspec.structs.replace(record.spec, devices=claimed, volumes=mounts)
        record = msgspec.structs.replace(
            record,
            spec=spec,
            number=rows.free_number(txn),
            ports=record.ports or assign_ports(spec.volumes),  # a fork's disks are on the same ports as its source's
        )
        rows.insert(txn, record)
        self.leases.take(txn, record, ports)
        self.images.pin(txn, record.digest, record.id)
        for mount in mounts:
            volumes.attach(
                txn,
                volumes.Attachment(
                    volume_id=mount.volume_id,
                    instance_id=record.id,
                    mount_path=mount.mount_path,
                    readonly=mount.readonly,
                ),
            )
        txn.put(INTENTS, record.id, Intent(Operation.CREATE, steps))
        return record

    def _release(self, txn: Txn, record: InstanceRecord) -> None:
        """The reverse of ``_insert``, after the instance's last effect was undone."""
        rows.remove(txn, record)
        self.leases.drop(txn, record.id)
        self.images.unpin(txn, record.id)
        self.devices.release(txn, record.id)
        self.secrets.drop(txn, record.id)
        for mount in record.spec.volumes:
            volumes.detach(txn, mount.volume_id, record.id)
        for capture in (record.capture, record.mapped):
            captures.let_go(txn, capture, captures.of_instance(record.id))
        hold(txn, record.id, Holding(), self.limits())

    # Verbs

    async def start(self, ref: str, request: StartInstanceRequest) -> Instance:
        await self.catalog.wait_ready()
        task = self.task(ref)
        return self.view(await task.perform(Command.START, lambda owned: start(owned, request.entrypoint, request.cmd)))

    def device_vanished(self, instance_id: str, text: str) -> None:
        """Journal that a device of a running instance has disappeared from the host."""
        self.machine.journal(instance_id, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ} {text}")

    async def plug_in_again(self, instance_id: str) -> None:
        """Reconnect a running instance whose TAP was deleted externally and has been recreated."""
        try:
            await self.machine.network.plug_in_again(instance_id)
        except Exception as error:  # on any error, the network must still handle other instances
            log.error("instance %s is without network until it is started or restored anew: %s", instance_id, error)
            self.machine.journal(instance_id, f"the network is lost until the next start or restore: {error}")

    async def stop(self, ref: str) -> Instance:
        """Stop the instance. One that waits to be restarted by its policy stays stopped."""
        task = self.task(ref)
        try:
            return self.view(await task.perform(Command.STOP, stop))
        except InvalidState:
            if not _awaits_restart(task.record):
                raise
        return self.view(await task.perform(None, _stay_stopped))

    async def stop_to_restart(self, instance_id: str, boots: int) -> None:
        """Stop the boot number ``boots`` of an instance, whose policy will start it again. Raises InvalidState if
        something else has happened to it meanwhile."""

        async def stop_it(owned: Owned) -> None:
            if owned.record.boots != boots:
                raise InvalidState("it was started anew")
            await stop(owned, cause=StopCause.POLICY)

        await self.task(instance_id).perform(Command.STOP, stop_it)

    async def start_again(self, instance_id: str, boots: int) -> None:
        """Start an instance as its restart policy says, if it has not been started or stopped by anyone since
        its boot number ``boots`` ended. Raises InvalidState otherwise."""
        await self.catalog.wait_ready()

        async def start_it(owned: Owned) -> None:
            if owned.record.boots != boots or not _awaits_restart(owned.record):
                raise InvalidState("it was started or stopped by someone else")
            await start(owned)

        await self.task(instance_id).perform(Command.START, start_it)

    async def delete(self, ref: str, *, graceful: bool = True) -> None:
        """Delete the instance. Without ``graceful`` its guest is not asked to shut down first."""
        task = self.task(ref)
        await task.perform(Command.DELETE, partial(delete, graceful=graceful))

    async def standby(self, ref: str, request: StandbyInstanceRequest) -> Instance:
        """Save the VM; compress later if the request, the instance or the server says so (in this order)."""
        await self.catalog.wait_ready()
        check_compression(request.compression)
        delay = request.compression_delay
        seconds = parse_duration(delay, code="invalid_compression_delay") if delay is not None else None
        task = self.task(ref)
        policy = task.record.spec.snapshot_policy
        compression = request.compression or self.usual_compression(task.record)
        if seconds is None:
            seconds = parse_duration((policy.standby_compression_delay if policy else None) or "0")

        async def save(owned: Owned) -> InstanceRecord:
            record = await standby(owned, compression)
            if record.capture is not None:  # scheduled before the next command, so that a queued restore can cancel it
                self.machine.captures.compressor.schedule(record.capture, delay=seconds)
            return record

        return self.view(await task.perform(Command.STANDBY, save))

    def usual_compression(self, record: InstanceRecord) -> SnapshotCompressionConfig | None:
        """Compression when the request specifies none: the instance's policy, else the server's default."""
        policy = record.spec.snapshot_policy
        if policy is not None and policy.compression is not None:
            return policy.compression
        settings = self.config.snapshots
        if not settings.compression:
            return None
        algorithm = CompressionAlgorithm(settings.compression)
        return SnapshotCompressionConfig(enabled=True, algorithm=algorithm, level=settings.level)

    async def restore(self, ref: str) -> Instance:
        await self.catalog.wait_ready()
        task = self.task(ref)
        return self.view(await task.perform(Command.RESTORE, restore))

    async def update(self, ref: str, request: UpdateInstanceRequest) -> Instance:
        task = self.task(ref)
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
        if policies:
            changes["spec"] = msgspec.structs.replace(record.spec, **policies)
        values = dict(request.env or {})
        sources = {policy.source.env for policy in record.spec.credentials.values()}
        for key in values:
            if key not in sources:
                raise InvalidRequest(f"env {key!r} is not the source of a credential of this instance")
        if request.env is not None and not values:
            raise InvalidRequest("env names no credential")
        if values:
            self.secrets.check(record.spec, values)

        def seal(txn: Txn) -> None:
            if values:
                self.secrets.seal(txn, record.id, values)

        record = msgspec.structs.replace(record, **changes)
        changed = await (owned.save(record, also=seal) if ports is None else self._publish(owned, record, ports, seal))
        if values:
            await self.secrets.refresh(record.id)
        self._reaper.look()
        return changed

    async def _publish(
        self, owned: Owned, record: InstanceRecord, ports: tuple[PortMapping, ...], also: Also
    ) -> InstanceRecord:
        """Save ``record`` with its new ``ports``, and let them take effect; if the host refuses, with the old ones."""
        if not record.spec.network:
            raise InvalidRequest(f"instance {record.name!r} has no network", code="invalid_ports")
        lease = self.store.read(lambda txn: get_lease(txn, record.id))
        before = lease.ports if lease is not None else ()
        changed = await self._save_ports(owned, record, ports, also)
        try:
            await self.leases.publish(record.id)
        except HypemanError:
            await self._save_ports(owned, record, before, lambda txn: None)
            with suppress(HypemanError):  # the rules are as they were; relays may have to be served again
                await self.leases.publish(record.id)
            raise
        return changed

    async def _save_ports(
        self, owned: Owned, record: InstanceRecord, ports: tuple[PortMapping, ...], also: Also
    ) -> InstanceRecord:
        with await self.leases.claim_ports(ports, instance_id=record.id) as claim:

            def write(txn: Txn) -> None:
                also(txn)
                self.leases.set_ports(txn, record.id, claim.ports)

            changed = await owned.save(record, also=write)
            claim.keep(record.id)
        return changed

    async def attach_volume(self, ref: str, volume: str, request: AttachVolumeRequest) -> Instance:
        await self.catalog.wait_ready()
        path = check_mount_path(request.mount_path)
        found = self.store.read(lambda txn: volumes.find_volume(txn, volume))
        task = self.task(ref)
        return self.view(
            await task.perform(Command.ATTACH, lambda owned: attach(owned, found.id, path, readonly=request.readonly))
        )

    async def detach_volume(self, ref: str, volume: str) -> Instance:
        found = self.store.read(lambda txn: volumes.find_volume(txn, volume))
        task = self.task(ref)
        return self.view(await task.perform(Command.DETACH, lambda owned: detach(owned, found.id)))

    # Forks

    async def fork(self, ref: str, request: ForkInstanceRequest) -> Instance:
        await self.catalog.wait_ready()
        check_name(request.name)
        self._check_free(request.name)
        task = self.task(ref)
        source = task.record
        check_legal(Command.FORK, source.state, name=source.name)
        target = request.target_state or TargetState(source.state.value)

        async def make() -> Instance:
            fork = await task.perform(Command.FORK, lambda owned: self._fork_in_turn(owned, request, target))
            return await self._finish_fork(fork, target)

        return await self.see_through(make)

    async def _fork_in_turn(self, owned: Owned, request: ForkInstanceRequest, target: TargetState) -> Lifecycle:
        """In the source's task: copy what the fork needs and record it."""
        source = owned.record
        if source.state is InstanceState.RUNNING and not request.from_running:
            raise InvalidState(
                f"instance {source.name!r} is Running; give from_running to fork it while it pauses, or stop it"
            )
        if target is TargetState.STANDBY and source.state is InstanceState.STOPPED:
            raise InvalidRequest("a stopped instance has no memory; its fork can be Stopped or Running")
        check_forkable(source)
        staged = self.machine.paths.tmp / f"fork-{new_id()}"
        fork = self.forked_record(source, request.name)
        with_memory = source.state is not InstanceState.STOPPED and target is not TargetState.STOPPED
        made: list[InstanceRecord] = []

        def publish(txn: Txn, _: InstanceRecord, capture: CaptureRow | None) -> None:
            record = fork
            if capture is not None:
                record = msgspec.structs.replace(record, capture=capture.id, state=InstanceState.STANDBY)
            made[:] = [self._insert(txn, record, plan_adopt_disks(record, str(staged), shared=False))]
            hold(txn, record.id, holding_of(record).without_vmm(), self.limits())

        try:
            await copy_out(
                owned, str(staged), with_memory=with_memory, holder=captures.of_instance(fork.id), publish=publish
            )
        except Exception:
            await self.machine.context.files.remove(staged)
            raise
        return await self._adopt(made[0], lambda forked: adopt_disks(forked, str(staged), shared=False))

    async def _finish_fork(self, fork: Lifecycle, target: TargetState) -> Instance:
        """Bring a fork to its target state; if that fails, the fork is deleted."""
        try:
            if target is TargetState.RUNNING:
                if fork.record.state is InstanceState.STANDBY:
                    await fork.perform(Command.RESTORE, restore)
                else:
                    await fork.perform(Command.START, start)
        except Exception:
            await fork.perform(Command.DELETE, delete)
            raise
        return self.view(fork.record)

    async def fork_from(
        self,
        record: InstanceRecord,
        disks: str,
        *,
        capture: str | None,
        target: TargetState,
        check: Callable[[Txn], object],
    ) -> Instance:
        """Create an instance from a copy of the disks in directory ``disks`` and, if given, a capture.

        ``check`` raises, in the transaction that creates the instance, if it may no longer be forked.
        """
        if capture is not None:
            record = msgspec.structs.replace(record, capture=capture, state=InstanceState.STANDBY)

        def write(txn: Txn) -> InstanceRecord:
            check(txn)
            written = self._insert(txn, record, plan_adopt_disks(record, disks, shared=True))
            hold(txn, record.id, holding_of(record).without_vmm(), self.limits())
            if capture is not None:
                captures.share(txn, capture, captures.of_instance(record.id))
            return written

        written = await self.store.write(write)
        fork = await self._adopt(written, lambda forked: adopt_disks(forked, disks, shared=True))
        return await self._finish_fork(fork, target)

    def forked_record(self, source: InstanceRecord, name: str) -> InstanceRecord:
        """The source's spec under a new identity. Expiry and secrets are not inherited."""
        now = self._now()
        return msgspec.structs.replace(
            source,
            id=new_id(),
            name=name,
            spec=msgspec.structs.replace(source.spec, credentials={}, egress=source.spec.egress),
            state=InstanceState.STOPPED,
            created_at=now,
            phases=Phases(InstanceState.STOPPED.value.lower(), now),
            expires_at=None,
            started_at=None,
            stopped_at=now,
            exit_code=None,
            exit_message=None,
            handle=None,
            capture=None,
            mapped=None,
            fresh=True,
            deleting=False,
            stop_cause=None,
        )

    # Inside the guest

    async def stat(self, ref: str, path: str, follow_links: bool) -> PathInfo:
        return await (await self._guest(ref)).stat(path, follow_links=follow_links)

    async def exec(self, ref: str, request: ExecRequest) -> ExecSession:
        guest = await self._guest(ref, max(SECONDS_FOR_AGENT, float(request.wait_for_agent)))
        return await open_exec(guest, request)

    async def copy_to(self, ref: str, request: CpRequest) -> CopyIn:
        return await open_copy_to(await self._guest(ref), request)

    async def copy_from(self, ref: str, request: CpRequest) -> CopyOut:
        return CopyOut(await self._guest(ref), request)

    async def _guest(self, ref: str, seconds: float = SECONDS_FOR_AGENT) -> GuestClient:
        record = self.board.find(ref)
        check_legal(Command.USE, record.state, name=record.name)
        if record.spec.skip_guest_agent:
            raise InvalidState(f"instance {record.name!r} was made without guest agent (skip_guest_agent)")
        live = self.machine.live(record.id)
        if live is None:
            raise InvalidState(f"instance {record.name!r} is just ending")
        return await live.wait_guest(seconds)

    # Helpers

    async def see_through(self, work: Callable[[], Awaitable[R]]) -> R:
        """Run ``work`` to completion, even if the caller is cancelled, and return its result."""
        assert self._nursery is not None, "the service does not run"
        job = Job(None, work)
        self._nursery.start_soon(job.run)
        return await job.wait()

    async def _adopt(self, record: InstanceRecord, first: Callable[[Owned], Awaitable[InstanceRecord]]) -> Lifecycle:
        """Start the task of a newly recorded instance and return it when it has done ``first``, which runs before
        any command."""
        task = self._make_task(record, new=True)
        job = task.submit(None, first)
        self.board.post(record)
        if record.expires_at is not None:
            self._reaper.look()
        await job.wait()
        return task

    def _make_task(self, record: InstanceRecord, *, new: bool) -> Lifecycle:
        assert self._nursery is not None, "the service does not run"
        task = self._tasks[record.id] = Lifecycle(self.machine, self.hooks, record, new=new, now=self._now)
        if new:
            self._nursery.start_soon(task.run)
        return task

    async def _settle(self, record: InstanceRecord) -> None:
        assert self._nursery is not None, "the service does not run"
        await self._nursery.start(self._make_task(record, new=False).run)

    def _forget(self, record: InstanceRecord) -> None:
        self._tasks.pop(record.id, None)
        self.leases.release_ports(record.id)
        self.board.remove(record)

    def task(self, ref: str) -> Lifecycle:
        """The task of an instance, started on first use if the instance is not running."""
        record = self.board.find(ref)
        return self._tasks.get(record.id) or self._make_task(record, new=True)

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
        lease = self.store.read(lambda txn: get_lease(txn, record.id))
        uuid = self.devices.mdev_uuid(record.id) if record.spec.gpu_profile else ""
        shown = render_instance(record, lease, mdev_uuid=uuid, now=now)
        details = self.details(record)
        return msgspec.structs.replace(shown, **details) if details else shown

    async def _rotate_logs(self) -> None:
        """Keep logs bounded, so that a guest that prints indefinitely cannot fill the disk."""
        limit = self.config.limits.max_log_size
        while True:
            await trio.sleep(LOG_INTERVAL)
            for record in list(self.board.records()):
                try:
                    await self.machine.logs.rotate(record.id, limit)
                except (HypemanError, OSError) as error:
                    log.warning("logs of instance %s can not be rotated: %s", record.id, error)


def _all_and_unsettled(txn: Txn) -> tuple[Sequence[InstanceRecord], Sequence[InstanceRecord]]:
    """All instances, and those that server start must settle: with a VM or unfinished work."""
    known = [record for _, record in txn.scan(INSTANCES)]
    unfinished = set(txn.keys(INTENTS))
    return known, [r for r in known if r.id in unfinished or r.handle is not None or r.state not in NO_VMM]


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
    return await owned.save(msgspec.structs.replace(record, stop_cause=StopCause.REQUESTED))


def check_forkable(record: InstanceRecord) -> None:
    """Raise NotSupported or Conflict if the instance has something that cannot be duplicated."""
    if record.spec.devices or record.spec.gpu_profile:
        raise NotSupported("an instance with passed-through devices can not be forked or captured")
    for mount in record.spec.volumes:
        if not mount.readonly:
            raise Conflict(f"volume {mount.volume_id!r} is attached read-write; detach it first")


def _is_final(state: InstanceState, wanted: InstanceState) -> bool:
    """Whether ``wanted`` can no longer be reached from ``state`` without a command."""
    return state in SETTLED and state is not wanted
