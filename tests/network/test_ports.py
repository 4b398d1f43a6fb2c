"""Published ports through a real kernel: from everywhere that they must be reached from, and nowhere else."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest
import trio
from msgspec.structs import replace

from hypeman.errors import PortInUse
from hypeman.host.types import Element
from hypeman.network.types import EgressMode, PortMapping, Protocol
from tests.network.hosts import Host, guest_host, world_host
from tests.network.lab import GATEWAY, HOST, ROUTER, Guest, Lab, in_namespace, plug_in, sh, wait_until

WEB = PortMapping(host_port=8080, guest_port=80)
ECHO = PortMapping(host_port=7007, guest_port=7, protocol=Protocol.UDP)


async def publish(lab: Lab, guest: Guest, *ports: PortMapping) -> tuple[PortMapping, ...]:
    """Change the ports of a guest as a PATCH does, without the store."""
    instance_id = guest.lease.instance_id
    with await lab.network.published.claim(ports, instance_id=instance_id) as claim:
        guest.lease = replace(guest.lease, ports=claim.ports)
        claim.keep(instance_id)
    await lab.network.set_ports(guest.lease)
    return claim.ports


@asynccontextmanager
async def reached(lab: Lab, **lease: object) -> AsyncIterator[tuple[Guest, Host, Host]]:
    """A running guest, its inside and the world; the network watches and repairs itself."""
    async with trio.open_nursery() as nursery:
        await nursery.start(lab.network.run)
        guest = await lab.guest(**lease)
        with guest_host(guest) as inside, world_host(lab) as world:
            yield guest, inside, world
        nursery.cancel_scope.cancel()


def tcp(client: socket.socket, server: socket.socket) -> str:
    """Talk over a connection that has just been made; the address that the server sees."""
    server.settimeout(10)
    accepted, peer = server.accept()
    accepted.settimeout(10)
    with client, accepted:
        client.sendall(b"question")
        assert accepted.recv(100) == b"question"
        accepted.sendall(b"answer")
        assert client.recv(100) == b"answer"
    return str(peer[0])


async def talk(client: Host | None, address: str, port: int, server: socket.socket) -> str:
    def run() -> str:
        if client is None:
            return tcp(socket.create_connection((address, port), 10), server)
        return tcp(client.connect(address, port), server)

    return await trio.to_thread.run_sync(run)


def refused(client: Host | None, address: str, port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        (socket.create_connection((address, port), 10) if client is None else client.connect(address, port)).close()
        return False
    return True


@in_namespace
async def test_a_port_is_reached_from_everywhere(lab: Lab) -> None:
    """Loopback, the host's addresses, the world, another guest, the guest itself; sources are kept if possible."""
    async with reached(lab) as (guest, inside, world):
        other = await lab.guest()
        with guest_host(other) as neighbour:
            await publish(lab, guest, WEB)
            server = inside.serve(80)
            assert await talk(None, "127.0.0.1", 8080, server) == GATEWAY
            assert await talk(None, HOST, 8080, server) == HOST
            assert await talk(None, GATEWAY, 8080, server) == GATEWAY
            assert await talk(world, HOST, 8080, server) == ROUTER
            for address in (HOST, GATEWAY):
                assert await talk(neighbour, address, 8080, server) == other.lease.ipv4
                assert await talk(inside, address, 8080, server) == GATEWAY
            assert await talk(None, "::1", 8080, server) == GATEWAY


@in_namespace
async def test_udp_is_reached_from_everywhere(lab: Lab) -> None:
    async with reached(lab) as (guest, inside, world):
        await publish(lab, guest, ECHO)
        server = inside.serve(7, kind=socket.SOCK_DGRAM)
        for client, address in ((None, "127.0.0.1"), (world, HOST), (inside, GATEWAY), (None, "::1"), (None, HOST)):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            asking = (
                socket.socket(family, socket.SOCK_DGRAM) if client is None else client.make_socket(socket.SOCK_DGRAM)
            )
            asking.settimeout(10)
            with asking:
                for question in (b"one", b"two"):
                    asking.sendto(question, (address, 7007))
                    data, peer = await trio.to_thread.run_sync(server.recvfrom, 100)
                    server.sendto(data[::-1], peer)
                    answer, source = await trio.to_thread.run_sync(asking.recvfrom, 100)
                    assert (answer, source[:2]) == (question[::-1], (address, 7007))


@in_namespace
async def test_only_what_is_published_is_reached(lab: Lab) -> None:
    async with reached(lab) as (guest, inside, world):
        other = await lab.guest()
        with guest_host(other) as neighbour:
            await publish(lab, guest, WEB)
            inside.serve(80)
            inside.serve(81)
            for port in (80, 8080):
                with pytest.raises(OSError):
                    neighbour.connect(guest.lease.ipv4, port)
            world.sh(f"ip route add 10.100.0.0/16 via {HOST}")
            reaching = world.make_socket()
            reaching.settimeout(1)
            with pytest.raises(TimeoutError):  # dropped: the address of a guest is none of the world's
                reaching.connect((guest.lease.ipv4, 80))
            assert refused(world, HOST, 8081)


@in_namespace
async def test_a_port_on_one_address_is_published_there_alone(lab: Lab) -> None:
    sh("ip addr add 192.0.2.3/24 dev up0")
    async with reached(lab) as (guest, inside, world):
        await publish(
            lab, guest,
            replace(WEB, host_address="127.0.0.1"),
            PortMapping(host_port=8081, guest_port=80, host_address="192.0.2.3"),
        )  # fmt: skip
        server = inside.serve(80)
        assert await talk(None, "127.0.0.1", 8080, server) == GATEWAY
        assert await talk(world, "192.0.2.3", 8081, server) == ROUTER
        assert refused(world, HOST, 8080) and refused(world, HOST, 8081)
        assert refused(None, HOST, 8080) and refused(None, "::1", 8080)


@in_namespace
async def test_loopback_ports_are_not_for_the_neighbour_on_the_wire(lab: Lab) -> None:
    """Somebody on the uplink's network addresses a frame for 127.0.0.1 to the host."""
    async with reached(lab) as (guest, inside, world):
        await publish(lab, guest, replace(WEB, host_address="127.0.0.1"))
        server = inside.serve(80)
        world.sh("ip addr del 127.0.0.1/8 dev lo; sysctl -qw net.ipv4.conf.all.route_localnet=1")
        world.sh(f"ip route del local 127.0.0.0/8 dev lo table local 2>/dev/null; ip route add 127.0.0.1 via {HOST}")
        attacker = world.make_socket()
        attacker.bind((ROUTER, 0))
        attacker.settimeout(1)
        with pytest.raises(OSError):
            attacker.connect(("127.0.0.1", 8080))
        assert await talk(None, "127.0.0.1", 8080, server) == GATEWAY


@in_namespace
async def test_a_guest_reaches_no_service_on_the_hosts_loopback(lab: Lab) -> None:
    """Its TAP routes loopback addresses, for ports published there."""
    async with reached(lab) as (guest, inside, _):
        listener = lab.listen("127.0.0.1", 5432)
        await publish(lab, guest, WEB)
        assert sh(f"cat /proc/sys/net/ipv4/conf/{guest.lease.tap}/route_localnet") == "1\n"
        guest_side = inside.make_socket()
        inside.sh("ip addr del 127.0.0.1/8 dev lo; sysctl -qw net.ipv4.conf.all.route_localnet=1")
        inside.sh(
            f"ip route del local 127.0.0.0/8 dev lo table local 2>/dev/null; ip route add 127.0.0.1 via {GATEWAY}"
        )
        guest_side.bind((guest.lease.ipv4, 0))
        guest_side.settimeout(1)
        with pytest.raises(TimeoutError):
            guest_side.connect(("127.0.0.1", 5432))
        with pytest.raises(BlockingIOError):
            listener.accept()
        await publish(lab, guest)
        assert sh(f"cat /proc/sys/net/ipv4/conf/{guest.lease.tap}/route_localnet") == "0\n"


@in_namespace
async def test_the_walls_of_egress_stay(lab: Lab) -> None:
    """Who may open no TCP connection reaches no published port either; who is reached through one may answer."""
    async with reached(lab, egress_mode=EgressMode.ALL) as (guest, inside, world):
        other = await lab.guest(egress_mode=EgressMode.HTTP_HTTPS_ONLY)
        with guest_host(other) as neighbour:
            await publish(lab, guest, WEB, PortMapping(host_port=80, guest_port=80))
            server = inside.serve(80)
            assert await talk(world, HOST, 8080, server) == ROUTER
            assert await talk(neighbour, HOST, 8080, server) == other.lease.ipv4
            assert refused(inside, GATEWAY, 8080)
            assert refused(neighbour, GATEWAY, 80)  # the proxy's business
            with pytest.raises(OSError):
                inside.connect(ROUTER, 9)


@in_namespace
async def test_a_removed_port_is_closed_at_once(lab: Lab) -> None:
    async with reached(lab) as (guest, inside, world):
        await publish(lab, guest, WEB, ECHO)
        server = inside.serve(80)
        echo = inside.serve(7, kind=socket.SOCK_DGRAM)
        client = await trio.to_thread.run_sync(world.connect, HOST, 8080)
        over_six = socket.create_connection(("::1", 8080), 10)
        asking = world.make_socket(socket.SOCK_DGRAM)
        asking.sendto(b"one", (HOST, 7007))
        assert (await trio.to_thread.run_sync(echo.recvfrom, 100))[0] == b"one"
        accepted, _ = server.accept()
        await publish(lab, guest)
        client.sendall(b"still there?")
        with pytest.raises(ConnectionResetError):
            await trio.to_thread.run_sync(client.recv, 100)
        with pytest.raises(ConnectionResetError):
            await trio.to_thread.run_sync(over_six.recv, 100)
        asking.sendto(b"two", (HOST, 7007))
        assert refused(world, HOST, 8080) and refused(None, "::1", 8080)
        echo.settimeout(0.2)
        with pytest.raises(TimeoutError):
            echo.recv(100)
        accepted.close()
        lab.listen("0.0.0.0", 8080).close()
        assert lab.network.published.relays.connections == 0


@in_namespace
async def test_a_client_that_was_too_early_gets_through(lab: Lab) -> None:
    """Its datagrams are one flow, of which the kernel translates only the first packet."""
    async with reached(lab) as (guest, inside, world):
        echo = inside.serve(7, kind=socket.SOCK_DGRAM)
        asking = world.make_socket(socket.SOCK_DGRAM)
        asking.sendto(b"early", (HOST, 7007))
        await wait_until(lambda: "dport=7007" in sh("cat /proc/net/nf_conntrack"))
        await publish(lab, guest, ECHO)
        asking.sendto(b"late", (HOST, 7007))
        assert (await trio.to_thread.run_sync(echo.recvfrom, 100))[0] == b"late"


@in_namespace
async def test_a_port_in_use_names_who_has_it(lab: Lab) -> None:
    async with reached(lab) as (guest, _, _):
        listener = lab.listen("127.0.0.1", 8080)
        with pytest.raises(PortInUse, match=r"host port 8080/tcp is in use by python\S* \(process \d+\)"):
            await publish(lab, guest, WEB)
        assert lab.network.published._held == {}
        listener.close()
        await publish(lab, guest, WEB, ECHO)
        for kind, port in ((socket.SOCK_STREAM, 8080), (socket.SOCK_DGRAM, 7007)):
            for family, address in (
                (socket.AF_INET, "0.0.0.0"),
                (socket.AF_INET, "127.0.0.1"),
                (socket.AF_INET6, "::"),
            ):
                with socket.socket(family, kind) as rival, pytest.raises(OSError) as refusal:
                    rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(kind == socket.SOCK_STREAM))
                    rival.bind((address, port))
                    if kind == socket.SOCK_STREAM:
                        rival.listen()
                assert refusal.value.errno == errno.EADDRINUSE


@in_namespace
async def test_free_ports_and_ranges(lab: Lab) -> None:
    async with reached(lab) as (guest, inside, world):
        ports = await publish(
            lab, guest, PortMapping(host_port=0, guest_port=80), PortMapping(host_port=9000, guest_port=90, count=3)
        )
        assert ports[0].host_port > 1024
        server = inside.serve(80)
        assert await talk(world, HOST, ports[0].host_port, server) == ROUTER
        for i in range(3):
            assert await talk(world, HOST, 9000 + i, inside.serve(90 + i)) == ROUTER
        # a change keeps what it names again
        again = await publish(lab, guest, ports[0], replace(WEB, host_address="127.0.0.1"))
        assert await talk(world, HOST, again[0].host_port, server) == ROUTER
        await publish(lab, guest, WEB)  # wider than the one on 127.0.0.1 that it replaces
        assert await talk(world, HOST, 8080, server) == ROUTER


@in_namespace
async def test_connections_outlive_a_flush_of_the_rules(lab: Lab) -> None:
    async with reached(lab) as (guest, inside, world):
        await publish(lab, guest, WEB)
        server = inside.serve(80)
        client = await trio.to_thread.run_sync(world.connect, HOST, 8080)
        accepted, _ = server.accept()
        before = sh("nft -s list ruleset")
        sh("nft flush ruleset")
        client.sendall(b"in the middle")
        await wait_until(lambda: sh("nft -s list ruleset") == before)
        accepted.settimeout(10)
        assert await trio.to_thread.run_sync(accepted.recv, 100) == b"in the middle"
        assert await talk(world, HOST, 8080, server) == ROUTER


@in_namespace
async def test_a_stopped_instance_keeps_its_port_and_refuses(lab: Lab) -> None:
    async with reached(lab) as (guest, _, world):
        await publish(lab, guest, WEB)
        await lab.network.detach(guest.lease)
        assert refused(world, HOST, 8080) and refused(None, "::1", 8080)
        with pytest.raises(OSError):
            lab.listen("0.0.0.0", 8080)
        lab.network.published.forget(guest.lease.instance_id)
        lab.listen("0.0.0.0", 8080).close()


@in_namespace
async def test_relays_pass_ends_and_resets_on(lab: Lab) -> None:
    async with reached(lab) as (guest, inside, _):
        await publish(lab, guest, WEB)
        server = inside.serve(80)
        relays = lab.network.published.relays

        async def connected() -> tuple[socket.socket, socket.socket]:
            client = await trio.to_thread.run_sync(socket.create_connection, ("::1", 8080), 10)
            accepted, _ = await trio.to_thread.run_sync(server.accept)
            accepted.settimeout(10)
            return client, accepted

        client, accepted = await connected()
        client.sendall(b"all of it")
        client.shutdown(socket.SHUT_WR)
        assert await trio.to_thread.run_sync(accepted.recv, 100) == b"all of it"
        assert await trio.to_thread.run_sync(accepted.recv, 100) == b""
        accepted.sendall(b"answer")
        accepted.close()
        assert await trio.to_thread.run_sync(client.recv, 100) == b"answer"
        assert await trio.to_thread.run_sync(client.recv, 100) == b""
        client.close()
        for leaving in (0, 1):
            pair = await connected()
            pair[leaving].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            pair[leaving].close()
            with pytest.raises(ConnectionResetError):
                await trio.to_thread.run_sync(pair[1 - leaving].recv, 100)
            pair[1 - leaving].close()
        await wait_until(lambda: relays.connections == 0)
        server.close()  # the guest refuses
        client = await trio.to_thread.run_sync(socket.create_connection, ("::1", 8080), 10)
        with pytest.raises(ConnectionResetError):
            await trio.to_thread.run_sync(client.recv, 100)
        await wait_until(lambda: relays.connections == 0)


@in_namespace
async def test_a_change_among_a_thousand_ports_is_as_small_as_the_first(lab: Lab) -> None:
    async with reached(lab) as (guest, inside, world):
        sizes: list[int] = []
        change = lab.rules.change

        async def counted(*, remove: Iterable[Element] = (), add: Iterable[Element] = ()) -> None:
            remove, add = set(remove), set(add)
            sizes.append(len(remove) + len(add))
            await change(remove=remove, add=add)

        lab.rules.change = counted  # type: ignore[method-assign]
        await publish(lab, guest, WEB)
        many = PortMapping(host_port=20000, guest_port=80, count=1000)
        await publish(lab, guest, many)
        one_more = replace(WEB, host_port=9999, guest_port=9999)
        await publish(lab, guest, many, one_more)
        assert sizes[2] <= sizes[0] < sizes[1]
        assert await talk(world, HOST, 20004, inside.serve(84)) == ROUTER
        assert await talk(world, HOST, 9999, inside.serve(9999)) == ROUTER
        await publish(lab, guest)
        assert refused(world, HOST, 20004)
        assert "10.100" not in sh("nft list map inet hypeman ports")


@in_namespace
async def test_an_instance_that_is_deleted_in_the_middle_leaves_nothing(lab: Lab) -> None:
    """Transfers over IPv4 and IPv6 end, and no socket, task or flow of them is left."""
    async with reached(lab) as (guest, inside, world):
        files = len(os.listdir("/proc/self/fd"))
        await publish(lab, guest, WEB, ECHO)
        server = inside.serve(80)
        clients = [socket.create_connection(("::1", 8080), 10) for _ in range(5)]
        clients.append(await trio.to_thread.run_sync(world.connect, HOST, 8080))
        accepted = [(await trio.to_thread.run_sync(server.accept))[0] for _ in clients]
        for each in accepted:
            each.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    each.send(bytes(1 << 16))  # more than the peer reads
        asking = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        asking.sendto(b"one", ("::1", 7007))
        await wait_until(lambda: lab.network.published.relays.connections == 6)
        await lab.network.detach(guest.lease)
        lab.network.published.forget(guest.lease.instance_id)
        await wait_until(lambda: lab.network.published.relays.connections == 0)
        for client in clients[:5]:
            with pytest.raises(ConnectionResetError):
                while await trio.to_thread.run_sync(client.recv, 1 << 20):
                    pass
        for each in (*clients, *accepted, server, asking):
            each.close()
        await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)
        assert "10.100.0" not in sh("nft list map inet hypeman ports")
        lab.listen("0.0.0.0", 8080).close()


@in_namespace
async def test_an_interface_that_does_not_forward_is_served_by_a_relay(lab: Lab) -> None:
    """As on a host with several networks, which is no router. When it becomes one, the kernel translates."""
    lan = lab.add_wire(plug_in("lan0"))
    sh("ip addr add 198.51.100.1/24 dev lan0 && ip link set lan0 up")
    async with reached(lab) as (guest, inside, world):
        there = Host(lan, mac="02:fe:00:00:00:02", commands=("ip addr add 198.51.100.2/24 dev eth0",))
        try:
            await publish(lab, guest, WEB, ECHO, replace(WEB, host_port=8081, host_address="198.51.100.1"))
            server, echo = inside.serve(80), inside.serve(7, kind=socket.SOCK_DGRAM)
            for port in (8080, 8081):
                assert await talk(there, "198.51.100.1", port, server) == GATEWAY
            assert await talk(world, HOST, 8080, server) == ROUTER
            with there.make_socket(socket.SOCK_DGRAM) as asking:
                asking.connect(("198.51.100.1", 7007))  # takes answers from this address only
                asking.send(b"one")
                data, peer = await trio.to_thread.run_sync(echo.recvfrom, 100)
                echo.sendto(data[::-1], peer)
                assert await trio.to_thread.run_sync(asking.recv, 100) == b"eno"
            assert sh("sysctl -n net.ipv4.conf.lan0.forwarding") == "0\n"
            sh("sysctl -qw net.ipv4.ip_forward=1")
            await wait_until(lambda: "lan0" in sh("nft list set inet hypeman forwarding"))
            for port in (8080, 8081):
                assert await talk(there, "198.51.100.1", port, server) == "198.51.100.2"
        finally:
            there.close()
