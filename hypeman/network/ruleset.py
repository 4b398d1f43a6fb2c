"""The rules of the guests' network as nftables text and set elements. Pure.

Two tables, each wholly ours and the only ones we touch:

    inet hypeman    identity (prerouting), mediation (nat), what guests reach, masquerade
    arp  hypeman    drops spoofed ARP, which ``inet`` chains never see

Not ``netdev``: packets that return from an ifb (upload limits) skip the netdev ingress hook, so
rules there would apply only to guests without a limit.

The chains are fixed and drop by default for the prefix of our TAPs. A guest is *opened* by elements:

    guests       tap . mac . address    may send, only with this MAC and address
    mediated     tap                    ports 80 and 443 are redirected to the proxy; may reach the proxy's port
    redirected   tap . port             this TCP port as well, except to guests
    mode_all     tap                    of the rest only UDP and ICMP pass: no other TCP, no other protocol
    neighbours   tap                    may communicate with other neighbours
    group0…7     tap → group            may communicate with others of this group, and is no neighbour
    members      tap . group            the same from the other side
    ports        protocol . port        → address . port of a guest: published on all addresses of the host
    ports_at_tcp, ports_at_udp   address . port → the same, published on one address
    published    address . protocol . port  of a guest: reached through a published port
    hairpin      address . address      of a guest that has published ports, twice: it reaches itself through them
    asleep       address                of a guest in standby that packets of neighbours wake (``waking.py``)
    members_asleep  address . group     likewise packets of its groups
    closed       tap                    reaches nothing but the proxy, names, and its openings
    openings     tap . protocol . network . ports   which a closed guest reaches directly
    private_open, private_closed   tap  private networks, whatever is configured for all guests

so a TAP is closed before its lease is applied and after it is removed, and adding or removing an
instance is one small transaction. Path of a packet from a guest:

    identity (-450, before defragmentation: each fragment must prove its sender)
      → arrivals (dstnat) → to_host (input) or to_world (forward) → departures (srcnat)

What the engine opens passes ``from_engine``: to the world, not to this host, and to guests only at the ports that
ingresses lead to (``entered``).

A published port is translated where the packet arrives (``arrivals``; ``from_host`` for what the host itself sends)
and passes ``to_world`` only as the translation of an address of this host, so that a guest's own address stays
unreachable from outside. Sources are kept, but for a guest that calls itself and for 127.0.0.0/8, which no guest
could answer: those come from the gateway. Loopback addresses are translated for the host's own packets alone.

No rule can compare two look-ups, so the group of the sender is put into the packet's mark and looked up together with
the receiver's TAP (``share_group``). Only packets between guests are marked, and those that pass lose the mark again.

``accept`` ends only our own chain: other firewalls' chains still apply. Identity accepts verified packets
and drops the rest, including IPv6: nft adds implicit conditions to a rule (Ethernet type, ARP format), so a
rule that drops *unverified* packets would let those pass that do not meet them.

The text is also accepted by nft 0.9.8 (Debian 11). That version requires ``icmpx type`` and ``addr . port to``; the
protocol of a translation in the same rule; and in a map of concatenations no more parts in the key than in the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from hypeman.host.types import (
    GROUP_MAPS,
    INTERVAL_SETS,
    MAP_TYPES,
    SET_TYPES,
    TABLE,
    TAP_PREFIX,
    WAKE_LINK,
    Element,
)
from hypeman.network.addressing import Subnet
from hypeman.network.ports import forwards_of
from hypeman.network.types import EgressMode, HostPort, Lease, PrivateReach

FAMILIES = ("inet", "arp")

REFUSED_NETWORKS = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")
"""Never forwarded for a guest: this host, link-local (cloud metadata at 169.254.169.254), multicast, reserved."""

PRIVATE_NETWORKS = (
    "10.0.0.0/8",
    "100.64.0.0/10",  # shared address space; has Alibaba Cloud's metadata at 100.100.100.200
    "168.63.129.16",  # Azure's services for its VMs
    "172.16.0.0/12",
    "192.0.0.0/24",  # Oracle Cloud's services at 192.0.0.192
    "192.168.0.0/16",
    "198.18.0.0/15",
)
"""Never forwarded for a guest where ``network.allow_private`` is off: private networks."""

OPENABLE_NETWORKS = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
"""What private networks can be opened for one guest: those without metadata services."""

_WEB = "{ 80, 443 }"
_OPENED_REPLY = "meta l4proto . ip saddr . th sport != @openings"
_OPENED = "meta l4proto . ip daddr . th dport @openings"
_PUBLISHED = "ip daddr . meta l4proto . th dport @published"


class RuleFacts(msgspec.Struct, frozen=True):
    """Inputs of the fixed part."""

    subnet: Subnet
    uplinks: tuple[str, ...]
    """Uplink interfaces; none: guests reach only the host and each other."""
    forwarding: tuple[str, ...] = ()
    """Interfaces that forward, TAPs apart: published ports are translated for what comes in by them."""
    egress_port: int = 0
    """The proxy's port on the gateway; 0: no proxy."""
    engine_uid: int = 0
    """The user of the engine alone, which may open connections to the world and to ``entered`` only; 0: it has none."""
    engine_allowed: tuple[str, ...] = ()
    """Networks that it may reach besides, as address/prefix."""
    entered: tuple[int, ...] = ()
    """Ports of guests that ingresses lead to."""
    offered: tuple[HostPort, ...] = ()
    policed: tuple[tuple[str, int], ...] = ()
    """(tap, bytes per second) whose upload is policed here, if the kernel has no ifb to shape it."""
    allow_private: bool = True
    """Whether guests' direct traffic may go to PRIVATE_NETWORKS."""
    resolver: bool = False
    """Whether guests ask the gateway for names."""
    bypass: bool = True
    """Whether the kernel can tell if a name server runs there; if none does, queries go to ``dns_server``."""
    dns_server: str = ""
    """The guests' name servers; their port 53 stays reachable in PRIVATE_NETWORKS."""


def lease_elements(lease: Lease) -> tuple[Element, ...]:
    """All elements that open the network for ``lease``; none if it has no interface."""
    if not lease.enabled:
        return ()
    identity = (lease.tap, lease.mac, lease.ipv4)
    elements = [Element("inet", "guests", identity), Element("arp", "guests", identity)]
    if lease.egress_mode is not EgressMode.NONE:
        elements.append(Element("inet", "mediated", (lease.tap,)))
        elements += [Element("inet", "redirected", (lease.tap, str(port))) for port in lease.reach.redirected]
    if lease.egress_mode is EgressMode.ALL:
        elements.append(Element("inet", "mode_all", (lease.tap,)))
    if not lease.isolated:
        elements += _neighbour_elements(lease)
    return (*elements, *_reach_elements(lease), *_port_elements(lease))


def _neighbour_elements(lease: Lease) -> list[Element]:
    if not lease.groups:
        return [Element("inet", "neighbours", (lease.tap,))]
    numbers = [str(number) for number in lease.groups]
    sends = [Element("inet", name, (lease.tap,), (number,)) for name, number in zip(GROUP_MAPS, numbers, strict=False)]
    return sends + [Element("inet", "members", (lease.tap, number)) for number in numbers]


def _reach_elements(lease: Lease) -> Iterator[Element]:
    reach = lease.reach
    if reach.closed:
        yield Element("inet", "closed", (lease.tap,))
        for opening in reach.openings:
            ports = str(opening.first) if opening.first == opening.last else f"{opening.first}-{opening.last}"
            yield Element("inet", "openings", (lease.tap, opening.protocol, opening.network, ports))
    if reach.private is not PrivateReach.CONFIGURED:
        yield Element("inet", f"private_{reach.private.value}", (lease.tap,))


def held_elements(lease: Lease) -> tuple[Element, ...]:
    """What stays open for an instance in standby that packets wake: its published ports, and its neighbours."""
    if not lease.enabled:
        return ()
    return (*_asleep_elements(lease), *_port_elements(lease))


def _asleep_elements(lease: Lease) -> tuple[Element, ...]:
    if lease.isolated:
        return ()
    if not lease.groups:
        return (Element("inet", "asleep", (lease.ipv4,)),)
    return tuple(Element("inet", "members_asleep", (lease.ipv4, str(number))) for number in lease.groups)


def possible_elements(lease: Lease) -> tuple[Element, ...]:
    """Every element that ``lease`` may have had in any mode; a removal deletes all of them. Openings, ports and groups
    are its own."""
    if not lease.enabled:
        return ()
    strictest = msgspec.structs.replace(lease, egress_mode=EgressMode.ALL, isolated=False)
    reach = tuple(Element("inet", name, (lease.tap,)) for name in ("closed", "private_open", "private_closed"))
    return tuple(dict.fromkeys((*lease_elements(strictest), *reach)))


def entered_elements(ports: Iterable[int]) -> set[Element]:
    """What lets the engine connect to these ports of guests."""
    return {Element("inet", "entered", (str(port),)) for port in ports}


def _port_elements(lease: Lease) -> Iterator[Element]:
    forwards = [each for mapping in lease.ports for each in forwards_of(mapping)]
    for forward in forwards:
        target = (lease.ipv4, str(forward.guest_port))
        if forward.address:
            yield Element("inet", f"ports_at_{forward.protocol}", (forward.address, str(forward.host_port)), target)
        else:
            yield Element("inet", "ports", (forward.protocol, str(forward.host_port)), target)
    for protocol, port in sorted({(forward.protocol, forward.guest_port) for forward in forwards}):
        yield Element("inet", "published", (lease.ipv4, protocol, str(port)))
    if forwards:
        yield Element("inet", "hairpin", (lease.ipv4, lease.ipv4))


def port_elements_changed(gone: Lease, fresh: Lease, after: Lease) -> tuple[set[Element], set[Element]]:
    """What to remove and what to add when an instance that publishes ``gone`` publishes ``fresh`` instead, and
    ``after`` in all."""
    add = set(_port_elements(fresh))
    return {element for element in _port_elements(gone) if not _is_shared(element, after)} - add, add


def _is_shared(element: Element, lease: Lease) -> bool:
    """Whether the element, of a port that is no longer published, is also one of the ports of ``lease``."""
    if element.set == "hairpin":
        return any(":" not in mapping.host_address for mapping in lease.ports)
    if element.set != "published":
        return False
    _, protocol, port = element.key
    return any(
        mapping.protocol == protocol
        and ":" not in mapping.host_address
        and mapping.guest_port <= int(port) < mapping.guest_port + mapping.count
        for mapping in lease.ports
    )


def render_ruleset(facts: RuleFacts, leases: Iterable[Lease], held: Iterable[Lease] = ()) -> str:
    """Both tables with all elements, replacing existing ones in one transaction (``nft -f``). ``held``: the leases of
    instances in standby that packets wake."""
    elements: dict[tuple[str, str], list[str]] = {}
    wanted = dict.fromkeys(element for lease in leases for element in lease_elements(lease))
    wanted |= dict.fromkeys(element for lease in held for element in held_elements(lease))
    wanted |= dict.fromkeys(sorted(entered_elements(facts.entered)))
    for element in wanted:
        elements.setdefault((element.family, element.set), []).append(_element_text(element))
    forget = "".join(f"table {family} {TABLE}\ndelete table {family} {TABLE}\n" for family in FAMILIES)
    return forget + _inet_table(facts, elements) + _arp_table(facts, elements)


def render_removal() -> str:
    """Delete both tables, even if they do not exist."""
    return "".join(f"table {family} {TABLE}\ndelete table {family} {TABLE}\n" for family in FAMILIES)


_ANY_TAP = f'"{TAP_PREFIX}*"'


def _inet_table(facts: RuleFacts, elements: dict[tuple[str, str], list[str]]) -> str:
    chains = (
        _identity_chains(facts),
        _translation_chains(facts),
        _to_host_chains(facts),
        _to_world_chains(facts),
        _departure_chain(facts),
        _asleep_chain(),
    )
    return f"table inet {TABLE} {{\n{_sets(elements)}{_host_sets(facts)}" + "\n".join(chains) + "}\n"


def _host_sets(facts: RuleFacts) -> str:
    """Interfaces of the host, and networks that are closed to guests."""
    refused = ", ".join(REFUSED_NETWORKS)
    private = "" if facts.allow_private else f"        elements = {{ {', '.join(PRIVATE_NETWORKS)} }}\n"
    forwarding = "".join(
        f"        elements = {{ {', '.join(map(_quoted, facts.forwarding))} }}\n" if facts.forwarding else ""
    )
    uplinks = "".join(f"        elements = {{ {', '.join(map(_quoted, facts.uplinks))} }}\n" if facts.uplinks else "")
    return f"""\
    set uplinks {{
        type ifname
{uplinks}    }}
    set forwarding {{
        type ifname
{forwarding}    }}
    set refused {{
        type ipv4_addr
        flags interval
        elements = {{ {refused} }}
    }}
    set private {{
        type ipv4_addr
        flags interval
{private}    }}
"""


def _identity_chains(facts: RuleFacts) -> str:
    """The rate limits, and packets whose sender is not who it claims to be."""
    return f"""\
{_pace_set(facts)}{_limits(facts)}
    chain identity {{
        type filter hook prerouting priority -450; policy accept;
        iifname "{WAKE_LINK}" accept
        iifname {_ANY_TAP} jump identity_guest
    }}
    chain identity_guest {{
{_policer(facts)}        ip daddr 127.0.0.0/8 counter drop
        iifname . ether saddr . ip saddr @guests accept
        counter drop
    }}
"""


def _translation_chains(facts: RuleFacts) -> str:
    """Connections that go to the proxy or to a published port."""
    return f"""\
    chain arrivals {{
        type nat hook prerouting priority dstnat; policy accept;
{_mediation(facts)}{_bypass(facts)}        iifname @mediated tcp dport {_WEB} return
        ip daddr 127.0.0.0/8 return
        iifname != {_ANY_TAP} iifname != @forwarding return
{_kept_by_gateway(facts)}        meta l4proto {{ tcp, udp }} jump publish
    }}
    chain from_host {{
        type nat hook output priority -100; policy accept;
{_kept_by_gateway(facts)}        meta l4proto {{ tcp, udp }} jump publish
    }}
    chain publish {{
        fib daddr type != local return
{_translations()}    }}
"""


def _to_host_chains(facts: RuleFacts) -> str:
    """What guests reach of the host."""
    gateway = facts.subnet.gateway
    return f"""\
    chain to_host {{
        type filter hook input priority filter; policy accept;
        iifname {_ANY_TAP} goto to_host_guest
        iifname != "lo" ip daddr {gateway} counter drop
    }}
    chain to_host_guest {{
{_pace(facts)}        ct state established,related accept
        ip daddr != {gateway} counter goto refuse
        icmp type echo-request accept
{_offered(facts)}        counter goto refuse
    }}
"""


def _to_world_chains(facts: RuleFacts) -> str:
    """What is forwarded from guests and to them."""
    network = facts.subnet.network
    return f"""\
    chain to_world {{
        type filter hook forward priority filter; policy accept;
        iifname {_ANY_TAP} goto to_world_guest
        oifname @closed ct state established ct direction reply oifname . {_OPENED_REPLY} counter drop
        oifname {_ANY_TAP} ct state established,related accept
        oifname {_ANY_TAP} ct status dnat {_PUBLISHED} accept
        oifname {_ANY_TAP} counter drop
    }}
    chain to_world_guest {{
        iifname "{WAKE_LINK}" ct state established,related accept
        ct direction reply ct status dnat ct state established,related accept
        iifname @closed counter goto to_world_closed
        iifname @mode_all meta l4proto != {{ udp, icmp }} counter goto refuse
        oifname {_ANY_TAP} ct status dnat {_PUBLISHED} accept
        iifname @mediated tcp dport {_WEB} counter goto refuse
        iifname @mediated udp dport 443 counter reject with icmpx type port-unreachable
        oifname {_ANY_TAP} iifname @neighbours oifname @neighbours accept
        oifname "{WAKE_LINK}" iifname @neighbours ip daddr @asleep accept
        oifname {_ANY_TAP} jump share_group
        ip daddr @refused counter goto refuse
        ip daddr {network} counter goto refuse
        udp sport {{ 67, 68 }} counter drop
{_name_server(facts)}{_private()}        oifname @uplinks accept
        counter goto refuse
    }}
    chain share_group {{
{_share_group()}    }}
    chain to_world_closed {{
        udp dport 443 counter reject with icmpx type port-unreachable
        ip daddr @refused counter goto refuse
        ip daddr {network} counter goto refuse
{_private()}        iifname . {_OPENED} oifname @uplinks accept
        counter goto refuse
    }}
{_engine(facts)}    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject with icmpx type admin-prohibited
    }}
"""


def _departure_chain(facts: RuleFacts) -> str:
    """Source addresses of what leaves."""
    gateway, network = facts.subnet.gateway, facts.subnet.network
    return f"""\
    chain departures {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr . ip daddr @hairpin snat ip to {gateway}
        oifname {_ANY_TAP} ip saddr 127.0.0.0/8 snat ip to {gateway}
        ip saddr {network} oifname @uplinks masquerade
    }}
"""


def _asleep_chain() -> str:
    """A limit for packets to each instance in standby."""
    return f"""\
    set arrivals_asleep {{
        type ipv4_addr
        size 65535
        flags dynamic,timeout
        timeout 1m
    }}
    chain to_asleep {{
        type filter hook postrouting priority filter; policy accept;
        oifname != "{WAKE_LINK}" accept
        update @arrivals_asleep {{ ip daddr limit rate over 256/second burst 512 packets }} counter drop
    }}
"""


def _arp_table(facts: RuleFacts, elements: dict[tuple[str, str], list[str]]) -> str:
    proved = "iifname . ether saddr . arp saddr ip @guests iifname . arp saddr ether . arp saddr ip @guests"
    return f"""\
table arp {TABLE} {{
    set guests {{
        type ifname . ether_addr . ipv4_addr
{_elements(elements, "arp", "guests")}    }}
    chain identity {{
        type filter hook input priority filter; policy accept;
        iifname "{TAP_PREFIX}*" goto identity_guest
    }}
    chain identity_guest {{
        {proved} arp daddr ip {facts.subnet.network} accept
        counter drop
    }}
}}
"""


def _translations() -> str:
    """The rules that lead published ports to guests, one for each protocol and map."""
    return "".join(
        f"        meta l4proto {protocol} dnat ip addr . port to {key} map @{name}\n"
        for protocol in ("tcp", "udp")
        for key, name in (("ip daddr . th dport", f"ports_at_{protocol}"), ("meta l4proto . th dport", "ports"))
    )


def _share_group() -> str:
    """Two rules for each group that a sender may be in; a look-up that fails ends its rule."""
    return "".join(
        f"        meta mark set iifname map @{name} {receiver} meta mark set 0 accept\n"
        for name in GROUP_MAPS
        for receiver in ("oifname . meta mark @members", "ip daddr . meta mark @members_asleep")
    )


def _sets(elements: dict[tuple[str, str], list[str]]) -> str:
    """The sets and maps that leases fill."""
    text = ""
    for name, types in SET_TYPES.items():
        values = MAP_TYPES.get(name)
        kind = " . ".join(types) + (f" : {' . '.join(values)}" if values else "")
        flags = "        flags interval\n" if name in INTERVAL_SETS else ""
        text += f"""\
    {"map" if values else "set"} {name} {{
        type {kind}
{flags}{_elements(elements, "inet", name)}    }}
"""
    return text


def _kept_by_gateway(facts: RuleFacts) -> str:
    """Ports of the gateway's address that are served here, and so are never a guest's."""
    kept = sorted(
        {*facts.offered, *_name_ports(facts), *([HostPort("tcp", facts.egress_port)] if facts.egress_port else [])}
    )
    return "".join(
        f"        ip daddr {facts.subnet.gateway} {port.protocol} dport {port.port} return\n" for port in kept
    )


def _engine(facts: RuleFacts) -> str:
    """The engine checks addresses itself; this holds even if it is compromised. Its answers to guests are replies."""
    if not facts.engine_uid:
        return ""
    allowed = "".join(
        f"        {family} daddr {{ {', '.join(networks)} }} accept\n"
        for family, networks in (
            ("ip", [each for each in facts.engine_allowed if ":" not in each]),
            ("ip6", [each for each in facts.engine_allowed if ":" in each]),
        )
        if networks
    )
    return f"""\
    chain from_host_filter {{
        type filter hook output priority filter; policy accept;
        meta skuid {facts.engine_uid} goto from_engine
    }}
    chain from_engine {{
        ct state established,related accept
        ip daddr {facts.subnet.network} tcp dport @entered accept
        ip daddr {facts.subnet.network} counter goto refuse
{allowed}        fib daddr type local counter goto refuse
        ip daddr @refused counter goto refuse
    }}
"""


def _mediation(facts: RuleFacts) -> str:
    if not facts.egress_port:
        return ""
    excluded = f"ip daddr != @refused ip daddr != {facts.subnet.gateway}"
    target = f"{facts.subnet.gateway}:{facts.egress_port}"
    return (
        f"        iifname @mediated {excluded} tcp dport {_WEB} dnat ip to {target}\n"
        f"        {excluded} ip daddr != {facts.subnet.network} iifname . tcp dport @redirected dnat ip to {target}\n"
    )


def _offered(facts: RuleFacts) -> str:
    rules = [f"{port.protocol} dport {port.port} accept" for port in sorted({*facts.offered, *_name_ports(facts)})]
    if facts.egress_port:
        rules.append(f"iifname @mediated tcp dport {facts.egress_port} accept")
    return "".join(f"        {rule}\n" for rule in rules)


def _name_ports(facts: RuleFacts) -> tuple[HostPort, ...]:
    return (HostPort("tcp", 53), HostPort("udp", 53)) if facts.resolver else ()


def _bypass(facts: RuleFacts) -> str:
    if not (facts.resolver and facts.bypass and facts.dns_server):
        return ""
    asked = f'iifname "{TAP_PREFIX}*" ip daddr {facts.subnet.gateway} meta l4proto {{ tcp, udp }} th dport 53'
    return f"        {asked} socket wildcard 0 return\n        {asked} dnat ip to {facts.dns_server}\n"


def _pace_set(facts: RuleFacts) -> str:
    if not facts.resolver:
        return ""
    lines = ("type ifname", "size 65536", "flags dynamic,timeout", "timeout 1m")
    return "    set pace {\n" + "".join(f"        {line}\n" for line in lines) + "    }\n"


def _pace(facts: RuleFacts) -> str:
    """What one guest may ask: more than programs do, less than what would keep the name server busy."""
    if not facts.resolver:
        return ""
    pace = "update @pace { iifname limit rate over 300/second burst 300 packets }"
    return f"        meta l4proto {{ tcp, udp }} th dport 53 {pace} counter drop\n"


def _name_server(facts: RuleFacts) -> str:
    if not facts.dns_server:
        return ""
    return f"        ip daddr {facts.dns_server} meta l4proto {{ tcp, udp }} th dport 53 oifname @uplinks accept\n"


def _private() -> str:
    everywhere, opened = ", ".join(PRIVATE_NETWORKS), ", ".join(OPENABLE_NETWORKS)
    return f"""\
        iifname @private_closed ip daddr {{ {everywhere} }} counter goto refuse
        iifname @private_open ip daddr != {{ {opened} }} ip daddr @private counter goto refuse
        iifname != @private_open ip daddr @private counter goto refuse
"""


def _limits(facts: RuleFacts) -> str:
    """Named policers: they drop instead of queueing, which hurts TCP; used only without ifb."""
    return "".join(
        f"    limit up_{_word(tap)} {{ rate over {rate} bytes/second burst {max(rate // 10, 65536)} bytes; }}\n"
        for tap, rate in facts.policed
    )


def _policer(facts: RuleFacts) -> str:
    if not facts.policed:
        return ""
    pairs = ", ".join(f'{_quoted(tap)} : "up_{_word(tap)}"' for tap, _ in facts.policed)
    return f"        limit name iifname map {{ {pairs} }} counter drop\n"


def _elements(elements: dict[tuple[str, str], list[str]], family: str, name: str) -> str:
    keys = elements.get((family, name))
    return f"        elements = {{ {', '.join(sorted(keys))} }}\n" if keys else ""


def _element_text(element: Element) -> str:
    types = SET_TYPES[element.set]
    key = " . ".join(_quoted(part) if kind == "ifname" else part for kind, part in zip(types, element.key, strict=True))
    return f"{key} : {' . '.join(element.value)}" if element.value else key


def _quoted(name: str) -> str:
    return f'"{name}"'


def _word(tap: str) -> str:
    return tap.replace("-", "_").replace(".", "_")
