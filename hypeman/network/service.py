"""The guest network's public interface: attach, detach, limits, egress mode, counters.

Desired state is ``_leases``: the leases of running VMs. Links and rules are made to match it by
attach and detach, at start, and whenever a watcher detects a change on the host:

    rules flushed or changed by others      both tables are reloaded
    TAP deleted by others                   recreated; its owner is notified and reattaches the VMM
    uplink lost, back, replaced, new MTU    rules, forwarding and MTUs are updated

A guest is opened last and closed first, so none of its packets meets a partial set of rules.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing

import trio

from hypeman._native.tapstats import TapStats
from hypeman.config import NetworkConfig
from hypeman.errors import InternalError
from hypeman.host.files import HostError
from hypeman.host.links import Change, Links, NamespaceClaim, Tap, Uplink, find_uplink
from hypeman.host.netlink import NetlinkError
from hypeman.host.revival import revive
from hypeman.host.rules import Rules
from hypeman.host.types import TAP_PREFIX, WAKE_LINK, Element, shaper_name
from hypeman.network import ruleset
from hypeman.network.addressing import Subnet
from hypeman.network.guest_names import GuestNames
from hypeman.network.ports import HostSocket, all_sockets, port_changes, reached_from_loopback
from hypeman.network.publishing import PublishedPorts
from hypeman.network.shaping import token_bucket
from hypeman.network.types import GuestNetwork, HostPort, Lease
from hypeman.network.waking import Waking

log = logging.getLogger(__name__)

TapLost = Callable[[str], Awaitable[None]]
"""Called with the id of an instance whose TAP was deleted and recreated."""


async def _ignore(instance_id: str) -> None:
    pass


TapOperation = Callable[[str], None]
"""Called with ``create`` or ``delete``, for the metrics."""

_RETRY = 1.0
"""Seconds."""


class Network:
    """``start`` once with the leases of running VMs, then ``run`` in a nursery."""

    def __init__(
        self,
        config: NetworkConfig,
        *,
        links: Links,
        rules: Rules,
        egress_port: int = 0,
        engine_uid: int = 0,
        engine_allowed: Iterable[str] = (),
        offered: Iterable[HostPort] = (),
        on_tap_operation: TapOperation = lambda operation: None,
    ) -> None:
        self.subnet = Subnet.parse(config.subnet_cidr, config.gateway)
        self.uplink = Uplink()
        self._config = config
        self._links = links
        self._rules = rules
        self._egress_port = egress_port
        self._engine_uid = engine_uid
        self._engine_allowed = tuple(engine_allowed)
        self._entered = frozenset[int]()
        """Ports of guests that ingresses lead to."""
        self._offered = tuple(offered)
        self._on_tap_lost: TapLost = _ignore
        self._leases: dict[str, Lease] = {}
        self._last_holders: dict[str, str] = {}
        """Address → the instance that had it last, since the server started."""
        self._owners: dict[int, str] = {}
        """Interface index → instance, for the counters."""
        self._changing = trio.Lock()
        """Held while ``_leases`` and the rules change together, so that a reload never reopens
        a guest that is being closed."""
        self._stats = TapStats()
        self._claim: NamespaceClaim | None = None
        self._can_shape = True
        self._on_tap_operation = on_tap_operation
        self.published = PublishedPorts()
        self.waking = Waking(links, gateway=str(self.subnet.gateway))
        self.names = GuestNames(config, self.subnet, self._leases)
        self._bypass = True
        self._forwarding: dict[str, int] = {}

    def on_tap_lost(self, react: TapLost) -> None:
        """Await ``react`` with the id of each instance whose TAP was deleted by others, once it has been recreated."""
        self._on_tap_lost = react

    async def start(self, living: Iterable[Lease], others: Iterable[Lease] = (), held: Iterable[Lease] = ()) -> None:
        """Make the host match ``living``: restore their links, remove all our others. ``others`` are the leases of
        instances without VM, whose published ports are held; ``held`` those of them that packets wake.

        Rules are loaded first, so no guest is open meanwhile. Raises HostError.
        """
        self._claim = self._claim or NamespaceClaim()
        held, others = [lease for lease in held if lease.enabled], list(others)
        self._leases.clear()
        self._leases.update((lease.instance_id, lease) for lease in living if lease.enabled)
        known = (*self._leases.values(), *others, *held)
        self._last_holders = {lease.ipv4: lease.instance_id for lease in known if lease.enabled}
        self.uplink = await find_uplink(self._config.uplink)
        if not self.uplink.names:
            log.warning("no uplink: no default route, and network.uplink is not set; guests reach only the host")
        self._can_shape = await self._links.can_shape()
        if not self._can_shape:
            log.warning("this kernel has no ifb: upload limits are cut roughly instead of shaped")
        await self._links.set_gateway(str(self.subnet.gateway))
        self.names.bind()
        for lease in held:
            await self.waking.hold(lease, mtu=self.uplink.mtu)
        await self._links.forward(self.uplink.names)
        await self._load_first_rules()
        leftovers = (await self._links.ours()).keys() - self._wanted_links()
        await self._links.remove_links(leftovers)
        if owned := [name for name in leftovers if name.startswith(TAP_PREFIX)]:
            log.info("removed %d TAPs without an owner: %s", len(owned), ", ".join(sorted(owned)))
        for lease in self._leases.values():
            await self._add_tap(lease)
        await self.published.restore([*self._leases.values(), *others])
        for lease in (*self._leases.values(), *held):
            self.published.open(lease)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch links, routes and rules, and repair them, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_links)
            await nursery.start(self._watch_rules)
            await nursery.start(self.published.relays.run)
            await nursery.start(self.names.run)
            nursery.start_soon(self.waking.run)
            task_status.started()

    def aclose(self) -> None:
        """Close sockets; the guests' network is unchanged."""
        self._stats.close()
        self.published.aclose()
        self.names.close()
        self.waking.close()
        if self._claim is not None:
            self._claim.close()

    async def attach(self, lease: Lease, *, uid: int = 0, boots: bool = False) -> None:
        """Create the TAP of ``lease``, owned by ``uid``, and open the guest, which has no connections if it ``boots``.
        Idempotent.

        Raises HostError; ``detach`` then removes a partial TAP.
        """
        if not lease.enabled:
            return
        await self._add_tap(lease, uid)
        if boots or self._last_holders.get(lease.ipv4) != lease.instance_id:
            await self._forget_flows(lease)
        await self._forget_untranslated(all_sockets(lease.ports))
        async with self._changing:
            before = self._leases.get(lease.instance_id)
            self._leases[lease.instance_id] = lease
            await self._change_rules(lease, add=ruleset.lease_elements(lease), before=before)
        self.published.open(lease)
        self.names.changed()
        self._on_tap_operation("create")

    async def detach(self, lease: Lease) -> None:
        """Close the guest and remove its TAP; a no-op if there is none."""
        if not lease.enabled:
            return
        self.waking.forget_passed(lease)
        held = self.waking.is_held(lease.instance_id)
        if not held:
            self.published.close(lease.instance_id)
        async with self._changing:
            before = self._leases.pop(lease.instance_id, None)
            await self._change_rules(lease, add=ruleset.held_elements(lease) if held else (), before=before)
        self.names.changed()
        await self._links.remove_taps([lease.tap])
        self._owners = {index: owner for index, owner in self._owners.items() if owner != lease.instance_id}
        self._on_tap_operation("delete")

    async def hold(self, lease: Lease) -> None:
        """Hold the packets to an instance that enters or is in standby, and report them (``waking.listen``).

        Idempotent. Raises HostError.
        """
        if not lease.enabled:
            return
        async with self._changing:
            await self._links.loosen(lease.tap)
            await self.waking.hold(lease, mtu=self.uplink.mtu)
            await self._change_elements(set(), set(ruleset.held_elements(lease)))
        self.published.open(lease)

    async def release(self, lease: Lease) -> None:
        """Hold the packets of an instance no longer: those held go to its TAP, or, if it has none, are answered with
        an error. A no-op if they are not held. Raises HostError."""
        if not self.waking.is_held(lease.instance_id):
            return
        async with self._changing:
            if lease.instance_id in self._leases:
                await self.waking.release_to(lease, self._tap(lease))
                return
            await self.waking.release(lease)
            await self._change_elements(set(ruleset.held_elements(lease)), set())
        self.published.close(lease.instance_id)

    async def open_tap(self, lease: Lease) -> int:
        """A descriptor for the VMM, owned by the caller."""
        return await self._links.open_tap(lease.tap)

    async def plug_in_again(self, lease: Lease, pid: int) -> bool:
        """Reattach the VMM with process ``pid`` to its recreated TAP; returns whether it held a deleted one.

        Raises HostError.
        """
        return await trio.to_thread.run_sync(revive, pid, lease.tap) > 0

    async def set_rates(self, lease: Lease) -> None:
        """Set the limits of a running guest to those of ``lease``; a stopped one gets them with its TAP."""
        async with self._changing:
            if lease.instance_id not in self._leases:
                return
            before, self._leases[lease.instance_id] = self._leases[lease.instance_id], lease
            await self._links.set_limits(self._tap(lease))
            if self._is_policed(lease) or self._is_policed(before):
                await self._load_rules_locked()

    async def set_egress(self, lease: Lease) -> None:
        """Set the egress mode and reach of a running guest to those of ``lease``, in one transaction.

        What is stricter also cuts open connections. Raises HostError.
        """
        async with self._changing:
            if lease.instance_id not in self._leases:
                return
            before, self._leases[lease.instance_id] = self._leases[lease.instance_id], lease
            await self._change_rules(lease, add=ruleset.lease_elements(lease), before=before)

    async def open_to_engine(self, ports: Iterable[int]) -> None:
        """The ports of guests to which the engine may connect, instead of those before. Raises HostError."""
        async with self._changing:
            before, self._entered = self._entered, frozenset(ports)
            fresh = ruleset.entered_elements(self._entered - before)
            try:
                await self._change_elements(ruleset.entered_elements(before - self._entered), fresh)
            except BaseException:
                self._entered = before
                raise

    async def set_ports(self, lease: Lease) -> None:
        """Publish the ports of ``lease`` instead of those before, in one transaction, if its guest runs.

        Connections through ports that are no longer published are cut. Raises HostError.
        """
        async with self._changing:
            before = self._leases.get(lease.instance_id)
            if before is None:
                await self._set_ports_asleep(lease)
                return
            gone, fresh = port_changes(before, lease)
            self._leases[lease.instance_id] = lease
            self.published.open(fresh if fresh.ports or gone.ports else lease)
            try:
                if reached_from_loopback(lease.ports) != reached_from_loopback(before.ports):
                    await self._add_tap(lease)
                remove, add = ruleset.port_elements_changed(gone, fresh, lease)
                await self._change_elements(remove, add)
            except BaseException:
                self._leases[lease.instance_id] = before
                raise
        old, new = all_sockets(gone.ports), all_sockets(fresh.ports)
        await self._forget_translated(lease.ipv4, dict(old.items() - new.items()))
        await self._forget_untranslated(dict(new.items() - old.items()))

    async def _set_ports_asleep(self, lease: Lease) -> None:
        before = self.waking.lease(lease.instance_id)
        if before is None:
            return
        await self.waking.hold(lease, mtu=self.uplink.mtu)
        self.published.open(lease)
        add = set(ruleset.held_elements(lease))
        await self._change_elements(set(ruleset.held_elements(before)) - add, add)

    def guest_network(self, lease: Lease) -> GuestNetwork | None:
        """The guest's network settings for ``lease``; None if it has no interface."""
        if not lease.enabled:
            return None
        return GuestNetwork(
            address=lease.ipv4,
            prefix_length=32,
            gateway=str(self.subnet.gateway),
            mac=lease.mac,
            dns_server=str(self.subnet.gateway) if self.names.bound else self._config.dns_server,
            mtu=self.uplink.mtu,
        )

    def counters(self) -> dict[str, tuple[int, int]]:
        """Instance → (bytes received, bytes sent) from the guest's view. One system call; does not block."""
        owners = self._owners
        return {
            owners[index]: (to_guest, from_guest)
            for index, from_guest, to_guest in self._stats.sweep()
            if index in owners
        }

    # Making the host agree

    def _tap(self, lease: Lease, uid: int = 0) -> Tap:
        return Tap(
            name=lease.tap,
            address=lease.ipv4,
            mac=lease.mac,
            gateway=str(self.subnet.gateway),
            gateway_mac=self.subnet.gateway_mac,
            mtu=self.uplink.mtu,
            uid=uid,
            alias=f"hypeman {lease.instance_id}",
            proxy_arp=not lease.isolated,
            routed=not self.waking.is_held(lease.instance_id),
            route_loopback=reached_from_loopback(lease.ports),
            download=token_bucket(lease.download_bps),
            upload=token_bucket(lease.upload_bps) if self._can_shape else None,
        )

    def _is_policed(self, lease: Lease) -> bool:
        return bool(lease.upload_bps) and not self._can_shape

    def _wanted_links(self) -> set[str]:
        taps = {lease.tap for lease in self._leases.values()}
        taps |= {WAKE_LINK} if self.waking.link_is_wanted else set()
        return taps | {shaper_name(lease.tap) for lease in self._leases.values() if self._tap(lease).upload}

    async def _add_tap(self, lease: Lease, uid: int = 0) -> None:
        index = await self._links.add_tap(self._tap(lease, uid))
        self._owners[index] = lease.instance_id

    async def _forget_flows(self, lease: Lease) -> None:
        """Drop flows to the address's previous holder, or of its own before it booted: the kernel would keep them for
        days. An instance that returns from standby to its own address keeps its connections."""
        try:
            await self._rules.forget_flows(lease.ipv4)
        except NetlinkError as error:
            log.warning("connections of the former holder of %s may live on: %s", lease.ipv4, error)
        self._last_holders[lease.ipv4] = lease.instance_id

    async def _forget_translated(self, address: str, sockets: dict[HostSocket, int]) -> None:
        """Cut connections to a guest through ports that are no longer its own."""
        ports = {(socket.protocol, socket.port) for socket in sockets if not socket.is_ipv6}
        if not ports:
            return
        try:
            await self._rules.forget_translated_flows(address, ports)
        except NetlinkError as error:
            log.warning("connections through former ports of %s may live on: %s", address, error)

    async def _forget_untranslated(self, sockets: dict[HostSocket, int]) -> None:
        """A UDP client that sent to a port before it was published is one flow to the kernel, which it would
        deliver to the host as long as the client tries."""
        ports = {("udp", socket.port) for socket in sockets if socket.protocol == "udp" and not socket.is_ipv6}
        if not ports:
            return
        try:
            await self._rules.forget_untranslated_flows(ports)
        except NetlinkError as error:
            log.warning("some clients of newly published ports may have to pause: %s", error)

    async def _load_first_rules(self) -> None:
        try:
            await self._load_rules()
        except HostError:
            if not self.names.bound:
                raise
            self._bypass = False  # the one expression that kernels may lack
            await self._load_rules()
            log.warning("this kernel has no nft_socket: guests have no name server while hypeman does not run")

    async def _load_rules(self) -> None:
        async with self._changing:
            await self._load_rules_locked()

    async def _load_rules_locked(self) -> None:
        leases = self._leases.values()
        self._forwarding = await self._links.forwarding()
        self.published.set_forwarding(self._forwarding.values())
        policed = tuple((lease.tap, lease.upload_bps) for lease in leases if self._is_policed(lease))
        facts = ruleset.RuleFacts(
            subnet=self.subnet,
            uplinks=self.uplink.names,
            forwarding=tuple(sorted(self._forwarding)),
            egress_port=self._egress_port,
            engine_uid=self._engine_uid,
            engine_allowed=self._engine_allowed,
            entered=tuple(sorted(self._entered)),
            offered=self._offered,
            policed=policed,
            allow_private=self._config.allow_private,
            dns_server=self._config.dns_server,
            resolver=self.names.bound,
            bypass=self._bypass,
        )
        await self._rules.load(ruleset.render_ruleset(facts, leases, self.waking.leases()))

    async def _change_rules(self, lease: Lease, add: tuple[Element, ...] = (), before: Lease | None = None) -> None:
        """Replace the elements of ``lease``, and of ``before`` if given, by ``add`` in one transaction: no packet meets
        a mixture."""
        if self._is_policed(lease):
            await self._load_rules_locked()
            return
        had = set(ruleset.lease_elements(before)) if before is not None else set()
        await self._change_elements((set(ruleset.possible_elements(lease)) | had) - set(add), set(add))

    async def _change_elements(self, remove: set[Element], add: set[Element]) -> None:
        try:
            await self._rules.change(remove=remove, add=add)
        except NetlinkError as error:
            log.warning("%s; our nftables tables were removed by others, reloading them", error)
            await self._load_rules_locked()

    async def _watch_rules(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with aclosing(self._rules.watch_foreign_changes()) as changes:
            task_status.started()
            async for _ in changes:
                log.warning("our nftables tables were changed or flushed by others; reloading them")
                await self._load_rules_until_done()

    async def _load_rules_until_done(self) -> None:
        """Load the rules, retrying indefinitely, since guests are unfiltered without them."""
        while True:
            try:
                await self._load_rules()
                return
            except InternalError as error:
                log.error("our nftables tables could not be loaded, trying again: %s", error)
                await trio.sleep(_RETRY)

    async def _watch_links(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with aclosing(self._links.watch()) as changes:
            task_status.started()
            async for change in changes:
                try:
                    if change & {Change.UPLINK, Change.LOST}:
                        await self._follow_uplink()
                    if change & {Change.FORWARDING, Change.LOST}:
                        await self._links.forward([*self.uplink.names, *(lease.tap for lease in self._leases.values())])
                    if change & {Change.UPLINK, Change.FORWARDING, Change.ROUTER, Change.LOST}:
                        await self._follow_forwarding()
                    if change & {Change.OURS, Change.LOST}:
                        await self._put_back()
                except InternalError as error:
                    log.error("the network could not be repaired: %s", error)

    async def _follow_uplink(self) -> None:
        before, self.uplink = self.uplink, await find_uplink(self._config.uplink)
        await self._links.forward(self.uplink.names)
        if self.uplink == before:
            return
        names = ", ".join(self.uplink.names) or "none"
        log.warning("uplink is now %s (was %s), MTU %d", names, ", ".join(before.names) or "none", self.uplink.mtu)
        if self.uplink.names != before.names:
            await self._load_rules()
        if self.uplink.mtu != before.mtu:
            taps = [lease.tap for lease in self._leases.values()]
            await self._links.set_mtu([*taps, WAKE_LINK], self.uplink.mtu)

    async def _follow_forwarding(self) -> None:
        if await self._links.forwarding() != self._forwarding:
            await self._load_rules()

    async def _put_back(self) -> None:
        """Restore TAPs, shapers and routes removed by others. Those that ``detach`` removes have no lease."""
        leases = list(self._leases.values())  # before reading links: guests attached meanwhile are not among them
        there, routed = await self._links.ours(), await self._links.routed()
        for lease in leases:
            link = there.get(lease.tap)
            shaped = self._tap(lease).upload is None or shaper_name(lease.tap) in there
            if link is not None and link.up and shaped and lease.ipv4 in routed:
                continue
            async with self._changing:
                if lease.instance_id not in self._leases:  # detached meanwhile
                    continue
                what = "deleted" if link is None else "changed"
                log.error("%s of instance %s was %s by others; restoring it", lease.tap, lease.instance_id, what)
                await self._add_tap(lease)
            if link is None:
                await self._on_tap_lost(lease.instance_id)
        async with self._changing:
            await self.waking.repair(self.uplink.mtu)
