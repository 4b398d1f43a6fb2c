"""SIGKILL before and after every effect of taking a lease, attach, a change of ports, detach and dropping it.

The victim is a forked process with a real store; it dies at its n-th effect, n counting up until it
lives to the end. After each death a new process starts, reconciles, and everything must agree: the
links and rules with the leases in the store, published ports included, and no lease clashes. In the end nothing is
left.
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from msgspec.structs import replace

from hypeman.config import NetworkConfig
from hypeman.host import links as links_module
from hypeman.host import rules as rules_module
from hypeman.host.links import Links
from hypeman.host.netlink import Netlink
from hypeman.host.port_holds import PortHold
from hypeman.host.rules import Rules
from hypeman.host.types import shaper_name
from hypeman.network import publishing as publishing_module
from hypeman.network.leases import all_leases, drop_lease, get_lease, set_ports, take_lease
from hypeman.network.ports import all_sockets, forwards_of
from hypeman.network.service import Network
from hypeman.network.types import EgressMode, NetworkPlan, PortMapping, Protocol
from hypeman.store import Store
from tests.network.lab import in_namespace, set_up_uplink, sh

PORTS = (PortMapping(host_port=8080, guest_port=80), PortMapping(host_port=53, guest_port=53, protocol=Protocol.UDP))
NEW_PORTS = (PortMapping(host_port=8080, guest_port=8), PortMapping(host_port=9090, guest_port=90, count=2))
PLAN = NetworkPlan(download_bps=10**6, upload_bps=10**6, egress_mode=EgressMode.ALL, isolated=False)
VICTIM, BYSTANDER = "victim00000000000000000a", "bystander000000000000000"
_SETS = ("inet hypeman guests", "arp hypeman guests", "inet hypeman mediated")
_EFFECTS = [
    (Netlink, "_run_group"),
    (fcntl, "ioctl"),
    (links_module, "_write_switch"),
    (rules_module, "_nft"),
    (Store, "_commit"),
    (publishing_module, "hold_port"),
    (PortHold, "release"),
]


def _die_at(number: int) -> None:
    """Replace every effect by one that counts before and after itself, and kills us at ``number``."""
    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in _EFFECTS:
        original = getattr(owner, name)

        def killing(*arguments: object, _original: Callable[..., object] = original, **named: object) -> object:
            count()
            result = _original(*arguments, **named)
            count()
            return result

        setattr(owner, name, killing)


def _in_child(work: Callable[[Store, Network], Awaitable[None]], store: Path, *, die_at: int = 0) -> bool:
    """Run ``work`` in a forked process; whether it lived. Its failure is ours."""
    pid = os.fork()
    if pid == 0:
        try:
            if die_at:
                _die_at(die_at)
            trio.run(_serve, work, store)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert die_at and os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


async def _serve(work: Callable[[Store, Network], Awaitable[None]], path: Path) -> None:
    store, links, rules = Store.open(path), Links(), Rules()
    network = Network(NetworkConfig(), links=links, rules=rules, egress_port=18080)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await network.start(store.read(all_leases))
        await work(store, network)
        nursery.cancel_scope.cancel()
    network.aclose()
    links.close()
    rules.close()
    store.close()


async def _live_and_die(store: Store, network: Network) -> None:
    with await network.published.claim(PORTS) as claim:
        plan = replace(PLAN, ports=claim.ports)
        lease = await store.write(lambda txn: take_lease(txn, VICTIM, plan, network.subnet))
        claim.keep(VICTIM)
    await network.attach(lease)
    with await network.published.claim(NEW_PORTS, instance_id=VICTIM) as claim:
        lease = await store.write(lambda txn: set_ports(txn, VICTIM, claim.ports, str))
        claim.keep(VICTIM)
    await network.set_ports(lease)
    await network.detach(lease)
    network.published.forget(VICTIM)
    await store.write(lambda txn: drop_lease(txn, VICTIM, network.subnet))


async def _check(store: Store, network: Network) -> None:
    """After a restart the host shows what the store says, no more and no less."""
    leases = store.read(all_leases)
    taps = {lease.tap for lease in leases}
    assert set(await network._links.ours()) == taps | {shaper_name(tap) for tap in taps}
    ruleset = "".join(sh(f"nft list set {name}") for name in _SETS)
    for lease in leases:
        assert ruleset.count(f'"{lease.tap}"') == 3
    assert ruleset.count('"hm-') == 3 * len(leases)
    shown = {name: sh(f"nft list {name}") for name in ("map inet hypeman ports", "set inet hypeman published")}
    for lease in leases:
        for forward in (each for mapping in lease.ports for each in forwards_of(mapping)):
            target = f"{lease.ipv4} . {forward.guest_port}"
            assert f"{forward.protocol} . {forward.host_port} : {target}" in shown["map inet hypeman ports"]
    forwards = sum(mapping.count for lease in leases for mapping in lease.ports)
    assert [text.count("tcp . ") + text.count("udp . ") for text in shown.values()] == [forwards, forwards]
    assert {i: set(held) for i, held in network.published._held.items()} == {
        lease.instance_id: set(all_sockets(lease.ports)) for lease in leases if lease.ports
    }
    fresh = await store.write(lambda txn: take_lease(txn, "newcomer", PLAN, network.subnet))
    everybody = store.read(all_leases)
    assert len({lease.ipv4 for lease in everybody}) == len({lease.cid for lease in everybody}) == len(everybody)
    assert fresh in everybody
    await store.write(lambda txn: drop_lease(txn, "newcomer", network.subnet))


async def _clear_victim(store: Store, network: Network) -> None:
    lease = store.read(lambda txn: get_lease(txn, VICTIM))
    if lease is not None:
        await network.detach(lease)
        await store.write(lambda txn: drop_lease(txn, VICTIM, network.subnet))


async def _arrive(store: Store, network: Network) -> None:
    lease = await store.write(lambda txn: take_lease(txn, BYSTANDER, PLAN, network.subnet))
    await network.attach(lease)


def _state() -> str:
    links = "ls /sys/class/net; ip addr show lo; ip route | sed 's/ linkdown//'; ip neigh; tc qdisc"
    return sh(f"nft -s list ruleset; {links}")


@in_namespace
def test_a_kill_at_any_effect_leaves_nothing_behind() -> None:
    world = set_up_uplink()
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory, "store")
        _in_child(_arrive, store)
        clean = _state()
        kills = 0
        while not _in_child(_live_and_die, store, die_at=kills + 1):
            kills += 1
            _in_child(_check, store)
            _in_child(_clear_victim, store)
            now = _state()
            assert now == clean, f"after a kill at effect {kills}: {now}\ninstead of {clean}"
        print(f"{kills} kills, each followed by a restart: nothing left, no lease twice")
        assert kills > 40
    world.close()
