"""What is known of an instance: its validated spec, its record, and the intent of unfinished work. Pure; the
tables that hold them are in ../rows.py.
"""

from __future__ import annotations

import enum
from datetime import datetime

import msgspec

from hypeman.actor import Actor
from hypeman.egress.types import CredentialPolicy, EgressAccess, EgressEnforcementMode
from hypeman.hypervisor.interface import VmmHandle
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.ids import Tags
from hypeman.instances.model.phases import Phases
from hypeman.instances.model.snapshot_types import SnapshotKind
from hypeman.instances.model.steps import Step
from hypeman.instances.model.types import (
    AutoStandbyPolicy,
    HealthCheck,
    InstanceState,
    RestartPolicy,
    SnapshotPolicy,
    VolumeMount,
)


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The validated request, in bytes, bytes per second and seconds."""

    image: str
    """As the caller wrote it."""
    platform: str
    hypervisor: HypervisorKind
    vcpus: int
    memory_bytes: int
    hotplug_bytes: int
    overlay_bytes: int
    disk_io_bps: int = 0
    env: dict[str, str] = {}
    """The guest's environment; values of ``credentials`` are not stored here but sealed in ``egress``."""
    credentials: dict[str, CredentialPolicy] = {}
    tags: Tags = {}
    network: bool = True
    download_bps: int = 0
    upload_bps: int = 0
    groups: tuple[str, ...] = ()
    egress: EgressEnforcementMode | None = None
    access: EgressAccess | None = None
    """Where mediated egress may go; None: anywhere."""
    devices: tuple[str, ...] = ()
    """Device ids."""
    gpu_profile: str = ""
    volumes: tuple[VolumeMount, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    user: str = ""
    """Empty: the image's; so for ``working_dir``."""
    working_dir: str = ""
    hostname: str = ""
    """Empty: the instance's name."""
    idle: bool = False
    skip_guest_agent: bool = False
    snapshot_policy: SnapshotPolicy | None = None
    auto_standby: AutoStandbyPolicy | None = None
    health_check: HealthCheck | None = None
    restart_policy: RestartPolicy | None = None
    auto_remove: bool = False
    """Deleted when it has ended."""


class StopCause(enum.StrEnum):
    """Why an instance is stopped; the restart policy depends on it."""

    REQUESTED = "requested"
    """A stop command."""
    POLICY = "policy"
    """Stopped by the server, to be started again."""
    HOST = "host"
    """The host rebooted while the VM ran."""
    ENDED = "ended"
    """The workload, the guest or the VMM ended without a command."""


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The authoritative state of one instance."""

    id: str
    name: str
    number: int
    """Small and unique among existing instances; the VMM's user is ``uid_base + number``."""
    spec: InstanceSpec
    digest: str
    """Digest of the image's manifest; empty while the image is pulled."""
    state: InstanceState
    created_at: datetime
    phases: Phases
    state_error: str | None = None
    """Why the instance is Unknown."""
    was: InstanceState | None = None
    """The state before it became Unknown."""
    expires_at: datetime | None = None
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    exit_code: int | None = None
    exit_message: str | None = None
    boots: int = 0
    """Number of VMM launches; identifies one boot."""
    nonce: bytes = b""
    """Nonce of this boot, or of the captured boot; it authenticates the guest agent."""
    handle: VmmHandle | None = None
    """The running VMM."""
    capture: str | None = None
    """Id of the capture to restore from."""
    mapped: str | None = None
    """Id of the capture whose memory the running VM maps privately; it must not change meanwhile."""
    ports: dict[str, int] = {}
    """Volume id → PCI port of its detachable disk; the other disks are fixed."""
    fresh: bool = False
    """A fork that has not run yet: its guest still has the source's identity."""
    deleting: bool = False
    stop_cause: StopCause | None = None
    """Written before the first effect of a stop; None while it runs, and for one that has never run."""


class Operation(enum.StrEnum):
    """What is being done; a restart uses it to decide what to do with an unfinished plan."""

    PULL = "pull"
    """Waiting for the image of a new instance; continued."""
    CREATE = "create"
    START = "start"
    RESTORE = "restore"
    CAPTURE = "capture"
    ATTACH = "attach"
    """Operations that are undone if they did not finish."""
    RESUME = "resume"
    REVERT = "revert"
    DETACH = "detach"
    STOP = "stop"
    PARK = "park"
    DELETE = "delete"
    """Operations that are completed instead."""


class Intent(msgspec.Struct, frozen=True):
    operation: Operation
    steps: tuple[Step, ...]
    actor: Actor | None = None
    """Who requested it; filled in where it is written. What finishes or undoes it is attributed to them."""


class SnapshotRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of a snapshot."""

    id: str
    kind: SnapshotKind
    name: str | None
    tags: Tags
    created_at: datetime
    source: InstanceRecord
    """The source's record at capture time, used for forks and restores."""
    size_bytes: int
    """Bytes on disk at creation."""
    disks_bytes: int | None = None
    """Of these, the disks; None: not known, in rows of earlier versions."""
    capture: str | None = None
    schedule: str = ""
    """The schedule that made it, and may delete it; empty: made by a command."""


class PoolRow(msgspec.Struct, frozen=True):
    """What is requested of a snapshot's pool."""

    size: int


class MemberRow(msgspec.Struct, frozen=True, kw_only=True):
    """A fork that is kept for a pool. It becomes an instance when it is claimed; a server that starts removes it."""

    snapshot: str
    record: InstanceRecord
    """Of the instance that it would be; without name and handle."""
    steps: tuple[Step, ...]
    """What made it, to be undone."""


def forked(
    source: InstanceRecord,
    *,
    instance_id: str,
    name: str,
    now: datetime,
    capture: str | None = None,
    hypervisor: HypervisorKind | None = None,
    tags: Tags | None = None,
) -> InstanceRecord:
    """The record of a fork: in Standby on ``capture``, or Stopped without one; ``tags`` replace those of the source.

    Only what is named here is kept from the source. A fork has no credentials, expiry, automatic deletion or history
    yet, and its host name is its own name; its number is assigned when it is recorded.
    """
    spec = source.spec
    state = InstanceState.STOPPED if capture is None else InstanceState.STANDBY
    return InstanceRecord(
        id=instance_id,
        name=name,
        number=0,
        spec=InstanceSpec(
            image=spec.image,
            platform=spec.platform,
            hypervisor=hypervisor or spec.hypervisor,
            vcpus=spec.vcpus,
            memory_bytes=spec.memory_bytes,
            hotplug_bytes=spec.hotplug_bytes,
            overlay_bytes=spec.overlay_bytes,
            disk_io_bps=spec.disk_io_bps,
            env=spec.env,
            tags=spec.tags if tags is None else tags,
            network=spec.network,
            download_bps=spec.download_bps,
            upload_bps=spec.upload_bps,
            groups=spec.groups,
            egress=spec.egress,
            access=spec.access,
            devices=spec.devices,
            gpu_profile=spec.gpu_profile,
            volumes=spec.volumes,
            entrypoint=spec.entrypoint,
            cmd=spec.cmd,
            user=spec.user,
            working_dir=spec.working_dir,
            idle=spec.idle,
            skip_guest_agent=spec.skip_guest_agent,
            snapshot_policy=spec.snapshot_policy,
            auto_standby=spec.auto_standby,
            health_check=spec.health_check,
            restart_policy=spec.restart_policy,
        ),
        digest=source.digest,
        state=state,
        created_at=now,
        phases=Phases(state.value.lower(), now),
        stopped_at=now,
        boots=source.boots,
        nonce=source.nonce,  # the captured agent has it
        capture=capture,
        ports=source.ports,  # the captured devices are on them
        fresh=True,
    )
