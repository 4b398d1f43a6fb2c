"""Connections of the server to hosts that others name: the address is checked when it is connected to."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Any

import httpcore
import trio


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to allowed addresses only, so that no name leads elsewhere after it was checked."""

    def __init__(self, may_connect: Callable[[str], bool]) -> None:
        self._may_connect = may_connect
        self._inner = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(where[0]) for *_, where in found]
        allowed = [address for address in addresses if self._may_connect(address)]
        if not allowed:
            raise httpcore.ConnectError(f"{host} has no address that is allowed, but {', '.join(addresses)}")
        for address in allowed[:-1]:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._inner.connect_tcp(allowed[-1], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


_IPV6 = ipaddress.IPv6Network("2000::/3")
"""All that is public. Outside lie addresses that carry an IPv4 address (NAT64, ``::a.b.c.d``), and site-local ones."""
_UNIQUE_LOCAL = ipaddress.IPv6Network("fc00::/7")


def is_allowed(address: str, *, private: bool) -> bool:
    """Whether the server may connect to this address; ``private`` admits private and loopback ones."""
    ip = _parse(address)
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _IPV6:
        return private and (ip in _UNIQUE_LOCAL or ip.is_loopback)
    return ip.is_global or private


def is_public_or_in(networks: Iterable[str], address: str) -> bool:
    """Whether the server may connect to this address: a public one, or one in ``networks``."""
    ip = _parse(address)
    return is_allowed(address, private=False) or any(ip in ipaddress.ip_network(network) for network in networks)


def _parse(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return ip.ipv4_mapped or ip if isinstance(ip, ipaddress.IPv6Address) else ip
