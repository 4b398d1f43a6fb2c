"""The settings of services that are not a section of the configuration, computed from it. All raise ConfigError."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hypeman import assets
from hypeman.config import Config, ConfigError, EgressBounds, EgressTotals
from hypeman.egress.oauth2 import TokenClient
from hypeman.egress.policy import Unmatched
from hypeman.egress.service import CLIENTS, Bounds, Limits, Timeouts
from hypeman.egress.service import Settings as EgressSettings
from hypeman.egress.sources import Sources
from hypeman.errors import InvalidRequest
from hypeman.host.checked_backend import is_public_or_in
from hypeman.host.processes import Processes
from hypeman.host.tls import client_context, client_context_later
from hypeman.ingress.certificates.acme_types import LETS_ENCRYPT, LETS_ENCRYPT_STAGING, CASettings
from hypeman.ingress.certificates.names import DomainList
from hypeman.ingress.certificates.service import Settings as CertificateSettings
from hypeman.network.addressing import Subnet
from hypeman.telemetry.export import Exporter

_NOBODY = 65534
_ENGINE_BASE = 1 << 30
_ENGINE_CONNECTION = 20 << 10
"""Bytes: the engine without connections, and for each of them beside its buffers (16 to 19 KB were measured)."""


def make_exporter(config: Config) -> Exporter | None:
    """None without a collector. Raises ConfigError."""
    if not config.otlp.endpoint:
        return None
    try:
        return Exporter(config.otlp, client_context(config.otlp.ca_file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration: otlp.ca_file cannot be used: {error}") from None


def guest_kernel(config: Config) -> tuple[str, str | None]:
    """Kernel and initrd for guests. Raises ConfigError if there is none."""
    kernel = Path(config.hypervisor.kernel) if config.hypervisor.kernel else assets.find(assets.KERNEL)
    initrd = Path(config.hypervisor.initrd) if config.hypervisor.initrd else assets.find(assets.INITRD)
    for name, path in (("hypervisor.kernel", kernel), ("hypervisor.initrd", initrd)):
        if path is None or not path.is_file():
            raise ConfigError(f"configuration: {name}: there is no file {path or 'that came with this program'}")
    return str(kernel), str(initrd)


def egress_settings(config: Config) -> EgressSettings:
    subnet = Subnet.parse(config.network.subnet_cidr, config.network.gateway)
    return EgressSettings(
        address=str(subnet.gateway),
        port=config.egress.port,
        loops=config.egress.loops,
        allow=config.egress.allow_private,
        deny=(config.network.subnet_cidr,),
        timeouts=Timeouts(ask=config.egress.approval_timeout),
        extra_ca_file=config.egress.upstream_ca_file,
        unmatched=Unmatched.INSPECT if config.egress.intercept_all else Unmatched.PASS,
        uid=config.hypervisor.uid_base or _NOBODY,
        drain_timeout=config.egress.drain_timeout,
        limits=Limits(each=_bounds(config.egress.per_instance), total=_bounds(config.egress.total)),
    )


def token_client(config: Config) -> TokenClient:
    try:
        tls = client_context_later(config.egress.upstream_ca_file)
    except OSError as error:
        raise ConfigError(f"configuration: egress.upstream_ca_file cannot be used: {error}") from None
    return TokenClient(tls, partial(is_public_or_in, config.egress.allow_private))


def credential_sources(config: Config, processes: Processes) -> Sources:
    try:
        return Sources(config.egress.sources, processes)
    except InvalidRequest as error:
        raise ConfigError(f"configuration: egress.sources: {error.message}") from None


def certificate_settings(config: Config) -> CertificateSettings:
    """Raises ConfigError."""
    acme = config.acme
    directory = acme.ca or (LETS_ENCRYPT_STAGING if acme.staging else LETS_ENCRYPT)
    allowed = _domain_list("acme.allowed_domains", acme.allowed_domains)
    return CertificateSettings(
        files={name: (Path(pair.certificate), Path(pair.key)) for name, pair in config.ingress.certificates.items()},
        internal=_domain_list("ingress.internal_domains", config.ingress.internal_domains),
        domain=config.network.domain,
        ca=CASettings(
            directory=directory, email=acme.email, ca_file=acme.ca_file, eab_key_id=acme.eab_key_id,
            eab_hmac_key=acme.eab_hmac_key, profile=acme.profile,
        ) if allowed.entries else None,
        allowed=allowed,
    )  # fmt: skip


def _domain_list(key: str, text: str) -> DomainList:
    """Raises ConfigError."""
    try:
        return DomainList.parse(text)
    except ValueError as error:
        raise ConfigError(f"configuration: {key}: {error}") from None


def engine_memory(config: Config) -> int:
    """Bytes that an engine at its bounds may hold."""
    total = config.egress.total
    buffers = total.buffers + CLIENTS.bytes
    connections = total.connections + total.upstreams + CLIENTS.connections + CLIENTS.upstreams
    return _ENGINE_BASE + 2 * buffers + _ENGINE_CONNECTION * connections


def _bounds(given: EgressBounds | EgressTotals) -> Bounds:
    return Bounds(
        connections=given.connections,
        upstreams=given.upstreams,
        streams=given.streams,
        handshakes=given.handshakes,
        descriptors=given.descriptors,
        bytes=given.buffers,
    )
