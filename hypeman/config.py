"""The server's settings: one frozen tree, read once at start.

Order of precedence: environment > drop-ins > file > default. The file is YAML. Drop-ins are ``config.d/*.yaml`` beside
it, in the order of their names: sections are merged key by key, any other value (lists included) replaces the earlier
one. So an image, a bundle or a tool sets one key without rewriting the file. An environment variable is the
path of the key in upper case with ``__`` between the levels (``NETWORK__SUBNET_CIDR``); a top-level
key has no prefix (``JWT_SECRET``). An unknown key, or a value out of bounds or of the wrong type, is
refused at start with its full name: a typo must never silently become a default.
Sizes and rates are written as text (``32GB``) and decoded here, once: other modules see bytes.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import yaml
from msgspec import Meta

from hypeman.errors import HypemanError, InvalidRequest
from hypeman.paths import Paths
from hypeman.units import parse_rate, parse_size

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Ratio = Annotated[float, Meta(gt=0)]

_PARSERS: Mapping[str, Callable[[str], int]] = {"size": parse_size, "rate": parse_rate}
"""Parsers of text values, by ``Meta.extra["text"]``."""

Size = Annotated[int, Meta(ge=0, extra={"text": "size"})]
"""Bytes; text as ``32GB`` in the file and the environment, where empty is 0."""
PositiveSize = Annotated[int, Meta(ge=1, extra={"text": "size"})]
Rate = Annotated[int, Meta(ge=0, extra={"text": "rate"})]
"""Bytes per second; text as ``10gbps`` or ``500MB/s`` in the file and the environment, where empty is 0."""

HypervisorChoice = Literal["", "cloud-hypervisor", "firecracker", "qemu", "qemu-microvm"]
"""Empty, or a kind that ``hypervisor/drivers.py`` has a driver for; a test compares them."""

MIN_SECRET_BYTES = 32
"""Required by RFC 7518 for HS256."""

CONFIG_FILES = ("/etc/hypeman/config.yaml", "~/.config/hypeman/config.yaml")


class ConfigError(HypemanError):
    """The settings cannot be used; the message names the key."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A group of settings that refuses unknown keys."""


class HypervisorConfig(_Section, frozen=True):
    default: HypervisorChoice = ""
    """Hypervisor if a create request names none; empty: cloud-hypervisor if installed and KVM works, else qemu."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """``auto``: KVM if the probe kernel runs on it, else TCG."""
    kvm_patience: Annotated[float, Meta(gt=0)] = 10.0
    """Seconds to wait for output from the probe kernel before treating KVM as unusable; more where KVM is nested."""
    kernel: str = ""
    """Guest kernel (x86-64: an uncompressed PVH ``vmlinux``; arm64: ``Image``); empty: the one shipped with hypeman."""
    initrd: str = ""
    """Initrd of guests, with the agent; empty: the one shipped with hypeman."""
    qemu_binary: str = ""
    """Path of the binary; empty: ``qemu-system-x86_64`` or ``qemu-system-aarch64`` in PATH."""
    cloud_hypervisor_binary: str = ""
    """Path of the binary; empty: ``cloud-hypervisor`` in PATH."""
    firecracker_binary: str = ""
    """Path of the binary; empty: ``firecracker`` in PATH."""
    jailer_binary: str = ""
    """Path of Firecracker's jailer; empty: ``jailer`` in PATH."""
    uid_base: Annotated[int, Meta(ge=0, le=2**31)] = 510000
    """Each VMM runs as ``uid_base`` plus a unique number; 0 runs all as the server's user."""


class LimitsConfig(_Section, frozen=True):
    max_vcpus_per_instance: Positive = 16
    """Maximum per instance."""
    max_memory_per_instance: PositiveSize = 32 << 30
    """Maximum per instance, including hotplugged memory."""
    max_overlay_size: PositiveSize = 100 << 30
    """Maximum size of the writable layer over an image."""
    max_concurrent_builds: Positive = 1
    """Concurrent image conversions."""
    max_total_volume_storage: Size = 0
    """Maximum total size of all volumes; 0: no limit."""
    max_log_size: PositiveSize = 50 << 20
    """An instance's log file is rotated above this size; one old file is kept, emptied above four times this size."""


class OversubscriptionConfig(_Section, frozen=True):
    cpu: Ratio = 16.0
    """Overcommit factor of the processors for running instances, which share them by weight: idle ones cost nothing."""
    memory: Ratio = 1.0
    """Overcommit factor of memory."""
    disk: Ratio = 1.0
    """Overcommit factor of disk space; guest disks are sparse."""
    network: Ratio = 2.0
    """Overcommit factor of the uplink's capacity."""
    disk_io: Ratio = 2.0
    """Overcommit factor of the disk rate."""


class CapacityConfig(_Section, frozen=True):
    """Capacity of the host, to override detection. 0: detected."""

    cpu: Annotated[int, Meta(ge=0)] = 0
    """Processors."""
    memory: Size = 0
    """Memory for guests."""
    disk: Size = 0
    """Disk below ``data_dir``."""
    network: Rate = 0
    """A rate such as ``10gbps``. Limiting by share requires it, or a link speed reported by the uplink."""
    disk_io: Rate = 0
    """A rate such as ``500MB/s``. Limiting by share requires it."""


class ReclaimConfig(_Section, frozen=True):
    """Memory that guests lend to the host on ``POST /resources/memory/reclaim``."""

    enabled: bool = True
    """Whether reclaim is enabled."""
    floor: Size = 256 << 20
    """Minimum memory that a guest keeps."""
    floor_percent: Annotated[int, Meta(ge=0, le=100)] = 50
    """Minimum fraction of its memory that a guest keeps."""


class ImagesConfig(_Section, frozen=True):
    root_fs: Literal["erofs", "ext4"] = "erofs"
    """File system of image disks; ``erofs`` is compressed and read-only."""
    insecure_registries: tuple[str, ...] = ()
    """``host[:port]`` of registries that use plain HTTP."""
    mirrors: dict[str, tuple[str, ...]] = {}
    """Registry host → mirrors to try first."""
    ca_file: str = ""
    """CA certificates for verifying registries; empty: the system's."""
    docker_config: str = ""
    """A docker ``config.json`` with credentials; empty: ``~/.docker/config.json`` of the server's user."""
    max_concurrent_downloads: Positive = 4
    """Concurrent layer downloads, over all images."""
    blob_cache_size: Size = 10 << 30
    """Size of the cache of compressed layers; the least recently used are evicted first."""
    max_image_size: PositiveSize = 50 << 30
    """Maximum unpacked size of all layers of an image."""
    max_uploads_size: PositiveSize = 100 << 30
    """Maximum size of all uploads to the registry (``/v2``) that are not complete. They leave 256 MB of the disk free
    in any case."""
    max_registry_size: Size = 0
    """Maximum size of all blobs that the registry keeps: pushed ones, results and caches of builds, and those of images
    that clients have pulled from here. 0: as much as fits."""
    max_image_entries: Positive = 2_000_000
    """Maximum number of files and directories in an image."""
    import_paths: tuple[str, ...] = ()
    """Directories from which the server may import archives by path."""


class BuildConfig(_Section, frozen=True):
    """Builds of images from source (``POST /builds``, ``hypeman build``)."""

    image: str = "docker.io/moby/buildkit:v0.34.2"
    """Image of the VMs in which builds run: BuildKit (buildkitd, buildctl), runc and a shell. ``make builder-image``
    makes one for hosts without access to a registry."""
    max_concurrent_source_builds: Positive = 2
    """Maximum number of builds that run at a time; the others wait."""
    timeout: Positive = 600
    """Seconds for a build that requests no other limit."""
    disk_size: Annotated[int, Meta(ge=1 << 30, extra={"text": "size"})] = 10 << 30
    """Size of a builder's cache, and of the disk of a build without a builder; a sparse file."""
    max_source_size: PositiveSize = 4 << 30
    """Maximum size of a compressed context."""
    max_sources_size: PositiveSize = 20 << 30
    """Maximum size of the contexts of all builds that wait or run; requests for more get ``insufficient_resources``."""
    secrets_dir: str = ""
    """Directory with secrets for builds that name them without a value, one file each; empty: none."""
    builder_idle_days: Annotated[float, Meta(ge=0)] = 0.0
    """Days after which unused builders are deleted with their cache; 0: never."""


class NetworkConfig(_Section, frozen=True):
    subnet_cidr: str = "10.100.0.0/16"
    """Subnet of the guests' addresses."""
    gateway: str = ""
    """Gateway address on every TAP; empty: the first address of the subnet."""
    dns_server: str = "1.1.1.1"
    """DNS server for all names but those of ``domain``; guests ask the gateway, which asks this one."""
    domain: str = "hypeman.local"
    """Domain of names in the guests' network: ``<instance>.<domain>`` for those that reach it, ``gateway.<domain>`` for
    the gateway. Empty: no such names; guests ask ``dns_server`` directly."""
    hosts_file: str = ""
    """Opt-in: ``/etc/hosts``, for the host to know ``<instance>.<domain>`` of running instances. The server keeps a
    marked block in it, which is removed with the appliance. Restart the server after the file was replaced by another
    one, as some editors do. Empty: no file is written."""
    uplink: str = ""
    """Uplink interface; empty: that of the default route."""
    bridge_name: str = ""
    """Ignored; accepted for compatibility with the original's configuration files. There is no bridge."""
    allow_private: bool = True
    """Whether guests' direct traffic reaches private networks behind the uplink (RFC 1918, 100.64.0.0/10, services of
    cloud providers at 168.63.129.16 and 100.100.100.200, and the like). Off is recommended: then only ``dns_server`` is
    reached there, on port 53. Mediated connections have ``egress.allow_private`` instead; link-local addresses are
    never reached."""
    guest_to_guest: bool = False
    """Whether guests can reach each other."""
    default_limits: bool = True
    """Give instances without explicit limits a share of the uplink's capacity, if it is known."""


class EgressBounds(_Section, frozen=True):
    connections: Annotated[int, Meta(ge=2)] = 4096
    """Connections from guests."""
    upstreams: Annotated[int, Meta(ge=2)] = 2048
    """Connections to hosts, idle ones included."""
    streams: Annotated[int, Meta(ge=2)] = 4096
    """Requests that are not complete."""
    handshakes: Annotated[int, Meta(ge=2)] = 256
    """TLS handshakes with guests that are not complete, and long key derivations for Postgres."""
    descriptors: Annotated[int, Meta(ge=8)] = 8192
    """File descriptors."""
    buffers: PositiveSize = 64 << 20
    """Bytes in buffers; beyond that, connections are read only as their bytes are taken on."""


class EgressTotals(_Section, frozen=True):
    connections: Annotated[int, Meta(ge=2)] = 65536
    """Connections from guests."""
    upstreams: Annotated[int, Meta(ge=2)] = 65536
    """Connections to hosts, idle ones included."""
    streams: Annotated[int, Meta(ge=2)] = 131072
    """Requests that are not complete."""
    handshakes: Annotated[int, Meta(ge=2)] = 4096
    """TLS handshakes with guests that are not complete, and long key derivations for Postgres."""
    descriptors: Annotated[int, Meta(ge=8)] = 262144
    """File descriptors; no more than the process may have."""
    buffers: PositiveSize = 1 << 30
    """Bytes in buffers; beyond that, connections are read only as their bytes are taken on."""


class CredentialSourceConfig(_Section, frozen=True):
    """One value for guests' requests; exactly one of ``file``, ``systemd`` and ``exec``."""

    hosts: Annotated[tuple[str, ...], Meta(min_length=1)]
    """The only hosts that may be sent the value: names, or ``*.x.y`` for one label."""
    file: Annotated[str, Meta(pattern="^(/.*)?$")] = ""
    """Absolute path of a file with the value; read again when it changes."""
    systemd: Annotated[str, Meta(pattern="^[^/]*$")] = ""
    """Name of a systemd credential of the server's unit (``LoadCredential=``)."""
    exec: tuple[str, ...] = ()
    """A program and its arguments, which writes JSON."""
    timeout: Annotated[float, Meta(gt=0, le=300)] = 10.0
    """Seconds that the program may take."""
    lifetime: Annotated[float, Meta(ge=1, le=30 * 86400)] = 3600.0
    """Seconds after which the program is run again, if its output does not say when it expires."""


class EgressConfig(_Section, frozen=True):
    port: Port = 18080
    """Port on the gateway where mediated connections end; never reachable from elsewhere."""
    loops: Annotated[int, Meta(ge=0, le=64)] = 0
    """Number of threads; 0: one per core, at most 4."""
    allow_private: tuple[str, ...] = ()
    """CIDRs of private upstreams that guests may reach through the proxy."""
    upstream_ca_file: str = ""
    """Additional CA certificates, besides the system's, for verifying upstreams."""
    intercept_all: bool = False
    """Also decrypt connections to hosts without a rule; by default they are passed through encrypted."""
    per_instance: EgressBounds = EgressBounds()
    """What one instance may hold at once, at most half of ``total``."""
    total: EgressTotals = EgressTotals()
    """What all instances may hold together."""
    approval_timeout: Annotated[float, Meta(gt=0, le=600)] = 60
    """Seconds that a request is held for an approval, where a rule asks for one."""
    drain_timeout: Annotated[float, Meta(gt=0, le=30 * 86400)] = 4 * 3600
    """Maximum seconds that connections continue in the previous engine process after an upgrade replaced it."""
    sources: dict[Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9_-]{0,62}$")], CredentialSourceConfig] = {}
    """Name → value that credentials of instances may use by ``source.named``, with ``hosts`` and one of ``file``,
    ``systemd`` and ``exec``: [hypeman/egress/README.md](../hypeman/egress/README.md#sources)."""


class CertificateFilesConfig(_Section, frozen=True):
    """A certificate and its key, which are renewed by other software."""

    certificate: str
    """PEM: the certificate, then its chain."""
    key: str
    """PEM without a password."""


class IngressConfig(_Section, frozen=True):
    certificates: dict[Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9_-]{0,62}$")], CertificateFilesConfig] = {}
    """Name → ``certificate`` and ``key``: absolute paths of PEM files, for ingresses with ``tls`` whose host name is in
    the certificate. Files that change are read again within seconds."""
    internal_domains: str = ""
    """Further names that get their certificates from the internal CA (``hypeman ingress ca``): exact names,
    ``*.domain`` for one label, or ``*``, separated by commas. Names of one label, below ``network.domain``,
    ``.internal``, ``.local``, ``.localhost``, ``.test`` and ``.home.arpa`` always do."""


class AcmeConfig(_Section, frozen=True):
    """A public CA that certifies host names of ingresses."""

    allowed_domains: str = ""
    """Names that may get certificates from the CA: exact names, ``*.domain`` for one label, or ``*``, separated by
    commas. Setting it accepts the CA's terms of service. Empty: ACME is not used."""
    email: str = ""
    """Contact address of the account at the CA; may be empty."""
    ca: Annotated[str, Meta(pattern="^(https://[^\\s]+)?$")] = ""
    """URL of the CA's directory; empty: Let's Encrypt."""
    staging: bool = False
    """Whether to use Let's Encrypt's staging environment, whose certificates no client trusts and whose rate limits are
    high; only with ``ca`` empty."""
    ca_file: str = ""
    """CA certificates for verifying the connection to the CA; empty: the system's."""
    eab_key_id: str = ""
    """External account binding: key identifier, for CAs that require one."""
    eab_hmac_key: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]*$")] = ""
    """External account binding: key, in base64url as the CA provides it."""
    profile: str = ""
    """Certificate profile of the CA, for example ``shortlived``; empty: its default."""


class DevicesConfig(_Section, frozen=True):
    sysfs_root: str = "/sys"
    """For tests."""
    dev_root: str = "/dev"
    """For tests."""
    pci_ids: str = ""
    """The pci.ids file; empty: the system's, else the one shipped with hypeman."""


class MetricsConfig(_Section, frozen=True):
    listen_address: str = "127.0.0.1"
    """Address on which metrics are served, without a token."""
    port: Port = 9464
    """Port of the metrics."""
    enabled: bool = True
    """Whether metrics are served."""
    per_instance: Annotated[int, Meta(ge=0, le=100_000)] = 200
    """Maximum number of running instances with series of their own, the oldest first; 0: none."""


class TracesConfig(_Section, frozen=True):
    keep: Annotated[int, Meta(ge=0, le=10_000)] = 256
    """Operations whose phases are kept in memory for ``hypeman trace``; each takes about 10 KB."""


class UsageConfig(_Section, frozen=True):
    """The ledger of what instances used."""

    interval: Annotated[float, Meta(ge=1, le=3600)] = 60.0
    """Seconds between two samples."""
    hourly_days: Annotated[int, Meta(ge=1, le=3650)] = 35
    """Days for which usage is kept by hour; then by day."""
    max_days: Annotated[int, Meta(ge=2, le=36500)] = 400
    """Days for which usage is kept."""


class OtlpConfig(_Section, frozen=True):
    """Export of traces and metrics to an OpenTelemetry collector."""

    endpoint: Annotated[str, Meta(pattern="^(https?://[^/?#@\\s]+(/[^?#\\s]*)?)?$")] = ""
    """Base URL of OTLP over HTTP, as in ``http://127.0.0.1:4318``; JSON goes to ``/v1/traces`` and ``/v1/metrics``
    below it. Empty: no export."""
    headers: dict[str, str] = {}
    """Sent with each request, for example ``authorization``."""
    traces: bool = True
    """Whether traces of operations are exported."""
    metrics: bool = True
    """Whether metrics are exported."""
    metrics_interval: Annotated[float, Meta(ge=1, le=3600)] = 60.0
    """Seconds between two exports of the metrics."""
    timeout: Annotated[float, Meta(gt=0, le=120)] = 10.0
    """Seconds for one request."""
    queue: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096
    """Maximum number of phases that wait for the collector; beyond that the oldest are dropped."""
    ca_file: str = ""
    """CA certificates to trust in addition to the system's."""
    attributes: dict[str, str] = {}
    """Attributes of the resource besides ``service.name``, ``service.version``, ``host.name``, or in their place."""


class LogConfig(_Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum level that is logged."""
    format: Literal["json", "text"] = "json"
    """One JSON object per line, or text."""


class SocketConfig(_Section, frozen=True):
    path: str = ""
    """Empty: ``<run_dir>/hypeman.sock``; ``none`` for no socket."""
    mode: Annotated[str, Meta(pattern="^0?[0-7]{3}$")] = "0660"
    """Permission bits of the socket."""
    group: str = ""
    """Group that owns the socket; its members have root on the host. Empty: root. The package sets ``hypeman``."""
    trusted: bool = True
    """Users who can open the socket need no token."""


class SnapshotsConfig(_Section, frozen=True):
    compression: Literal["", "zstd", "lz4"] = ""
    """Default for standby and snapshots; empty: none."""
    level: Annotated[int, Meta(ge=0, le=19)] = 1
    """Higher is smaller and slower; 1 to 19 for zstd, 0 to 9 for lz4."""


class AutoStandbyConfig(_Section, frozen=True):
    max_concurrent: Positive = 16
    """Maximum number of instances that enter standby by themselves at a time."""


class RestartConfig(_Section, frozen=True):
    max_concurrent: Positive = 8
    """Maximum number of instances that restart policies start at a time, for example after a reboot of the host."""


class HealthChecksConfig(_Section, frozen=True):
    max_concurrent: Positive = 64
    """Maximum number of health checks in progress; the others wait for their turn."""


class WebhookConfig(_Section, frozen=True):
    """One receiver of events."""

    url: Annotated[str, Meta(pattern="^https?://[^/?#@\\s]+(/[^\\s]*)?$")]
    """``https://…``; plain HTTP only with ``allow_private``."""
    secret: Annotated[str, Meta(min_length=16)]
    """Signs each delivery (HMAC-SHA256); base64 after ``whsec_``, else the bytes of the text."""
    types: tuple[str, ...] = ()
    """Event types, or kinds for all types of a kind; empty: all."""
    tags: dict[str, str] = {}
    """Only events of objects that have all of these tags."""
    allow_private: bool = False
    """Whether the receiver may have a private or loopback address."""
    ca_file: str = ""
    """CA certificates to trust in addition to the system's."""
    timeout: Annotated[float, Meta(gt=0, le=120)] = 10.0
    """Seconds for one delivery."""
    retry_hours: Annotated[float, Meta(ge=0, le=720)] = 24.0
    """An event that the receiver does not accept for so long is skipped."""


class EventsConfig(_Section, frozen=True):
    """The log of life-cycle changes."""

    max_count: Annotated[int, Meta(ge=100, le=1_000_000)] = 50_000
    """Maximum number of retained events; the oldest are dropped."""
    max_days: Annotated[float, Meta(gt=0, le=3650)] = 30.0
    """Events are dropped after this many days."""
    webhooks: dict[Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9_-]{0,62}$")], WebhookConfig] = {}
    """Name → receiver of events, with ``url``, ``secret`` and optionally ``types``, ``tags``, ``allow_private``,
    ``ca_file``, ``timeout``, ``retry_hours``: [hypeman/events/README.md](../hypeman/events/README.md#webhooks)."""


class NodeConfig(_Section, frozen=True):
    """The host as a node of a Kubernetes cluster (``hypeman node``); the server itself does not use it."""

    name: Annotated[str, Meta(pattern="^[a-z0-9.-]*$", max_length=253)] = ""
    """Name of the node; empty: the host name in lower case."""
    kubeconfig: str = "/etc/hypeman/kubeconfig"
    """The kubeconfig of the node, with a token or a client certificate; used if it exists."""
    bootstrap_kubeconfig: str = "/etc/hypeman/bootstrap-kubeconfig"
    """Otherwise: a kubeconfig with a bootstrap token, with which the node requests its client certificate.
    `hypeman node join` writes it."""
    server: Annotated[str, Meta(pattern="^(https?://[^\\s]+)?$")] = ""
    """URL of the cluster's API server; empty: that of the kubeconfig."""
    state_dir: str = "/var/lib/hypeman-node"
    """Directory for the node's keys and certificates."""
    base_url: Annotated[str, Meta(pattern="^((https?|unix)://[^\\s]+)?$")] = ""
    """The server of this host: ``http://…``, ``https://…`` or ``unix:///path``; empty: its socket."""
    api_key: str = ""
    """Token for ``base_url``; its socket needs none."""
    address: str = ""
    """Address at which the cluster reaches this host; empty: that of the default route."""
    port: Port = 10250
    """TCP port of the kubelet's API (logs, exec, stats)."""
    labels: dict[str, str] = {}
    """Further labels of the node."""
    max_pods: Positive = 110
    """Maximum number of pods."""
    lease_duration: Annotated[int, Meta(ge=3, le=3600)] = 40
    """Seconds that a heartbeat is valid; renewed four times as often."""
    fence_after: Annotated[float, Meta(ge=1)] = 50.0
    """Seconds without a heartbeat after which the cluster starts to move pods elsewhere: the controller manager's
    ``--node-monitor-grace-period``, or less. A pod is fenced so long, plus its own toleration of an unreachable node,
    after the last heartbeat."""


class Config(_Section, frozen=True):
    listen_address: str = "127.0.0.1"
    """TCP address of the API. It uses plain HTTP: expose it to others only through a TLS proxy."""
    port: Port = 8080
    """TCP port of the API; 0: only the socket."""
    jwt_secret: str = ""
    """Signs the tokens; at least 32 bytes (for example from ``openssl rand -hex 32``). Empty: no access over TCP."""
    data_dir: str = "/var/lib/hypeman"
    """Directory for images, disks and records."""
    run_dir: str = "/run/hypeman"
    """Directory for sockets, on a file system that a reboot clears."""
    request_timeout: Annotated[float, Meta(gt=0)] = 60.0
    """Maximum seconds for a request, except streams and waits."""
    socket: SocketConfig = SocketConfig()
    hypervisor: HypervisorConfig = HypervisorConfig()
    limits: LimitsConfig = LimitsConfig()
    oversubscription: OversubscriptionConfig = OversubscriptionConfig()
    capacity: CapacityConfig = CapacityConfig()
    reclaim: ReclaimConfig = ReclaimConfig()
    images: ImagesConfig = ImagesConfig()
    build: BuildConfig = BuildConfig()
    network: NetworkConfig = NetworkConfig()
    egress: EgressConfig = EgressConfig()
    ingress: IngressConfig = IngressConfig()
    acme: AcmeConfig = AcmeConfig()
    devices: DevicesConfig = DevicesConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()
    auto_standby: AutoStandbyConfig = AutoStandbyConfig()
    restart: RestartConfig = RestartConfig()
    health_checks: HealthChecksConfig = HealthChecksConfig()
    metrics: MetricsConfig = MetricsConfig()
    traces: TracesConfig = TracesConfig()
    otlp: OtlpConfig = OtlpConfig()
    usage: UsageConfig = UsageConfig()
    log: LogConfig = LogConfig()
    events: EventsConfig = EventsConfig()
    node: NodeConfig = NodeConfig()

    @property
    def paths(self) -> Paths:
        return Paths(Path(self.data_dir), Path(self.run_dir))

    def __repr__(self) -> str:
        return f"Config(data_dir={self.data_dir!r}, port={self.port})"  # the secret stays out of logs


def load_config(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """The settings from ``path`` (or the first of CONFIG_FILES that exists) and the environment.

    Raises ConfigError naming the key or the file.
    """
    file = path or next((found for name in CONFIG_FILES if (found := Path(name).expanduser()).is_file()), None)
    tree: dict[str, Any] = {}
    for each in [file, *drop_ins(file)] if file else []:
        part = _read_yaml(each)
        _convert(part, str(each))  # names the file that is wrong
        _merge(tree, part)
    for name, text in environ.items():
        keys = _key_of_variable(name)
        if keys is not None:
            _set_in(tree, keys, _value_of_variable(keys, text))
    config = _convert(tree, "the environment")
    _check(config)
    return config


def drop_ins(file: Path) -> list[Path]:
    """The drop-ins of the settings ``file``, in the order in which they apply; no hidden files."""
    return sorted(found for found in file.with_name("config.d").glob("[!.]*.yaml") if found.is_file())


def _merge(tree: dict[str, Any], later: dict[str, Any]) -> None:
    """Merge ``later`` into ``tree``: mappings key by key, any other value replaces."""
    for key, value in later.items():
        below = tree.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)
        else:
            tree[key] = value


def _convert(tree: dict[str, Any], where: str) -> Config:
    """``tree``, whose texts are parsed in place, as Config. Raises ConfigError with ``where``."""
    _parse_texts(tree, Config, "", where)
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration: {_named(str(error))} (in {where})") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file {file} cannot be read: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file {file} must hold keys and values")
    return tree


def _key_of_variable(name: str) -> tuple[str, ...] | None:
    """("network", "dns_server") for NETWORK__DNS_SERVER; None for unrelated variables.

    Only existing sections and top-level keys are accepted, since the environment is shared with others;
    below an existing section every name is, so that a typo there is refused.
    """
    keys = tuple(name.lower().split("__"))
    types = _field_types(Config)
    if name != name.upper() or keys[0] not in types:
        return None
    is_section = _is_section(types[keys[0]])
    if len(keys) == 1:
        return None if is_section else keys
    return keys if is_section else None


def _value_of_variable(keys: tuple[str, ...], text: str) -> object:
    """``text`` as the key's type: strings are taken literally, everything else is parsed as YAML."""
    wanted: Any = Config
    for key in keys:
        wanted = _field_types(wanted).get(key) if _is_section(wanted) else None
    if wanted is str or getattr(wanted, "__origin__", None) is str or _choices(wanted) or _parser(wanted):
        return text
    return yaml.safe_load(text)


def _parse_texts(tree: dict[str, Any], section: Any, prefix: str, where: str) -> None:
    """Replace the text of sizes and rates in ``tree``, which may have any shape, with numbers."""
    for name, kind in _field_types(section).items():
        value = tree.get(name)
        if _is_section(kind):
            if isinstance(value, dict):
                _parse_texts(value, kind, f"{prefix}{name}.", where)
        elif (parse := _parser(kind)) is not None and isinstance(value, str):
            try:
                tree[name] = parse(value or "0")
            except InvalidRequest as error:
                raise ConfigError(f"configuration: {prefix}{name}: {error.message} (in {where})") from None


def _parser(kind: Any) -> Callable[[str], int] | None:
    """The text parser of a field of type ``kind``; None if it has none."""
    extras = (meta.extra for meta in getattr(kind, "__metadata__", ()) if meta.extra)
    return next((_PARSERS[extra["text"]] for extra in extras), None)


def _choices(kind: Any) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _named(message: str) -> str:
    """msgspec's message, with the allowed choices added if the value is not one of them."""
    path = re.search(r"at `\$\.([a-z_.]+)`", message)
    kind: Any = Config
    for key in path[1].split(".") if path else ():
        kind = _field_types(kind).get(key) if _is_section(kind) else None
    choices = ", ".join(repr(choice) for choice in _choices(kind))
    return f"{message}; it must be one of {choices}" if choices else message


def _field_types(section: Any) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(section)}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, _Section)


def _set_in(tree: dict[str, Any], keys: tuple[str, ...], value: object) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            return  # the wrong shape is reported by the conversion, with its name
        tree = below
    tree[keys[-1]] = value


def _check(config: Config) -> None:
    """What the types cannot express."""
    if config.jwt_secret and len(config.jwt_secret.encode()) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"configuration: jwt_secret has {len(config.jwt_secret.encode())} bytes; a secret shorter than "
            f"{MIN_SECRET_BYTES} can be found from any token. Make one with: openssl rand -hex 32"
        )
    try:
        subnet = ipaddress.IPv4Network(config.network.subnet_cidr)
        gateway = ipaddress.IPv4Address(config.network.gateway) if config.network.gateway else None
        ipaddress.ip_address(config.network.dns_server)
        for cidr in config.egress.allow_private:
            ipaddress.ip_network(cidr)
    except ValueError as error:
        raise ConfigError(f"configuration: network or egress: {error}") from None
    if gateway is not None and gateway not in subnet:
        raise ConfigError(f"configuration: network.gateway {gateway} is not in network.subnet_cidr {subnet}")
    for name, hook in config.events.webhooks.items():
        if not hook.url.startswith("https:") and not hook.allow_private:
            raise ConfigError(f"configuration: events.webhooks.{name}.url must be https, or allow_private be set")
    for name, source in config.egress.sources.items():
        if sum(1 for kind in (source.file, source.systemd, source.exec) if kind) != 1:
            raise ConfigError(f"configuration: egress.sources.{name} must have one of file, systemd and exec")
        if source.exec and not source.exec[0].startswith("/"):
            raise ConfigError(f"configuration: egress.sources.{name}.exec must begin with an absolute path")
    if config.acme.staging and config.acme.ca:
        raise ConfigError("configuration: acme.staging is for Let's Encrypt; acme.ca names another CA")
    if bool(config.acme.eab_key_id) != bool(config.acme.eab_hmac_key):
        raise ConfigError("configuration: acme.eab_key_id and acme.eab_hmac_key go together")
    for name, files in config.ingress.certificates.items():
        for key, text in (("certificate", files.certificate), ("key", files.key)):
            if not text.startswith("/"):
                raise ConfigError(
                    f"configuration: ingress.certificates.{name}.{key} must be an absolute path, not {text!r}"
                )
    for name, text in (("data_dir", config.data_dir), ("run_dir", config.run_dir)):
        if not text.startswith("/"):
            raise ConfigError(f"configuration: {name} must be an absolute path, not {text!r}")
