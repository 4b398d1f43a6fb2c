"""How the parts are put together: each service built once, started in the order in which they lean on
each other, stopped in the reverse one. Nothing imports this module but the command line.

    store → hypervisors (asked in the background) → devices → network → egress → images → instances
          → snapshots, volumes → HTTP

VMs are no part of it: they live in control groups of their own and are found again at the next start.
"""

from __future__ import annotations

import logging
import platform
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from msgspec import UNSET

from hypeman import API_VERSION, __version__, assets
from hypeman.config import Config, ConfigError
from hypeman.devices.service import Devices
from hypeman.egress.audit import AuditLog
from hypeman.egress.metrics import register_metrics
from hypeman.egress.policy import Unmatched
from hypeman.egress.service import Egress
from hypeman.egress.service import Settings as EgressSettings
from hypeman.egress.view import EgressView
from hypeman.host import facts
from hypeman.host.cgroups import CGroups
from hypeman.host.disks import Disks
from hypeman.host.files import Files
from hypeman.host.links import Links, find_uplink
from hypeman.host.notify import keep_sockets, notify, take_kept_sockets
from hypeman.host.ownership import repair
from hypeman.host.processes import Processes
from hypeman.host.rules import Rules
from hypeman.host.watchdog import feed_watchdog, watchdog_interval
from hypeman.hypervisor.catalog import Catalog, features
from hypeman.hypervisor.cloud_hypervisor.driver import CloudHypervisorDriver
from hypeman.hypervisor.firecracker.driver import FirecrackerDriver
from hypeman.hypervisor.kinds import HypervisorKind
from hypeman.hypervisor.kvm import KVM_DEVICE, KvmProof
from hypeman.hypervisor.qemu.driver import QemuDriver
from hypeman.hypervisor.vmm_process import VFIO_DEVICE
from hypeman.images.service import Images
from hypeman.instances import adapters
from hypeman.instances.compression import Compressor
from hypeman.instances.records import INSTANCES
from hypeman.instances.service import Instances
from hypeman.instances.world import World
from hypeman.network.addressing import Subnet
from hypeman.network.leases import get_lease
from hypeman.network.service import Network
from hypeman.network.types import Lease
from hypeman.resources.service import Capacity, ResourceService
from hypeman.resources.types import DiskBreakdown
from hypeman.server.app import ServerSettings, build_app
from hypeman.server.serve import Server, bind_tcp, bind_unix, metrics_app
from hypeman.server.services import Services
from hypeman.server.types import (
    Capabilities,
    DefaultRuntime,
    HostPlatform,
    ImageCapabilities,
    NetworkCapabilities,
    Runtime,
    ServerVersion,
)
from hypeman.snapshots.service import Snapshots
from hypeman.store import Store, Txn
from hypeman.telemetry import metrics
from hypeman.telemetry.logs import setup_logs
from hypeman.volumes.records import VOLUMES
from hypeman.volumes.service import Volumes

log = logging.getLogger(__name__)

FEATURES = ("instances", "images", "volumes", "exec", "logs", "devices")


def main(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises HypemanError if the server can not start."""
    setup_logs(config.log.level, config.log.format)
    if not config.jwt_secret:
        log.warning("jwt_secret is empty: over TCP every call is refused; only the unix socket lets anybody in")
    trio.run(serve, config)


async def serve(config: Config, *, started: Callable[[], object] = lambda: None) -> None:
    """The whole server; ends in order when SIGTERM or SIGINT comes."""
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_signals, shutdown)
        await run(config, shutdown, started=started)
        nursery.cancel_scope.cancel()


async def run(config: Config, shutdown: trio.Event, *, started: Callable[[], object] = lambda: None) -> None:
    """The server until ``shutdown`` is set. ``started`` is called when it answers."""
    sockets = bind_tcp(config.listen_address, config.port) if config.port else []
    trusted = _bind_socket(config)
    async with AsyncExitStack() as stack:
        for each in (*sockets, *trusted):
            stack.callback(each.close)
        parts = await _build(config, stack)
        async with parts.store.serving(), trio.open_nursery() as background:
            if not await _started(parts, background, shutdown):
                log.info("shutting down before everything was started; VMs go on")
                background.cancel_scope.cancel()
                return
            app = build_app(parts.services, ServerSettings(config.jwt_secret, config.request_timeout))
            open_to_all = config.socket.trusted
            async with trio.open_nursery() as serving:
                await serving.start(
                    lambda task_status: Server(app).run(
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
            log.info("shutting down; VMs go on")
            background.cancel_scope.cancel()


@dataclass(frozen=True)
class _Parts:
    config: Config
    store: Store
    catalog: Catalog
    devices: Devices
    network: Network
    egress: Egress
    egress_audit: AuditLog
    egress_view: EgressView
    images: Images
    compressor: Compressor
    instances: Instances
    snapshots: Snapshots
    volumes: Volumes
    services: Services


async def _build(config: Config, stack: AsyncExitStack) -> _Parts:
    """All services, none of them running. What they hold open is closed by ``stack``."""
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
    egress = Egress(
        _egress_settings(config),
        paths.egress,
        listeners=take_kept_sockets().get("egress", ()),
        keep=partial(keep_sockets, "egress"),
    )
    audit = AuditLog()
    stack.callback(audit.flush)
    network = Network(
        config.network,
        links=links,
        rules=rules,
        egress_port=config.egress.port,
        on_tap_operation=lambda operation: metrics.tap_operations.labels(operation).inc(),
        on_tap_lost=lambda instance_id: instances.plug_in_again(instance_id),  # who are below
    )
    stack.callback(network.aclose)
    devices = Devices(
        store,
        config.devices,
        uplink=uplink.names[0] if uplink.names else "",
        on_vanished=lambda instance_id, text: instances.device_vanished(instance_id, text),  # who are below
    )
    images = Images(store=store, paths=paths, config=config.images, conversions=config.limits.max_concurrent_builds)
    disks = Disks(files, processes, paths.templates)
    catalog = _catalog(config, store, processes, links, kernel)
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
        name_of=lambda instance_id: _name_of(store, instance_id),
        disk_use=lambda: _disk_use(store, images),
        gpu=devices.gpu_status,
    )
    secrets = adapters.EgressOfInstances(egress, store)
    world = World(
        config=config,
        store=store,
        files=files,
        drivers=catalog.drivers,
        cgroups=CGroups.detect(),
        kernel=kernel,
        initrd=initrd,
        images=images,
        network=network,
        devices=devices,
        egress=secrets,
        templates=disks,
        compressor=compressor,
    )
    instances = Instances(
        world=world,
        images=images,
        leases=adapters.Leases(
            network,
            resources,
            default_limits=config.network.default_limits,
            isolated=not config.network.guest_to_guest,
        ),
        devices=devices,
        secrets=secrets,
        counters=adapters.Counters(network),
        limits=lambda: resources.limits,
        catalog=catalog,
    )
    volumes = Volumes(
        store=store,
        paths=paths,
        files=files,
        disks=disks,
        fill=images.fill_volume,
        max_total=config.limits.max_total_volume_storage,
    )
    snapshots = Snapshots(store=store, instances=instances)
    egress_view = EgressView(egress, adapters.EgressGuests(instances.board))
    _register_gauges(instances, images, network, store)
    register_metrics(egress)
    return _Parts(
        config=config,
        store=store,
        catalog=catalog,
        devices=devices,
        network=network,
        egress=egress,
        egress_audit=audit,
        egress_view=egress_view,
        images=images,
        compressor=compressor,
        instances=instances,
        snapshots=snapshots,
        volumes=volumes,
        services=Services(
            images=images,
            instances=instances,
            snapshots=snapshots,
            volumes=volumes,
            devices=devices,
            egress=egress_view,
            resources=resources,
            capabilities=_CapabilityService(config, catalog, network, images),
        ),
    )


async def _started(parts: _Parts, background: trio.Nursery, shutdown: trio.Event) -> bool:
    """False if ``shutdown`` came first: what a crash left unfinished may take long to settle, and the next
    start can go on with it."""

    async def stop_starting() -> None:
        await shutdown.wait()
        starting.cancel_scope.cancel()

    async with trio.open_nursery() as starting:
        starting.start_soon(stop_starting)
        await _start(parts, background)
        starting.cancel_scope.cancel()
    return not shutdown.is_set()


async def _start(parts: _Parts, nursery: trio.Nursery) -> None:
    """Start everything in order; returns when all instances are settled."""
    files = Files()
    await files.remove(parts.config.paths.tmp)
    await files.make_dir(parts.config.paths.tmp)
    nursery.start_soon(parts.catalog.probe)
    await nursery.start(parts.devices.run)
    await parts.network.start(_living_leases(parts.store))
    await nursery.start(parts.network.run)
    parts.egress.on_audit(parts.egress_audit.offer)
    parts.egress.on_audit(parts.egress_view.keep)
    nursery.start_soon(parts.egress_audit.run)
    await nursery.start(parts.egress.run)
    await nursery.start(parts.images.run)
    await nursery.start(parts.compressor.run)
    await parts.volumes.start()
    await parts.snapshots.start()
    await nursery.start(parts.instances.run)
    parts.egress.accept()  # the rules of all guests are there again


def _living_leases(store: Store) -> Sequence[Lease]:
    """Leases of instances that had a VMM when we last looked; the dead are found when they are settled."""

    def read(txn: Txn) -> list[Lease]:
        living = [record.id for _, record in txn.scan(INSTANCES) if record.handle is not None]
        return [lease for instance_id in living if (lease := get_lease(txn, instance_id)) is not None]

    return store.read(read)


def _catalog(config: Config, store: Store, processes: Processes, links: Links, kernel: str) -> Catalog:
    settings = config.hypervisor
    kvm = KvmProof.configured(processes, settings, kernel=kernel)

    def qemu(kind: HypervisorKind) -> QemuDriver:
        return QemuDriver(
            processes,
            links.open_tap,
            kvm=kvm,
            kind=kind,
            binary=settings.qemu_binary,
            accelerator=settings.accelerator,
        )

    drivers = (
        qemu(HypervisorKind.QEMU),
        qemu(HypervisorKind.QEMU_MICROVM),
        CloudHypervisorDriver(
            processes,
            links.open_tap,
            kvm=kvm,
            binary=settings.cloud_hypervisor_binary,
            folders=(config.data_dir,),
        ),
        FirecrackerDriver(processes, kvm=kvm, binary=settings.firecracker_binary, jailer=settings.jailer_binary),
    )
    on_host = (
        *(kernel, KVM_DEVICE, VFIO_DEVICE),
        *(f"{name}={getattr(settings, name)}" for name in ("accelerator", "kvm_patience", "uid_base")),
    )
    depends_on = {driver.kind: (*on_host, *driver.programs()) for driver in drivers}
    return Catalog(drivers, store=store, default=settings.default, depends_on=depends_on)


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
        extra_ca_file=config.egress.upstream_ca_file,
        unmatched=Unmatched.INSPECT if config.egress.intercept_all else Unmatched.PASS,
    )


def _bind_socket(config: Config) -> list[socket.socket]:
    settings = config.socket
    if settings.path == "none":
        return []
    path = settings.path or str(config.paths.api_socket)
    return [bind_unix(path, mode=int(settings.mode, 8), group=settings.group)]


async def _watch_signals(shutdown: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("received %s", signal.Signals(number).name)
            shutdown.set()


def _name_of(store: Store, instance_id: str) -> str | None:
    record = store.read(lambda txn: txn.get(INSTANCES, instance_id))
    return record.name if record is not None else None


def _disk_use(store: Store, images: Images) -> DiskBreakdown:
    def read(txn: Txn) -> tuple[int, int]:
        overlays = sum(record.spec.overlay_bytes for _, record in txn.scan(INSTANCES))
        return overlays, sum(volume.size_gb for _, volume in txn.scan(VOLUMES)) << 30

    overlays, volumes = store.read(read)
    statistics = images.statistics()
    return DiskBreakdown(
        images_bytes=statistics["disk_bytes"],
        oci_cache_bytes=statistics.get("cache_bytes", 0),
        volumes_bytes=volumes,
        overlays_bytes=overlays,
    )


def _register_gauges(instances: Instances, images: Images, network: Network, store: Store) -> None:
    def states() -> dict[tuple[str, ...], float]:
        counts: dict[tuple[str, ...], float] = {}
        for record in instances.board.records():
            counts[(record.state.value,)] = counts.get((record.state.value,), 0) + 1
        return counts

    metrics.register_gauge("hypeman_instances_total", "Instances by state", ("state",), states)
    metrics.register_gauge(
        "hypeman_guests_silent", "Running guests that do not answer", (), lambda: {(): float(instances.silent_guests())}
    )
    metrics.register_gauge(
        "hypeman_images_build_queue_length", "Images that wait", (), lambda: {(): images.statistics()["queued"]}
    )
    metrics.register_gauge(
        "hypeman_volumes_total",
        "Volumes",
        (),
        lambda: {(): store.read(lambda txn: sum(1 for _ in txn.keys(VOLUMES)))},
    )

    def bytes_in_direction(column: int) -> dict[tuple[str, ...], float]:
        return {(instance,): counts[column] for instance, counts in network.counters().items()}

    for column, direction in enumerate(("receive", "transmit")):
        metrics.register_counter(
            f"hypeman_network_{direction}_bytes_total",
            f"Bytes that the guest did {direction}",
            ("instance",),
            partial(bytes_in_direction, column),
        )


class _CapabilityService:
    """What this server can do on this host, as it is known now (§2.1)."""

    def __init__(self, config: Config, catalog: Catalog, network: Network, images: Images) -> None:
        self._config = config
        self._catalog = catalog
        self._network = network
        self._images = images

    async def get(self) -> Capabilities:
        default = self._catalog.default()
        drivers = self._catalog.drivers
        return Capabilities(
            server=ServerVersion(version=__version__, api_version=API_VERSION),
            host=HostPlatform(os="linux", arch={"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")),
            default_runtime=DefaultRuntime(
                name=default.value,
                available=default in drivers and drivers[default].capabilities.available,
            ),
            runtimes=tuple(
                Runtime(kind.value, driver.capabilities.available, features(driver.capabilities))
                for kind, driver in sorted(drivers.items())
            ),
            network=NetworkCapabilities(
                model="bridge",
                guest_to_guest=self._config.network.guest_to_guest,
                gateway=str(self._network.subnet.gateway) or UNSET,
                subnet=str(self._network.subnet.network),
            ),
            images=ImageCapabilities(
                platforms=(self._images.platform(None),), default_platform=self._images.platform(None)
            ),
            features=FEATURES,
        )
