"""API types of instances: the requests and responses of the contract, §2.4 and §2.5.

The same Structs define the wire format and /spec.json. ``hypeman/fields.py`` explains which fields
are emitted when, and why sizes and durations are text here.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from hypeman.captures.types import SnapshotCompressionConfig
from hypeman.egress.types import (
    AccessDefault,
    AccessRule,
    CredentialPolicy,
    EgressAccess,
    EgressEnforcementMode,
    PrivateNetworks,
)
from hypeman.fields import (
    Argument,
    Count,
    DiskRate,
    Duration,
    ImageName,
    Name,
    Platform,
    Port,
    Positive,
    Rate,
    Size,
    TagMap,
    Timestamp,
)
from hypeman.host.types import MAX_GROUPS
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.network.types import PortMapping


class InstanceState(enum.StrEnum):
    """The state of an instance."""

    CREATED = "Created"
    """The VMM exists, the guest has not booted."""
    INITIALIZING = "Initializing"
    RUNNING = "Running"
    PAUSED = "Paused"
    SHUTDOWN = "Shutdown"
    """The guest is off, its VMM still alive."""
    STOPPED = "Stopped"
    """No VMM, no saved memory."""
    STANDBY = "Standby"
    """No VMM; memory is saved and can be restored."""
    UNKNOWN = "Unknown"
    """Could not be determined; ``state_error`` says why."""


class TargetState(enum.StrEnum):
    """The state that a fork or a restore from a snapshot ends in."""

    STOPPED = "Stopped"
    STANDBY = "Standby"
    RUNNING = "Running"


class LogRun(enum.StrEnum):
    """Which run of an instance's program, counted by boots; a restored instance continues its run."""

    CURRENT = "current"
    PREVIOUS = "previous"


class LogSource(enum.StrEnum):
    """Which log of an instance."""

    APP = "app"
    """The serial console."""
    VMM = "vmm"
    """The hypervisor's own output."""
    HYPEMAN = "hypeman"
    """What this server did with the instance."""


# ── Policies: sent by the client, stored, and echoed as given ───────────────────────────────────


class SnapshotPolicy(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Defaults for captures of one instance; a request may override them."""

    compression: SnapshotCompressionConfig | None = None
    standby_compression_delay: Annotated[Duration | None, Meta(description="Default: at once")] = None


class WakeOn(enum.StrEnum):
    """What brings an instance back from standby by itself."""

    NONE = "none"
    TRAFFIC = "traffic"
    """A packet to its address."""
    ALL = "all"
    """A packet, or an exec, cp, stat or logs with follow over the API."""


class AutoStandbyPolicy(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Standby after a period without connections (IPv4) to the instance or from it: of TCP, unless count_udp is set."""

    enabled: Annotated[bool | None, Meta(description="Default false")] = None
    idle_timeout: Annotated[Duration | None, Meta(description="Default 5m")] = None
    ignore_source_cidrs: Annotated[
        tuple[str, ...] | None, Meta(description="Connections from here neither count nor wake")
    ] = None
    ignore_destination_ports: Annotated[
        tuple[Port, ...] | None,
        Meta(description="Connections to these ports neither count nor wake; its own to these of others do not count"),
    ] = None
    wake: Annotated[
        WakeOn | None,
        Meta(description="Extension: what ends a standby. Default: traffic if enabled, else none"),
    ] = None
    count_udp: Annotated[
        bool | None,
        Meta(
            description="Extension: UDP flows count as connections do, until about 30 s (two-way: 2 min) after the last"
            " packet. Default false"
        ),
    ] = None


class HealthCheckType(enum.StrEnum):
    NONE = "none"
    HTTP = "http"
    TCP = "tcp"
    EXEC = "exec"


class HttpHealthCheck(Struct, frozen=True, kw_only=True, omit_defaults=True):
    port: Port
    path: Annotated[str | None, Meta(description="Default /")] = None
    scheme: Annotated[Literal["http", "https"] | None, Meta(description="Default http")] = None
    expected_status: Annotated[Annotated[int, Meta(ge=100, le=599)] | None, Meta(description="Default 200")] = None
    expected_status_max: Annotated[
        Annotated[int, Meta(ge=100, le=599)] | None,
        Meta(description="Extension: with it, any status from expected_status to this one is expected"),
    ] = None


class TcpHealthCheck(Struct, frozen=True, kw_only=True):
    port: Port


class ExecHealthCheck(Struct, frozen=True, kw_only=True, omit_defaults=True):
    command: Annotated[tuple[str, ...], Meta(min_length=1)]
    working_dir: str | None = None


class HealthCheck(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Never changes the instance's state; the restart policy may act on it. Only running instances are checked."""

    type: Annotated[HealthCheckType | None, Meta(description="Default none")] = None
    interval: Annotated[Duration | None, Meta(description="Default 10s")] = None
    timeout: Annotated[Duration | None, Meta(description="Default 2s")] = None
    start_period: Annotated[Duration | None, Meta(description="Default 30s")] = None
    failure_threshold: Annotated[Positive | None, Meta(description="Default 3; at most 1000")] = None
    success_threshold: Annotated[Positive | None, Meta(description="Default 1; at most 1000")] = None
    http: HttpHealthCheck | None = None
    tcp: TcpHealthCheck | None = None
    exec: ExecHealthCheck | None = None


class RestartMode(enum.StrEnum):
    NEVER = "never"
    ALWAYS = "always"
    ON_FAILURE = "on_failure"
    """After a non-zero or unknown exit, a signal, or out of memory."""


class RestartPolicy(Struct, frozen=True, kw_only=True, omit_defaults=True):
    policy: Annotated[RestartMode | None, Meta(description="Default never")] = None
    backoff: Annotated[Duration | None, Meta(description="Default 5s")] = None
    max_attempts: Annotated[Count | None, Meta(description="Default 0: unlimited; at most 1000000")] = None
    stable_after: Annotated[Duration | None, Meta(description="Default 10m")] = None


# ── Parts of requests ───────────────────────────────────────────────────────────────────────────


class VolumeMount(Struct, frozen=True, kw_only=True):
    """A volume in a guest; the same in requests and responses."""

    volume_id: str
    mount_path: Annotated[str, Meta(description="Absolute path in the guest")]
    readonly: bool = False
    overlay: Annotated[bool, Meta(description="Private write layer; needs readonly")] = False
    overlay_size: Annotated[Size | UnsetType, Meta(description="Size limit of the layer; needed with overlay")] = UNSET
    files: Annotated[
        bool | UnsetType,
        Meta(
            description="Extension. Each file of the volume is mounted on its own, over the one of its path below "
            "mount_path, which may be `/`; what lies beside it in the guest stays visible. Until the instance stops"
        ),
    ] = UNSET


class EgressEnforcementRequest(Struct, frozen=True, kw_only=True):
    mode: EgressEnforcementMode = EgressEnforcementMode.ALL


class EgressRequest(Struct, frozen=True, kw_only=True):
    """Egress through the host, which inserts credentials."""

    enabled: bool = False
    enforcement: EgressEnforcementRequest = EgressEnforcementRequest()
    rules: Annotated[
        tuple[AccessRule, ...],
        Meta(max_length=1000, description="Extension: where the instance may go; the first that matches decides"),
    ] = ()
    default: Annotated[
        AccessDefault,
        Meta(
            description="Extension: what happens to requests that no rule matches. deny also closes everything that "
            "is neither HTTP nor TLS, apart from rules with networks"
        ),
    ] = AccessDefault.ALLOW
    observe: Annotated[bool, Meta(description="Extension: record what the rules would refuse, and refuse nothing")] = (
        False
    )
    private_networks: Annotated[
        PrivateNetworks | None, Meta(description="Extension: default: as the server is configured")
    ] = None


class EgressUpdate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Absent fields stay as they are."""

    rules: Annotated[
        Annotated[tuple[AccessRule, ...], Meta(max_length=1000)] | None,
        Meta(description="Instead of those before"),
    ] = None
    default: AccessDefault | None = None
    observe: bool | None = None
    private_networks: Annotated[
        PrivateNetworks | UnsetType | None, Meta(description="null: as the server is configured")
    ] = UNSET


class NetworkUpdate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    egress: EgressUpdate


GroupName = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", examples=["backend"])]


class NetworkRequest(Struct, frozen=True, kw_only=True):
    enabled: bool = True
    bandwidth_download: Annotated[Rate | None, Meta(description="Outside to VM; default: a share of the host's")] = None
    bandwidth_upload: Annotated[Rate | None, Meta(description="VM to outside; default: a share of the host's")] = None
    egress: EgressRequest = EgressRequest()
    groups: Annotated[
        tuple[GroupName, ...],
        Meta(
            max_length=MAX_GROUPS,
            description="Extension: of the other guests it reaches only those that share a group with it, and they it; "
            "without groups, those that have none. Needs network.guest_to_guest; groups of a stack are the stack's own",
        ),
    ] = ()


class GpuRequest(Struct, frozen=True, kw_only=True):
    profile: Annotated[str | None, Meta(description="vGPU profile")] = None


# ── Requests ────────────────────────────────────────────────────────────────────────────────────


class CreateInstanceRequest(Struct, frozen=True, kw_only=True):
    """A new instance, created and booted; a missing image is pulled."""

    name: Name
    image: ImageName
    platform: Platform | None = None
    size: Annotated[Size | None, Meta(description="Memory; default 1GB")] = None
    hotplug_size: Annotated[Size | None, Meta(description="Memory that may be plugged later; default none")] = None
    overlay_size: Annotated[Size | None, Meta(description="Writable layer over the image; default 10GB")] = None
    vcpus: Annotated[Positive | None, Meta(description="Default 2")] = None
    disk_io_bps: Annotated[DiskRate | None, Meta(description="Default: a share of the host's")] = None
    env: Annotated[dict[str, str], Meta(description="Environment of the guest, and real values of credentials")] = {}
    credentials: Annotated[
        dict[str, CredentialPolicy], Meta(description="By the name under which the guest sees a stand-in")
    ] = {}
    tags: TagMap = {}
    ttl: Annotated[Duration | None, Meta(description="Life time from creation; 0s: no limit")] = None
    expires_at: Annotated[Timestamp | None, Meta(description="Instead of ttl; in the future")] = None
    network: NetworkRequest = NetworkRequest()
    devices: Annotated[tuple[str, ...], Meta(description="Ids or names of registered devices")] = ()
    gpu: GpuRequest | None = None
    volumes: tuple[VolumeMount, ...] = ()
    ports: Annotated[tuple[PortMapping, ...], Meta(description="Extension: published ports; 409 port_in_use")] = ()
    hypervisor: Annotated[HypervisorKind | None, Meta(description="Default: the server's")] = None
    snapshot_policy: SnapshotPolicy | None = None
    auto_standby: AutoStandbyPolicy | None = None
    health_check: HealthCheck | None = None
    restart_policy: RestartPolicy | None = None
    skip_kernel_headers: bool = False
    skip_guest_agent: Annotated[bool, Meta(description="No agent: no exec, cp or stat")] = False
    user: Annotated[
        Annotated[Argument, Meta(max_length=256)] | None,
        Meta(description="Extension. Instead of the image's: a name or number, and a group after a colon"),
    ] = None
    working_dir: Annotated[
        Annotated[str, Meta(pattern=r"^/[^\x00]*$", max_length=4095)] | None,
        Meta(description="Extension. Instead of the image's"),
    ] = None
    hostname: Annotated[
        Annotated[str, Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?$", max_length=64)] | None,
        Meta(description="Extension. Default: the name"),
    ] = None
    auto_remove: Annotated[
        bool,
        Meta(description="Extension. Delete it when it has ended, or is stopped. Not with a restart policy"),
    ] = False
    idle: Annotated[
        bool,
        Meta(description="Extension. Start no program: the instance runs until it is stopped, and exec runs programs"),
    ] = False
    entrypoint: Annotated[tuple[Argument, ...] | None, Meta(description="Instead of the image's")] = None
    cmd: Annotated[tuple[Argument, ...] | None, Meta(description="Instead of the image's")] = None


class UpdateInstanceRequest(Struct, frozen=True, kw_only=True):
    """What may change in an existing instance; absent fields stay unchanged."""

    env: Annotated[
        Annotated[dict[str, str], Meta(min_length=1)] | None,
        Meta(description="New values of credentials, merged; takes effect without a reboot"),
    ] = None
    auto_standby: AutoStandbyPolicy | None = None
    health_check: HealthCheck | None = None
    restart_policy: RestartPolicy | None = None
    ports: Annotated[
        tuple[PortMapping, ...] | None,
        Meta(
            description="Extension: published ports instead of those before; takes effect without a reboot. "
            "Connections through ports that are no longer published are cut"
        ),
    ] = None
    network: Annotated[
        NetworkUpdate | None, Meta(description="Extension: egress rules; in force from the next request")
    ] = None
    ttl: Annotated[Duration | None, Meta(description="From now; 0s clears")] = None
    expires_at: Timestamp | None = None
    tags: Annotated[
        TagMap | None,
        Meta(description="Extension: tags instead of those before; settings among them apply from the next boot"),
    ] = None


class StartInstanceRequest(Struct, frozen=True, kw_only=True):
    """Absent fields keep what the instance was last started with."""

    entrypoint: tuple[Argument, ...] | None = None
    cmd: tuple[Argument, ...] | None = None


class StopInstanceRequest(Struct, frozen=True, kw_only=True):
    grace: Annotated[
        Duration | None,
        Meta(description="Extension: how long the program may take to end before it is killed, up to 1h; default 10s"),
    ] = None


class StandbyInstanceRequest(Struct, frozen=True, kw_only=True):
    compression: SnapshotCompressionConfig | None = None
    compression_delay: Duration | None = None


class ForkInstanceRequest(Struct, frozen=True, kw_only=True):
    name: Name
    from_running: Annotated[bool, Meta(description="Allow a running source; it pauses for the capture")] = False
    target_state: Annotated[TargetState | None, Meta(description="Default: the state of the source")] = None
    tags: Annotated[TagMap | None, Meta(description="Extension. Default: those of the source")] = None


class AttachVolumeRequest(Struct, frozen=True, kw_only=True):
    mount_path: Annotated[str, Meta(description="Absolute path in the guest")]
    readonly: bool = False


# ── Responses ───────────────────────────────────────────────────────────────────────────────────


class InstanceNetwork(Struct, frozen=True, kw_only=True):
    enabled: bool
    name: Annotated[str | UnsetType, Meta(description="'default' while enabled")] = UNSET
    ip: str | None = None
    mac: str | None = None
    bandwidth_download: Rate | UnsetType = UNSET
    bandwidth_upload: Rate | UnsetType = UNSET
    egress: Annotated[
        EgressAccess | UnsetType, Meta(description="Extension: where the instance may go; absent: anywhere")
    ] = UNSET
    groups: Annotated[tuple[GroupName, ...] | UnsetType, Meta(description="Extension: as created with")] = UNSET


class InstanceGpu(Struct, frozen=True, kw_only=True):
    profile: str
    mdev_uuid: str


class HealthState(enum.StrEnum):
    DISABLED = "disabled"
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"


class InstanceHealthStatus(Struct, frozen=True, kw_only=True):
    status: HealthState
    consecutive_successes: Count = 0
    consecutive_failures: Count = 0
    last_checked_at: Timestamp | None = None
    last_success_at: Timestamp | None = None
    last_failure_at: Timestamp | None = None
    last_error: str | None = None


class RestartStatus(Struct, frozen=True, kw_only=True):
    attempts: Count = 0
    last_attempt_at: Timestamp | None = None
    next_attempt_at: Timestamp | None = None
    blocked_reason: Literal["manual_stop", "max_attempts_exceeded"] | None = None
    last_reason: Literal["health_check_failed"] | None = None


class Instance(Struct, frozen=True, kw_only=True):
    """One virtual machine and its current state."""

    id: str
    name: str
    image: Annotated[str, Meta(description="As the caller wrote it")]
    state: InstanceState
    created_at: Timestamp
    expires_at: Annotated[Timestamp | None, Meta(description="null: never")] = None
    platform: Platform | UnsetType = UNSET
    state_error: Annotated[str | None, Meta(description="Only in state Unknown")] = None
    size: Size | UnsetType = UNSET
    hotplug_size: Size | UnsetType = UNSET
    overlay_size: Size | UnsetType = UNSET
    vcpus: int | UnsetType = UNSET
    disk_io_bps: DiskRate | UnsetType = UNSET
    env: dict[str, str] | UnsetType = UNSET
    tags: TagMap | UnsetType = UNSET
    network: InstanceNetwork | UnsetType = UNSET
    volumes: tuple[VolumeMount, ...] | UnsetType = UNSET
    ports: Annotated[tuple[PortMapping, ...] | UnsetType, Meta(description="Extension: published ports")] = UNSET
    gpu: InstanceGpu | UnsetType = UNSET
    started_at: Timestamp | None = None
    stopped_at: Timestamp | None = None
    exit_code: Annotated[int | None, Meta(description="Of the workload")] = None
    exit_message: Annotated[str | UnsetType, Meta(description="Why it ended, for people")] = UNSET
    has_snapshot: bool | UnsetType = UNSET
    hypervisor: HypervisorKind | UnsetType = UNSET
    snapshot_policy: SnapshotPolicy | UnsetType = UNSET
    auto_standby: AutoStandbyPolicy | UnsetType = UNSET
    health_check: HealthCheck | UnsetType = UNSET
    restart_policy: RestartPolicy | UnsetType = UNSET
    auto_remove: Annotated[bool | UnsetType, Meta(description="Extension: deleted when it has ended")] = UNSET
    health_status: InstanceHealthStatus = InstanceHealthStatus(status=HealthState.DISABLED)
    restart_status: RestartStatus | UnsetType = UNSET
    phase_durations_ms: Annotated[
        dict[str, int] | UnsetType, Meta(description="Milliseconds in each phase, the current one included")
    ] = UNSET
    current_phase: str | UnsetType = UNSET
    current_phase_since: Timestamp | UnsetType = UNSET
    guest_silent_since: Annotated[
        Timestamp | UnsetType,
        Meta(
            description="Of one running instance, not in lists: its guest does not answer, and was last heard from "
            "then. Requests that need the guest end with 504 guest_timeout; stop and delete work."
        ),
    ] = UNSET


class WaitForStateResponse(Struct, frozen=True, kw_only=True):
    """Also sent, with timed_out false, if the wanted state can no longer be reached."""

    state: InstanceState
    timed_out: bool
    state_error: str | None = None


class InstanceUsage(Struct, frozen=True, kw_only=True):
    """Resources used by the VMM process, and traffic through its TAP as the guest sees it."""

    instance_id: str
    instance_name: str
    cpu_seconds: float
    memory_rss_bytes: int
    memory_vms_bytes: int
    network_rx_bytes: int
    network_tx_bytes: int
    allocated_vcpus: int
    allocated_memory_bytes: Annotated[int, Meta(description="Including hotplugged memory")]
    memory_utilization_ratio: Annotated[
        float | None, Meta(description="Resident memory of the VMM, of the allocated memory")
    ] = None
    vmm_started_at: Annotated[
        Timestamp | UnsetType,
        Meta(
            description="Extension: when the VMM began, and cpu_seconds with it: at the last start, restore or fork, "
            "which is later than the guest's boot after a standby; absent without a VMM"
        ),
    ] = UNSET


class InstanceStats(InstanceUsage, frozen=True, kw_only=True):
    """Resources used by the VMM process, traffic through its TAP as the guest sees it, and the guest's own view."""

    memory_pss_bytes: Annotated[
        int | UnsetType,
        Meta(description="Extension: resident memory, of which that shared with other VMs counts in part (PSS)"),
    ] = UNSET
    guest_memory_used_bytes: Annotated[
        int | UnsetType,
        Meta(description="Extension: used inside (MemTotal − MemAvailable); absent if the agent does not answer"),
    ] = UNSET
    guest_memory_total_bytes: Annotated[int | UnsetType, Meta(description="Extension: MemTotal of the guest")] = UNSET


class UsageOfAll(Struct, frozen=True, kw_only=True):
    """The usage of all instances that have a VMM, at one moment."""

    time: Timestamp
    instances: tuple[InstanceUsage, ...]


class AutoStandbyState(enum.StrEnum):
    UNSUPPORTED = "unsupported"
    DISABLED = "disabled"
    INELIGIBLE = "ineligible"
    ACTIVE = "active"
    IDLE_COUNTDOWN = "idle_countdown"
    READY_FOR_STANDBY = "ready_for_standby"
    STANDBY_REQUESTED = "standby_requested"
    ERROR = "error"


class AutoStandbyReason(enum.StrEnum):
    UNSUPPORTED_PLATFORM = "unsupported_platform"
    POLICY_MISSING = "policy_missing"
    POLICY_DISABLED = "policy_disabled"
    INSTANCE_NOT_RUNNING = "instance_not_running"
    NETWORK_DISABLED = "network_disabled"
    MISSING_IP = "missing_ip"
    HAS_VGPU = "has_vgpu"
    HAS_DEVICES = "has_devices"
    """Extension: other devices are passed through."""
    ACTIVE_INBOUND_CONNECTIONS = "active_inbound_connections"
    ACTIVE_OUTBOUND_CONNECTIONS = "active_outbound_connections"
    """Extension: it has begun them itself."""
    IDLE_TIMEOUT_NOT_ELAPSED = "idle_timeout_not_elapsed"
    OBSERVER_ERROR = "observer_error"
    READY_FOR_STANDBY = "ready_for_standby"


class LastWake(Struct, frozen=True, kw_only=True):
    """The last time that the instance was brought back from standby by itself."""

    at: Timestamp
    by: Annotated[str, Meta(description="Such as `tcp 10.0.0.7 to port 22`, or `exec`")]
    milliseconds: Annotated[Count, Meta(description="From the first packet or request until the guest ran")]
    error: Annotated[str | UnsetType, Meta(description="Why it failed")] = UNSET


class AutoStandbyStatus(Struct, frozen=True, kw_only=True):
    supported: bool
    configured: bool
    enabled: bool
    eligible: bool
    active_inbound_connections: Count
    status: AutoStandbyState
    reason: AutoStandbyReason
    tracking_mode: Annotated[
        str, Meta(description="conntrack_events_v4_tcp; with count_udp conntrack_events_v4_tcp_udp")
    ] = "conntrack_events_v4_tcp"
    idle_timeout: Duration | None = None
    idle_since: Timestamp | None = None
    last_inbound_activity_at: Timestamp | None = None
    next_standby_at: Timestamp | None = None
    hold_until: Timestamp | None = None
    countdown_remaining: Duration | None = None
    active_outbound_connections: Annotated[
        Count, Meta(description="Extension: connections that it has begun, which also keep it running")
    ] = 0
    active_sessions: Annotated[
        Count, Meta(description="Extension: exec and copy sessions and followed logs, which also keep it running")
    ] = 0
    wake: Annotated[WakeOn, Meta(description="Extension: what ends its standby")] = WakeOn.NONE
    last_wake: Annotated[LastWake | None, Meta(description="Extension")] = None
