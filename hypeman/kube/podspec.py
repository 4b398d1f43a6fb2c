"""What a pod asks for: read into ``PodSpec``, or refused by the name of the field. Pure.

A pod's spec has some 200 fields. Each is one of these; anything else, also a field that a later version of Kubernetes
adds, is refused if it asks for something (is neither absent nor empty nor false):

    read        decoded into the types below
    elsewhere   done by the scheduler or the API server; there is nothing to do on the node
    noted       cannot be applied, and weakens nothing beyond the VM: the pod runs, with an event that names the field
    default     refused, except with the values given here, which ask for nothing
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from hypeman.kube.quantity import BadQuantity, parse_quantity

Fields = Mapping[str, Any]

READ, ELSEWHERE, NOTED = "read", "elsewhere", "noted"

_POD: Fields = {
    **dict.fromkeys(
        ("containers", "volumes", "restartPolicy", "terminationGracePeriodSeconds", "activeDeadlineSeconds",
         "imagePullSecrets", "hostname", "readinessGates", "securityContext", "serviceAccountName", "nodeName",
         "tolerations"),
        READ,
    ),
    **dict.fromkeys(
        ("nodeSelector", "affinity", "topologySpreadConstraints", "priority", "priorityClassName", "preemptionPolicy",
         "schedulerName", "schedulingGates", "runtimeClassName", "overhead", "serviceAccount", "enableServiceLinks",
         "automountServiceAccountToken", "subdomain", "shareProcessNamespace", "ephemeralContainers", "hostUsers"),
        ELSEWHERE,
    ),
    "dnsPolicy": ("ClusterFirst", "Default"),
    "os": ({"name": "linux"},),
}  # fmt: skip
_CONTAINER: Fields = {
    **dict.fromkeys(
        ("name", "image", "imagePullPolicy", "command", "args", "workingDir", "env", "envFrom", "ports", "resources",
         "volumeMounts", "livenessProbe", "readinessProbe", "startupProbe", "securityContext"),
        READ,
    ),
    "resizePolicy": ELSEWHERE,
    "terminationMessagePath": ("/dev/termination-log",),
    "terminationMessagePolicy": ("File",),
}  # fmt: skip
_POD_SECURITY: Fields = {
    **dict.fromkeys(("runAsUser", "runAsGroup", "runAsNonRoot", "sysctls"), READ),
    "seccompProfile": NOTED,
    "appArmorProfile": NOTED,
    "fsGroupChangePolicy": ELSEWHERE,
}
_SECURITY: Fields = {
    **dict.fromkeys(("runAsUser", "runAsGroup", "runAsNonRoot"), READ),
    **dict.fromkeys(("allowPrivilegeEscalation", "capabilities", "seccompProfile", "appArmorProfile"), NOTED),
    "privileged": ELSEWHERE,
    "procMount": ("Default",),
}
_RESOURCES: Fields = {"limits": READ, "requests": READ}
_MOUNT: Fields = {
    **dict.fromkeys(("name", "mountPath", "readOnly"), READ),
    "mountPropagation": ("None",),
    "recursiveReadOnly": ("Disabled", "IfPossible"),
}
_PORT: Fields = dict.fromkeys(("name", "containerPort", "hostPort", "hostIP", "protocol"), READ)
_ENV: Fields = dict.fromkeys(("name", "value", "valueFrom"), READ)
_ENV_SOURCE: Fields = dict.fromkeys(("configMapKeyRef", "secretKeyRef", "fieldRef", "resourceFieldRef"), READ)
_ENV_FROM: Fields = dict.fromkeys(("prefix", "configMapRef", "secretRef"), READ)
_VOLUME: Fields = dict.fromkeys(
    ("name", "emptyDir", "configMap", "secret", "downwardAPI", "projected", "persistentVolumeClaim"), READ
)
_EMPTY_DIR: Fields = {"sizeLimit": READ}
_CONFIG_MAP: Fields = dict.fromkeys(("name", "items", "optional", "defaultMode"), READ)
_SECRET: Fields = dict.fromkeys(("secretName", "items", "optional", "defaultMode"), READ)
_DOWNWARD: Fields = dict.fromkeys(("items", "defaultMode"), READ)
_PROJECTED: Fields = dict.fromkeys(("sources", "defaultMode"), READ)
_PROJECTION: Fields = dict.fromkeys(("configMap", "secret", "downwardAPI", "serviceAccountToken"), READ)
_CLAIM: Fields = dict.fromkeys(("claimName", "readOnly"), READ)
_PROBE: Fields = {
    **dict.fromkeys(
        ("exec", "httpGet", "tcpSocket", "initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold",
         "successThreshold"),
        READ,
    ),
}  # fmt: skip
_HTTP_GET: Fields = dict.fromkeys(("port", "path", "scheme"), READ)
_TCP: Fields = {"port": READ}


class Remark(Struct, frozen=True, order=True):
    """A field that is refused or noted, and why."""

    field: str
    why: str

    def __str__(self) -> str:
        return f"{self.field}: {self.why}"


# ── What is read ────────────────────────────────────────────────────────────────────────────────


class Part(Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of all parts of a spec."""


class KeyRef(Part, frozen=True):
    key: str
    name: str = ""
    optional: bool = False


class FieldRef(Part, frozen=True):
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
    name: str
    mount_path: str
    read_only: bool = False


class Resources(Part, frozen=True):
    limits: dict[str, str | int] = {}
    requests: dict[str, str | int] = {}


class SecurityContext(Part, frozen=True):
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_non_root: bool | None = None


class Container(Part, frozen=True):
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
    """One of its sources is given."""

    name: str
    empty_dir: EmptyDir | None = None
    config_map: ConfigMapFiles | None = None
    secret: SecretFiles | None = None
    downward_api: DownwardFiles | None = field(name="downwardAPI", default=None)
    projected: Projected | None = None
    persistent_volume_claim: Claim | None = None


class Toleration(Part, frozen=True):
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
    sysctls: tuple[Sysctl, ...] = ()


class PodSpec(Part, frozen=True):
    containers: Annotated[tuple[Container, ...], Meta(min_length=1)]
    volumes: tuple[Volume, ...] = ()
    restart_policy: str = "Always"
    termination_grace_period_seconds: int = 30
    active_deadline_seconds: int | None = None
    image_pull_secrets: tuple[ObjectRef, ...] = ()
    hostname: str = ""
    node_name: str = ""
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
    return tuple(Remark(path, why) for path, verdict, why in _verdicts(spec) if verdict == NOTED)


def _refused(spec: Fields) -> Iterator[Remark]:
    yield from (Remark(path, why) for path, verdict, why in _verdicts(spec) if verdict is None)
    if len(spec.get("containers") or ()) != 1:
        yield Remark("spec.containers", "a pod has exactly one container here")


Verdict = tuple[str, str | None, str]


def _verdicts(spec: Fields) -> Iterator[Verdict]:
    """Field, its kind (None: refused) and why; only of fields that ask for something."""
    yield from _check(spec, _POD, "spec")
    yield from _check(spec.get("securityContext"), _POD_SECURITY, "spec.securityContext")
    for path, volume in _each(spec, "volumes", "spec"):
        yield from _check_volume(volume, path)
    for path, container in _each(spec, "containers", "spec"):
        yield from _check_container(container, path)


def _check_container(container: Fields, path: str) -> Iterator[Verdict]:
    yield from _check(container, _CONTAINER, path)
    yield from _check(container.get("securityContext"), _SECURITY, f"{path}.securityContext")
    yield from _check(container.get("resources"), _RESOURCES, f"{path}.resources")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        probe = container.get(name) or {}
        yield from _check(probe, _PROBE, f"{path}.{name}")
        yield from _check(probe.get("httpGet"), _HTTP_GET, f"{path}.{name}.httpGet")
        yield from _check(probe.get("tcpSocket"), _TCP, f"{path}.{name}.tcpSocket")
    for below, mount in _each(container, "volumeMounts", path):
        yield from _check(mount, _MOUNT, below)
    for below, port in _each(container, "ports", path):
        yield from _check(port, _PORT, below)
    for below, env in _each(container, "env", path):
        yield from _check(env, _ENV, below)
        yield from _check(env.get("valueFrom"), _ENV_SOURCE, f"{below}.valueFrom")
    for below, source in _each(container, "envFrom", path):
        yield from _check(source, _ENV_FROM, below)


def _check_volume(volume: Fields, path: str) -> Iterator[Verdict]:
    yield from _check(volume, _VOLUME, path)
    for name, known in (
        ("emptyDir", _EMPTY_DIR),
        ("configMap", _CONFIG_MAP),
        ("secret", _SECRET),
        ("downwardAPI", _DOWNWARD),
        ("projected", _PROJECTED),
        ("persistentVolumeClaim", _CLAIM),
    ):
        yield from _check(volume.get(name), known, f"{path}.{name}")
    for below, source in _each(volume.get("projected") or {}, "sources", f"{path}.projected"):
        yield from _check(source, _PROJECTION, below)


def _check(part: Fields | None, known: Fields, path: str) -> Iterator[Verdict]:
    for name, value in (part or {}).items():
        kind = known.get(name)
        asks = value not in (None, False, "", 0, [], {}) or name == "emptyDir"
        if kind == NOTED and (value is False if name == "allowPrivilegeEscalation" else asks):
            yield (f"{path}.{name}", NOTED, "is not applied inside the guest; the VM is the boundary")
        elif asks and kind not in (READ, ELSEWHERE, NOTED) and (kind is None or value not in kind):
            yield (f"{path}.{name}", None, "is not supported by hypeman" if kind is None else f"{value!r} is not")


def _each(part: Fields, name: str, path: str) -> Iterator[tuple[str, Fields]]:
    for number, each in enumerate(part.get(name) or ()):
        yield f"{path}.{name}[{number}]", each


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
    names = [mount.name for mount in container.volume_mounts]
    for number, mount in enumerate(container.volume_mounts):
        if spec.volume(mount.name) is None:
            yield Remark(f"{path}.volumeMounts[{number}]", f"there is no volume {mount.name!r}")
        elif names.index(mount.name) != number:
            yield Remark(f"{path}.volumeMounts[{number}]", "a volume can be mounted once")
    for name, amount in {**container.resources.requests, **container.resources.limits}.items():
        try:
            parse_quantity(amount)
        except BadQuantity:
            yield Remark(f"{path}.resources", f"{name} {amount!r} is no quantity")
        if name not in ("cpu", "memory", "ephemeral-storage") and not name.startswith("hypeman.dev/"):
            yield Remark(f"{path}.resources", f"{name} is not supported by hypeman")
