"""``hypeman clean-host``: remove what a server leaves on its host when it stops.

The server deliberately leaves links, rules, forwarding and devices lent to VMs, since VMs keep running without it. To
remove the appliance, end the VMs first, then call this. Refuses while a server runs; touches nothing that is not
hypeman's, and nothing below the data directory except the record of what was lent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio

from hypeman.config import Config
from hypeman.devices.registry import BINDINGS, VGPUS
from hypeman.devices.service import Devices
from hypeman.egress.link import end_engines
from hypeman.errors import HypemanError
from hypeman.host.hosts_file import write_block
from hypeman.host.links import Links, NamespaceClaim
from hypeman.host.modules import unload_ours
from hypeman.host.rules import Rules
from hypeman.network import ruleset
from hypeman.network.addressing import Subnet
from hypeman.store import Store, Txn

MODULES_BEFORE = Path("/etc/hypeman/modules-before")
"""Names of the kernel modules that were loaded before the first installation; written by the package's scripts."""


async def clean_host(config: Config) -> None:
    """Tries to remove everything, then raises HypemanError for what could not be removed."""
    parts: tuple[Callable[[Config], Awaitable[None]], ...] = (
        _give_back_devices,
        _end_engines,
        _remove_network,
        _remove_names,
        _unload_modules,
    )
    failures: list[HypemanError] = []
    claim = NamespaceClaim()  # no server is running, and none can start meanwhile
    try:
        for part in parts:
            try:
                await part(config)
            except HypemanError as error:
                failures.append(error)
    finally:
        claim.close()
    if failures:
        raise failures[0]


async def _give_back_devices(config: Config) -> None:
    if not (config.paths.store / "data.mdb").exists():
        return
    store = Store.open(config.paths.store)
    try:
        async with store.serving():
            devices = Devices(store, config.devices)
            for instance_id in store.read(_borrowers):
                await devices.unbind(instance_id)
    finally:
        store.close()


async def _end_engines(config: Config) -> None:
    await end_engines(config.paths.engines)


def _borrowers(txn: Txn) -> tuple[str, ...]:
    found = [binding.instance_id for _, binding in txn.scan(BINDINGS)]
    return tuple(dict.fromkeys([*found, *txn.keys(VGPUS)]))


async def _remove_names(config: Config) -> None:
    """From the hosts file that the settings name, and from the host's, in case they named it before."""
    for path in {config.network.hosts_file or "/etc/hosts", "/etc/hosts"}:
        with suppress(FileNotFoundError):
            await trio.to_thread.run_sync(write_block, Path(path), ())


async def _unload_modules(config: Config) -> None:
    await trio.to_thread.run_sync(unload_ours, MODULES_BEFORE)


async def _remove_network(config: Config) -> None:
    links, rules = Links(), Rules()
    try:
        await links.remove_links((await links.ours()).keys())
        await links.remove_gateway(str(Subnet.parse(config.network.subnet_cidr, config.network.gateway).gateway))
        await rules.load(ruleset.render_removal())
        await links.stop_forwarding()
    finally:
        rules.close()
        links.close()
