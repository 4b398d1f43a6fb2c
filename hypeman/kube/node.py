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
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from hypeman.config import Config
from hypeman.instances.model.types import Instance
from hypeman.kube.api import ApiClient
from hypeman.kube.credentials import load_kubeconfig
from hypeman.kube.local import LocalServer
from hypeman.kube.types import Pod
from hypeman.telemetry.logs import setup_logs

log = logging.getLogger(__name__)


class Served(msgspec.Struct, frozen=True):
    """A pod of this node, and its instance if there is one."""

    pod: Pod
    instance: Instance | None


class PodTable(Protocol):
    """What the kubelet's API needs to know about pods. Both answer from memory."""

    def find(self, namespace: str, name: str) -> Served | None: ...

    def all(self) -> tuple[Served, ...]: ...


class Site(msgspec.Struct, frozen=True):
    """The node, and whom it talks to."""

    name: str
    address: str
    """At which the cluster reaches this host; also ``hostIP`` of its pods."""
    port: int
    """Of the kubelet's API."""
    state_dir: Path
    api: ApiClient
    local: LocalServer


def main(config: Config) -> None:
    """Run until SIGTERM or SIGINT. Raises HypemanError if the settings cannot be used."""
    setup_logs(config.log.level, config.log.format)
    trio.run(_until_signal, config)


async def _until_signal(config: Config) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, config)
            async for number in signals:
                log.info("shutting down; VMs go on", extra={"signal": signal.Signals(number).name})
                break
            nursery.cancel_scope.cancel()


async def run(config: Config) -> None:
    """Run the node. Raises HypemanError if it cannot start."""
    async with AsyncExitStack() as stack:
        site = build_site(config)
        stack.push_async_callback(site.api.aclose)
        stack.push_async_callback(site.local.aclose)
        log.info("node", extra={"node": site.name, "address": site.address})
        await trio.sleep_forever()


def build_site(config: Config) -> Site:
    """Raises KubeconfigError."""
    node = config.node
    access = load_kubeconfig(Path(node.kubeconfig), server=node.server)
    name = node.name or socket.gethostname().lower()
    base_url = node.base_url or f"unix://{config.socket.path or config.paths.api_socket}"
    return Site(
        name=name,
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
