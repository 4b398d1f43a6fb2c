"""Messages between the server and the ingress worker. Pure.

A unix socket of type SOCK_SEQPACKET: each packet is one message in MessagePack, strictly typed; listening sockets come
with the message that announces them. Neither side trusts the other's input to be well-formed.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct

from hypeman.ingress.routing import Route

MAX_MESSAGE = 160 << 10
"""Bytes; a socket takes this much at once by default."""
MAX_LISTENERS = 8
"""Descriptors with one message."""


class ProtocolError(Exception):
    """The peer does not follow the protocol."""


class Start(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """First message."""

    uid: int
    """The user that the worker becomes."""


class Listen(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Accept connections on the sockets that come with it."""

    id: int
    port: int


class Unlisten(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    id: int
    port: int


class Put(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Routes of one ingress, instead of those before."""

    id: int
    ingress: str
    routes: tuple[Route, ...]


class Drop(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Remove an ingress and end its connections."""

    id: int
    ingress: str


class Certify(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The certificate of a name, instead of the one before. Connections that are open go on."""

    id: int
    name: str
    """In lower case; ``*.example.com`` is for every name with one more label that has no certificate of its own."""
    chain: str
    """PEM, the certificate of the site first."""
    key: str
    """PEM."""

    def __repr__(self) -> str:
        """Without the key."""
        return f"Certify({self.name})"


class Uncertify(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The name has no certificate any more. Idempotent."""

    id: int
    name: str


class Challenge(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What shows a public CA that the name is ours, instead of what did so before."""

    id: int
    name: str
    token: str
    """HTTP-01: a plain request for the name and the path ``/.well-known/acme-challenge/<token>``, on any port, is
    answered with 200, text/plain and ``answer``; empty: none is."""
    answer: str
    chain: str
    """TLS-ALPN-01: presented, with ``key``, to a hello for the name whose only ALPN protocol is ``acme-tls/1``, on any
    port; the connection is closed after the handshake. Empty: such a hello is refused."""
    key: str

    def __repr__(self) -> str:
        """Without the key."""
        return f"Challenge({self.name})"


class Unchallenge(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The CA has seen it. Idempotent."""

    id: int
    name: str


class Target(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Answer to Ask."""

    token: int
    address: str
    """Empty if requests cannot be passed to it now."""
    exists: bool


class Ready(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The worker is confined and takes messages."""


class Done(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    id: int


class Ask(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Where is this instance now?"""

    token: int
    instance: str


class Served(Struct, frozen=True, forbid_unknown_fields=True):
    """One request that is done."""

    ingress: str
    """Id; empty if no rule fits."""
    host: str
    client: str
    method: str
    path: str
    """Without the query, shortened."""
    instance: str
    status: int
    """Of the response; 499 if the client left before one."""
    received: int
    """Bytes of the body."""
    sent: int
    seconds: float


class Log(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Requests since the last one."""

    served: tuple[Served, ...]
    lost: int
    """That many more were not kept."""
    connections: int
    """Open now."""
    refused: int
    """Connections refused by a limit since the last one."""


Request = Start | Listen | Unlisten | Put | Drop | Certify | Uncertify | Challenge | Unchallenge | Target
Report = Ready | Done | Ask | Log

_encode = msgspec.msgpack.Encoder().encode
_decode_request: Callable[[bytes], Request] = msgspec.msgpack.Decoder(Request).decode
_decode_report: Callable[[bytes], Report] = msgspec.msgpack.Decoder(Report).decode


def encode(message: Request | Report) -> bytes:
    """Raises ProtocolError if it is too long."""
    data = _encode(message)
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes")
    return data


def decode_request(data: bytes) -> Request:
    """Raises ProtocolError."""
    try:
        return _decode_request(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from None


def decode_report(data: bytes) -> Report:
    """Raises ProtocolError."""
    try:
        return _decode_report(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from None
