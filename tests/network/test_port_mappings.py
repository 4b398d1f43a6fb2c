"""Published ports as data: what is refused, what conflicts, and what is recorded of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypeman.errors import InvalidRequest, NotFound, PortInUse
from hypeman.network.addressing import Subnet
from hypeman.network.leases import PORTS, check_ports_free, drop_lease, get_lease, set_ports, take_lease
from hypeman.network.ports import HostSocket, all_sockets, check_ports, forwards_of, reached_from_loopback
from hypeman.network.types import NetworkPlan, PortMapping, Protocol
from hypeman.store import Store, Txn

SUBNET = Subnet.parse("10.100.0.0/16")
UDP = Protocol.UDP


def port(host: int, guest: int = 80, **more: object) -> PortMapping:
    return PortMapping(host_port=host, guest_port=guest, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ports", "reason"),
    [
        ([port(8080), port(8080, 81)], "published twice"),
        ([port(8080, host_address="127.0.0.1"), port(8080)], "127.0.0.1:8080/tcp is published twice|8080/tcp is"),
        ([port(8080, count=10), port(8085)], "8085/tcp is published twice"),
        ([port(65530, count=10)], "10 host ports from 65530"),
        ([port(8080, 65530, count=10)], "10 guest ports from 65530"),
        ([port(1000, 1000, count=1000), port(3000, 3000, count=25)], "at most 1024"),
        ([port(80, host_address="localhost")], "not an IP address"),
        ([port(80, host_address="fe80::1%eth0")], "scope"),
        ([port(80, host_address="fe80::1")], "link-local"),
        ([port(80, host_address="224.0.0.1")], "multicast"),
        ([port(80, host_address="255.255.255.255")], "broadcast"),
    ],
)
def test_what_is_refused(ports: list[PortMapping], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refusal:
        check_ports(ports)
    assert refusal.value.code == "invalid_ports"


def test_what_is_accepted() -> None:
    ports = [
        port(53), port(53, protocol=UDP), port(80, host_address="192.0.2.1"), port(80, host_address="192.0.2.2"),
        port(443, host_address="0.0.0.0"), port(443, host_address="::"), port(0, 22), port(0, 22),
    ]  # fmt: skip
    assert check_ports(ports) == tuple(ports)


def test_addresses_have_one_form() -> None:
    (first, second) = check_ports([port(80, host_address="0:0::1"), port(80, host_address="::ffff:192.0.2.1")])
    assert (first.host_address, second.host_address) == ("::1", "192.0.2.1")


def test_free_ports_are_found_one_by_one() -> None:
    assert check_ports([port(0, 8000, count=2)]) == (port(0, 8000), port(0, 8001))


def test_what_is_forwarded_and_held() -> None:
    assert [tuple(each) for each in forwards_of(port(8080, count=2))] == [("", "tcp", 8080, 80), ("", "tcp", 8081, 81)]
    assert list(forwards_of(port(8080, host_address="::1"))) == []
    assert all_sockets([port(8080), port(53, 5353, protocol=UDP, host_address="192.0.2.1")]) == {
        HostSocket("tcp", "0.0.0.0", 8080): 80,
        HostSocket("tcp", "::", 8080): 80,
        HostSocket("udp", "192.0.2.1", 53): 5353,
    }


@pytest.mark.parametrize(
    ("address", "reached"), [("", True), ("127.0.0.2", True), ("192.0.2.1", False), ("::1", False)]
)
def test_loopback(address: str, reached: bool) -> None:
    assert reached_from_loopback([port(8080, host_address=address)]) is reached


def test_ports_live_and_die_with_the_lease(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    names = {"one": "web", "two": "other"}.__getitem__

    def steps(txn: Txn) -> None:
        take_lease(txn, "one", NetworkPlan(ports=(port(8080), port(53, protocol=UDP))), SUBNET)
        for clashing in (port(8080), port(8080, host_address="::1"), port(8079, 1, count=2)):
            with pytest.raises(PortInUse, match=r"8080/tcp is published by web"):
                take_lease(txn, "two", NetworkPlan(ports=(clashing,)), SUBNET, names)
        check_ports_free(txn, [port(8080)], names, instance_id="one")
        take_lease(txn, "two", NetworkPlan(ports=(port(53),)), SUBNET, names)
        assert set_ports(txn, "one", (port(9090), port(8080)), names).ports == (port(9090), port(8080))
        assert set_ports(txn, "two", (port(53, protocol=UDP),), names).ports == (port(53, protocol=UDP),)
        with pytest.raises(PortInUse):
            set_ports(txn, "two", (port(9090),), names)
        drop_lease(txn, "one", SUBNET)
        check_ports_free(txn, [port(8080), port(9090)], names)
        drop_lease(txn, "two", SUBNET)
        assert list(txn.keys(PORTS)) == []
        take_lease(txn, "three", NetworkPlan(enabled=False), SUBNET)
        with pytest.raises(NotFound):
            set_ports(txn, "three", (port(1),), names)
        found = get_lease(txn, "three")
        assert found is not None and found.ports == ()

    with store._env.begin(write=True) as raw:
        steps(Txn(raw))
    store.close()
