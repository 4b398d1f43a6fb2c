"""The rendered rules: whole in a golden file, and the elements of each kind of lease."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from hypeman.errors import InvalidRequest
from hypeman.network.addressing import Subnet
from hypeman.network.ports import check_ports, port_changes
from hypeman.network.ruleset import (
    RuleFacts,
    held_elements,
    lease_elements,
    port_elements_changed,
    possible_elements,
    render_removal,
    render_ruleset,
)
from hypeman.network.types import (
    EgressMode,
    HostPort,
    Lease,
    Opening,
    PortMapping,
    PrivateReach,
    Protocol,
    Reach,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "network" / "ruleset.nft"
CLOSED = GOLDEN.with_name("ruleset-without-private.nft")
FACTS = RuleFacts(
    subnet=Subnet.parse("10.100.0.0/16"),
    uplinks=("eth0",),
    forwarding=("eth0",),
    egress_port=18080,
    engine_uid=510000,
    entered=(8080, 80),
    engine_allowed=("10.7.0.0/16", "fd00:7::/64"),
    offered=(HostPort("udp", 53), HostPort("tcp", 53)),
    policed=(("hm-b", 1_250_000),),
)
REDIRECTED = Reach(redirected=(5432,))
PORTS = (
    PortMapping(host_port=8080, guest_port=80),
    PortMapping(host_port=8081, guest_port=80, host_address="192.0.2.1"),
    PortMapping(host_port=9000, guest_port=9000, protocol=Protocol.UDP, count=2),
    PortMapping(host_port=8443, guest_port=443, host_address="::1"),
)
REACHES = (
    Reach(),
    Reach(closed=True, openings=(Opening("tcp", "203.0.113.0/24", 443, 443), Opening("udp", "203.0.113.9/32", 1, 9))),
    Reach(private=PrivateReach.OPEN),
    Reach(private=PrivateReach.CLOSED),
)


def lease(name: str, **changes: object) -> Lease:
    number = ord(name) - ord("a") + 2
    fields = {
        "instance_id": name,
        "cid": number,
        "ipv4": f"10.100.0.{number}",
        "mac": f"02:00:00:00:00:{number:02x}",
        "tap": f"hm-{name}",
    }
    return Lease(**(fields | changes))  # type: ignore[arg-type]


def test_the_whole_ruleset() -> None:
    """Written anew by hand when it changes on purpose: ``python -m tests.network.test_ruleset``."""
    assert render() == GOLDEN.read_text()


def test_the_ruleset_without_private_networks() -> None:
    assert render_closed() == CLOSED.read_text()


@pytest.mark.parametrize(
    "facts",
    [
        FACTS,
        RuleFacts(subnet=FACTS.subnet, uplinks=()),
        RuleFacts(subnet=FACTS.subnet, uplinks=(), resolver=True, dns_server="10.0.0.53"),
        RuleFacts(subnet=FACTS.subnet, uplinks=(), resolver=True, bypass=False, dns_server="10.0.0.53"),
        RuleFacts(subnet=FACTS.subnet, uplinks=(), engine_uid=510000, egress_port=18080),
    ],
)
def test_whatever_is_left_out_the_rest_is_whole(facts: RuleFacts) -> None:
    """Chains and sets that rules name exist; a part that is not wanted leaves nothing behind."""
    text = render_ruleset(facts, [])
    inet = text[: text.index("table arp hypeman {")]
    assert set(re.findall(r"(?:goto|jump) (\w+)", inet)) <= set(re.findall(r"chain (\w+)", inet))
    assert set(re.findall(r"@(\w+)", inet)) <= set(re.findall(r"(?:set|map) (\w+) \{", inet))
    assert text.count("{") == text.count("}") and "None" not in text
    parts = {
        "from_engine": facts.engine_uid,
        "@mediated ip daddr": facts.egress_port,
        f"dport {facts.egress_port} accept": facts.egress_port,
        "update @pace": facts.resolver,
        "socket wildcard": facts.resolver and facts.bypass,
        "th dport 53 oifname @uplinks": facts.dns_server,
        "rate over 1250000": facts.policed,
    }
    assert {part for part in parts if part in text} == {part for part, wanted in parts.items() if wanted}


def test_a_load_begins_with_a_removal() -> None:
    assert render().startswith(render_removal() + "table inet hypeman {\n")


def render_closed() -> str:
    facts = replace(FACTS, allow_private=False, dns_server="10.0.0.53", policed=(), resolver=True, offered=())
    return render_ruleset(facts, [lease("a"), lease("b", egress_mode=EgressMode.ALL)])


def render() -> str:
    guests = [
        lease("a", ports=PORTS),
        lease("b", egress_mode=EgressMode.ALL),
        lease("c", egress_mode=EgressMode.HTTP_HTTPS_ONLY, isolated=False, reach=REDIRECTED),
        Lease(instance_id="d", cid=9),
        *(lease(name, reach=reach) for name, reach in zip("efg", REACHES[1:], strict=True)),
    ]
    return render_ruleset(
        FACTS, guests, held=[lease("h", isolated=False, ports=(PortMapping(host_port=7000, guest_port=70),))]
    )


@pytest.mark.parametrize(
    ("changes", "sets"),
    [
        ({}, {"guests"}),
        ({"egress_mode": EgressMode.ALL}, {"guests", "mediated", "mode_all"}),
        ({"egress_mode": EgressMode.HTTP_HTTPS_ONLY}, {"guests", "mediated"}),
        ({"egress_mode": EgressMode.ALL, "reach": REDIRECTED}, {"guests", "mediated", "mode_all", "redirected"}),
        ({"reach": REDIRECTED}, {"guests"}),
        ({"isolated": False}, {"guests", "neighbours"}),
        ({"isolated": False, "groups": (3, 7)}, {"guests", "group0", "group1", "members"}),
        ({"groups": (3,)}, {"guests"}),
        ({"ports": PORTS}, {"guests", "ports", "ports_at_tcp", "published", "hairpin"}),
        ({"ports": PORTS[3:]}, {"guests"}),
        ({"reach": REACHES[1]}, {"guests", "closed", "openings"}),
        ({"reach": REACHES[2]}, {"guests", "private_open"}),
        ({"reach": REACHES[3]}, {"guests", "private_closed"}),
    ],
)
def test_elements_of_a_lease(changes: dict[str, object], sets: set[str]) -> None:
    guest = lease("a", **changes)
    assert {element.set for element in lease_elements(guest)} == sets
    assert {element.family for element in lease_elements(guest)} == {"inet", "arp"}


def test_packets_of_a_group_wake_its_members() -> None:
    assert [element.set for element in held_elements(lease("a", isolated=False))] == ["asleep"]
    member = held_elements(lease("a", isolated=False, groups=(3, 7)))
    assert [(element.set, element.key[1]) for element in member] == [("members_asleep", "3"), ("members_asleep", "7")]
    assert held_elements(lease("a", groups=(3,))) == ()


def test_a_removal_clears_whatever_a_lease_may_have_opened() -> None:
    for mode in EgressMode:
        for isolated in (True, False):
            for reach in (*REACHES, REDIRECTED):
                opened = lease("a", egress_mode=mode, isolated=isolated, reach=reach)
                now = replace(
                    opened,
                    egress_mode=EgressMode.NONE,
                    isolated=True,
                    reach=replace(reach, closed=False, private=PrivateReach.CONFIGURED),
                )
                own = {element for element in lease_elements(opened) if element.set == "openings"}
                assert set(lease_elements(opened)) <= {*possible_elements(now), *own}
    member = lease("a", groups=(3, 7), isolated=False)
    assert set(lease_elements(member)) <= set(possible_elements(member))


def test_an_instance_without_network_opens_nothing() -> None:
    assert lease_elements(Lease(instance_id="a", cid=3)) == ()
    assert possible_elements(Lease(instance_id="a", cid=3)) == ()
    assert held_elements(Lease(instance_id="a", cid=3)) == ()


@pytest.mark.parametrize(
    ("changes", "sets"),
    [
        ({}, set()),
        ({"isolated": False}, {"asleep"}),
        ({"isolated": False, "groups": (3,)}, {"members_asleep"}),
        ({"ports": PORTS, "reach": REACHES[1]}, {"ports", "ports_at_tcp", "published", "hairpin"}),
    ],
)
def test_elements_of_an_instance_in_standby(changes: dict[str, object], sets: set[str]) -> None:
    """Neither its TAP nor its identity: nothing may pass in its name while it does not run."""
    assert {element.set for element in held_elements(lease("a", **changes))} == sets


def published(ports: list[PortMapping]) -> Lease:
    try:
        return lease("a", ports=check_ports(ports))
    except InvalidRequest:
        assume(False)
        raise


MAPPINGS = st.builds(
    PortMapping,
    host_port=st.integers(80, 84),
    guest_port=st.integers(80, 83),
    protocol=st.sampled_from(Protocol),
    host_address=st.sampled_from(["", "0.0.0.0", "192.0.2.1", "192.0.2.2", "::1"]),
    count=st.integers(1, 3),
)


@given(st.lists(MAPPINGS, max_size=4).map(published), st.lists(MAPPINGS, max_size=4).map(published))
def test_a_change_of_ports_leaves_the_elements_of_the_new_ones(before: Lease, after: Lease) -> None:
    """Whatever ports come, go and stay: what was added and removed gives what a fresh load would have."""
    gone, fresh = port_changes(before, after)
    remove, add = port_elements_changed(gone, fresh, after)
    assert not remove & add
    assert (set(lease_elements(before)) - remove) | add == set(lease_elements(after))


if __name__ == "__main__":
    GOLDEN.write_text(render())
    CLOSED.write_text(render_closed())
