"""Listening sockets on ports of the host. Blocking; requires the right to bind them."""

from __future__ import annotations

import contextlib
import errno
import socket

from hypeman.errors import PortInUse
from hypeman.host.files import HostError
from hypeman.host.port_holds import find_holder

_BACKLOG = 512
_ADDRESSES = ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::"))  # noqa: S104 - all addresses are meant
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def listen_on(port: int) -> list[socket.socket]:
    """On all addresses of the host, IPv6 where it has that. Raises PortInUse, which names the holder, or HostError."""
    made: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for family, address in _ADDRESSES:
            try:
                each = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                undo.callback(each.close)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                each.bind((address, port))
                each.listen(_BACKLOG)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise PortInUse(f"host port {port}/tcp is in use by {find_holder('tcp', port)}") from None
                if error.errno in _NO_FAMILY and made:
                    continue
                raise HostError(f"host port {port}/tcp cannot be bound: {error.strerror}") from error
            made.append(each)
        undo.pop_all()
    return made
