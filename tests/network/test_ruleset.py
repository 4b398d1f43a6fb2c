"""The rendered rules: whole in a golden file, and the elements of each kind of lease."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from hypeman.network.addressing import Subnet
from hypeman.network.ruleset import RuleFacts, lease_elements, possible_elements, render_ruleset
from hypeman.network.types import EgressMode, HostPort, Lease, PortMapping, Protocol, Reach

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


def render_closed() -> str:
    facts = replace(FACTS, allow_private=False, dns_server="10.0.0.53", policed=(), resolver=True, offered=())
    return render_ruleset(facts, [lease("a"), lease("b", egress_mode=EgressMode.ALL)])


def render() -> str:
    guests = [
        lease("a", ports=PORTS),
        lease("b", egress_mode=EgressMode.ALL),
        lease("c", egress_mode=EgressMode.HTTP_HTTPS_ONLY, isolated=False, reach=REDIRECTED),
        Lease(instance_id="d", cid=9),
    ]
    return render_ruleset(FACTS, guests)


@pytest.mark.parametrize(
    ("changes", "sets"),
    [
        ({}, {"guests"}),
        ({"egress_mode": EgressMode.ALL}, {"guests", "mediated", "mode_all"}),
        ({"egress_mode": EgressMode.HTTP_HTTPS_ONLY}, {"guests", "mediated"}),
        ({"egress_mode": EgressMode.ALL, "reach": REDIRECTED}, {"guests", "mediated", "mode_all", "redirected"}),
        ({"reach": REDIRECTED}, {"guests"}),
        ({"isolated": False}, {"guests", "neighbours"}),
        ({"ports": PORTS}, {"guests", "ports", "ports_at", "published", "hairpin"}),
        ({"ports": PORTS[3:]}, {"guests"}),
    ],
)
def test_elements_of_a_lease(changes: dict[str, object], sets: set[str]) -> None:
    guest = lease("a", **changes)
    assert {element.set for element in lease_elements(guest)} == sets
    assert {element.family for element in lease_elements(guest)} == {"inet", "arp"}


def test_a_removal_clears_whatever_a_lease_may_have_opened() -> None:
    everything = set(possible_elements(lease("a")))
    for mode in EgressMode:
        for isolated in (True, False):
            assert set(lease_elements(lease("a", egress_mode=mode, isolated=isolated))) <= everything


def test_an_instance_without_network_opens_nothing() -> None:
    assert lease_elements(Lease(instance_id="a", cid=3)) == ()
    assert possible_elements(Lease(instance_id="a", cid=3)) == ()


if __name__ == "__main__":
    GOLDEN.write_text(render())
    CLOSED.write_text(render_closed())
