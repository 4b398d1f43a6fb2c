"""Objects of the Kubernetes API, as far as the node reads or writes them. Pure.

Field names are written as in the API, in camel case, by ``rename``. What is absent stays absent when it is encoded.
Fields that are not declared are ignored by decoding, so an object that was read is never written back: writes are
patches of what the node owns. The ``spec`` of a pod or claim stays as it came, because what it asks for and we do not
know has to be refused, by name.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

from hypeman.fields import Timestamp


class Part(Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """Base of all parts of objects."""


class OwnerReference(Part, frozen=True):
    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False

    @property
    def group(self) -> str:
        """The API group; empty for the core."""
        group, slash, _ = self.api_version.partition("/")
        return group if slash else ""


class ObjectMeta(Part, frozen=True):
    name: str = ""
    generate_name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    deletion_grace_period_seconds: int | None = None
    owner_references: tuple[OwnerReference, ...] = ()
    finalizers: tuple[str, ...] = ()

    @property
    def controller(self) -> OwnerReference | None:
        return next((owner for owner in self.owner_references if owner.controller), None)


class Thing(Part, frozen=True):
    """Any object: what all of them have."""

    metadata: ObjectMeta = ObjectMeta()
    api_version: str = ""
    kind: str = ""

    @property
    def key(self) -> str:
        """``namespace/name``, or the name alone."""
        about = self.metadata
        return f"{about.namespace}/{about.name}" if about.namespace else about.name


class ListMeta(Part, frozen=True):
    resource_version: str = ""
    continue_: str = field(name="continue", default="")


class StatusDetails(Part, frozen=True):
    name: str = ""
    """Of the object concerned."""


class Status(Part, frozen=True):
    """The API server's answer to a refused request, and the object of a watch's ERROR."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: StatusDetails | None = None


# ── Pods ────────────────────────────────────────────────────────────────────────────────────────


class Condition(Part, frozen=True):
    """Of a pod or a node; of a node with ``last_heartbeat_time``."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: Timestamp | None = None
    last_heartbeat_time: Timestamp | None = None
    observed_generation: int | None = None


class Waiting(Part, frozen=True):
    reason: str
    message: str = ""


class Running(Part, frozen=True):
    started_at: Timestamp | None = None


class Terminated(Part, frozen=True):
    exit_code: int = field(name="exitCode")
    """Declared without a default: 0 is written."""
    reason: str = ""
    message: str = ""
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    container_id: str = field(name="containerID", default="")


class ContainerState(Part, frozen=True):
    """At most one of the three."""

    waiting: Waiting | None = None
    running: Running | None = None
    terminated: Terminated | None = None


class ContainerStatus(Part, frozen=True):
    name: str
    state: ContainerState
    ready: bool
    restart_count: int
    image: str
    image_id: str = field(name="imageID")
    last_state: ContainerState = ContainerState()
    started: bool | None = None
    container_id: str = field(name="containerID", default="")


class PodIP(Part, frozen=True):
    ip: str


class PodStatus(Part, frozen=True):
    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: tuple[Condition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()
    host_ip: str = field(name="hostIP", default="")
    host_ips: tuple[PodIP, ...] = field(name="hostIPs", default=())
    pod_ip: str = field(name="podIP", default="")
    pod_ips: tuple[PodIP, ...] = field(name="podIPs", default=())
    ephemeral_container_statuses: tuple[ContainerStatus, ...] = ()
    start_time: Timestamp | None = None
    observed_generation: int | None = None


class Pod(Thing, frozen=True):
    spec: dict[str, Any] = {}
    status: PodStatus = PodStatus()


# ── Nodes and their leases ──────────────────────────────────────────────────────────────────────


class Taint(Part, frozen=True):
    key: str
    effect: str
    value: str = ""


class NodeSpec(Part, frozen=True):
    pod_cidr: str = field(name="podCIDR", default="")
    taints: tuple[Taint, ...] = ()
    unschedulable: bool = False


class NodeAddress(Part, frozen=True):
    type: str
    address: str


class DaemonEndpoint(Part, frozen=True):
    port: int = field(name="Port")


class DaemonEndpoints(Part, frozen=True):
    kubelet_endpoint: DaemonEndpoint


class NodeInfo(Part, frozen=True):
    machine_id: str = field(name="machineID")
    system_uuid: str = field(name="systemUUID")
    boot_id: str = field(name="bootID")
    kernel_version: str
    os_image: str
    container_runtime_version: str
    kubelet_version: str
    kube_proxy_version: str
    operating_system: str
    architecture: str


class NodeStatus(Part, frozen=True):
    capacity: dict[str, str] = {}
    allocatable: dict[str, str] = {}
    conditions: tuple[Condition, ...] = ()
    addresses: tuple[NodeAddress, ...] = ()
    daemon_endpoints: DaemonEndpoints | UnsetType = UNSET
    node_info: NodeInfo | UnsetType = UNSET
    declared_features: tuple[str, ...] = ()


class Node(Thing, frozen=True):
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class LeaseSpec(Part, frozen=True):
    holder_identity: str = ""
    lease_duration_seconds: int = 0
    renew_time: Timestamp | None = None


class Lease(Thing, frozen=True):
    spec: LeaseSpec = LeaseSpec()


# ── What pods refer to ──────────────────────────────────────────────────────────────────────────


class PhaseStatus(Part, frozen=True):
    phase: str = ""


class PersistentVolumeClaim(Thing, frozen=True):
    spec: dict[str, Any] = {}
    status: PhaseStatus = PhaseStatus()


class ObjectReference(Part, frozen=True):
    uid: str = ""


class VolumeSpec(Part, frozen=True):
    claim_ref: ObjectReference = ObjectReference()
    storage_class_name: str = ""
    persistent_volume_reclaim_policy: str = ""


class PersistentVolume(Thing, frozen=True):
    spec: VolumeSpec = VolumeSpec()
    status: PhaseStatus = PhaseStatus()


class StorageClass(Thing, frozen=True):
    provisioner: str = ""
    parameters: dict[str, str] = {}
    mount_options: tuple[str, ...] = ()
    allow_volume_expansion: bool = False
    reclaim_policy: str = "Delete"


class RuntimeClass(Thing, frozen=True):
    handler: str = ""


class TokenStatus(Part, frozen=True):
    token: str = ""


class TokenRequest(Thing, frozen=True):
    status: TokenStatus = TokenStatus()


class ConfigMap(Thing, frozen=True):
    data: dict[str, str] = {}
    binary_data: dict[str, str] = {}
    """Base64."""


class Secret(Thing, frozen=True):
    type: str = ""
    data: dict[str, str] = {}
    """Base64."""
