"""Examples in the document: one for each type of a body, a response and a query, and one for each path parameter.

They tell one story, so that they can be tried one after another: the instance ``web`` with the volume ``data``, its
snapshot, and an ingress. Structs, so that mypy and the decoder hold them to the contract. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from hypeman.actor import Actor
from hypeman.builds.types import Build, Builder, BuilderStatus, BuildForm, BuildStatus, CreateBuilderRequest
from hypeman.captures.types import CompressionAlgorithm, SnapshotCompressionConfig
from hypeman.devices.types import AvailableDevice, CreateDeviceRequest, Device, DeviceType
from hypeman.egress.types import (
    AccessAction,
    AccessDefault,
    AccessRule,
    CredentialPolicy,
    CredentialSource,
    EgressApproval,
    EgressCheck,
    EgressDecision,
    EgressEnforcementMode,
    EgressPolicy,
    EgressProposal,
    InjectAs,
    InjectRule,
)
from hypeman.events.types import Event, EventObject, Kind
from hypeman.guest.session_types import CpRequest, ExecRequest
from hypeman.guest.types import PathInfo
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.images.types import (
    CreateImageRequest,
    Image,
    ImageStatus,
    LayerProgress,
    Progress,
    TagImageRequest,
)
from hypeman.ingress.types import CreateIngressRequest, Ingress, IngressMatch, IngressRule, IngressTarget
from hypeman.instances.model.snapshot_types import (
    CompressionState,
    CreateSnapshotRequest,
    ForkSnapshotRequest,
    RestoreSnapshotRequest,
    SetSnapshotPoolRequest,
    SetSnapshotScheduleRequest,
    Snapshot,
    SnapshotKind,
    SnapshotPool,
    SnapshotRetention,
    SnapshotSchedule,
)
from hypeman.instances.model.types import (
    AttachVolumeRequest,
    AutoStandbyPolicy,
    AutoStandbyReason,
    AutoStandbyState,
    AutoStandbyStatus,
    CreateInstanceRequest,
    ForkInstanceRequest,
    HealthCheck,
    HealthCheckType,
    HealthState,
    HttpHealthCheck,
    Instance,
    InstanceHealthStatus,
    InstanceNetwork,
    InstanceState,
    InstanceStats,
    InstanceUsage,
    RestartMode,
    RestartPolicy,
    StandbyInstanceRequest,
    StartInstanceRequest,
    StopInstanceRequest,
    TargetState,
    UpdateInstanceRequest,
    UsageOfAll,
    VolumeMount,
    WaitForStateResponse,
    WakeOn,
)
from hypeman.metering.types import UsageBy, UsageReport, UsageRow, UsageVerification
from hypeman.network.types import PortMapping
from hypeman.registry.push_types import CreatePushRequest, Push, PushStatus
from hypeman.resources.types import (
    MemoryReclaimAction,
    MemoryReclaimRequest,
    MemoryReclaimResponse,
    ResourceAllocation,
    Resources,
    ResourceStatus,
)
from hypeman.server.errors import ErrorBody
from hypeman.server.types import (
    Capabilities,
    DefaultRuntime,
    Health,
    HostPlatform,
    ImageCapabilities,
    NetworkCapabilities,
    Runtime,
    ServerVersion,
)
from hypeman.telemetry.findings import Finding, Verdict
from hypeman.telemetry.trace_types import OperationTrace, TraceSpan
from hypeman.volumes.types import CreateVolumeRequest, Volume, VolumeAttachment

_TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_USAGE = UsageRow(
    begin=datetime(2026, 1, 2, 3, tzinfo=UTC),
    end=datetime(2026, 1, 2, 4, tzinfo=UTC),
    cpu_seconds=412.5,
    memory_gb_hours=2.0,
    disk_gb_hours=10.0,
    network_rx_bytes=48_000_000,
    network_tx_bytes=1_200_000,
)
_SPAN = "b7ad6b7169203331"
_INSTANCE = "k3v9x0q2m4c7b1z8f5d6s2a1"
_SNAPSHOT = "t7h2n5w8r1y4u6p9e3j0g2l5"
_IMAGE = "docker.io/library/nginx:alpine"
_DIGEST = "sha256:" + "7a" * 32
_MOUNT = VolumeMount(volume_id="data", mount_path="/data")
_RULE = IngressRule(match=IngressMatch(hostname="web.example.com"), target=IngressTarget(instance="web", port=80))
_RETENTION = SnapshotRetention(max_count=7)
_ZSTD = SnapshotCompressionConfig(enabled=True, algorithm=CompressionAlgorithm.ZSTD, level=1)
_GIB = 1 << 30


def _resource(kind: str, capacity: int, allocated: int, ratio: float = 1.0) -> ResourceStatus:
    limit = int(capacity * ratio)
    return ResourceStatus(
        type=kind, capacity=capacity, effective_limit=limit, allocated=allocated, available=limit - allocated,
        oversub_ratio=ratio, source="detected",
    )  # fmt: skip


BODIES: Mapping[Any, Any] = {
    MemoryReclaimRequest: MemoryReclaimRequest(reclaim_bytes=_GIB, hold_for="10m", dry_run=True),
    CreateImageRequest: CreateImageRequest(name="nginx:alpine"),
    TagImageRequest: TagImageRequest(target="nginx:tested"),
    CreateInstanceRequest: CreateInstanceRequest(
        name="web",
        image=_IMAGE,
        size="512MB",
        vcpus=1,
        env={"LOG_LEVEL": "info"},
        tags={"team": "backend"},
        ports=(PortMapping(host_port=8000, guest_port=80),),
        restart_policy=RestartPolicy(policy=RestartMode.ON_FAILURE, max_attempts=10),
    ),
    UpdateInstanceRequest: UpdateInstanceRequest(
        auto_standby=AutoStandbyPolicy(enabled=True, idle_timeout="10m"),
        health_check=HealthCheck(type=HealthCheckType.HTTP, http=HttpHealthCheck(port=80, path="/")),
    ),
    StopInstanceRequest: StopInstanceRequest(grace="30s"),
    StartInstanceRequest: StartInstanceRequest(cmd=("nginx", "-g", "daemon off;")),
    StandbyInstanceRequest: StandbyInstanceRequest(compression=_ZSTD),
    ForkInstanceRequest: ForkInstanceRequest(name="web2", from_running=True),
    AttachVolumeRequest: AttachVolumeRequest(mount_path="/data"),
    CreateSnapshotRequest: CreateSnapshotRequest(kind=SnapshotKind.STANDBY, name="base"),
    RestoreSnapshotRequest: RestoreSnapshotRequest(target_state=TargetState.RUNNING),
    ForkSnapshotRequest: ForkSnapshotRequest(name="web3", target_state=TargetState.RUNNING),
    SetSnapshotPoolRequest: SetSnapshotPoolRequest(size=3),
    SetSnapshotScheduleRequest: SetSnapshotScheduleRequest(interval="24h", retention=_RETENTION, name_prefix="daily"),
    CreateVolumeRequest: CreateVolumeRequest(name="data", size_gb=1),
    CreateDeviceRequest: CreateDeviceRequest(pci_address="0000:03:00.0", name="gpu"),
    CreateIngressRequest: CreateIngressRequest(name="site", rules=(_RULE,)),
    CreateBuilderRequest: CreateBuilderRequest(id="fast", disk_size_gb=20),
    BuildForm: BuildForm(source="(the bytes of context.tar.gz)", builder_id="fast", image_name="team/app:v1"),
    EgressDecision: EgressDecision(for_="10m"),
    CreatePushRequest: CreatePushRequest(image=_IMAGE, target="registry.example.com/team/nginx:v1"),
}
"""By the type of the body."""

QUERIES: Mapping[str, Mapping[str, Any]] = {
    "list_instances": {"state": "Running"},
    "wait_for_state": {"state": "Running", "timeout": "1s"},
    "stat_path": {"path": "/etc"},
    "get_logs": {"tail": 10},
    "import_image": {"name": "localhost/app:v1"},
    "create_volume_from_archive": {"name": "filled", "size_gb": 1},
    "check_egress": {"url": "https://api.example.com/v1/models"},
    "list_snapshots": {"kind": "Standby"},
    "get_events": {"follow": False, "since": "10m", "type": "instance"},
}
"""By the name of the operation: values of query parameters."""

ANSWERS: Mapping[Any, Any] = {
    Health: Health(),
    Finding: Finding(
        name="kvm", verdict=Verdict.WARN, message="there is no /dev/kvm: guests are emulated", remedy="modprobe kvm"
    ),
    Capabilities: Capabilities(
        server=ServerVersion("0.1.0", "0.3.0"),
        host=HostPlatform("linux", "amd64"),
        default_runtime=DefaultRuntime("qemu", True),
        runtimes=(Runtime("qemu", True, ("standby", "fork", "snapshot")),),
        network=NetworkCapabilities("bridge", False, "10.100.0.1", "10.100.0.0/16"),
        images=ImageCapabilities(("linux/amd64",), "linux/amd64"),
        features=("instances", "images", "volumes", "snapshots"),
    ),
    Resources: Resources(
        cpu=_resource("cpu", 8, 1, 4.0),
        memory=_resource("memory", 32 * _GIB, _GIB // 2),
        disk=_resource("disk", 500 * _GIB, 11 * _GIB),
        network=_resource("network", 125_000_000, 0),
        allocations=(
            ResourceAllocation(
                instance_id=_INSTANCE, instance_name="web", cpu=1, memory_bytes=_GIB // 2, disk_bytes=10 * _GIB
            ),
        ),
    ),
    MemoryReclaimResponse: MemoryReclaimResponse(
        requested_reclaim_bytes=_GIB // 8,
        planned_reclaim_bytes=_GIB // 8,
        applied_reclaim_bytes=_GIB // 8,
        host_available_bytes=20 * _GIB,
        host_pressure_state="healthy",
        actions=(
            MemoryReclaimAction(
                instance_id=_INSTANCE,
                instance_name="web",
                hypervisor="qemu",
                status="applied",
                assigned_memory_bytes=_GIB // 2,
                protected_floor_bytes=_GIB // 4,
                previous_target_guest_memory_bytes=_GIB // 2,
                planned_target_guest_memory_bytes=_GIB // 8 * 3,
                target_guest_memory_bytes=_GIB // 8 * 3,
                applied_reclaim_bytes=_GIB // 8,
            ),
        ),
        hold_until=_TIME,
    ),
    Image: Image(
        name=_IMAGE,
        digest=_DIGEST,
        status=ImageStatus.READY,
        created_at=_TIME,
        platform="linux/amd64",
        size_bytes=50_331_648,
        entrypoint=("/docker-entrypoint.sh",),
        cmd=("nginx", "-g", "daemon off;"),
    ),
    Progress: Progress(ImageStatus.PULLING, (LayerProgress(_DIGEST, 3_600_000, 1_200_000),)),
    Instance: Instance(
        id=_INSTANCE,
        name="web",
        image=_IMAGE,
        state=InstanceState.RUNNING,
        created_at=_TIME,
        started_at=_TIME,
        platform="linux/amd64",
        size="512MB",
        overlay_size="10GB",
        vcpus=1,
        env={"LOG_LEVEL": "info"},
        tags={"team": "backend"},
        network=InstanceNetwork(enabled=True, name="default", ip="10.100.0.2", mac="02:00:00:64:00:02"),
        volumes=(_MOUNT,),
        ports=(PortMapping(host_port=8000, guest_port=80),),
        has_snapshot=False,
        hypervisor=HypervisorKind.QEMU,
        health_status=InstanceHealthStatus(
            status=HealthState.HEALTHY, consecutive_successes=12, last_checked_at=_TIME, last_success_at=_TIME
        ),
        phase_durations_ms={"created": 12, "initializing": 340, "running": 90_000},
        current_phase="running",
        current_phase_since=_TIME,
    ),
    WaitForStateResponse: WaitForStateResponse(state=InstanceState.RUNNING, timed_out=False),
    PathInfo: PathInfo(exists=True, is_dir=True, mode=0o755, size=4096),
    InstanceStats: InstanceStats(
        instance_id=_INSTANCE,
        instance_name="web",
        cpu_seconds=12.5,
        memory_rss_bytes=180_000_000,
        memory_vms_bytes=2_000_000_000,
        network_rx_bytes=120_000,
        network_tx_bytes=480_000,
        allocated_vcpus=1,
        allocated_memory_bytes=_GIB // 2,
        memory_utilization_ratio=0.34,
        vmm_started_at=_TIME,
        guest_memory_used_bytes=90_000_000,
        guest_memory_total_bytes=500_000_000,
    ),
    UsageOfAll: UsageOfAll(
        time=_TIME,
        instances=(
            InstanceUsage(
                instance_id=_INSTANCE,
                instance_name="web",
                cpu_seconds=12.5,
                memory_rss_bytes=180_000_000,
                memory_vms_bytes=900_000_000,
                allocated_vcpus=2,
                allocated_memory_bytes=536_870_912,
                network_rx_bytes=120_000,
                network_tx_bytes=480_000,
                vmm_started_at=_TIME,
            ),
        ),
    ),
    Snapshot: Snapshot(
        id=_SNAPSHOT,
        kind=SnapshotKind.STANDBY,
        source_instance_id=_INSTANCE,
        source_instance_name="web",
        source_hypervisor=HypervisorKind.QEMU,
        created_at=_TIME,
        size_bytes=150_000_000,
        name="base",
        compression_state=CompressionState.NONE,
    ),
    EgressCheck: EgressCheck(
        method="GET",
        scheme="https",
        host="api.example.com",
        port=443,
        decision=AccessAction.ALLOW,
        rule="#1",
        reason="ok",
        observed=False,
        resolves=True,
    ),
    EgressProposal: EgressProposal(
        requests=12,
        complete=True,
        default=AccessDefault.DENY,
        rules=(AccessRule(action=AccessAction.ALLOW, hosts=("api.example.com",), ports=(443,), methods=("GET",)),),
    ),
    EgressApproval: EgressApproval(
        id="hn2ao2lzyqrvbnkv7b3xm2zu",
        instance_id=_INSTANCE,
        rule="writes",
        scheme="https",
        host="api.example.com",
        port=443,
        method="POST",
        path="/v1/issues",
        waiting=1,
        since=_TIME,
        expires_at=_TIME,
    ),
    EgressPolicy: EgressPolicy(
        instance_id=_INSTANCE,
        instance_name="web",
        mode=EgressEnforcementMode.ALL,
        credentials={
            "API_KEY": CredentialPolicy(
                source=CredentialSource(env="REAL_KEY"),
                inject=(
                    InjectRule(
                        hosts=("api.example.com",), as_=InjectAs(header="Authorization", format="Bearer ${value}")
                    ),
                ),
            )
        },
    ),
    AutoStandbyStatus: AutoStandbyStatus(
        supported=True,
        configured=True,
        enabled=True,
        eligible=True,
        active_inbound_connections=0,
        status=AutoStandbyState.IDLE_COUNTDOWN,
        reason=AutoStandbyReason.IDLE_TIMEOUT_NOT_ELAPSED,
        idle_timeout="10m0s",
        idle_since=_TIME,
        countdown_remaining="7m12s",
        wake=WakeOn.TRAFFIC,
    ),
    SnapshotPool: SnapshotPool(snapshot_id=_SNAPSHOT, size=3, ready=3, memory_bytes=96 << 20),
    SnapshotSchedule: SnapshotSchedule(
        instance_id=_INSTANCE,
        interval="24h0m0s",
        retention=_RETENTION,
        next_run_at=_TIME,
        created_at=_TIME,
        updated_at=_TIME,
        name_prefix="daily",
    ),
    Volume: Volume(
        id="data",
        name="data",
        size_gb=1,
        created_at=_TIME,
        attachments=(VolumeAttachment(instance_id=_INSTANCE, mount_path="/data", readonly=False),),
    ),
    Device: Device(
        id="d5c1v7b3n9m2k4j6h8g0f1e2",
        type=DeviceType.GPU,
        pci_address="0000:03:00.0",
        vendor_id="10de",
        device_id="2204",
        iommu_group=14,
        bound_to_vfio=True,
        created_at=_TIME,
        name="gpu",
    ),
    AvailableDevice: AvailableDevice(
        pci_address="0000:03:00.0",
        vendor_id="10de",
        device_id="2204",
        iommu_group=14,
        vendor_name="NVIDIA Corporation",
        current_driver="nouveau",
    ),
    Ingress: Ingress(id="q8w2e6r0t4y7u1i5o9p3a2s6", name="site", rules=(_RULE,), created_at=_TIME),
    Push: Push(
        id="z1x5c9v3b7n2m6l0k4j8h2g6",
        image=_IMAGE,
        digest=_DIGEST,
        target="registry.example.com/team/nginx:v1",
        status=PushStatus.PUSHING,
        created_at=_TIME,
        layers=8,
        bytes=20_000_000,
        bytes_done=5_000_000,
    ),
    Builder: Builder(id="fast", disk_size_gb=20, status=BuilderStatus.READY, created_at=_TIME),
    Build: Build(
        id="b2n6m0k4j8h3g7f1d5s9a2q6",
        status=BuildStatus.READY,
        created_at=_TIME,
        started_at=_TIME,
        completed_at=_TIME,
        duration_ms=41_000,
        image_digest=_DIGEST,
        image_ref="localhost/team/app:v1",
        builder_id="fast",
    ),
    Event: Event(
        cursor=4711,
        time=_TIME,
        type="instance.state_changed",
        object=EventObject(Kind.INSTANCE, _INSTANCE, "web"),
        actor=Actor("ops", address="10.0.0.5", request_id="5f0c9a7e1b2d3c4f"),
        data={"from": "Initializing", "to": "Running"},
    ),
    UsageReport: UsageReport(by=UsageBy.INSTANCE, rows=(_USAGE,), total=_USAGE),
    UsageVerification: UsageVerification(valid=True, first=1, last=730, hash="5e" * 32, entries=8760),
    OperationTrace: OperationTrace(
        id="0af7651916cd43dd8448eb211c80319c",
        name="POST /instances",
        started_at=_TIME,
        duration_ms=812.4,
        spans=(
            TraceSpan(id=_SPAN, parent="", name="POST /instances", begin_ms=0.0, duration_ms=97.1),
            TraceSpan(id="00f067aa0ba902b7", parent=_SPAN, name="LaunchVmm", begin_ms=9.2, duration_ms=84.0),
        ),
    ),
    ErrorBody: ErrorBody("not_found", "instance 'web' does not exist"),
}
"""By the type of the response; a list has one of these."""

TEXTS: Mapping[str, str] = {
    "get_logs": 'data: "listening on port 80"\n\n',
    "get_egress_requests": 'data: {"time":"2026-01-02T03:04:05Z","kind":"request","host":"api.example.com","port":443,'
    '"method":"GET","status":200,"reason":"ok","injected":true,"credentials":["API_KEY"],"bytes_up":120,'
    '"bytes_down":4800,"ms":35.2,"http":2}\n\n',
    "get_events": 'id: 4711\ndata: {"cursor":4711,"time":"2026-01-02T03:04:05Z","type":"volume.created",'
    '"object":{"kind":"volume","id":"data","name":"data"},"data":{"size_gb":1}}\n\n',
    "get_build_events": 'data: {"type":"log","timestamp":"2026-01-02T03:04:05Z","content":"#5 RUN make"}\n\n',
    "get_ingress_ca": "-----BEGIN CERTIFICATE-----\nMIIB…\n-----END CERTIFICATE-----\n",
    "get_egress_ca": "-----BEGIN CERTIFICATE-----\nMIIB…\n-----END CERTIFICATE-----\n",
    "spec_yaml": "openapi: 3.1.0\n",
    "swagger": "<!doctype html>\n",
}
"""By the name of the operation, for responses that are no JSON of a type."""

EXEC = ExecRequest(command=("sh", "-c", "uname -a"), tty=True, rows=24, cols=80)
COPY = CpRequest(direction="to", guest_path="/etc/motd", mode=0o644)


def path_value(path: str, parameter: str) -> str:
    """An example of a path parameter of the operation at ``path``."""
    match parameter, path.split("/")[1]:
        case "id", owner if owner in _IDS:
            return _IDS[owner]
        case "volumeId", _:
            return "data"
        case "snapshotId", _:
            return _SNAPSHOT
        case "approval", _:
            return "hn2ao2lzyqrvbnkv7b3xm2zu"
        case "name", "images":
            return _IMAGE
    raise LookupError(f"{path}: no example for {parameter}")


_IDS = {
    "instances": "web",
    "volumes": "data",
    "devices": "gpu",
    "ingresses": "site",
    "pushes": "z1x5c9v3b7n2m6l0k4j8h2g6",
    "builds": "b2n6m0k4j8h3g7f1d5s9a2q6",
    "builders": "fast",
}
