"""Routes as the data plane needs them. Pure. Which one is for a host name is decided in ``ext/egress/site.c``.

Layout, little-endian: ``HIG1``, u16 number of routes; each: u16 port, u16 port of the guest, u8 TLS (1: ended here,
2: passed through), u16 redirect; then host name, target, name and value of the required header, each as u16 length and
text.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from msgspec import Struct


class Route(Struct, frozen=True):
    """A rule as the data plane needs it."""

    hostname: str
    """In lower case apart from names of captures."""
    port: int
    instance: str
    """A name; with a pattern, a text with captures."""
    target_port: int
    auth_header: str = ""
    auth_value: str = ""
    tls: bool = False
    """Requests over TLS are for this rule, plain ones are not; otherwise the other way round."""
    tls_passthrough: bool = False
    """TLS for the host name goes to the guest unopened; plain requests are not for this rule."""
    redirect: int = 0
    """A plain request is answered with 308 and the same host and target at ``https`` on this port; 0: it is not."""

    def __repr__(self) -> str:
        """Without the secret."""
        return f"Route({self.hostname}:{self.port} to {self.instance}:{self.target_port})"


def compile_routes(routes: Sequence[Route]) -> bytes:
    out = bytearray(b"HIG1" + struct.pack("<H", len(routes)))
    for route in routes:
        tls = 2 if route.tls_passthrough else int(route.tls)
        out += struct.pack("<HHBH", route.port, route.target_port, tls, route.redirect)
        for text in (route.hostname, route.instance, route.auth_header, route.auth_value):
            data = text.encode("ascii")
            out += struct.pack("<H", len(data)) + data
    return bytes(out)
