"""The parts of the server, built once and connected; app.py starts and stops them.

    store, host → network, devices, images, egress → machine, instances
                → snapshots, volumes, policies, ingresses, builds

A function builds the parts of one subject from those that it needs. Nothing is started here.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import trio

from hypeman.builds import metrics as build_metrics
from hypeman.builds.service import Builds
from hypeman.builds.service import Settings as BuildSettings
from hypeman.builds.vm import VmSettings, VmWorker
from hypeman.captures.compression import Compressor
from hypeman.config import Config
from hypeman.devices.service import Devices
from hypeman.doctor import Doctor
from hypeman.egress import metrics as egress_metrics
from hypeman.egress.approvals import Approvals
from hypeman.egress.audit import AuditLog
from hypeman.egress.broker import Broker
from hypeman.egress.service import Egress
from hypeman.egress.view import EgressView
from hypeman.events.service import Events
from hypeman.events.webhooks import Webhooks
from hypeman.host import facts
from hypeman.host.cgroups import CGroups
from hypeman.host.conntrack import Connections
from hypeman.host.disks import Disks
from hypeman.host.files import Files
from hypeman.host.links import Links, Uplink, find_uplink
from hypeman.host.notify import keep_sockets, take_kept_sockets
from hypeman.host.ownership import repair
from hypeman.host.processes import Processes
from hypeman.host.rules import Rules
from hypeman.host.usage import read_usage
from hypeman.hypervisor.catalog import Catalog
from hypeman.hypervisor.drivers import make_catalog
from hypeman.images import metrics as image_metrics
from hypeman.images.service import Images
from hypeman.ingress import metrics as ingress_metrics
from hypeman.ingress.certificates.service import Certificates
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
from hypeman.network.service import Network
from hypeman.policies import metrics as policy_metrics
from hypeman.policies.service import Policies
from hypeman.registry.pushes import Pushes
from hypeman.registry.records import digests_in_use, forget_image
from hypeman.registry.service import Registry
from hypeman.resources import metrics as resource_metrics
from hypeman.resources.service import Capacity, ResourceService
from hypeman.server.capabilities import CapabilityView
from hypeman.server.services import Services
from hypeman.store import Store
from hypeman.telemetry import metrics, traces
from hypeman.telemetry.export import Exporter
from hypeman.volumes import metrics as volume_metrics
from hypeman.volumes.service import Volumes
from hypeman.wiring_settings import (
    certificate_settings,
    credential_sources,
    egress_settings,
    engine_memory,
    guest_kernel,
    make_exporter,
    token_client,
)

_ENGINE_GROUP = "egress-engine"
"""Control group next to those of the VMs, which has their life: it does not end with the server."""


@dataclass(frozen=True)
class Parts:
    """All services, and what serves them."""

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
    resources: ResourceService

    def services(self) -> Services:
        """What the API calls."""
        return Services(
            images=self.images,
            instances=self.instances,
            snapshots=self.snapshots,
            policies=self.policies,
            volumes=self.volumes,
            devices=self.devices,
            ingresses=self.ingresses,
            egress=self.egress_view,
            events=self.events,
            resources=self.resources,
            capabilities=CapabilityView(self.config, self.catalog, self.network, self.images),
            doctor=Doctor(self.config),
            registry=self.registry,
            pushes=self.pushes,
            builds=self.builds,
            traces=traces.RECORDER,
            metering=self.metering,
        )


@dataclass(frozen=True)
class _Base:
    """What the services are built on: the settings, the store, and the parts that act on the host."""

    config: Config
    store: Store
    files: Files
    processes: Processes
    disks: Disks
    links: Links
    rules: Rules
    uplink: Uplink
    cgroups: CGroups
    kernel: str
    initrd: str | None
    """Of guests."""


async def build(config: Config, stack: AsyncExitStack) -> Parts:
    """Build all services without starting them. ``stack`` closes the resources they hold open. Raises ConfigError."""
    base = await _open_base(config, stack)
    store = base.store
    egress = _egress(base)
    audit = AuditLog()
    stack.callback(audit.flush)
    network = _network(base)
    stack.callback(network.aclose)
    devices = Devices(store, config.devices, uplink=base.uplink.names[0] if base.uplink.names else "")
    images = _images(base)
    registry = _registry(base, images)
    pushes = Pushes(store=store, images=images, blobs=images.blobs, client=images.client)
    catalog = make_catalog(
        config.hypervisor,
        store,
        base.processes,
        base.links.open_tap,
        kernel=base.kernel,
        folders=(config.data_dir,),
    )
    compressor = Compressor(store, config.paths)
    resources = _resources(base, images, devices)
    broker = _broker(base, egress)
    approvals = Approvals(partial(adapters.note_approval, store), timeout=config.egress.approval_timeout)
    egress.on_approval_needed(approvals.ask)
    secrets = adapters.EgressOfInstances(egress, broker, approvals, store)
    machine = Machine(
        config=config,
        store=store,
        files=base.files,
        drivers=catalog.drivers,
        cgroups=base.cgroups,
        kernel=base.kernel,
        initrd=base.initrd,
        images=images,
        network=network,
        devices=devices,
        egress=secrets,
        templates=base.disks,
        compressor=compressor,
        boot_id=base.processes.boot_id,
    )
    instances = Instances(
        config=config,
        store=store,
        machine=machine,
        images=images,
        leases=_leases(base, network, resources),
        devices=devices,
        secrets=secrets,
        counters=adapters.Counters(network),
        limits=lambda: resources.limits,
        catalog=catalog,
    )
    devices.on_vanished(instances.device_vanished)
    metering = _metering(base, network, instances)
    machine.on_vmm_end(metering.count)
    _connect_network(network, instances, egress)
    volumes = _volumes(base, images)
    snapshots = _snapshots(base, machine, instances, catalog)
    ingresses = _ingresses(base, egress, network, instances)
    builds = _builds(base, instances, volumes, images, registry)
    connections = Connections()
    stack.callback(connections.close)
    policies = Policies(
        instances=instances, store=store, config=config, snapshots=snapshots, connections=connections, network=network
    )
    events = Events(store, max_count=config.events.max_count, max_age=timedelta(days=config.events.max_days))
    egress_view = EgressView(egress, adapters.EgressGuests(instances.board), approvals)
    parts = Parts(
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
        exporter=make_exporter(config),
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
        resources=resources,
    )
    _register_metrics(parts)
    traces.RECORDER.keep(config.traces.keep)
    return parts


async def _open_base(config: Config, stack: AsyncExitStack) -> _Base:
    paths = config.paths
    files = Files()
    await files.make_dir(paths.data_dir.resolve(), mode=0o711)
    await files.make_dir(paths.run_dir.resolve(), mode=0o755)
    await trio.to_thread.run_sync(repair, paths.data_dir, paths.run_dir)
    store = Store.open(paths.store)
    stack.callback(store.close)
    processes = Processes()
    stack.callback(processes.close)
    kernel, initrd = guest_kernel(config)
    links, rules = Links(), Rules()
    stack.callback(links.close)
    stack.callback(rules.close)
    return _Base(
        config=config,
        store=store,
        files=files,
        processes=processes,
        disks=Disks(files, processes, paths.templates),
        links=links,
        rules=rules,
        uplink=await find_uplink(config.network.uplink),
        cgroups=CGroups.detect(),
        kernel=kernel,
        initrd=initrd,
    )


def _network(base: _Base) -> Network:
    config = base.config
    return Network(
        config.network,
        links=base.links,
        rules=base.rules,
        egress_port=config.egress.port,
        engine_uid=config.hypervisor.uid_base,
        engine_allowed=config.egress.allow_private,
        on_tap_operation=lambda operation: metrics.tap_operations.labels(operation).inc(),
    )


def _connect_network(network: Network, instances: Instances, egress: Egress) -> None:
    """What the network asks of instances: new TAPs, and which guests find each other by name."""
    network.on_tap_lost(instances.plug_in_again)
    network.names.use(
        id_of=instances.board.id_of,
        name_of=instances.board.name_of,
        of_stack=partial(adapters.of_stack, instances.board),
        rules=adapters.NamesOfInstances(egress, instances.board),
    )


def _leases(base: _Base, network: Network, resources: ResourceService) -> adapters.Leases:
    return adapters.Leases(
        network,
        resources,
        base.store,
        default_limits=base.config.network.default_limits,
        isolated=not base.config.network.guest_to_guest,
    )


def _egress(base: _Base) -> Egress:
    config = base.config
    return Egress(
        egress_settings(config),
        config.paths.egress,
        listeners=take_kept_sockets().get("egress", ()),
        keep=partial(keep_sockets, "egress"),
        engines=config.paths.engines,
        group=partial(base.cgroups.make, _ENGINE_GROUP, vcpus=facts.cpus(), memory=engine_memory(config)),
    )


def _broker(base: _Base, egress: Egress) -> Broker:
    return Broker(
        egress,
        credential_sources(base.config, base.processes),
        token_client(base.config),
        keep=adapters.RotatedSecrets(egress, base.store).keep,
    )


def _images(base: _Base) -> Images:
    config = base.config
    return Images(
        store=base.store,
        paths=config.paths,
        config=config.images,
        conversions=config.limits.max_concurrent_builds,
        kept=digests_in_use,
        on_delete=forget_image,
    )


def _registry(base: _Base, images: Images) -> Registry:
    config = base.config
    return Registry(
        store=base.store,
        blobs=images.blobs,
        images=images,
        max_blob_bytes=config.images.max_image_size,
        max_uploads_bytes=config.images.max_uploads_size,
        max_kept_bytes=config.images.max_registry_size,
        room=partial(facts.room_bytes, config.paths.data_dir),
    )


def _resources(base: _Base, images: Images, devices: Devices) -> ResourceService:
    config, store = base.config, base.store
    data_dir = config.paths.data_dir
    return ResourceService(
        store=store,
        detected=Capacity(
            vcpus=facts.cpus(),
            memory=facts.memory_bytes(),
            disk=facts.disk_bytes(data_dir),
            network=base.uplink.speed,
            disk_io=0,
        ),
        configured=config.capacity,
        oversubscription=config.oversubscription,
        names=usage.instance_names,
        disk_use=partial(usage.disk_use, store, images),
        gpu=devices.gpu_status,
        disk_free=partial(facts.free_bytes, data_dir),
    )


def _metering(base: _Base, network: Network, instances: Instances) -> Metering:
    settings = base.config.usage
    return Metering(
        base.store,
        instances.board.records,
        adapters.Counters(network),
        partial(_cpu_seconds, base.cgroups),
        interval=settings.interval,
        hourly_days=settings.hourly_days,
        max_days=settings.max_days,
    )


def _cpu_seconds(cgroups: CGroups, record: InstanceRecord) -> float:
    """Of the VMM of ``record``; without control groups 0 once it has ended."""
    found = cgroups.cpu_seconds(record.id)
    if found is not None:
        return found
    return read_usage(record.handle.pid).cpu_seconds if record.handle is not None else 0.0


def _volumes(base: _Base, images: Images) -> Volumes:
    config = base.config
    return Volumes(
        store=base.store,
        paths=config.paths,
        files=base.files,
        disks=base.disks,
        fill=images.fill_volume,
        max_total=config.limits.max_total_volume_storage,
        room=lambda: int(facts.free_bytes(config.paths.data_dir) * config.oversubscription.disk),
    )


def _snapshots(base: _Base, machine: Machine, instances: Instances, catalog: Catalog) -> Snapshots:
    return Snapshots(
        store=base.store,
        tasks=instances.tasks,
        ledger=instances.ledger,
        forks=instances.forks,
        pools=instances.pools,
        machine=machine,
        catalog=catalog,
        settings=base.config.snapshots,
        render=instances.view,
    )


def _ingresses(base: _Base, egress: Egress, network: Network, instances: Instances) -> Ingresses:
    targets = Targets(instances.board, base.store, egress.front.forget)
    return Ingresses(
        base.store,
        egress.front,
        find=targets.find,
        place_of=targets.place_of,
        certificates=Certificates(certificate_settings(base.config), base.config.paths.ingress, base.store),
        name_of=targets.name_of,
        open_to_engine=network.open_to_engine,
    )


def _builds(base: _Base, instances: Instances, volumes: Volumes, images: Images, registry: Registry) -> Builds:
    config = base.config
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
        store=base.store,
        paths=config.paths,
        files=base.files,
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


def _register_metrics(parts: Parts) -> None:
    """The metrics that are read from the services when they are scraped."""
    egress_metrics.register(parts.egress)
    build_metrics.register(parts.builds)
    image_metrics.register(parts.images)
    ingress_metrics.register(parts.ingresses)
    instance_metrics.register(parts.instances, parts.config.metrics.per_instance)
    network_metrics.register(parts.store)
    policy_metrics.register(parts.policies)
    resource_metrics.register(parts.resources)
    volume_metrics.register(parts.volumes)
