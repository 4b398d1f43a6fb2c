"""From a pod to the request for its instance. Pure."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from hypeman.egress.types import CredentialPolicy
from hypeman.instances.model.types import (
    CreateInstanceRequest,
    EgressRequest,
    ExecHealthCheck,
    GpuRequest,
    HealthCheck,
    HealthCheckType,
    HttpHealthCheck,
    NetworkRequest,
    RestartMode,
    RestartPolicy,
    TcpHealthCheck,
    VolumeMount,
)
from hypeman.kube import names
from hypeman.kube.podspec import Container, PodSpec, Probe, Refusal, Remark, Toleration, Volume
from hypeman.kube.quantity import parse_quantity, whole
from hypeman.kube.references import Facts, File, Sources, environment, expand, files, mounted, projections
from hypeman.kube.types import Pod, Secret
from hypeman.network.types import PortMapping, Protocol

GIB = 1 << 30
DEFAULT_MEMORY = GIB
EMPTY_DIR_GB = 10
"""Size of an emptyDir without a sizeLimit; the file on the host is sparse."""
CREDENTIALS_KEY = "credentials.json"
"""Key of the Secret of ``names.CREDENTIALS`` with the rules, as ``credentials`` of ``POST /instances``."""
RESTARTS = {"Always": RestartMode.ALWAYS, "OnFailure": RestartMode.ON_FAILURE, "Never": RestartMode.NEVER}


class Archive(Struct, frozen=True):
    """A volume with files, made for the pod."""

    id: str
    files: tuple[File, ...]


class Disk(Struct, frozen=True):
    """An empty volume, made for the pod."""

    id: str
    size_gb: int


class Wanted(Struct, frozen=True):
    """What has to exist for a pod, in this order."""

    archives: tuple[Archive, ...]
    disks: tuple[Disk, ...]
    request: CreateInstanceRequest


class Placement(Struct, frozen=True):
    """What was found out for the pod beside its objects."""

    claims: Mapping[str, str | None] = {}
    """Name of a claim → its volume's id; None: it has no disk, and only pins the pod."""
    devices: tuple[str, ...] = ()
    """Ids of devices for ``hypeman.dev/gpu-…``."""
    profiles: Mapping[str, str] = {}
    """Suffix of ``hypeman.dev/vgpu-…`` → the profile's name."""
    credentials: Secret | None = None


def vcpus_of(container: Container) -> int | None:
    """What is limited counts, else what is requested; None: the server's default."""
    amount = _amount(container, "cpu")
    return None if amount is None else max(1, math.ceil(parse_quantity(amount)))


def memory_of(container: Container) -> int | None:
    amount = _amount(container, "memory")
    return None if amount is None else whole(amount)


def facts_of(pod: Pod, spec: PodSpec, node: str, address: str) -> Facts:
    cpu, memory = vcpus_of(spec.container), memory_of(spec.container)
    return Facts(pod, node, address, cpu or 1, memory or DEFAULT_MEMORY, spec.container)


def translate(pod: Pod, spec: PodSpec, facts: Facts, sources: Sources, placement: Placement) -> Wanted:
    """Raises Missing while something does not exist yet, Refusal if it cannot be done."""
    container = spec.container
    env = environment(spec, facts, sources)
    credentials, values = credentials_of(placement.credentials)
    storage = _amount(container, "ephemeral-storage")
    memory = memory_of(container)
    archives = tuple(
        Archive(names.volume_id(pod, volume.name), files(volume, facts, sources))
        for volume in mounted(spec)
        if projections(volume)
    )
    request = CreateInstanceRequest(
        name=names.instance_name(pod),
        image=container.image,
        size=None if memory is None else str(memory),
        vcpus=vcpus_of(container),
        overlay_size=None if storage is None else str(whole(storage)),
        env={**env, **values},
        credentials=credentials,
        tags=tags_of(pod, spec, facts.node, credentials=placement.credentials),
        network=NetworkRequest(egress=EgressRequest(enabled=bool(credentials))),
        devices=placement.devices,
        gpu=_gpu(container, placement.profiles),
        volumes=tuple(_mounts(pod, spec, placement)),
        ports=_ports(container),
        health_check=health_check(container),
        restart_policy=RestartPolicy(policy=RESTARTS[spec.restart_policy], backoff="10s", stable_after="10m"),
        entrypoint=tuple(expand(word, env) for word in container.command) or None,
        cmd=_cmd(container, env),
        user=_user(spec),
        working_dir=container.working_dir or None,
        hostname=(spec.hostname or pod.metadata.name)[:63].rstrip(".-"),
    )
    disks = tuple(
        Disk(names.volume_id(pod, volume.name), _empty_dir_gb(volume))
        for volume in mounted(spec)
        if volume.empty_dir is not None
    )
    return Wanted(archives, disks, request)


def tags_of(pod: Pod, spec: PodSpec, node: str, *, credentials: Secret | None = None) -> dict[str, str]:
    """Everything that the node knows of the instance later, without the pod."""
    about = pod.metadata
    tags = {
        names.NODE: node,
        names.POD_UID: about.uid,
        names.POD: about.name,
        names.NAMESPACE: about.namespace,
        names.SELF: names.instance_name(pod),
        names.SPEC: spec_digest(pod),
        names.FENCING: fencing_policy(pod),
        names.TOLERATES: tolerates(spec),
        **{f"hypeman.sysctl.{sysctl.name}": sysctl.value for sysctl in spec.security_context.sysctls},
    }
    if (owner := about.controller) is not None:
        tags[names.OWNER] = f"{owner.api_version} {owner.kind} {owner.name}"
        tags[names.OWNER_UID] = owner.uid
    if credentials is not None:
        tags[names.CREDENTIALS] = credentials.metadata.resource_version
    return tags


def spec_digest(pod: Pod) -> str:
    """Stands for what the guest is made of; the same for a later pod of the same template."""
    hidden = {
        volume.get("name")
        for volume in pod.spec.get("volumes") or ()
        if str(volume.get("name", "")).startswith("kube-api-access-")  # a new name in each pod
    }
    containers = [
        {**each, "volumeMounts": [mount for mount in each.get("volumeMounts") or () if mount.get("name") not in hidden]}
        for each in pod.spec.get("containers") or ()
    ]
    volumes = [volume for volume in pod.spec.get("volumes") or () if volume.get("name") not in hidden]
    return names.digest([containers, volumes, pod.spec.get("securityContext")])


def golden_digest(pod: Pod) -> str:
    """Which golden instance the pod is forked from: one of its own namespace, since memory holds values of Secrets."""
    return names.digest([pod.metadata.namespace, spec_digest(pod)])


FENCING = ("keep", "standby", "stop")


def check_annotations(pod: Pod) -> None:
    """Raises Refusal for a value that says nothing."""
    legal = {names.FENCING: FENCING, names.GOLDEN: ("true", "false")}
    wrong = [
        Remark(f"metadata.annotations[{name}]", f"{value!r} is none of {', '.join(legal[name])}")
        for name, value in pod.metadata.annotations.items()
        if name in legal and value not in legal[name]
    ]
    if wrong:
        raise Refusal(tuple(wrong))


def unknown_annotations(pod: Pod) -> tuple[Remark, ...]:
    """Of ours: a misspelt name, or one of a later version."""
    known = (names.FENCING, names.GOLDEN, names.CREDENTIALS)
    return tuple(
        Remark(f"metadata.annotations[{name}]", "is not known to this version of hypeman")
        for name in pod.metadata.annotations
        if name.startswith("hypeman.dev/") and name not in known
    )


def fencing_policy(pod: Pod) -> str:
    """What happens to the VM after the node lost its lease."""
    wanted = pod.metadata.annotations.get(names.FENCING, "")
    return wanted if wanted in FENCING else "keep" if names.is_retained(pod.metadata.controller) else "standby"


def tolerates(spec: PodSpec) -> str:
    """Seconds for which the pod stays bound to a node that cannot be reached."""
    limits = [toleration.toleration_seconds for toleration in spec.tolerations if _tolerates_unreachable(toleration)]
    if not limits:
        return "0"
    seconds = [limit for limit in limits if limit is not None]
    return str(max(0, min(seconds))) if seconds else names.FOREVER


def _tolerates_unreachable(toleration: Toleration) -> bool:
    if toleration.effect not in ("", "NoExecute"):
        return False
    anything = not toleration.key and toleration.operator == "Exists"
    return anything or toleration.key == "node.kubernetes.io/unreachable"


def check_golden(pod: Pod, spec: PodSpec) -> None:
    """A pod that starts as a fork has nothing of its own. Raises Refusal."""
    wrong: list[Remark] = []
    for number, env in enumerate(spec.container.env):
        if env.value_from is not None and env.value_from.field_ref is not None:
            wrong.append(Remark(f"spec.containers[0].env[{number}].valueFrom.fieldRef", "is the same in all forks"))
    for volume in mounted(spec):
        if any(part.service_account_token for part in projections(volume)):
            continue  # a token is of one pod: it is left out
        wrong.append(Remark(f"spec.volumes {volume.name!r}", "cannot be shared by forks"))
    if any(name.startswith("hypeman.dev/") for name in spec.container.resources.limits):
        wrong.append(Remark("spec.containers[0].resources", "devices cannot be shared by forks"))
    if pod.metadata.annotations.get(names.CREDENTIALS):
        wrong.append(Remark(f"metadata.annotations[{names.CREDENTIALS}]", "a fork has no credentials"))
    if any(port.host_port for port in spec.container.ports):
        wrong.append(Remark("spec.containers[0].ports", "a fork has no published ports"))
    if wrong:
        raise Refusal(tuple(wrong))


def golden_request(wanted: Wanted, digest: str) -> CreateInstanceRequest:
    """The instance that is booted once per host, and forked for each pod."""
    kept = (names.NODE, names.OWNER, names.OWNER_UID, names.NAMESPACE)
    tags = {key: value for key, value in wanted.request.tags.items() if key in kept}
    name = names.golden_name(digest)
    return msgspec.structs.replace(
        wanted.request,
        name=name,
        hostname=None,
        tags={**tags, names.GOLDEN: digest, names.SELF: name},
        volumes=(),
    )


# ── Parts ───────────────────────────────────────────────────────────────────────────────────────


def _amount(container: Container, name: str) -> str | int | None:
    return container.resources.limits.get(name, container.resources.requests.get(name))


def _cmd(container: Container, env: Mapping[str, str]) -> tuple[str, ...] | None:
    args = tuple(expand(word, env) for word in container.args)
    if args or container.command:  # a command replaces the image's arguments as well
        return args
    return None


def _user(spec: PodSpec) -> str | None:
    own, of_pod = spec.container.security_context, spec.security_context
    user = own.run_as_user if own.run_as_user is not None else of_pod.run_as_user
    group = own.run_as_group if own.run_as_group is not None else of_pod.run_as_group
    if user is None and group is None:
        return None
    return str(user or 0) if group is None else f"{user or 0}:{group}"


def _ports(container: Container) -> tuple[PortMapping, ...]:
    try:
        return tuple(
            PortMapping(
                host_port=port.host_port,
                guest_port=port.container_port,
                protocol=Protocol(port.protocol.lower()),
                host_address=port.host_ip,
            )
            for port in container.ports
            if port.host_port
        )
    except ValueError as error:
        raise Refusal((Remark("spec.containers[0].ports", str(error)),)) from None


def _gpu(container: Container, profiles: Mapping[str, str]) -> GpuRequest | None:
    for name, amount in container.resources.limits.items():
        if not name.startswith(names.VGPU) or not whole(amount):
            continue
        if whole(amount) > 1:
            raise Refusal((Remark(f"spec.containers[0].resources.limits[{name}]", "a guest has one vGPU"),))
        return GpuRequest(profile=profiles.get(name.removeprefix(names.VGPU)))
    return None


def _mounts(pod: Pod, spec: PodSpec, placement: Placement) -> list[VolumeMount]:
    found = []
    for mount in spec.container.volume_mounts:
        volume = spec.volume(mount.name)
        assert volume is not None, "checked by parse_pod"
        readonly = mount.read_only or bool(projections(volume))
        identifier: str | None = names.volume_id(pod, volume.name)
        if volume.persistent_volume_claim is not None:
            identifier = placement.claims[volume.persistent_volume_claim.claim_name]
            readonly = readonly or volume.persistent_volume_claim.read_only
        if identifier is not None:
            found.append(VolumeMount(volume_id=identifier, mount_path=mount.mount_path, readonly=readonly))
    return found


def _empty_dir_gb(volume: Volume) -> int:
    limit = volume.empty_dir.size_limit if volume.empty_dir is not None else None
    return EMPTY_DIR_GB if limit in (None, "0", 0) else max(1, math.ceil(whole(limit or 0) / GIB))


def health_check(container: Container) -> HealthCheck | None:
    """The liveness probe; the startup probe gives it time. Raises Refusal."""
    probe = container.liveness_probe
    if probe is None:
        return None
    start = probe.initial_delay_seconds
    if (startup := container.startup_probe) is not None:
        start = max(start, startup.initial_delay_seconds + startup.period_seconds * startup.failure_threshold)
    check = HealthCheck(
        interval=f"{probe.period_seconds}s",
        timeout=f"{probe.timeout_seconds}s",
        start_period=f"{start}s",
        failure_threshold=probe.failure_threshold,
        success_threshold=1,
    )
    return msgspec.structs.replace(check, **_action(probe, container))


def _action(probe: Probe, container: Container) -> dict[str, object]:
    if probe.exec is not None:
        return {"type": HealthCheckType.EXEC, "exec": ExecHealthCheck(command=probe.exec.command)}
    if probe.http_get is not None:
        port, scheme = port_number(probe.http_get.port, container), probe.http_get.scheme.lower()
        http = HttpHealthCheck(
            port=port,
            path=probe.http_get.path,
            scheme=scheme,  # type: ignore[arg-type]  # one of the two, as the API server has checked
            expected_status=200,
            expected_status_max=399,
        )
        return {"type": HealthCheckType.HTTP, "http": http}
    if probe.tcp_socket is not None:
        return {"type": HealthCheckType.TCP, "tcp": TcpHealthCheck(port=port_number(probe.tcp_socket.port, container))}
    raise Refusal((Remark("spec.containers[0].livenessProbe", "names no action"),))


def port_number(port: int | str, container: Container) -> int:
    """A port that may be named. Raises Refusal."""
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for known in container.ports:
        if known.name == port:
            return known.container_port
    raise Refusal((Remark("spec.containers[0]", f"a probe names the port {port!r}, which is not among its ports"),))


def credentials_secret(pod: Pod, spec: PodSpec) -> str:
    """Name of the Secret whose values stay on the host; empty: none. Raises Refusal.

    A node may read the Secrets that pods on it refer to in their spec: an annotation alone gives no right.
    """
    name = pod.metadata.annotations.get(names.CREDENTIALS, "")
    if not name:
        return ""
    field = f"metadata.annotations[{names.CREDENTIALS}]"
    volume = next(
        (volume for volume in spec.volumes if volume.secret is not None and volume.secret.secret_name == name), None
    )
    if volume is None:
        raise Refusal((Remark(field, f"needs {name!r} in spec.volumes, which lets the node read it"),))
    if volume in mounted(spec):
        raise Refusal((Remark(field, f"the values of {name!r} are not to be mounted in the guest"),))
    return name


def credentials_of(secret: Secret | None) -> tuple[dict[str, CredentialPolicy], dict[str, str]]:
    """Rules, and real values by the name of their ``source.env``. Raises Refusal."""
    if secret is None:
        return {}, {}
    where = f"secret {secret.metadata.name!r}"
    data = {key: _decoded(value, where) for key, value in secret.data.items()}
    try:
        rules = msgspec.json.decode(data.get(CREDENTIALS_KEY, "{}"), type=dict[str, CredentialPolicy])
    except msgspec.DecodeError as error:
        raise Refusal((Remark(f"{where} {CREDENTIALS_KEY}", str(error)),)) from None
    if named := sorted(name for name, policy in rules.items() if policy.source.named is not None):
        raise Refusal((Remark(f"{where} {CREDENTIALS_KEY}", f"{json.dumps(named)} name a source of the host"),))
    needed = {policy.source.env for policy in rules.values() if policy.source.env is not None}
    if lacking := sorted(needed - set(data)):
        raise Refusal((Remark(where, f"lacks {json.dumps(lacking)}"),))
    return rules, {name: data[name] for name in needed}


def _decoded(value: str, where: str) -> str:
    try:
        return base64.b64decode(value).decode()
    except ValueError:
        raise Refusal((Remark(where, "has a value that is not text"),)) from None
