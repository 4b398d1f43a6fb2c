"""Netlink messages, made and read; what the kernel refuses is reported in its own words."""

from __future__ import annotations

import errno
import os
import socket
import struct
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hypeman.host.files import HostError
from hypeman.host.links import Links, NamespaceClaim, Tap
from hypeman.host.netlink import (
    NETLINK_ROUTE,
    Message,
    Monitor,
    Netlink,
    NetlinkError,
    attr,
    attributes,
    nested,
    packets,
    text,
    u32,
)
from hypeman.host.qdiscs import ticks
from hypeman.host.rules import Rules
from hypeman.host.types import Element, TokenBucket
from tests.network.lab import in_namespace, sh

TAP = Tap(
    name="hm-one",
    address="10.100.0.2",
    mac="02:00:00:00:00:02",
    gateway="10.100.0.1",
    gateway_mac="02:00:00:00:00:01",
    alias="hypeman one",
    download=TokenBucket(10**6, 16384, 131072),
    upload=TokenBucket(10**6, 16384, 131072),
)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8))
def test_attributes_are_read_as_written(pairs: list[tuple[int, bytes]]) -> None:
    assert list(attributes(b"".join(attr(kind, value) for kind, value in pairs))) == pairs


def test_nested_attributes_are_marked_and_hold_others() -> None:
    outer = nested(5, text(1, "tbf"), u32(2, 7))
    ((kind, inner),) = attributes(outer)
    assert kind == 5 and struct.unpack_from("=HH", outer)[1] == 0x8005
    assert list(attributes(inner)) == [(1, b"tbf\0"), (2, struct.pack("=I", 7))]


@given(st.binary(max_size=200))
def test_malformed_packets_are_read_without_harm(data: bytes) -> None:
    assert all(len(packet.body) <= len(data) for packet in packets(data))
    assert all(len(value) <= len(data) for _, value in attributes(data))


def test_ticks_of_the_packet_schedulers() -> None:
    assert ticks(64e-9 * 1000) == 1000
    assert ticks(1e9) == 2**32 - 1


def test_sockets_can_be_opened_and_closed() -> None:
    netlink = Netlink()
    assert netlink.port
    netlink.close()


@in_namespace
async def test_errors_contain_the_kernels_message() -> None:
    """A batch goes on behind the message that was refused, and the first refusal is raised."""
    netlink = Netlink()
    header = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
    bad = Message(16, 0x600, header + text(3, "a/b") + nested(18, text(1, "ifb")), "make a/b")
    good = Message(16, 0x600, header + text(3, "fine0") + nested(18, text(1, "ifb")), "make fine0")
    with pytest.raises(NetlinkError, match="make a/b: Invalid argument") as refusal:
        netlink.run([bad, good])
    assert refusal.value.errno == errno.EINVAL
    assert "fine0" in sh("ip link")
    netlink.run([good._replace(tolerated=(errno.EEXIST,))])
    with pytest.raises(NetlinkError, match=r"list.*\(.+\)"):  # with the words of an extended acknowledgement
        netlink.dump(Message(18, 0, header[:4] + struct.pack("=iII", 5, 0, 0), "list"))
    netlink.run([good._replace(tolerated=(errno.EEXIST,))])  # nothing of the refusals is left over
    netlink.close()


@in_namespace
async def test_a_transaction_of_rules_is_all_or_nothing() -> None:
    rules = Rules()
    await rules.load("table inet hypeman { set mediated { type ifname; }\n set mode_all { type ifname; }\n}")
    good, bad = Element("inet", "mediated", ("hm-a",)), Element("inet", "neighbours", ("hm-a",))
    with pytest.raises(NetlinkError, match="inet neighbours hm-a: No such file"):
        await rules.change(add=[good, bad])
    assert "hm-a" not in sh("nft list ruleset")
    await rules.change(remove=[good], add=[good, Element("inet", "mode_all", ("hm-a",))])
    assert sh("nft list ruleset").count("hm-a") == 2
    for _ in range(2):
        await rules.change(remove=[good])
    assert sh("nft list ruleset").count("hm-a") == 1
    rules.close()


@in_namespace
async def test_an_error_of_nft_is_reported() -> None:
    rules = Rules()
    with pytest.raises(HostError, match=r"nft refused: /dev/stdin:1:\d+.*syntax error"):
        await rules.load("table inet hypeman { nonsense }\n")
    assert sh("nft list ruleset") == ""
    rules.close()


@in_namespace
async def test_a_tap_is_as_described() -> None:
    links = Links()
    index = await links.add_tap(TAP)
    assert sh(f"cat /sys/class/net/{TAP.name}/ifindex") == f"{index}\n"
    details = sh(f"ip -d link show {TAP.name}")
    for detail in ("mtu 1500", "qdisc tbf", TAP.gateway_mac, "tap pi off vnet_hdr on persist on", "alias hypeman one"):
        assert detail in details
    assert "UP" in details
    assert f"{TAP.address} dev {TAP.name} proto static scope link src {TAP.gateway}" in sh("ip route")
    assert f"{TAP.address} dev {TAP.name} lladdr {TAP.mac} PERMANENT" in sh("ip neigh")
    assert "rate 8Mbit burst 16Kb" in sh(f"tc qdisc show dev {TAP.name}")
    assert "rate 8Mbit burst 16Kb" in sh("tc qdisc show dev hmu-one")
    assert "mirred (Egress Redirect to device hmu-one)" in sh(f"tc filter show dev {TAP.name} ingress")
    await links.remove_taps([TAP.name])
    assert await links.ours() == {}
    links.close()


@in_namespace
async def test_limits_can_be_set_changed_and_lifted() -> None:
    from msgspec.structs import replace

    links = Links()
    free = replace(TAP, download=None, upload=None)
    await links.add_tap(free)
    unlimited = sh("tc qdisc show")
    await links.set_limits(TAP)
    await links.set_limits(replace(TAP, download=TokenBucket(2 * 10**6, 16384, 131072)))
    assert "rate 16Mbit" in sh(f"tc qdisc show dev {TAP.name}")
    for _ in range(2):
        await links.set_limits(free)
        assert sh("tc qdisc show").split() == unlimited.split()
        assert list(await links.ours()) == [TAP.name]
    links.close()


@in_namespace
async def test_only_a_tap_that_exists_is_opened() -> None:
    """And once: a second user would take the first one's frames."""
    links = Links()
    with pytest.raises(HostError, match="hm-one is not there"):
        await links.open_tap("hm-one")
    assert await links.ours() == {}
    await links.add_tap(TAP)
    descriptor = await links.open_tap("hm-one")
    assert not os.get_inheritable(descriptor)
    with pytest.raises(HostError, match="hm-one cannot be opened: Device or resource busy"):
        await links.open_tap("hm-one")
    os.close(descriptor)
    with pytest.raises(HostError, match="limits cannot be set"):
        await links.set_limits(Tap("hm-two", "10.100.0.3", TAP.mac, TAP.gateway, TAP.gateway_mac))
    links.close()


@in_namespace
async def test_removals_that_meet_share_one() -> None:
    links = Links()
    names = [f"hm-{number}" for number in range(20)]
    for number, name in enumerate(names):
        await links.add_tap(Tap(name, f"10.100.0.{number + 2}", TAP.mac, TAP.gateway, TAP.gateway_mac))
    sh("ip link add other0 type ifb")
    async with trio.open_nursery() as nursery:
        for name in [*names, "hm-never-there"]:
            nursery.start_soon(links.remove_taps, [name])
    assert await links.ours() == {}
    assert "other0" in sh("ip link")
    links.close()


@in_namespace
async def test_lost_notifications_are_reported() -> None:
    monitor = Monitor(NETLINK_ROUTE, (1,), settle=0)
    monitor._socket.setsockopt(1, 8, 1)  # SO_RCVBUF, as small as the kernel allows
    for number in range(30):
        sh(f"ip link add lost{number} type ifb")
    with trio.fail_after(5):
        while "lost" not in await monitor.receive(lambda packet: "seen", "lost"):
            pass
    monitor.close()


@in_namespace
async def test_one_server_for_one_namespace() -> None:
    """Nobody but root can be in its way: neither by an abstract socket's name nor by a lock on what they may open."""
    squatter = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    squatter.bind("\0hypeman-network")
    with tempfile.TemporaryDirectory() as directory:
        claim = NamespaceClaim(Path(directory))
        (lock,) = Path(directory).iterdir()
        assert lock.stat().st_mode & 0o777 == 0o600
        with pytest.raises(HostError, match="another hypeman server"):
            NamespaceClaim(Path(directory))
        claim.close()
        claim.close()
        NamespaceClaim(Path(directory)).close()
        lock.unlink()
        lock.symlink_to("elsewhere")
        with pytest.raises(HostError):
            NamespaceClaim(Path(directory))
    squatter.close()
