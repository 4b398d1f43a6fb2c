"""What a pod asks for: read into ``PodSpec``, or refused by the name of the field. Pure.

A pod's spec has some 400 fields. Those that are read are the fields of the Structs below, at every depth. Each Struct
names in ``others`` those that it knows and does not read; anything else, also a field that a later version of
Kubernetes adds, is refused if it asks for something (is neither absent nor empty nor false).

    ELSEWHERE   done by the scheduler, the API server or a controller; there is nothing to do on the node
    SO_IN_A_VM  true of every VM, whatever is asked
    Noted       cannot be applied, and weakens nothing beyond the VM: the pod runs, with an event that names the field
    values      refused, except with these, which ask for nothing

``tests/kube/test_pod_fields.py`` holds the fields that Kubernetes publishes against this.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, get_args

import msgspec
from msgspec import Meta, Struct, field

from hypeman.kube import names
from hypeman.kube.quantity import BadQuantity, parse_quantity

Fields = Mapping[str, Any]


class Kind(enum.Enum):
    """Of a field that is known and not read."""

    ELSEWHERE = "elsewhere"
    SO_IN_A_VM = "so in a VM"


ELSEWHERE, SO_IN_A_VM = Kind.ELSEWHERE, Kind.SO_IN_A_VM


class Noted(Struct, frozen=True):
    """Why the field is not applied."""

    why: str


_GUEST = Noted("is not applied inside the guest; the VM is the boundary")
Others = Mapping[str, Kind | Noted | tuple[Any, ...]]


class Remark(Struct, frozen=True, order=True):
    """A field that is refused or noted, and why."""

    field: str
    why: str

    def __str__(self) -> str:
        return f"{self.field}: {self.why}"


# ── What is read ────────────────────────────────────────────────────────────────────────────────


class Part(Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of all parts of a spec."""

    others: ClassVar[Others] = {}
    """Fields that are known and not read."""


class KeyRef(Part, frozen=True):
    key: str
    name: str = ""
    optional: bool = False


class FieldRef(Part, frozen=True):
    others = {"apiVersion": ("v1",)}

    field_path: str


class ResourceRef(Part, frozen=True):
    resource: str
    divisor: str | int = "0"
    container_name: str = ""


class EnvSource(Part, frozen=True):
    config_map_key_ref: KeyRef | None = None
    secret_key_ref: KeyRef | None = None
    field_ref: FieldRef | None = None
    resource_field_ref: ResourceRef | None = None


class EnvVar(Part, frozen=True):
    name: str
    value: str = ""
    value_from: EnvSource | None = None


class ObjectRef(Part, frozen=True):
    name: str = ""
    optional: bool = False


class EnvFrom(Part, frozen=True):
    prefix: str = ""
    config_map_ref: ObjectRef | None = None
    secret_ref: ObjectRef | None = None


class ContainerPort(Part, frozen=True):
    container_port: int
    name: str = ""
    host_port: int = 0
    host_ip: str = field(name="hostIP", default="")
    protocol: str = "TCP"


class ExecAction(Part, frozen=True):
    command: tuple[str, ...] = ()


class HttpGetAction(Part, frozen=True):
    others = {"protocol": ("HTTP1",)}

    port: int | str
    path: str = "/"
    scheme: str = "HTTP"


class TcpAction(Part, frozen=True):
    port: int | str


class Probe(Part, frozen=True):
    exec: ExecAction | None = None
    http_get: HttpGetAction | None = None
    tcp_socket: TcpAction | None = None
    initial_delay_seconds: int = 0
    period_seconds: int = 10
    timeout_seconds: int = 1
    failure_threshold: int = 3
    success_threshold: int = 1

    @property
    def action(self) -> tuple[ExecAction | None, HttpGetAction | None, TcpAction | None]:
        return (self.exec, self.http_get, self.tcp_socket)


class VolumeMount(Part, frozen=True):
    others = {"mountPropagation": ("None",), "recursiveReadOnly": ("Disabled", "IfPossible")}

    name: str
    mount_path: str
    read_only: bool = False


class Resources(Part, frozen=True):
    limits: dict[str, str | int] = {}
    requests: dict[str, str | int] = {}


class SecurityContext(Part, frozen=True):
    others = {
        **dict.fromkeys(("allowPrivilegeEscalation", "capabilities", "seccompProfile", "appArmorProfile"), _GUEST),
        "privileged": SO_IN_A_VM,
        "procMount": ("Default",),
    }

    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_non_root: bool | None = None


class Container(Part, frozen=True):
    others = {
        "resizePolicy": ELSEWHERE,
        "terminationMessagePath": ("/dev/termination-log",),
        "terminationMessagePolicy": ("File",),
    }

    name: str
    image: str
    image_pull_policy: str = "IfNotPresent"
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    env: tuple[EnvVar, ...] = ()
    env_from: tuple[EnvFrom, ...] = ()
    ports: tuple[ContainerPort, ...] = ()
    resources: Resources = Resources()
    volume_mounts: tuple[VolumeMount, ...] = ()
    liveness_probe: Probe | None = None
    readiness_probe: Probe | None = None
    startup_probe: Probe | None = None
    security_context: SecurityContext = SecurityContext()


class KeyToPath(Part, frozen=True):
    key: str
    path: str
    mode: int | None = None


class EmptyDir(Part, frozen=True):
    size_limit: str | int | None = None


class ConfigMapFiles(Part, frozen=True):
    name: str = ""
    items: tuple[KeyToPath, ...] = ()
    optional: bool = False
    default_mode: int | None = None


class SecretFiles(Part, frozen=True):
    secret_name: str = ""
    name: str = ""
    """Instead of ``secret_name`` in a projection."""
    items: tuple[KeyToPath, ...] = ()
    optional: bool = False
    default_mode: int | None = None


class DownwardFile(Part, frozen=True):
    path: str
    field_ref: FieldRef | None = None
    resource_field_ref: ResourceRef | None = None
    mode: int | None = None


class DownwardFiles(Part, frozen=True):
    items: tuple[DownwardFile, ...] = ()
    default_mode: int | None = None


class TokenFile(Part, frozen=True):
    path: str
    audience: str = ""
    expiration_seconds: int = 3600


class Projection(Part, frozen=True):
    config_map: ConfigMapFiles | None = None
    secret: SecretFiles | None = None
    downward_api: DownwardFiles | None = field(name="downwardAPI", default=None)
    service_account_token: TokenFile | None = None


class Projected(Part, frozen=True):
    sources: tuple[Projection, ...] = ()
    default_mode: int | None = None


class Claim(Part, frozen=True):
    claim_name: str
    read_only: bool = False


class Volume(Part, frozen=True):
    """One of its sources is given, as the API server makes sure."""

    name: str
    empty_dir: EmptyDir | None = None
    config_map: ConfigMapFiles | None = None
    secret: SecretFiles | None = None
    downward_api: DownwardFiles | None = field(name="downwardAPI", default=None)
    projected: Projected | None = None
    persistent_volume_claim: Claim | None = None


class Toleration(Part, frozen=True):
    others = {"value": ELSEWHERE}

    key: str = ""
    operator: str = "Equal"
    effect: str = ""
    toleration_seconds: int | None = None


class ReadinessGate(Part, frozen=True):
    condition_type: str


class Sysctl(Part, frozen=True):
    name: str
    value: str


class PodSecurityContext(SecurityContext, frozen=True):
    others = {
        "seccompProfile": _GUEST,
        "appArmorProfile": _GUEST,
        "fsGroupChangePolicy": ("Always", "OnRootMismatch"),  # says how to do what is refused: fsGroup
        "supplementalGroupsPolicy": ("Merge",),
    }

    sysctls: tuple[Sysctl, ...] = ()


class PodSpec(Part, frozen=True):
    others = {
        **dict.fromkeys(
            ("nodeName", "nodeSelector", "affinity", "topologySpreadConstraints", "priority", "priorityClassName",
             "preemptionPolicy", "schedulerName", "schedulingGates", "schedulingGroup", "overhead", "serviceAccount",
             "automountServiceAccountToken", "evictionResponders"),
            ELSEWHERE,
        ),
        "ephemeralContainers": ELSEWHERE,  # pods.py says of each that it cannot run
        "shareProcessNamespace": SO_IN_A_VM,
        "hostUsers": SO_IN_A_VM,
        "subdomain": Noted("names of Services and of their pods are not resolved in guests"),
        "dnsPolicy": ("ClusterFirst", "Default"),
        "enableServiceLinks": (True,),  # the API server fills it in; docs/kubernetes.md says that there are none
        "os": ({"name": "linux"},),
    }  # fmt: skip

    containers: Annotated[tuple[Container, ...], Meta(min_length=1)]
    volumes: tuple[Volume, ...] = ()
    restart_policy: str = "Always"
    termination_grace_period_seconds: int = 30
    active_deadline_seconds: int | None = None
    image_pull_secrets: tuple[ObjectRef, ...] = ()
    hostname: str = ""
    runtime_class_name: str = ""
    service_account_name: str = "default"
    readiness_gates: tuple[ReadinessGate, ...] = ()
    tolerations: tuple[Toleration, ...] = ()
    security_context: PodSecurityContext = PodSecurityContext()

    @property
    def container(self) -> Container:
        return self.containers[0]

    def volume(self, name: str) -> Volume | None:
        return next((volume for volume in self.volumes if volume.name == name), None)


class Refusal(Exception):
    """The pod asks for what the node cannot do."""

    def __init__(self, remarks: tuple[Remark, ...]) -> None:
        super().__init__("; ".join(map(str, remarks)))
        self.remarks = remarks


def parse_pod(spec: Fields) -> PodSpec:
    """``spec`` as far as it is read. Raises Refusal, which names every field that cannot be done."""
    refused = tuple(_refused(spec))
    if refused:
        raise Refusal(refused)
    parsed = read_pod(spec)
    refused = tuple(_contradictions(parsed))
    if refused:
        raise Refusal(refused)
    return parsed


def read_pod(spec: Fields) -> PodSpec:
    """``spec`` as far as it is read, of a pod that was accepted. Raises Refusal if it has another shape."""
    try:
        return msgspec.convert(spec, PodSpec)
    except msgspec.ValidationError as error:
        raise Refusal((Remark("spec", str(error)),)) from None


def notes_of(spec: Fields) -> tuple[Remark, ...]:
    """Fields that are not applied although the pod runs."""
    found = _check(spec, PodSpec, "spec")
    return tuple(Remark(path, verdict.why) for path, verdict, _ in found if isinstance(verdict, Noted))


def refused_fields(part: Fields, kind: type[Part], path: str) -> Iterator[Remark]:
    """Fields of ``part``, and of what it consists of, that ``kind`` neither reads nor knows."""
    yield from (Remark(below, why) for below, verdict, why in _check(part, kind, path) if verdict is None)


def _refused(spec: Fields) -> Iterator[Remark]:
    yield from refused_fields(spec, PodSpec, "spec")
    if len(spec.get("containers") or ()) != 1:
        yield Remark("spec.containers", "a pod has exactly one container here")


Verdict = tuple[str, Noted | None, str]
"""Field, a note or None, which is a refusal, and why."""


def _check(part: Fields, kind: type[Part], path: str) -> Iterator[Verdict]:
    """Only of fields that ask for something."""
    read = read_fields(kind)
    for name, value in part.items():
        below = f"{path}.{name}"
        if name in read:
            if (inner := read[name]) is not None:
                for place, each in _each(value, below):
                    yield from _check(each, inner, place)
        elif _asks(name, value):
            other = kind.others.get(name)
            if isinstance(other, Noted):
                yield below, other, other.why
            elif not isinstance(other, Kind) and value not in (other or ()):
                yield below, None, "is not supported by hypeman" if other is None else f"{value!r} is not"


@functools.cache
def read_fields(kind: type[Part]) -> Mapping[str, type[Part] | None]:
    """The fields that are read, by their names in the API, with what they are made of if they have fields as well."""
    return {each.encode_name: _part_of(each.type) for each in msgspec.structs.fields(kind)}


def _part_of(annotation: Any) -> type[Part] | None:
    """The Part in a type such as ``tuple[Part, ...]`` or ``Part | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    return next((found for each in get_args(annotation) if (found := _part_of(each)) is not None), None)


def _each(value: Any, path: str) -> Iterator[tuple[str, Fields]]:
    """The objects of a field that has one or a list of them; other shapes are for ``read_pod`` to refuse."""
    if isinstance(value, Mapping):
        yield path, value
    elif isinstance(value, list | tuple):
        yield from ((f"{path}[{number}]", each) for number, each in enumerate(value) if isinstance(each, Mapping))


def _asks(name: str, value: Any) -> bool:
    if name == "allowPrivilegeEscalation":  # without it nothing is asked for
        return value is False
    return value not in (None, False, "", 0, [], {})


def _contradictions(spec: PodSpec) -> Iterator[Remark]:
    """What only shows in the values."""
    container, path = spec.container, "spec.containers[0]"
    security = spec.security_context
    user = (
        container.security_context.run_as_user
        if container.security_context.run_as_user is not None
        else (security.run_as_user)
    )
    non_root = container.security_context.run_as_non_root
    if (security.run_as_non_root if non_root is None else non_root) and not user:
        yield Remark("spec.securityContext.runAsNonRoot", "needs runAsUser: the image's user is not checked")
    mounts = [mount.name for mount in container.volume_mounts]
    for number, volume in enumerate(spec.volumes):
        if volume == Volume(name=volume.name):
            yield Remark(f"spec.volumes[{number}]", "has no source that is known here")
    for number, mount in enumerate(container.volume_mounts):
        if spec.volume(mount.name) is None:
            yield Remark(f"{path}.volumeMounts[{number}]", f"there is no volume {mount.name!r}")
        elif mounts.index(mount.name) != number:
            yield Remark(f"{path}.volumeMounts[{number}]", "a volume can be mounted once")
    for name, amount in {**container.resources.requests, **container.resources.limits}.items():
        try:
            parse_quantity(amount)
        except BadQuantity:
            yield Remark(f"{path}.resources", f"{name} {amount!r} is not a quantity")
        if name not in ("cpu", "memory", "ephemeral-storage") and not name.startswith((names.GPU, names.VGPU)):
            yield Remark(f"{path}.resources", f"{name} is not supported by hypeman")
