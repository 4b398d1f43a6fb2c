"""The kernel's connections and their events, with real ones in a namespace of their own."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import trio

from hypeman.host.conntrack import Connection, Connections
from tests.network.lab import in_namespace

RULES = "table ip t { chain c { type filter hook input priority 0; ct state new accept; }; }"


async def until(connections: Connections, condition: Callable[[list[Connection]], bool]) -> list[Connection]:
    seen: list[Connection] = []
    with trio.fail_after(30):
        while not condition(seen):
            seen += await connections.wait_events() or ()
    return seen


@in_namespace
async def test_a_connection_is_seen_to_open_and_to_close() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["nft", RULES], check=True)
    connections = Connections()
    try:
        connections.listen()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            client = socket.create_connection(("127.0.0.1", port))
            source_port = client.getsockname()[1]
            opened = Connection("127.0.0.1", source_port, "127.0.0.1", port, True, port)
            await until(connections, lambda seen: opened in seen)
            assert opened in await connections.list()
            assert list(await connections.list("127.0.0.1")) == [opened]
            assert list(await connections.list(client="127.0.0.1")) == [opened]
            assert list(await connections.list("192.0.2.1")) == list(await connections.list(client="192.0.2.1")) == []
            served, _ = listener.accept()
            client.close()
            served.close()
            await until(connections, lambda seen: opened._replace(open=False) in seen)
            assert opened not in await connections.list()
            refused = socket.socket()
            refused.connect_ex(("127.0.0.1", port + 1 if port < 65535 else port - 1))
            seen = await until(connections, lambda seen: bool(seen))
            assert not any(each.open for each in seen if each.port != port), "a refused attempt is not open"
            refused.close()
    finally:
        connections.close()


@in_namespace
async def test_a_udp_flow_is_open_until_the_kernel_forgets_it() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["nft", RULES], check=True)
    Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout").write_text("1")
    connections = Connections()
    try:
        connections.listen()
        with socket.socket(type=socket.SOCK_DGRAM) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
            server.bind(("127.0.0.1", 0))
            client.connect(server.getsockname())
            client.send(b"hello")
            port = server.getsockname()[1]
            opened = Connection("127.0.0.1", client.getsockname()[1], "127.0.0.1", port, True, port, udp=True)
            while opened in await connections.list():
                await trio.sleep(0.2)
            await until(connections, lambda seen: {opened, opened._replace(open=False)} <= set(seen))
    finally:
        connections.close()


@in_namespace
async def test_a_redirected_connection_shows_what_the_client_wanted_and_who_answers() -> None:
    """As those of guests to the egress proxy."""
    chain = "type nat hook output priority -100; ip daddr 127.0.0.9 tcp dport 443 dnat to 127.0.0.1:7443;"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["nft", f"table ip t {{ chain c {{ {chain} }}; }}"], check=True)
    connections = Connections()
    try:
        connections.listen()
        with socket.create_server(("127.0.0.1", 7443)), socket.create_connection(("127.0.0.9", 443)) as client:
            source_port = client.getsockname()[1]
            opened = Connection("127.0.0.1", source_port, "127.0.0.1", 7443, True, 443)
            await until(connections, lambda seen: opened in seen)
            assert list(await connections.list(client="127.0.0.1")) == [opened]
    finally:
        connections.close()
