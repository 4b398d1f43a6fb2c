"""Validates every field of a create request and parses its text forms into numbers. Pure; each
refusal has the code that the contract assigns to its field (§2.3, §2.4).
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import msgspec
from msgspec import UNSET

from hypeman.captures.types import CompressionAlgorithm, SnapshotCompressionConfig
from hypeman.config import LimitsConfig, SnapshotsConfig
from hypeman.egress.policy import guest_environment, redirected_ports
from hypeman.egress.rules import check_access
from hypeman.egress.types import CredentialPolicy, EgressAccess
from hypeman.errors import Conflict, InvalidRequest, NotSupported
from hypeman.guest.settings import parse_settings
from hypeman.hypervisor.interface import Capabilities
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.ids import STACK_TAG, Tags, check_name, check_tags
from hypeman.instances.model.policies import check_policies, restart_rules
from hypeman.instances.model.record import InstanceSpec
from hypeman.instances.model.types import (
    CreateInstanceRequest,
    EgressRequest,
    EgressUpdate,
    RestartMode,
    SnapshotPolicy,
    VolumeMount,
)
from hypeman.units import format_size, parse_disk_rate, parse_duration, parse_rate, parse_size

DEFAULT_MEMORY = 1 << 30
DEFAULT_OVERLAY = 10 << 30
DEFAULT_VCPUS = 2
MIN_MEMORY = 64 << 20
"""Minimum memory for a kernel to boot."""
MIN_OVERLAY = 16 << 20
MAX_VOLUME_DISKS = 23
MAX_ENV_BYTES = 512 << 10
_MEMORY_STEP = 2 << 20
"""VMMs require whole huge pages; memory is rounded up to a multiple."""

_KERNEL_DIRS = frozenset(["dev", "proc", "sys"])
"""Kernel file systems of the guest: nothing can be mounted at or below them."""
_SYSTEM_DIRS = frozenset(["bin", "etc", "lib", "lib64", "sbin", "usr"])
"""Directories that the guest boots from: nothing can be mounted on them, only below them."""


MAX_GRACE = 3600.0


def check_create(
    request: CreateInstanceRequest,
    *,
    limits: LimitsConfig,
    kind: HypervisorKind,
    capabilities: Capabilities,
    platform: str,
) -> InstanceSpec:
    """The validated spec of a request. Raises InvalidRequest with the field's code, or NotSupported."""
    check_name(request.name)
    tags = check_instance_tags(request.tags)
    if not request.image:
        raise InvalidRequest("image is empty")
    memory = _memory(request.size, "size", "invalid_size", DEFAULT_MEMORY)
    if memory < MIN_MEMORY:
        raise InvalidRequest(f"size must be at least {format_size(MIN_MEMORY)}", code="invalid_size")
    hotplug = _memory(request.hotplug_size, "hotplug_size", "invalid_hotplug_size", 0)
    most = limits.max_memory_per_instance
    if memory + hotplug > most:
        raise InvalidRequest(
            f"size and hotplug_size together are {format_size(memory + hotplug)}; the limit is {format_size(most)}"
        )
    overlay = parse_size(request.overlay_size, code="invalid_overlay_size") if request.overlay_size else DEFAULT_OVERLAY
    if not MIN_OVERLAY <= overlay <= limits.max_overlay_size:
        raise InvalidRequest(
            f"overlay_size must be {format_size(MIN_OVERLAY)} to {format_size(limits.max_overlay_size)}",
            code="invalid_overlay_size",
        )
    vcpus = request.vcpus or DEFAULT_VCPUS
    if vcpus > limits.max_vcpus_per_instance:
        raise InvalidRequest(f"vcpus is {vcpus}, at most {limits.max_vcpus_per_instance} are allowed")
    if request.idle and request.skip_guest_agent:
        raise InvalidRequest("idle needs the guest agent: nothing else could run a program")
    _check_env(request)
    check_snapshot_policy(request.snapshot_policy)
    check_policies(
        request.auto_standby,
        request.health_check,
        request.restart_policy,
        network=request.network.enabled,
        agent=not request.skip_guest_agent,
    )
    if request.auto_remove and restart_rules(request.restart_policy).mode is not RestartMode.NEVER:
        raise InvalidRequest("auto_remove and a restart policy exclude each other", code="invalid_restart_policy")
    _check_network(request)
    volumes = check_volumes(request.volumes)
    spec = InstanceSpec(
        image=request.image,
        platform=platform,
        hypervisor=kind,
        vcpus=vcpus,
        memory_bytes=memory,
        hotplug_bytes=hotplug,
        overlay_bytes=_rounded(overlay, 1 << 20),
        disk_io_bps=parse_disk_rate(request.disk_io_bps) if request.disk_io_bps else 0,
        env=request.env,
        credentials=request.credentials,
        tags=tags,
        network=request.network.enabled,
        download_bps=_rate(request.network.bandwidth_download, "invalid_bandwidth_download"),
        upload_bps=_rate(request.network.bandwidth_upload, "invalid_bandwidth_upload"),
        groups=tuple(dict.fromkeys(request.network.groups)),
        egress=request.network.egress.enforcement.mode if request.network.egress.enabled else None,
        access=_access(request.network.egress, request.credentials),
        devices=request.devices,
        gpu_profile=(request.gpu.profile or "") if request.gpu else "",
        volumes=volumes,
        entrypoint=request.entrypoint,
        cmd=request.cmd,
        user=request.user or "",
        working_dir=request.working_dir or "",
        hostname=request.hostname or "",
        idle=request.idle,
        skip_guest_agent=request.skip_guest_agent,
        snapshot_policy=request.snapshot_policy,
        auto_standby=request.auto_standby,
        health_check=request.health_check,
        restart_policy=request.restart_policy,
        auto_remove=request.auto_remove,
    )
    _check_capable(spec, kind, capabilities)
    return spec


def check_instance_tags(tags: Mapping[str, str] | None) -> Tags:
    """A copy of ``tags``, settings of the guest among them. Raises InvalidRequest."""
    checked = check_tags(tags)
    parse_settings(checked)
    return checked


def check_same_stack(spec: InstanceSpec, tags: Tags) -> None:
    """Raise Conflict if new ``tags`` move an instance with groups to another stack, whose groups it is not in."""
    if spec.groups and tags.get(STACK_TAG) != spec.tags.get(STACK_TAG):
        raise Conflict(f"tag {STACK_TAG!r} cannot change: the instance's groups are those of its stack; fork it")


def check_grace(text: str | None, default: float) -> float:
    """Seconds that a program may take to end. Raises InvalidRequest ``invalid_grace``."""
    if text is None:
        return default
    grace = parse_duration(text, code="invalid_grace")
    if not 0 <= grace <= MAX_GRACE:
        raise InvalidRequest(f"grace must be between 0s and 1h, not {text}", code="invalid_grace")
    return grace


def expiry(ttl: str | None, expires_at: datetime | None, *, now: datetime) -> datetime | None:
    """When an instance expires: ``ttl`` counts from ``now``; None is never.

    Raises InvalidRequest (``invalid_ttl``, ``invalid_expires_at``).
    """
    if ttl is not None and expires_at is not None:
        raise InvalidRequest("give ttl or expires_at, not both", code="invalid_ttl")
    if ttl is not None:
        seconds = parse_duration(ttl, code="invalid_ttl")
        try:
            return now + timedelta(seconds=seconds) if seconds else None
        except OverflowError:
            raise InvalidRequest(f"ttl {ttl!r} is too long", code="invalid_ttl") from None
    if expires_at is not None and expires_at <= now:
        raise InvalidRequest("expires_at must be in the future", code="invalid_expires_at")
    return expires_at


def check_volumes(volumes: Sequence[VolumeMount]) -> tuple[VolumeMount, ...]:
    """The mounts with normalized paths. Raises InvalidRequest if they break a rule of §2.4."""
    disks = sum(2 if volume.overlay else 1 for volume in volumes)
    if disks > MAX_VOLUME_DISKS:
        raise InvalidRequest(f"the volumes need {disks} disks, {MAX_VOLUME_DISKS} fit (an overlay counts twice)")
    checked: list[VolumeMount] = []
    for volume in volumes:
        path = check_files_path(volume.mount_path) if volume.files else check_mount_path(volume.mount_path)
        if not volume.files and any(path == other.mount_path and not other.files for other in checked):
            raise InvalidRequest(f"two volumes at {path}")
        if any(volume.volume_id == other.volume_id for other in checked):
            raise InvalidRequest(f"volume {volume.volume_id!r} is given twice")
        if volume.overlay and volume.files:
            raise InvalidRequest(f"volume {volume.volume_id!r}: overlay excludes files")
        if volume.overlay:
            if not volume.readonly:
                raise InvalidRequest(f"volume {volume.volume_id!r}: overlay needs readonly")
            size = parse_size(volume.overlay_size or "0", code="invalid_overlay_size")
            if size < MIN_OVERLAY:
                raise InvalidRequest(
                    f"volume {volume.volume_id!r}: overlay_size must be at least {format_size(MIN_OVERLAY)}",
                    code="invalid_overlay_size",
                )
        checked.append(msgspec.structs.replace(volume, mount_path=path))
    return tuple(checked)


def check_files_path(path: str) -> str:
    """``path``, below which files of a volume are mounted one by one, normalized: also the root. Raises
    InvalidRequest."""
    normal = _absolute(path)
    if normal.split("/")[1] in _KERNEL_DIRS:
        raise InvalidRequest(f"files cannot be mounted at or below /{normal.split('/')[1]}")
    return normal


def check_mount_path(path: str) -> str:
    """``path`` normalized. Raises InvalidRequest if no volume may be mounted there."""
    normal = _absolute(path)
    top = normal.split("/")[1]
    if not top:
        raise InvalidRequest("a volume cannot be mounted over the root")
    if top in _KERNEL_DIRS:
        raise InvalidRequest(f"a volume cannot be mounted at or below /{top}")
    if normal.removeprefix("/") in _SYSTEM_DIRS:
        raise InvalidRequest(f"a volume cannot be mounted over {normal}; below it is allowed")
    return normal


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\0" in path or len(path.encode()) > 1024:
        raise InvalidRequest(f"mount path {path!r} must be absolute")
    if ".." in path.split("/"):
        raise InvalidRequest(f"mount path {path!r} must not contain '..'")
    return "/" + posixpath.normpath(path).lstrip("/")


def check_compression(config: SnapshotCompressionConfig | None) -> SnapshotCompressionConfig | None:
    """``config`` if the level fits the algorithm, else InvalidRequest ``invalid_snapshot_compression``."""
    if config is None or not config.enabled or config.level is None:
        return config
    lowest, highest = (0, 9) if config.algorithm is CompressionAlgorithm.LZ4 else (1, 19)
    if not lowest <= config.level <= highest:
        name = config.algorithm or CompressionAlgorithm.ZSTD
        raise InvalidRequest(
            f"compression level {config.level} is not one of {name.value}'s {lowest} to {highest}",
            code="invalid_snapshot_compression",
        )
    return config


def usual_compression(spec: InstanceSpec, settings: SnapshotsConfig) -> SnapshotCompressionConfig | None:
    """Compression when the request specifies none: the instance's policy, else the server's default."""
    policy = spec.snapshot_policy
    if policy is not None and policy.compression is not None:
        return policy.compression
    if not settings.compression:
        return None
    algorithm = CompressionAlgorithm(settings.compression)
    return SnapshotCompressionConfig(enabled=True, algorithm=algorithm, level=settings.level)


def check_snapshot_policy(policy: SnapshotPolicy | None) -> None:
    if policy is None:
        return
    try:
        check_compression(policy.compression)
        if policy.standby_compression_delay is not None:
            parse_duration(policy.standby_compression_delay)
    except InvalidRequest as error:
        raise InvalidRequest(f"snapshot_policy: {error.message}", code="invalid_snapshot_policy") from None


def check_capturable(spec: InstanceSpec, capabilities: Capabilities, what: str) -> None:
    """Raise NotSupported, naming the operation ``what``, if memory of such an instance cannot be saved."""
    if not capabilities.standby:
        raise NotSupported(f"hypervisor {spec.hypervisor.value} cannot save a VM; it cannot be {what}")
    if spec.devices or spec.gpu_profile:
        raise NotSupported(f"an instance with passed-through devices cannot be {what}")
    if spec.skip_guest_agent:
        raise NotSupported(f"an instance without guest agent cannot be {what}")


def guest_env(spec: InstanceSpec) -> Mapping[str, str]:
    """The environment as the guest sees it: a placeholder for each credential, never a real value."""
    return guest_environment(spec.credentials, spec.env)


def _memory(text: str | None, field: str, code: str, default: int) -> int:
    value = parse_size(text, code=code) if text else default
    if value > 1 << 50:
        raise InvalidRequest(f"{field} {text!r} is more than any host has", code=code)
    return _rounded(value, _MEMORY_STEP)


def _rounded(value: int, step: int) -> int:
    return (value + step - 1) // step * step


def _rate(text: str | None, code: str) -> int:
    if not text:
        return 0
    value = parse_rate(text, code=code)
    if value <= 0:
        raise InvalidRequest(f"rate {text!r} must be above 0", code=code)
    return value


def _check_env(request: CreateInstanceRequest) -> None:
    total = 0
    for key, value in request.env.items():
        if not key or "=" in key or "\0" in key or "\0" in value:
            raise InvalidRequest(f"environment variable {key!r} must have a name without '=' and no NUL bytes")
        total += len(key.encode()) + len(value.encode()) + 2
    if total > MAX_ENV_BYTES:
        raise InvalidRequest(f"the environment has {total} bytes, at most {MAX_ENV_BYTES} are allowed")
    if request.credentials and not request.network.egress.enabled:
        raise InvalidRequest("credentials need network.egress.enabled")
    for key, policy in request.credentials.items():
        if not key or "=" in key or "\0" in key:
            raise InvalidRequest(f"credential {key!r} must be the name of an environment variable")
        if policy.source.env is not None and policy.source.env not in request.env:
            raise InvalidRequest(f"credential {key!r}: env has no {policy.source.env!r}")


def _access(request: EgressRequest, credentials: Mapping[str, CredentialPolicy]) -> EgressAccess | None:
    access = EgressAccess(
        rules=request.rules,
        default=request.default,
        observe=request.observe,
        private_networks=request.private_networks,
    )
    if access == EgressAccess():
        return None
    if not request.enabled:
        raise InvalidRequest("network.egress: rules, default, observe and private_networks need enabled")
    return check_access(access, redirected_ports(credentials))


def changed_access(spec: InstanceSpec, update: EgressUpdate) -> EgressAccess | None:
    """Where the instance may go after ``update``. Raises InvalidRequest."""
    if spec.egress is None:
        raise InvalidRequest("network.egress: the egress of this instance is not mediated; create it with enabled")
    before = spec.access or EgressAccess()
    access = EgressAccess(
        rules=before.rules if update.rules is None else update.rules,
        default=before.default if update.default is None else update.default,
        observe=before.observe if update.observe is None else update.observe,
        private_networks=before.private_networks if update.private_networks is UNSET else update.private_networks,
    )
    return check_access(access, redirected_ports(spec.credentials)) if access != EgressAccess() else None


def _check_network(request: CreateInstanceRequest) -> None:
    if request.network.egress.enabled and not request.network.enabled:
        raise InvalidRequest("network.egress needs network.enabled")
    if request.network.groups and not request.network.enabled:
        raise InvalidRequest("network.groups need network.enabled")
    if request.ports and not request.network.enabled:
        raise InvalidRequest("ports need network.enabled", code="invalid_ports")


def _check_capable(spec: InstanceSpec, kind: HypervisorKind, capabilities: Capabilities) -> None:
    for wanted, able, what in (
        (spec.hotplug_bytes, capabilities.hotplug_memory, "hotplug_size"),
        (spec.devices or spec.gpu_profile, capabilities.pci_passthrough, "devices and gpu"),
        (spec.disk_io_bps, capabilities.disk_io_limit, "disk_io_bps"),
    ):
        if wanted and not able:
            raise NotSupported(f"hypervisor {kind.value} cannot do {what}")
    check_disks(spec, kind, capabilities)


def check_disks(spec: InstanceSpec, kind: HypervisorKind, capabilities: Capabilities) -> None:
    """Raises NotSupported if the VM would have more disks than it can."""
    disks = 3 + sum(2 if volume.overlay else 1 for volume in spec.volumes)
    if disks > capabilities.max_disks:
        raise NotSupported(f"hypervisor {kind.value} takes {capabilities.max_disks} disks, this instance needs {disks}")
