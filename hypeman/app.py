"""The life of the server: services (wiring.py) are started in dependency order and stopped in reverse order. Only
the command line imports this module.

    store → hypervisors (probed in the background) → devices → network → egress → images → instances
          → policies, ingresses, builds → HTTP

VMs are not part of it: they run in their own control groups and are reattached at the next start.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack

import trio

from hypeman import __version__, assets
from hypeman.config import Config
from hypeman.host import facts
from hypeman.host.files import Files
from hypeman.host.notify import notify
from hypeman.host.watchdog import feed_watchdog, watchdog_interval
from hypeman.instances import usage
from hypeman.server.exchange import ServerSettings
from hypeman.server.front import Front
from hypeman.server.idempotency import Calls
from hypeman.server.serve import Server, bind_tcp, bind_unix, metrics_app
from hypeman.server.sessions import Sessions
from hypeman.telemetry.logs import setup_logs
from hypeman.wiring import Parts, build

log = logging.getLogger(__name__)


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
        parts = await build(config, stack)
        async with parts.store.serving(), trio.open_nursery() as background:
            if not await _started(parts, background, shutdown):
                log.info("shutting down before startup was complete; VMs keep running")
                background.cancel_scope.cancel()
                return
            services = parts.services()
            calls = Calls(parts.store, services)
            await background.start(calls.run)
            settings = ServerSettings(config.jwt_secret, config.request_timeout, _local_url(config))
            sessions = Sessions(parts.store, config.jwt_secret)
            app = Front(services, settings, calls, sessions, assets.find_ui())
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


async def _started(parts: Parts, background: trio.Nursery, shutdown: trio.Event) -> bool:
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


async def _start(parts: Parts, nursery: trio.Nursery) -> None:
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
