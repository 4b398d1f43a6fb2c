"""The program ``hypeman node``: starts the parts and ends them.

    registration, heartbeats       this host as an object of kind Node
    pods                           pods that are bound to the node ↔ instances of this host's server
    kubelet                        the HTTPS API that the cluster calls: logs, exec, port-forward, stats

Each part is a task that loops: a failure of the API server or of the local server is logged, and the loop comes again.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import trio
from msgspec import Struct

from hypeman.config import Config, NodeConfig
from hypeman.kube.api import ApiClient
from hypeman.kube.credentials import Access
from hypeman.kube.events import Events
from hypeman.kube.fencing import Fencing
from hypeman.kube.heartbeat import Heartbeat
from hypeman.kube.identity import client_keeper, find_access
from hypeman.kube.kubelet import service as kubelet
from hypeman.kube.lease import LeaseClock, boot_time
from hypeman.kube.local import LocalServer
from hypeman.kube.owners import Owners
from hypeman.kube.pods import Pods, Shared
from hypeman.kube.provisioner import Provisioner
from hypeman.kube.site import Site, node_name
from hypeman.kube.sweeper import Sweeper
from hypeman.telemetry.logs import setup_logs

log = logging.getLogger(__name__)


def main(config: Config) -> None:
    """Run until SIGTERM or SIGINT. Raises HypemanError if the settings cannot be used, OSError without a state_dir."""
    setup_logs(config.log.level, config.log.format)
    Path(config.node.state_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    trio.run(_until_signal, config)


async def _until_signal(config: Config) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, config)
            async for number in signals:
                log.info("shutting down; VMs keep running", extra={"signal": signal.Signals(number).name})
                break
            nursery.cancel_scope.cancel()


async def run(config: Config) -> None:
    """Run the node. Raises HypemanError if it cannot start."""
    async with AsyncExitStack() as stack:
        access, first = find_access(config.node)
        site = build_site(config, access)
        stack.push_async_callback(site.api.aclose)
        stack.push_async_callback(site.local.aclose)
        log.info("node", extra={"node": site.name, "address": site.address})
        parts = build_parts(site, config.node)
        async with trio.open_nursery() as nursery:
            for part in parts.alone:
                nursery.start_soon(part.run)
            if first is not None:
                bootstrap = ApiClient(first)
                stack.push_async_callback(bootstrap.aclose)
                keeper = client_keeper(site.api, bootstrap, site.name, site.state_dir)
                await keeper.obtain()
                nursery.start_soon(keeper.run)
            await nursery.start(kubelet.serve, site, parts.pods, config.paths.data_dir)
            for part in parts.of_cluster:
                nursery.start_soon(part.run)


class Part(Protocol):
    async def run(self) -> None: ...


class Parts(Struct, frozen=True):
    """The tasks that serve the pods and the node, and what is known of the pods."""

    pods: Pods
    alone: tuple[Part, ...]
    """Also without a certificate: one that has ended while the host was cut off must not keep VMs from being fenced."""
    of_cluster: tuple[Part, ...]


async def serve(site: Site, settings: NodeConfig, clock: Callable[[], float] = boot_time) -> None:
    """All parts but the kubelet's API, until cancelled."""
    parts = build_parts(site, settings, clock)
    async with trio.open_nursery() as nursery:
        for part in (*parts.alone, *parts.of_cluster):
            nursery.start_soon(part.run)


def build_parts(site: Site, settings: NodeConfig, clock: Callable[[], float] = boot_time) -> Parts:
    lease = LeaseClock(
        settings.lease_duration, clock, site.state_dir / "heartbeat" if site.state_dir.is_dir() else None
    )
    events = Events(site.api, site.name)
    shared = Shared(site, lease, events, Owners(site.api))
    pods = Pods(shared)
    heartbeat = Heartbeat(
        site,
        shared.instances,
        lease,
        duration=settings.lease_duration,
        labels=settings.labels,
        max_pods=settings.max_pods,
    )
    fencing = Fencing(site.local, shared.instances, lease, site.name, settings.fence_after)
    return Parts(pods, (shared.instances, fencing), (heartbeat, pods, Sweeper(shared), Provisioner(site, events)))


def build_site(config: Config, access: Access) -> Site:
    node = config.node
    base_url = node.base_url or f"unix://{config.socket.path or config.paths.api_socket}"
    return Site(
        name=node_name(node),
        address=node.address or own_address(),
        port=node.port,
        state_dir=Path(node.state_dir),
        api=ApiClient(access),
        local=LocalServer(base_url, node.api_key),
    )


def own_address() -> str:
    """The source address of packets along the default route; loopback if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # chooses a route, sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
