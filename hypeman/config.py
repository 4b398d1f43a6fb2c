"""The server's settings: one frozen tree, read once at start.

Order of precedence: environment > file > default. A file is YAML; an environment variable is the
path of the key in upper case with ``__`` between the levels (``NETWORK__SUBNET_CIDR``), alone
(``JWT_SECRET``) for a key of the first level. A key nobody knows, a value out of bounds or of the
wrong type is refused at start with its full name: a typing error must never quietly become a default.
Sizes and rates are written as text (``32GB``) and decoded here, once: everybody else sees bytes.
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
"""By ``Meta.extra["text"]``: how the text of a value becomes the number."""

Size = Annotated[int, Meta(ge=0, extra={"text": "size"})]
"""Bytes; text as ``32GB`` in the file and the environment, where empty is 0."""
PositiveSize = Annotated[int, Meta(ge=1, extra={"text": "size"})]
Rate = Annotated[int, Meta(ge=0, extra={"text": "rate"})]
"""Bytes per second; text as ``10gbps`` or ``500MB/s`` in the file and the environment, where empty is 0."""

HypervisorChoice = Literal["", "cloud-hypervisor", "firecracker", "qemu", "qemu-microvm"]
"""Empty, or a kind that ``hypervisor/drivers.py`` has a driver for; a test compares them."""

MIN_SECRET_BYTES = 32
"""As RFC 7518 requires for HS256."""

CONFIG_FILES = ("/etc/hypeman/config.yaml", "~/.config/hypeman/config.yaml")


class ConfigError(HypemanError):
    """The settings can not be used; the message names the key."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A group of settings that refuses unknown keys."""


class HypervisorConfig(_Section, frozen=True):
    default: HypervisorChoice = ""
    """Kind used when a create names none; empty: cloud-hypervisor where it is installed and KVM works, else qemu."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """``auto``: KVM if the probe kernel runs on it, else TCG."""
    kvm_patience: Annotated[float, Meta(gt=0)] = 10.0
    """Seconds to wait for output from the probe kernel before treating KVM as unusable; more where KVM is nested."""
    kernel: str = ""
    """Guest kernel (uncompressed PVH vmlinux); empty: the one that came with us."""
    initrd: str = ""
    """Initial file system of guests, with the agent; empty: the one that came with us."""
    qemu_binary: str = ""
    """Empty: ``qemu-system-x86_64`` on the path."""
    cloud_hypervisor_binary: str = ""
    """Empty: ``cloud-hypervisor`` on the path."""
    firecracker_binary: str = ""
    """Empty: ``firecracker`` on the path."""
    jailer_binary: str = ""
    """Firecracker's own; empty: ``jailer`` on the path."""
    uid_base: Annotated[int, Meta(ge=0, le=2**31)] = 510000
    """VMMs run as ``uid_base`` + a number of their own each; 0 runs them as the server's user."""


class LimitsConfig(_Section, frozen=True):
    max_vcpus_per_instance: Positive = 16
    """The most that one instance may ask for."""
    max_memory_per_instance: PositiveSize = 32 << 30
    """The most that one instance may ask for, plugged memory included."""
    max_overlay_size: PositiveSize = 100 << 30
    """The largest writable layer over an image."""
    max_concurrent_builds: Positive = 1
    """Image conversions at once."""
    max_total_volume_storage: Size = 0
    """Sum of the sizes of all volumes; 0: no limit."""
    max_log_size: PositiveSize = 50 << 20
    """A log file of an instance is rotated above this size; one old one is kept."""


class OversubscriptionConfig(_Section, frozen=True):
    cpu: Ratio = 4.0
    """How many times the processors may be promised to running instances."""
    memory: Ratio = 1.0
    """How many times the memory may be promised."""
    disk: Ratio = 1.0
    """How many times the disk may be promised; disks of guests are sparse."""
    network: Ratio = 2.0
    """How many times the uplink's capacity may be promised."""
    disk_io: Ratio = 2.0
    """How many times the rate of the disks may be promised."""


class CapacityConfig(_Section, frozen=True):
    """Capacity of the host, to override detection. 0: detected."""

    cpu: Annotated[int, Meta(ge=0)] = 0
    """Processors."""
    memory: Size = 0
    """Memory for guests."""
    disk: Size = 0
    """Disk below ``data_dir``."""
    network: Rate = 0
    """A rate, as in ``10gbps``. Limiting by share needs it, or a link speed that the uplink reports."""
    disk_io: Rate = 0
    """A rate, as in ``500MB/s``. Limiting by share needs it."""


class ReclaimConfig(_Section, frozen=True):
    """Memory that guests lend to the host when ``POST /resources/memory/reclaim`` asks for it."""

    enabled: bool = True
    """Whether it may be asked for."""
    floor: Size = 256 << 20
    """What a guest keeps in any case."""
    floor_percent: Annotated[int, Meta(ge=0, le=100)] = 50
    """Part of its memory that a guest keeps in any case."""


class ImagesConfig(_Section, frozen=True):
    root_fs: Literal["erofs", "ext4"] = "erofs"
    """File system of image disks; ``erofs`` is compressed and read-only."""
    insecure_registries: tuple[str, ...] = ()
    """``host[:port]`` of registries that speak plain HTTP."""
    mirrors: dict[str, tuple[str, ...]] = {}
    """Registry host → mirrors to ask first."""
    ca_file: str = ""
    """Roots for verifying registries; empty: those of the system."""
    docker_config: str = ""
    """A docker ``config.json`` with logins; empty: ``~/.docker/config.json`` of the server's user."""
    max_concurrent_downloads: Positive = 4
    """Layers being fetched at once, over all images."""
    blob_cache_size: Size = 10 << 30
    """Compressed layers kept for the next pull; the least used go first."""
    max_image_size: PositiveSize = 50 << 30
    """Bytes of all layers unpacked."""
    max_image_entries: Positive = 2_000_000
    """Files and directories in an image."""
    import_paths: tuple[str, ...] = ()
    """Directories below which the server may import archives by path."""


class NetworkConfig(_Section, frozen=True):
    subnet_cidr: str = "10.100.0.0/16"
    """Where guests get their addresses from."""
    gateway: str = ""
    """Address that answers on every TAP; empty: the first of the subnet."""
    dns_server: str = "1.1.1.1"
    """What guests are told to ask for names."""
    uplink: str = ""
    """Interface towards the world; empty: that of the default route."""
    bridge_name: str = ""
    """Accepted for the original's configuration files; there is no bridge."""
    allow_private: bool = True
    """Whether guests' direct traffic reaches private networks behind the uplink (RFC 1918, 100.64.0.0/10, services of
    cloud providers at 168.63.129.16 and 100.100.100.200, and the like). Off is recommended: then only ``dns_server`` is
    reached there, on port 53. Mediated connections have ``egress.allow_private`` instead; link-local addresses are
    never reached."""
    guest_to_guest: bool = False
    """Whether guests reach each other."""
    default_limits: bool = True
    """Give instances without explicit limits a share of the uplink's capacity, where that is known."""


class EgressConfig(_Section, frozen=True):
    port: Port = 18080
    """Port on the gateway where mediated connections end; never reachable from elsewhere."""
    loops: Annotated[int, Meta(ge=0, le=64)] = 0
    """Threads; 0: one for each core, at most 4."""
    allow_private: tuple[str, ...] = ()
    """CIDRs of private upstreams that guests may reach through the proxy."""
    upstream_ca_file: str = ""
    """Extra roots, beside the system's, for verifying upstreams."""
    intercept_all: bool = False
    """Decrypt also hosts without a rule; by default they are passed through unread."""


class DevicesConfig(_Section, frozen=True):
    sysfs_root: str = "/sys"
    """For tests."""
    dev_root: str = "/dev"
    """For tests."""
    pci_ids: str = ""
    """File with the names of PCI devices; empty: that of the system, else the one that came with us."""


class MetricsConfig(_Section, frozen=True):
    listen_address: str = "127.0.0.1"
    """Where the metrics are served, without a token."""
    port: Port = 9464
    """Of the metrics."""
    enabled: bool = True
    """Whether metrics are served."""


class LogConfig(_Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe level that is logged."""
    format: Literal["json", "text"] = "json"
    """One JSON object per line, or text."""


class SocketConfig(_Section, frozen=True):
    path: str = ""
    """Empty: ``<run_dir>/hypeman.sock``; ``none`` for no socket."""
    mode: Annotated[str, Meta(pattern="^0?[0-7]{3}$")] = "0660"
    """Permission bits of the socket."""
    group: str = ""
    """Group that owns the socket, whose members have root on the host; empty: root. The package sets ``hypeman``."""
    trusted: bool = True
    """Who may open the socket needs no token."""


class SnapshotsConfig(_Section, frozen=True):
    compression: Literal["", "zstd", "lz4"] = ""
    """Default for standby and snapshots; empty: none."""
    level: Annotated[int, Meta(ge=0, le=19)] = 1
    """The more, the smaller and the slower; 1 to 19 for zstd, 0 to 9 for lz4."""


class Config(_Section, frozen=True):
    listen_address: str = "127.0.0.1"
    """Where the API listens for TCP. It speaks plain HTTP: let others in only through a proxy with TLS."""
    port: Port = 8080
    """Of the API; 0: only the socket."""
    jwt_secret: str = ""
    """Signs the tokens; at least 32 bytes (``openssl rand -hex 32`` makes a good one). Empty: no access over TCP."""
    data_dir: str = "/var/lib/hypeman"
    """Images, disks and records."""
    run_dir: str = "/run/hypeman"
    """Sockets; a file system that a reboot empties."""
    request_timeout: Annotated[float, Meta(gt=0)] = 60.0
    """Seconds that a request may take, streams and waits apart."""
    socket: SocketConfig = SocketConfig()
    hypervisor: HypervisorConfig = HypervisorConfig()
    limits: LimitsConfig = LimitsConfig()
    oversubscription: OversubscriptionConfig = OversubscriptionConfig()
    capacity: CapacityConfig = CapacityConfig()
    reclaim: ReclaimConfig = ReclaimConfig()
    images: ImagesConfig = ImagesConfig()
    network: NetworkConfig = NetworkConfig()
    egress: EgressConfig = EgressConfig()
    devices: DevicesConfig = DevicesConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()

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
    tree = _read_yaml(file) if file else {}
    for name, text in environ.items():
        keys = _key_of_variable(name)
        if keys is not None:
            _set_in(tree, keys, _value_of_variable(keys, text))
    _parse_texts(tree, Config, "")
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        where = f" (in {file} or the environment)" if file else " (in the environment)"
        raise ConfigError(f"configuration: {_named(str(error))}{where}") from None
    _check(config)
    return config


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
    """("network", "dns_server") for NETWORK__DNS_SERVER; None for variables that are not ours.

    Only sections and first-level keys that exist are taken, since the environment is everybody's;
    below a section of ours every name is, so that a typing error there is refused.
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
    """``text`` as the type that the key wants: strings stay as they are, all else is read as YAML."""
    wanted: Any = Config
    for key in keys:
        wanted = _field_types(wanted).get(key) if _is_section(wanted) else None
    if wanted is str or getattr(wanted, "__origin__", None) is str or _choices(wanted) or _parser(wanted):
        return text
    return yaml.safe_load(text)


def _parse_texts(tree: dict[str, Any], section: Any, prefix: str) -> None:
    """Replace the text of sizes and rates in ``tree``, which may have any shape, by numbers."""
    for name, kind in _field_types(section).items():
        value = tree.get(name)
        if _is_section(kind):
            if isinstance(value, dict):
                _parse_texts(value, kind, f"{prefix}{name}.")
        elif (parse := _parser(kind)) is not None and isinstance(value, str):
            try:
                tree[name] = parse(value or "0")
            except InvalidRequest as error:
                raise ConfigError(f"configuration: {prefix}{name}: {error.message}") from None


def _parser(kind: Any) -> Callable[[str], int] | None:
    """How the text of a field of type ``kind`` becomes a number; None if it is no such field."""
    extras = (meta.extra for meta in getattr(kind, "__metadata__", ()) if meta.extra)
    return next((_PARSERS[extra["text"]] for extra in extras), None)


def _choices(kind: Any) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _named(message: str) -> str:
    """msgspec's message, with the choices where it complains of a value that is none of them."""
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
    for name, text in (("data_dir", config.data_dir), ("run_dir", config.run_dir)):
        if not text.startswith("/"):
            raise ConfigError(f"configuration: {name} must be an absolute path, not {text!r}")
