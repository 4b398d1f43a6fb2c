"""Foreign changes to our links and rules are noticed, repaired and logged; links and rules of others are left alone."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from hypeman.config import NetworkConfig
from hypeman.host.netlink import NetlinkError
from hypeman.host.types import shaper_name
from hypeman.network.doctor import examine
from hypeman.network.types import Lease
from hypeman.telemetry.findings import Finding, Verdict
from tests.network import frames
from tests.network.frames import ARP, ICMP, TCP, UDP
from tests.network.lab import (
    GATEWAY,
    HOST,
    SERVER,
    VIRTIO_1_HEADER,
    Guest,
    Lab,
    in_namespace,
    lab,
    set_up_uplink,
    sh,
    wait_until,
)


class Told(logging.Handler):
    """What was logged, to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("hypeman.network").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@asynccontextmanager
async def watched(lab: Lab) -> AsyncIterator[Told]:
    reported = Told()
    async with trio.open_nursery() as nursery:
        await nursery.start(lab.network.run)
        yield reported
        nursery.cancel_scope.cancel()


async def failures() -> list[Finding]:
    return [finding for finding in await examine(NetworkConfig()) if finding.verdict is Verdict.FAIL]


async def _is_fenced(lab: Lab, guest: Guest) -> bool:
    guest.send_udp(SERVER, 9, b"spoofed", source="10.100.9.9")
    return [seen.data for seen in await lab.world_sees(guest)] == [b"marker"]


@in_namespace
async def test_flushed_rules_come_back(lab: Lab) -> None:
    guest = await lab.guest()
    async with watched(lab) as reported:
        for attack in ("flush ruleset", "delete table inet hypeman", "flush chain inet hypeman identity_guest",
                       "flush set inet hypeman guests", "add rule inet hypeman to_world_guest accept",
                       "delete table arp hypeman"):  # fmt: skip
            before = sh("nft -s list ruleset")
            sh(f"nft {attack}")
            assert sh("nft -s list ruleset") != before
            await wait_until(lambda before=before: sh("nft -s list ruleset") == before)  # type: ignore[misc]
            assert await _is_fenced(lab, guest)
        assert sum("nftables" in line for line in reported.lines) >= 6


@in_namespace
async def test_our_own_changes_are_not_taken_for_foreign_ones(lab: Lab) -> None:
    async with watched(lab) as reported:
        for _ in range(3):
            await lab.network.detach((await lab.guest()).lease)
        await lab.network._load_rules()
        sh("nft add table inet somebody")  # noticed after ours, so ours have been seen by then
        await trio.sleep(0.2)
        assert reported.lines == []


@in_namespace
async def test_a_deleted_tap_comes_back_and_its_vmm_is_put_on_it(lab: Lab) -> None:
    """Here the VMM is this process: the descriptor that it held works again, only with longer headers."""
    lost: list[str] = []

    async def on_tap_lost(instance_id: str) -> None:
        lost.append(instance_id)

    lab.network.on_tap_lost(on_tap_lost)
    guest = await lab.guest(upload_bps=10**6)
    async with watched(lab) as reported:
        sh(f"ip link del {guest.lease.tap}")
        await wait_until(lambda: lost == [guest.lease.instance_id])
        assert await lab.network.plug_in_again(guest.lease, os.getpid())
        assert not await lab.network.plug_in_again(guest.lease, os.getpid())
        guest.header = VIRTIO_1_HEADER
        await wait_until(lambda: sh(f"cat /sys/class/net/{guest.lease.tap}/operstate") == "up\n")
        assert await _is_fenced(lab, guest)
        assert lab.network.counters().keys() == {guest.lease.instance_id}
        assert any(guest.lease.tap in line and "deleted" in line for line in reported.lines)


@in_namespace
async def test_a_tap_taken_down_or_robbed_of_its_route_is_put_right(lab: Lab) -> None:
    guest = await lab.guest(upload_bps=10**6)
    async with watched(lab):
        tap, shaper = guest.lease.tap, shaper_name(guest.lease.tap)
        attacks = [f"link set {tap} down", f"route del {guest.lease.ipv4}", f"link del {shaper}"]
        attacks.append(f"addr del {GATEWAY}/32 dev lo")  # with it go all routes that name it as source
        for attack in attacks:
            sh(f"ip {attack}")
            await wait_until(lambda: guest.lease.ipv4 in sh("ip route") and shaper in sh("ip link"))
            await wait_until(lambda: "LOWER_UP" in sh(f"ip link show {guest.lease.tap}"))
            await trio.sleep(0.1)
            await guest.expect_pong()


@in_namespace
async def test_a_detached_guest_does_not_come_back(lab: Lab) -> None:
    async with watched(lab) as reported:
        for _ in range(5):
            guest = await lab.guest(upload_bps=10**6)
            await lab.network.detach(guest.lease)
        await trio.sleep(0.3)
        assert await lab.links.ours() == {}
        assert reported.lines == []


@in_namespace
async def test_the_uplink_goes_and_another_comes(lab: Lab) -> None:
    guest = await lab.guest()
    async with watched(lab) as reported:
        lab.unplug(lab.world)
        await wait_until(lambda: any("uplink is now none" in line for line in reported.lines))
        await wait_until(lambda: "up0" not in sh("nft list set inet hypeman uplinks"))
        guest.send_tcp(SERVER, 80)
        refusal = await guest.expect(lambda seen: seen.protocol in (ICMP, TCP))
        assert refusal.protocol == ICMP or refusal.flags & frames.RST
        lab.world = lab.add_wire(set_up_uplink("up1"))
        sh("ip link set up1 mtu 1400")
        await wait_until(lambda: "mtu 1400" in sh(f"ip link show {guest.lease.tap}"))
        await wait_until(lambda: "up1" in sh("nft list set inet hypeman uplinks"))
        (seen,) = await lab.world_sees(guest)
        assert seen.source == HOST


@in_namespace
async def test_forwarding_switched_off_is_switched_on_again(lab: Lab) -> None:
    """A `sysctl --system` that sets ip_forward to 0 reaches every interface."""
    guest = await lab.guest()
    async with watched(lab):
        sh("sysctl -qw net.ipv4.ip_forward=1; sysctl -qw net.ipv4.ip_forward=0")
        await wait_until(
            lambda: sh(f"sysctl -n net.ipv4.conf.up0.forwarding net.ipv4.conf.{guest.lease.tap}.forwarding") == "1\n1\n"
        )
        await lab.world_sees(guest)


@in_namespace
async def test_a_second_server_is_refused(lab: Lab) -> None:
    from hypeman.config import NetworkConfig
    from hypeman.host.files import HostError
    from hypeman.network.service import Network

    second = Network(NetworkConfig(), links=lab.links, rules=lab.rules)
    guest = await lab.guest()
    try:
        await second.start([])
        raise AssertionError("a second server started")
    except HostError as error:
        assert "another hypeman server" in error.message
    finally:
        second.aclose()
    await guest.expect_pong()


# Reconcile at start


async def _restart(lab: Lab, living: list[Lease]) -> None:
    lab.network.aclose()
    lab.network._claim = None
    lab.network._owners.clear()
    from hypeman._native.tapstats import TapStats

    lab.network._stats = TapStats()
    await lab.network.start(living)


@in_namespace
async def test_a_restart_keeps_the_living_and_removes_the_rest(lab: Lab) -> None:
    """The living guest's descriptor goes on working; nothing foreign is touched."""
    living, dead = await lab.guest(upload_bps=10**6), await lab.guest(upload_bps=10**6)
    sh("ip tuntap add mode tap name foreign0 && ip link add foreign1 type ifb")
    await _restart(lab, [living.lease])
    assert set(await lab.links.ours()) == {living.lease.tap, shaper_name(living.lease.tap)}
    assert "foreign0" in sh("ip link") and "foreign1" in sh("ip link")
    assert dead.lease.tap not in sh("nft list ruleset")
    assert await _is_fenced(lab, living)
    assert lab.network.counters().keys() == {living.lease.instance_id}


@in_namespace
async def test_a_restart_after_a_reboot_makes_everything(lab: Lab) -> None:
    lease = lab.lease(upload_bps=10**6, download_bps=10**6)
    await _restart(lab, [lease])
    guest = await lab.plug(lease)
    assert await _is_fenced(lab, guest)


@in_namespace
async def test_an_address_brings_no_connections_of_its_former_holder(lab: Lab) -> None:
    """What the world still sends to the old guest does not reach the new one; the same guest keeps its own."""
    first = await lab.guest()
    (seen,) = await lab.world_sees(first)
    answer = frames.ipv4(SERVER, HOST, UDP, frames.udp(SERVER, HOST, 9, seen.source_port, b"for the first"))

    async def comes_back_as(lease: Lease, *, boots: bool = False) -> list[bytes]:
        await lab.network.detach(lab_guests[-1].lease)
        await lab.network.attach(lease, boots=boots)
        await lab.network.release(lease)
        lab_guests.append(await lab.plug(lease))
        lab.from_world(answer)
        return [each.data for each in await lab_guests[-1].expect_pong() if each.protocol == UDP]

    lab_guests = [first]
    assert await comes_back_as(first.lease) == [b"for the first"]
    await lab.network.start([], others=[first.lease], held=[first.lease])
    assert await comes_back_as(first.lease) == [b"for the first"], "another server brings it back from standby"
    heir = lab.lease(ipv4=first.lease.ipv4, mac=first.lease.mac)
    bystander = await lab.guest()
    (other,) = await lab.world_sees(bystander)
    assert await comes_back_as(heir) == []
    seen = (await lab.world_sees(lab_guests[-1]))[-1]
    answer = frames.ipv4(SERVER, HOST, UDP, frames.udp(SERVER, HOST, 9, seen.source_port, b"for the heir"))
    assert await comes_back_as(heir) == [b"for the heir"]
    assert await comes_back_as(heir, boots=True) == [], "it has booted meanwhile"
    lab.from_world(frames.ipv4(SERVER, HOST, UDP, frames.udp(SERVER, HOST, 9, other.source_port, b"still mine")))
    assert (await bystander.expect(lambda each: each.protocol == UDP)).data == b"still mine"


@in_namespace
async def test_connections_are_cut_where_the_kernel_selects_only_what_it_lists(lab: Lab) -> None:
    """As Debian 12's does; the same as above, by the longer way."""

    def refuse(address: object) -> None:
        raise NetlinkError("delete", errno.EINVAL)

    lab.rules._forget_selected = refuse  # type: ignore[method-assign]
    first, bystander = await lab.guest(), await lab.guest()
    (seen,), (other,) = await lab.world_sees(first), await lab.world_sees(bystander)
    await lab.network.detach(first.lease)
    heir = lab.lease(ipv4=first.lease.ipv4, mac=first.lease.mac)
    await lab.network.attach(heir)
    guest = await lab.plug(heir)
    lab.from_world(frames.ipv4(SERVER, HOST, UDP, frames.udp(SERVER, HOST, 9, seen.source_port, b"for the first")))
    lab.from_world(frames.ipv4(SERVER, HOST, UDP, frames.udp(SERVER, HOST, 9, other.source_port, b"still mine")))
    assert [each.data for each in await guest.expect_pong() if each.protocol == UDP] == []
    assert (await bystander.expect(lambda each: each.protocol == UDP)).data == b"still mine"


@in_namespace
async def test_attach_after_a_flush_opens_the_guest_all_the_same(lab: Lab) -> None:
    """Nobody watches here: the failed change itself leads to a full load."""
    sh("nft flush ruleset")
    assert await _is_fenced(lab, await lab.guest())


@in_namespace
async def test_attach_and_detach_may_be_repeated(lab: Lab) -> None:
    lease = lab.lease(upload_bps=10**6, download_bps=10**6, egress_mode="all")
    clean = sh("nft -s list ruleset; ip -br link; ip route")
    for _ in range(2):
        await lab.network.attach(lease)
    state = "nft -s list ruleset; ls /sys/class/net; ip route | sed 's/ linkdown//'; ip neigh"
    attached = sh(state)
    await lab.network.attach(lease)
    again = sh(state)
    assert again == attached, f"{attached} became {again}"
    for _ in range(2):
        await lab.network.detach(lease)
        assert sh("nft -s list ruleset; ip -br link; ip route") == clean


# Beside others

FOREIGN = """
table inet filter {
    chain forward { type filter hook forward priority filter; policy drop; }
    chain input { type filter hook input priority filter; policy accept; }
}
table ip theirs {
    chain postrouting { type nat hook postrouting priority srcnat; policy accept; ip saddr 172.17.0.0/16 masquerade; }
}
"""


@in_namespace
async def test_foreign_rules_stay_as_they_are(lab: Lab) -> None:
    def foreign() -> str:
        return sh("nft -s list table inet filter; nft -s list table ip theirs")

    sh(f"nft -f - <<'END'\n{FOREIGN}\nEND")
    before = foreign()
    guest = await lab.guest(upload_bps=10**6)
    await lab.network._load_rules()
    await lab.network.detach(guest.lease)
    await _restart(lab, [])
    assert foreign() == before


@in_namespace
async def test_a_foreign_forward_drop_is_found_and_its_remedy_works(lab: Lab) -> None:
    guest = await lab.guest()
    firewalls = {
        "inet filter forward": f"nft -f - <<'END'\n{FOREIGN}\nEND",
        "ip filter FORWARD": "iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER",
    }
    for chain, command in firewalls.items():
        assert await failures() == []
        await lab.world_sees(guest)
        sh(command)
        (finding,) = await failures()
        assert chain in finding.message
        guest.send_udp(SERVER, 9, b"cut off")
        guest.send_arp(GATEWAY)
        await guest.expect(lambda seen: seen.kind == ARP)
        sh(finding.remedy)
        assert [seen.data for seen in await lab.world_sees(guest)] == [b"marker"]


@in_namespace
async def test_a_foreign_masquerade_and_ours_live_together(lab: Lab) -> None:
    greedy = FOREIGN.replace("policy drop", "policy accept").replace("ip saddr 172.17.0.0/16", "")
    sh(f"nft -f - <<'END'\n{greedy}\nEND")
    guest = await lab.guest()
    (seen,) = await lab.world_sees(guest)
    assert seen.source == HOST and seen.protocol == UDP


@in_namespace
async def test_the_doctor_finds_a_clashing_subnet() -> None:
    async with lab():
        sh("ip tuntap add mode tap name lan0 && ip addr add 10.100.3.1/24 dev lan0 && ip link set lan0 up")
        (finding,) = await failures()
        assert "10.100.3.0/24 on lan0" in finding.message
        assert "10.101.0.0/16" in finding.remedy


@in_namespace
async def test_five_hundred_taps_come_and_go(lab: Lab) -> None:
    def state() -> str:
        return sh("nft -s list ruleset; ls /sys/class/net; ip route; ip neigh; tc qdisc")

    clean = state()
    leases = [lab.lease(ipv4=f"10.100.{number // 250}.{number % 250 + 2}", upload_bps=10**6) for number in range(500)]
    for lease in leases:
        await lab.network.attach(lease)
    assert len(await lab.links.ours()) == 1000
    assert lab.network.counters().keys() == {lease.instance_id for lease in leases}
    async with trio.open_nursery() as nursery:
        for lease in leases:
            nursery.start_soon(lab.network.detach, lease)
    assert state() == clean
    assert lab.network.counters() == {}
