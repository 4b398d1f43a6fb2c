"""The protocol between the server and an engine process, as a pure codec: frames over a unix stream socket.

    u32 size of the message · u32 size of the payload · u8 version · u8 descriptors · u16 0 · message · payload

Little-endian. The message is MessagePack, one of the tagged types below; unknown types and fields are errors, on either
side. The payload is what a message carries besides: a compiled policy, the authority's key, audit records. It is not
part of the message so that a receiver can wipe it: nothing here copies a payload. Descriptors come with the first byte
of their frame (SCM_RIGHTS).

    server → engine  Start, then SetPolicy, RemovePolicy, Accept, Drain, Count, PutSite, DropSite, Listen, Unlisten,
                     Sockets, Certify, Challenge, each answered by Done, Refused, Counters or Held with the same
                     ``id``, in order; Answer, Verdict, Place and Forget, which have no reply
    engine → server  Hello once a connection is made, or Failed if the engine cannot start; Question;
                     ApprovalNeeded; Locate; Audit

A message type is added by appending it to ``Request`` or ``Report`` and raising ``VERSION``, as is needed for another
form of compiled policies (policy.py). An engine of an earlier version in ``SPOKEN`` gets only messages that it
understands, in its version, until it has drained; one of any other version is ended. ``Hello``, ``Drain`` and the
header never change their form.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
from msgspec import Meta

VERSION = 6
SPOKEN = (2, 3, 4, 5, 6)
"""Versions of engines that a server can talk to. 2 has no ingresses; 2 and 3 refuse policies with client certificates
or scrubbing, 4 those with Postgres, 5 those with MySQL."""
SITES = 3
"""The first version that has ingresses."""
ENDED = 4
"""The first version with a message that an instance has ended."""

MAX_MESSAGE = 64 << 10
MAX_PAYLOAD = 4 << 20
"""A policy of 256 rules has 2.3 MB of values, a bundle of CA certificates 0.3 MB."""
MAX_DESCRIPTORS = 64

_HEADER = struct.Struct("<IIBBH")
HEADER_SIZE = _HEADER.size

Name = Annotated[str, Meta(max_length=255)]
Instance = Annotated[str, Meta(min_length=1, max_length=63)]
Address = Annotated[str, Meta(min_length=2, max_length=45)]
Networks = Annotated[tuple[Annotated[str, Meta(max_length=49)], ...], Meta(max_length=64)]
Count32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Count64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Text = Annotated[str, Meta(max_length=4000)]


BOUNDS = ("connections", "upstreams", "streams", "handshakes", "descriptors", "bytes")
Bounds = Annotated[tuple[Annotated[int, Meta(ge=1, le=2**62)], ...], Meta(max_length=32)]


class ProtocolError(Exception):
    """The peer sent something that is not a frame, or not one of its messages."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine is started with, besides its listeners and keys."""

    uid: Count32
    """The user it becomes; used if it is started by root."""
    leaf_cache: Count32
    each: Bounds
    """What one instance may hold at once, in the order of BOUNDS."""
    total: Bounds
    requests_per_second: Count32
    clients_each: Bounds
    """The same for clients of ingresses at one address, and for all of them."""
    clients_total: Bounds
    mints_per_second: Count32
    listen_port: Port
    assumed_tls_port: Port
    timers_ms: Annotated[tuple[Count32, ...], Meta(max_length=32)]
    allow: Networks
    deny: Networks


# ── From the server ──────────────────────────────────────────────────────────────────────────────


class Start(_Message, frozen=True, kw_only=True):
    """The first message. Payload: the authority's certificate, its key, the trusted roots, further roots (all PEM), in
    this order, with these sizes. Descriptors: the socket on which other servers find the engine, if ``adoptable``;
    then a listening socket per loop."""

    settings: EngineSettings
    identity: Name
    """Equal for engines of the same program with the same settings, so that a server knows whether to keep one."""
    sizes: tuple[Count32, Count32, Count32, Count32]
    adoptable: bool
    """Go on without a server. Otherwise the engine ends with the connection."""


class SetPolicy(_Message, frozen=True, kw_only=True):
    """In force when ``Done`` is sent. Payload: the compiled policy (see policy.py)."""

    id: Count64
    source: Address
    instance: Instance


class RemovePolicy(_Message, frozen=True, kw_only=True):
    """Wipe the policy, close the source's connections. Not an error if there is none."""

    id: Count64
    source: Address


class Accept(_Message, frozen=True, kw_only=True):
    """All policies are set: remove those not set on this connection, and accept connections."""

    id: Count64


class Drain(_Message, frozen=True, kw_only=True):
    """Accept nothing more, end when the open connections have, after ``grace_ms`` at the latest."""

    id: Count64
    grace_ms: Count32


class Count(_Message, frozen=True, kw_only=True):
    """Answered by ``Counters``."""

    id: Count64


class Answer(_Message, frozen=True, kw_only=True):
    """To a ``Question``. No addresses: the name cannot be resolved."""

    token: Count64
    loop: Count32
    addresses: Annotated[tuple[Address, ...], Meta(max_length=16)]


class Verdict(_Message, frozen=True, kw_only=True):
    """On an ``ApprovalNeeded``."""

    token: Count64
    loop: Count32
    allow: bool


class PutSite(_Message, frozen=True, kw_only=True):
    """The routes of an ingress, instead of those before. Payload: the compiled routes (see ingress/routing.py)."""

    id: Count64
    ingress: Instance


class DropSite(_Message, frozen=True, kw_only=True):
    """Remove the routes of an ingress, end its exchanges. Not an error if there are none."""

    id: Count64
    ingress: Instance


class Listen(_Message, frozen=True, kw_only=True):
    """Accept clients of ingresses on the sockets that come with it; no-op if it has some for the port."""

    id: Count64
    port: Port


class Unlisten(_Message, frozen=True, kw_only=True):
    id: Count64
    port: Port


class Sockets(_Message, frozen=True, kw_only=True):
    """Answered by ``Held``."""

    id: Count64
    port: Port


class Certify(_Message, frozen=True, kw_only=True):
    """The certificate of a host name, instead of the previous one, which open connections keep. Payload: chain and
    key (PEM), each with a zero byte at its end, with these sizes; two zero bytes: it has none."""

    id: Count64
    name: Name
    """In lower case; ``*.example.com`` is for every name with one more label that has no certificate of its own."""
    sizes: tuple[Count32, Count32]


class Challenge(_Message, frozen=True, kw_only=True):
    """What shows a public CA that the name is ours, instead of what did so before. Payload: as in ``Certify``; for
    TLS-ALPN-01."""

    id: Count64
    name: Name
    token: Annotated[str, Meta(max_length=250)]
    """HTTP-01: a plain request for the name and the path ``/.well-known/acme-challenge/<token>``, on any port, is
    answered with 200, text/plain and ``proof``; empty: none is."""
    proof: Annotated[str, Meta(max_length=500)]
    sizes: tuple[Count32, Count32]


class Place(_Message, frozen=True, kw_only=True):
    """To a ``Locate``. No address: the instance cannot take requests now."""

    token: Count64
    loop: Count32
    address: Annotated[str, Meta(max_length=45)]
    exists: bool


class Forget(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """Something about these instances has changed: where they are must be asked again. None: about any."""

    instances: Annotated[tuple[Instance, ...], Meta(max_length=500)] | None
    ended: Annotated[tuple[Instance, ...], Meta(max_length=500)] = ()
    """Of these: which run no more. What is under way with them ends. Since version 4."""


# ── From an engine ───────────────────────────────────────────────────────────────────────────────


class Hello(_Message, frozen=True, kw_only=True):
    """Descriptors: its listening sockets, if another server might need them."""

    version: Count32
    identity: Name
    pid: Count32
    draining: bool
    locked: bool
    """Its memory is locked: none of it is written to swap."""
    reasons: Annotated[tuple[Name, ...], Meta(max_length=256)]
    """What the numbers in audit records stand for."""


class Failed(_Message, frozen=True, kw_only=True):
    message: Text


class Done(_Message, frozen=True, kw_only=True):
    id: Count64


class Refused(_Message, frozen=True, kw_only=True):
    """The request was not carried out; what was in force stays so."""

    id: Count64
    message: Text


class Question(_Message, frozen=True, kw_only=True):
    token: Count64
    loop: Count32
    instance: Instance
    name: Name


class ApprovalNeeded(_Message, frozen=True, kw_only=True):
    """A request is held until a ``Verdict`` comes, or its time has run out."""

    token: Count64
    loop: Count32
    instance: Instance
    tls: bool
    host: Name
    port: Port
    method: Name
    path: Name
    """Without query; may be cut."""
    rule: Name


class Locate(_Message, frozen=True, kw_only=True):
    """Where is this instance, by name or id? Answered by ``Place``."""

    token: Count64
    loop: Count32
    instance: Instance


class Held(_Message, frozen=True, kw_only=True):
    """Descriptors: its sockets for a port, none if there are none."""

    id: Count64


class Audit(_Message, frozen=True, kw_only=True):
    """Payload: records, see records.py."""


class Counters(_Message, frozen=True, kw_only=True):
    """``id`` 0: not requested; the last ones before the engine ends."""

    id: Count64
    counters: dict[Name, Count64]
    denied: dict[Name, Count64]
    latency: Annotated[tuple[Count64, ...], Meta(max_length=64)]
    in_use: dict[Name, Count64] = {}
    """What is held now, by bound."""
    largest: dict[Name, tuple[Instance, Count64]] = {}
    """The instance that holds the most of it, and how much."""
    limited: dict[Name, Count64] = {}
    """How often something was refused because of a bound."""


Request = (
    Start | SetPolicy | RemovePolicy | Accept | Drain | Count | Answer | Verdict
    | PutSite | DropSite | Listen | Unlisten | Sockets | Certify | Challenge | Place | Forget
)  # fmt: skip
Report = Hello | Failed | Done | Refused | Question | Audit | Counters | ApprovalNeeded | Locate | Held

_encode = msgspec.msgpack.Encoder().encode
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_report: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Request | Report, *, payload: int = 0, descriptors: int = 0, version: int = VERSION) -> bytes:
    """Header and message; ``payload`` bytes must follow, and ``descriptors`` go with the first byte."""
    body = _encode(message)
    if len(body) > MAX_MESSAGE or payload > MAX_PAYLOAD or descriptors > MAX_DESCRIPTORS:
        raise ProtocolError("a message is too long")
    return _HEADER.pack(len(body), payload, version, descriptors, 0) + body


class Header(msgspec.Struct, frozen=True):
    message: int
    payload: int
    version: int
    descriptors: int


def decode_header(data: bytes | bytearray) -> Header:
    """Raises ProtocolError. The version is not judged."""
    message, payload, version, descriptors, zero = _HEADER.unpack(data)
    if not 0 < message <= MAX_MESSAGE or payload > MAX_PAYLOAD or descriptors > MAX_DESCRIPTORS or zero:
        raise ProtocolError("not a frame")
    return Header(message, payload, version, descriptors)


def decode_request(data: bytes | bytearray) -> Request:
    """Raises ProtocolError."""
    try:
        return _request.decode(data)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ProtocolError(str(error)) from None


def decode_report(data: bytes | bytearray) -> Report:
    """Raises ProtocolError."""
    try:
        return _report.decode(data)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ProtocolError(str(error)) from None


class Frame(msgspec.Struct):
    """One frame being received: give its buffers to ``recvmsg_into`` one after the other, exactly filled.

    Only what belongs to the frame is read, so a payload lies in one buffer and nowhere else.
    """

    head: bytearray = msgspec.field(default_factory=lambda: bytearray(HEADER_SIZE))
    header: Header | None = None
    message: bytearray = msgspec.field(default_factory=bytearray)
    payload: bytearray = msgspec.field(default_factory=bytearray)
    got: int = 0
    """Bytes of the whole frame."""

    def room(self) -> memoryview:
        """Where the next bytes belong; empty when the frame is complete."""
        at = self.got
        for part in (self.head, self.message, self.payload):
            if at < len(part):
                return memoryview(part)[at:]
            at -= len(part)
        return memoryview(b"")

    def add(self, count: int) -> None:
        """``count`` bytes were written into ``room()``. Raises ProtocolError once a header is none."""
        self.got += count
        if self.header is None and self.got >= HEADER_SIZE:
            self.header = decode_header(self.head)
            self.message = bytearray(self.header.message)
            self.payload = bytearray(self.header.payload)

    @property
    def complete(self) -> bool:
        return self.header is not None and self.got == HEADER_SIZE + len(self.message) + len(self.payload)

    def wipe(self) -> None:
        self.payload[:] = bytes(len(self.payload))
