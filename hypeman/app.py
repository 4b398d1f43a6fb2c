"""Wiring: each service is built once, started in dependency order and stopped in reverse order. Only
the command line imports this module.

    store → hypervisors (probed in the background) → devices → network → egress → images → instances
          → snapshots, volumes, policies, ingresses, builds → HTTP

VMs are not part of it: they run in their own control groups and are reattached at the next start.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import trio

from hypeman import __version__, assets
from hypeman.builds import metrics as build_metrics
from hypeman.builds.service import Builds
from hypeman.builds.service import Settings as BuildSettings
from hypeman.builds.vm import VmSettings, VmWorker
from hypeman.captures.compression import Compressor
from hypeman.config import Config, ConfigError, EgressBounds, EgressTotals
from hypeman.devices.service import Devices
from hypeman.doctor import Doctor
from hypeman.egress import metrics as egress_metrics
from hypeman.egress.approvals import Approvals
from hypeman.egress.audit import AuditLog
from hypeman.egress.broker import Broker
from hypeman.egress.oauth2 import TokenClient
from hypeman.egress.policy import Unmatched
from hypeman.egress.service import CLIENTS, Bounds, Egress, Limits, Timeouts
from hypeman.egress.service import Settings as EgressSettings
from hypeman.egress.sources import Sources
from hypeman.egress.view import EgressView
from hypeman.errors import InvalidRequest
from hypeman.events.service import Events
from hypeman.events.webhooks import Webhooks
from hypeman.host import facts
from hypeman.host.cgroups import CGroups
from hypeman.host.checked_backend import is_public_or_in
from hypeman.host.conntrack import Connections
from hypeman.host.disks import Disks
from hypeman.host.files import Files
from hypeman.host.links import Links, find_uplink
from hypeman.host.notify import keep_sockets, notify, take_kept_sockets
from hypeman.host.ownership import repair
from hypeman.host.processes import Processes
from hypeman.host.rules import Rules
from hypeman.host.tls import client_context, client_context_later
from hypeman.host.usage import read_usage
from hypeman.host.watchdog import feed_watchdog, watchdog_interval
from hypeman.hypervisor.catalog import Catalog
from hypeman.hypervisor.drivers import make_catalog
from hypeman.images import metrics as image_metrics
from hypeman.images.service import Images
from hypeman.ingress import metrics as ingress_metrics
from hypeman.ingress.certificates.acme_types import LETS_ENCRYPT, LETS_ENCRYPT_STAGING, CASettings
from hypeman.ingress.certificates.names import DomainList
from hypeman.ingress.certificates.service import Certificates
from hypeman.ingress.certificates.service import Settings as CertificateSettings
from hypeman.ingress.service import Ingresses
from hypeman.ingress.targets import Targets
from hypeman.instances import adapters, usage
from hypeman.instances import metrics as instance_metrics
from hypeman.instances.machine.machine import Machine
from hypeman.instances.model.record import InstanceRecord
from hypeman.instances.service import Instances
from hypeman.instances.snapshots import Snapshots
from hypeman.metering.service import Metering
from hypeman.network import metrics as network_metrics
from hypeman.network.addressing import Subnet
from hypeman.network.service import Network
from hypeman.policies import metrics as policy_metrics
from hypeman.policies.service import Policies
from hypeman.registry.pushes import Pushes
from hypeman.registry.records import digests_in_use, forget_image
from hypeman.registry.service import Registry
from hypeman.resources import metrics as resource_metrics
from hypeman.resources.service import Capacity, ResourceService
from hypeman.server.capabilities import CapabilityView
from hypeman.server.exchange import ServerSettings
from hypeman.server.front import Front
from hypeman.server.idempotency import Calls
from hypeman.server.serve import Server, bind_tcp, bind_unix, metrics_app
from hypeman.server.services import Services
from hypeman.server.sessions import Sessions
from hypeman.store import Store
from hypeman.telemetry import metrics, traces
from hypeman.telemetry.export import Exporter
from hypeman.telemetry.logs import setup_logs
from hypeman.volumes import metrics as volume_metrics
from hypeman.volumes.service import Volumes

log = logging.getLogger(__name__)

_NOBODY = 65534
_ENGINE_GROUP = "egress-engine"
"""Control group next to those of the VMs, which has their life: it does not end with the server."""
_ENGINE_BASE = 1 << 30
_ENGINE_CONNECTION = 20 << 10
"""Bytes: the engine without connections, and for each of them beside its buffers (16 to 19 KB were measured)."""


def main(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises HypemanError if the server cannot start."""
    setup_logs(config.log.level, config.log.format)
    if not config.jwt_secret:
        log.warning("jwt_secret is empty: over TCP every call is refused; clients can only use the unix socket")
    if conflicts := facts.uid_conflicts(config.hypervisor.uid_base):
        log.warning("others may use the same user ids as VMMs (hypervisor.uid_base): %s", ", ".join(conflicts))
    trio.run(serve, config)


async def serve(config: Config, *, started: Callable[[], object] = lambda: None) -> None:
    """Run the whole server; shuts down in order on SIGTERM or SIGINT."""
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_signals, shutdown)
        await run(config, shutdown, started=started)
        nursery.cancel_scope.cancel()


async def run(config: Config, shutdown: trio.Event, *, started: Callable[[], object] = lambda: None) -> None:
    """Run the server until ``shutdown`` is set. ``started`` is called once it accepts requests."""
    sockets = bind_tcp(config.listen_address, config.port) if config.port else []
    trusted = _bind_socket(config)
    async with AsyncExitStack() as stack:
        for each in (*sockets, *trusted):
            stack.callback(each.close)
        parts = await _build(config, stack)
        async with parts.store.serving(), trio.open_nursery() as background:
            if not await _started(parts, background, shutdown):
                log.info("shutting down before startup was complete; VMs keep running")
                background.cancel_scope.cancel()
                return
            calls = Calls(parts.store, parts.services)
            await background.start(calls.run)
            settings = ServerSettings(config.jwt_secret, config.request_timeout, _local_url(config))
            sessions = Sessions(parts.store, config.jwt_secret)
            app = Front(parts.services, settings, calls, sessions, assets.find_ui())
            open_to_all = config.socket.trusted
            async with trio.open_nursery() as serving:
                await serving.start(
                    lambda task_status: Server(app, plain=app.plain).run(
                        sockets if open_to_all else [*sockets, *trusted],
                        shutdown,
                        trusted=trusted if open_to_all else [],
                        task_status=task_status,
                    )
                )
                if config.metrics.enabled:
                    listeners = bind_tcp(config.metrics.listen_address, config.metrics.port)
                    await serving.start(
                        lambda task_status: Server(metrics_app).run(listeners, shutdown, task_status=task_status)
                    )
                notify()
                background.start_soon(feed_watchdog, notify, watchdog_interval())
                log.info("serving", extra={"port": config.port, "data_dir": config.data_dir, "version": __version__})
                started()
            log.info("shutting down; VMs keep running")
            background.cancel_scope.cancel()


@dataclass(frozen=True)
class _Parts:
    config: Config
    store: Store
    catalog: Catalog
    devices: Devices
    network: Network
    egress: Egress
    broker: Broker
    egress_audit: AuditLog
    egress_view: EgressView
    events: Events
    webhooks: Webhooks
    exporter: Exporter | None
    images: Images
    registry: Registry
    pushes: Pushes
    compressor: Compressor
    instances: Instances
    metering: Metering
    snapshots: Snapshots
    policies: Policies
    volumes: Volumes
    ingresses: Ingresses
    builds: Builds
    services: Services


async def _build(config: Config, stack: AsyncExitStack) -> _Parts:
    """Build all services without starting them. ``stack`` closes the resources they hold open."""
    paths = config.paths
    files = Files()
    await files.make_dir(paths.data_dir.resolve(), mode=0o711)
    await files.make_dir(paths.run_dir.resolve(), mode=0o755)
    await trio.to_thread.run_sync(repair, paths.data_dir, paths.run_dir)
    store = Store.open(paths.store)
    stack.callback(store.close)
    processes = Processes()
    stack.callback(processes.close)
    kernel, initrd = _guest_kernel(config)
    links, rules = Links(), Rules()
    stack.callback(links.close)
    stack.callback(rules.close)
    uplink = await find_uplink(config.network.uplink)
    cgroups = CGroups.detect()
    egress = Egress(
        _egress_settings(config),
        paths.egress,
        listeners=take_kept_sockets().get("egress", ()),
        keep=partial(keep_sockets, "egress"),
        engines=paths.engines,
        group=partial(cgroups.make, _ENGINE_GROUP, vcpus=facts.cpus(), memory=_engine_memory(config)),
    )
    audit = AuditLog()
    stack.callback(audit.flush)
    network = Network(
        config.network,
        links=links,
        rules=rules,
        egress_port=config.egress.port,
        engine_uid=config.hypervisor.uid_base,
        engine_allowed=config.egress.allow_private,
        on_tap_operation=lambda operation: metrics.tap_operations.labels(operation).inc(),
    )
    stack.callback(network.aclose)
    devices = Devices(
        store,
        config.devices,
        uplink=uplink.names[0] if uplink.names else "",
        on_vanished=lambda instance_id, text: instances.device_vanished(instance_id, text),  # defined below
    )
    images = Images(
        store=store,
        paths=paths,
        config=config.images,
        conversions=config.limits.max_concurrent_builds,
        kept=digests_in_use,
        on_delete=forget_image,
    )
    registry = Registry(
        store=store,
        blobs=images.blobs,
        images=images,
        max_blob_bytes=config.images.max_image_size,
        max_uploads_bytes=config.images.max_uploads_size,
        max_kept_bytes=config.images.max_registry_size,
        room=partial(facts.room_bytes, paths.data_dir),
    )
    pushes = Pushes(store=store, images=images, blobs=images.blobs, client=images.client)
    disks = Disks(files, processes, paths.templates)
    catalog = make_catalog(
        config.hypervisor, store, processes, links.open_tap, kernel=kernel, folders=(config.data_dir,)
    )
    compressor = Compressor(store, paths)
    resources = ResourceService(
        store=store,
        detected=Capacity(
            vcpus=facts.cpus(),
            memory=facts.memory_bytes(),
            disk=facts.disk_bytes(paths.data_dir),
            network=uplink.speed,
            disk_io=0,
        ),
        configured=config.capacity,
        oversubscription=config.oversubscription,
        names=usage.instance_names,
        disk_use=partial(usage.disk_use, store, images),
        gpu=devices.gpu_status,
        disk_free=partial(facts.free_bytes, paths.data_dir),
    )
    broker = Broker(
        egress,
        _credential_sources(config, processes),
        _token_client(config),
        keep=adapters.RotatedSecrets(egress, store).keep,
    )
    approvals = Approvals(partial(adapters.note_approval, store), timeout=config.egress.approval_timeout)
    egress.on_approval_needed(approvals.ask)
    secrets = adapters.EgressOfInstances(egress, broker, approvals, store)
    machine = Machine(
        config=config,
        store=store,
        files=files,
        drivers=catalog.drivers,
        cgroups=cgroups,
        kernel=kernel,
        initrd=initrd,
        images=images,
        network=network,
        devices=devices,
        egress=secrets,
        templates=disks,
        compressor=compressor,
        boot_id=processes.boot_id,
        count_usage=lambda record: metering.count(record),  # defined below
    )
    instances = Instances(
        config=config,
        store=store,
        machine=machine,
        images=images,
        leases=adapters.Leases(
            network,
            resources,
            store,
            default_limits=config.network.default_limits,
            isolated=not config.network.guest_to_guest,
        ),
        devices=devices,
        secrets=secrets,
        counters=adapters.Counters(network),
        limits=lambda: resources.limits,
        catalog=catalog,
    )
    metering = Metering(
        store,
        instances.board.records,
        adapters.Counters(network),
        partial(_cpu_seconds, cgroups),
        interval=config.usage.interval,
        hourly_days=config.usage.hourly_days,
        max_days=config.usage.max_days,
    )
    network.on_tap_lost(instances.plug_in_again)
    network.names.use(
        id_of=instances.board.id_of,
        name_of=instances.board.name_of,
        of_stack=partial(adapters.of_stack, instances.board),
        rules=adapters.NamesOfInstances(egress, instances.board),
    )
    volumes = Volumes(
        store=store,
        paths=paths,
        files=files,
        disks=disks,
        fill=images.fill_volume,
        max_total=config.limits.max_total_volume_storage,
        room=lambda: int(facts.free_bytes(paths.data_dir) * config.oversubscription.disk),
    )
    snapshots = Snapshots(
        store=store,
        tasks=instances.tasks,
        ledger=instances.ledger,
        forks=instances.forks,
        pools=instances.pools,
        machine=machine,
        catalog=catalog,
        settings=config.snapshots,
        render=instances.view,
    )
    targets = Targets(instances.board, store, egress.front.forget)
    ingresses = Ingresses(
        store,
        egress.front,
        find=targets.find,
        place_of=targets.place_of,
        certificates=Certificates(_certificate_settings(config), paths.ingress, store),
        name_of=targets.name_of,
        open_to_engine=network.open_to_engine,
    )
    builds = _builds(config, store, instances, volumes, images, registry)
    connections = Connections()
    stack.callback(connections.close)
    policies = Policies(
        instances=instances, store=store, config=config, snapshots=snapshots, connections=connections, network=network
    )
    events = Events(store, max_count=config.events.max_count, max_age=timedelta(days=config.events.max_days))
    egress_view = EgressView(egress, adapters.EgressGuests(instances.board), approvals)
    egress_metrics.register(egress)
    build_metrics.register(builds)
    image_metrics.register(images)
    ingress_metrics.register(ingresses)
    instance_metrics.register(instances, config.metrics.per_instance)
    network_metrics.register(store)
    policy_metrics.register(policies)
    resource_metrics.register(resources)
    volume_metrics.register(volumes)
    traces.RECORDER.keep(config.traces.keep)
    return _Parts(
        config=config,
        store=store,
        catalog=catalog,
        devices=devices,
        network=network,
        egress=egress,
        broker=broker,
        egress_audit=audit,
        egress_view=egress_view,
        events=events,
        webhooks=Webhooks(store, events, config.events.webhooks),
        exporter=_exporter(config),
        images=images,
        registry=registry,
        pushes=pushes,
        compressor=compressor,
        instances=instances,
        metering=metering,
        snapshots=snapshots,
        policies=policies,
        volumes=volumes,
        ingresses=ingresses,
        builds=builds,
        services=Services(
            images=images,
            instances=instances,
            snapshots=snapshots,
            policies=policies,
            volumes=volumes,
            devices=devices,
            ingresses=ingresses,
            egress=egress_view,
            events=events,
            resources=resources,
            capabilities=CapabilityView(config, catalog, network, images),
            doctor=Doctor(config),
            registry=registry,
            pushes=pushes,
            builds=builds,
            traces=traces.RECORDER,
            metering=metering,
        ),
    )


async def _started(parts: _Parts, background: trio.Nursery, shutdown: trio.Event) -> bool:
    """False if ``shutdown`` came first: settling the leftovers of a crash may take long, and the next start
    can continue it."""

    async def stop_starting() -> None:
        await shutdown.wait()
        starting.cancel_scope.cancel()

    async with trio.open_nursery() as starting:
        starting.start_soon(stop_starting)
        await _start(parts, background)
        starting.cancel_scope.cancel()
    return not shutdown.is_set()


async def _start(parts: _Parts, nursery: trio.Nursery) -> None:
    """Start everything in order; returns once all instances are settled."""
    files = Files()
    await files.remove(parts.config.paths.tmp)
    await files.make_dir(parts.config.paths.tmp)
    await nursery.start(parts.events.run)
    nursery.start_soon(parts.webhooks.run)
    if parts.exporter is not None:
        nursery.start_soon(parts.exporter.run)
    nursery.start_soon(parts.catalog.probe)
    await nursery.start(parts.devices.run)
    await parts.network.start(*usage.leases_by_life(parts.store))
    await nursery.start(parts.network.run)
    parts.egress.on_audit(parts.egress_audit.offer)
    parts.egress.on_audit(parts.egress_view.keep)
    nursery.start_soon(parts.egress_audit.run)
    await nursery.start(parts.egress.run)
    await nursery.start(parts.broker.run)
    await nursery.start(parts.images.run)
    await nursery.start(parts.registry.run)
    await nursery.start(parts.pushes.run)
    await nursery.start(parts.compressor.run)
    await parts.volumes.start()
    await parts.snapshots.start()
    await nursery.start(parts.instances.run)
    await nursery.start(parts.metering.run)
    await nursery.start(parts.policies.run)
    await nursery.start(parts.ingresses.run)
    await nursery.start(parts.builds.run)
    await parts.egress.accept()  # the rules of all guests have been restored


def _builds(
    config: Config, store: Store, instances: Instances, volumes: Volumes, images: Images, registry: Registry
) -> Builds:
    settings = config.build
    disk_size_gb = settings.disk_size >> 30
    worker = VmWorker(
        guests=instances,
        volumes=volumes,
        images=images,
        registry=registry,
        settings=VmSettings(
            image=settings.image,
            disk_size_gb=disk_size_gb,
            insecure_registries=config.images.insecure_registries,
            mirrors=config.images.mirrors,
            ca_file=config.images.ca_file,
        ),
    )
    return Builds(
        store=store,
        paths=config.paths,
        files=Files(),
        worker=worker,
        settings=BuildSettings(
            at_once=settings.max_concurrent_source_builds,
            timeout=settings.timeout,
            disk_size_gb=disk_size_gb,
            max_source=settings.max_source_size,
            max_sources=settings.max_sources_size,
            secrets_dir=settings.secrets_dir,
            builder_idle=settings.builder_idle_days * 86400,
            max_cpus=config.limits.max_vcpus_per_instance,
            max_memory=config.limits.max_memory_per_instance,
        ),
        room=partial(facts.room_bytes, config.paths.data_dir),
    )


def _cpu_seconds(cgroups: CGroups, record: InstanceRecord) -> float:
    """Of the VMM of ``record``; without control groups 0 once it has ended."""
    found = cgroups.cpu_seconds(record.id)
    if found is not None:
        return found
    return read_usage(record.handle.pid).cpu_seconds if record.handle is not None else 0.0


def _exporter(config: Config) -> Exporter | None:
    """None without a collector. Raises ConfigError."""
    if not config.otlp.endpoint:
        return None
    try:
        return Exporter(config.otlp, client_context(config.otlp.ca_file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration: otlp.ca_file cannot be used: {error}") from None


def _guest_kernel(config: Config) -> tuple[str, str | None]:
    """Kernel and initrd for guests. Raises ConfigError if there is none."""
    kernel = Path(config.hypervisor.kernel) if config.hypervisor.kernel else assets.find(assets.KERNEL)
    initrd = Path(config.hypervisor.initrd) if config.hypervisor.initrd else assets.find(assets.INITRD)
    for name, path in (("hypervisor.kernel", kernel), ("hypervisor.initrd", initrd)):
        if path is None or not path.is_file():
            raise ConfigError(f"configuration: {name}: there is no file {path or 'that came with this program'}")
    return str(kernel), str(initrd)


def _egress_settings(config: Config) -> EgressSettings:
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


def _token_client(config: Config) -> TokenClient:
    try:
        tls = client_context_later(config.egress.upstream_ca_file)
    except OSError as error:
        raise ConfigError(f"configuration: egress.upstream_ca_file cannot be used: {error}") from None
    return TokenClient(tls, partial(is_public_or_in, config.egress.allow_private))


def _credential_sources(config: Config, processes: Processes) -> Sources:
    try:
        return Sources(config.egress.sources, processes)
    except InvalidRequest as error:
        raise ConfigError(f"configuration: egress.sources: {error.message}") from None


def _certificate_settings(config: Config) -> CertificateSettings:
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


def _engine_memory(config: Config) -> int:
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


def _bind_socket(config: Config) -> list[socket.socket]:
    settings = config.socket
    if settings.path == "none":
        return []
    path = settings.path or str(config.paths.api_socket)
    return [bind_unix(path, mode=int(settings.mode, 8), group=settings.group)]


def _local_url(config: Config) -> str:
    """Of the API over TCP, for a browser on this host."""
    if not config.port:
        return ""
    host = config.listen_address
    if host in ("", "0.0.0.0", "::", "127.0.0.1", "::1"):  # noqa: S104
        host = "localhost"
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


async def _watch_signals(shutdown: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("received %s", signal.Signals(number).name)
            shutdown.set()
