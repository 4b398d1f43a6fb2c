"""TLS in the ingress worker: certificates by name, handshakes, streams.

The worker has no files, and ``ssl`` loads certificates from files only: hence pyOpenSSL, with the bytes in memory. The
hello is read before the handshake, so that a name without a certificate gets its own alert.

    hello for                                                        gets
    no name, or a name without a rule with tls on this port          alert unrecognized_name
    a rule whose certificate is not there (yet)                      alert internal_error
    a rule, but only other protocols than HTTP/1.1                   alert no_application_protocol
    acme-tls/1 and a name that is being validated                    the answer to TLS-ALPN-01, then the end
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL

from hypeman.ingress.hello import BadHello, read_hello
from hypeman.ingress.hostnames import parse_host

HTTP_1_1 = b"http/1.1"
ACME_TLS_1 = b"acme-tls/1"
_CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20"
_CHUNK = 1 << 16


def _make_select(protocol: bytes) -> SSL._ALPNSelectHelper:
    return SSL._ALPNSelectHelper(lambda _, offered: protocol if protocol in offered else SSL.NO_OVERLAPPING_PROTOCOLS)


_SELECT = {protocol: _make_select(protocol) for protocol in (HTTP_1_1, ACME_TLS_1)}
"""A callback is memory that is written and executed, which a confined process does not get any more."""


class Alert(enum.IntEnum):
    """Numbers of RFC 8446."""

    DECODE_ERROR = 50
    INTERNAL_ERROR = 80
    UNRECOGNIZED_NAME = 112
    NO_APPLICATION_PROTOCOL = 120


class TlsStream:
    """A TLS connection over TCP, as far as ``Side`` needs it. Sending and receiving may go on at the same time."""

    def __init__(self, transport: trio.SocketStream, context: SSL.Context, received: bytes) -> None:
        self.transport_stream = transport
        self._tls = SSL.Connection(context, None)
        self._tls.set_accept_state()
        self._tls.bio_write(received)
        self._sending = trio.Lock()

    async def handshake(self) -> None:
        """Raises trio.BrokenResourceError."""
        while True:
            try:
                self._tls.do_handshake()
            except SSL.WantReadError:
                await self._flush()
                await self._fill()
            except SSL.Error as error:
                await self._flush()
                raise trio.BrokenResourceError(str(error)) from None
            else:
                await self._flush()
                return

    @property
    def protocol(self) -> bytes:
        """Of ALPN; empty if the client does not use it."""
        return self._tls.get_alpn_proto_negotiated()

    async def receive_some(self, max_bytes: int) -> bytes:
        """Empty at the end. Raises trio.BrokenResourceError."""
        while True:
            try:
                return self._tls.recv(max_bytes)
            except SSL.WantReadError:
                await self._flush()
                await self._fill()
            except SSL.ZeroReturnError:
                return b""
            except SSL.Error as error:
                raise trio.BrokenResourceError(str(error)) from None

    async def send_all(self, data: bytes) -> None:
        """Raises trio.BrokenResourceError."""
        view = memoryview(data)
        async with self._sending:
            while view:
                try:
                    sent = self._tls.send(view[:_CHUNK])
                except SSL.Error as error:
                    raise trio.BrokenResourceError(str(error)) from None
                view = view[sent:]
                await self._drain()

    async def send_close(self) -> None:
        """Tell the peer that nothing follows. Raises trio.BrokenResourceError."""
        try:
            self._tls.shutdown()
        except SSL.Error as error:
            raise trio.BrokenResourceError(str(error)) from None
        await self._flush()

    async def aclose(self) -> None:
        await self.transport_stream.aclose()

    async def _fill(self) -> None:
        data = await self.transport_stream.receive_some(_CHUNK)
        if data:
            self._tls.bio_write(data)
        else:
            raise trio.BrokenResourceError("the peer closed the connection without saying so in TLS")

    async def _flush(self) -> None:
        async with self._sending:
            await self._drain()

    async def _drain(self) -> None:
        while True:
            try:
                data = self._tls.bio_read(_CHUNK)
            except SSL.WantReadError:
                return
            await self.transport_stream.send_all(data)


class Certificates:
    """By name, and what a name that is being validated shows."""

    def __init__(self) -> None:
        self._contexts: dict[str, SSL.Context] = {}
        self._challenges: dict[str, SSL.Context] = {}
        self._answers: dict[tuple[str, str], str] = {}

    def certify(self, name: str, chain: str, key: str) -> None:
        """Raises SSL.Error or ValueError for what is no certificate with its key."""
        self._contexts[name] = make_context(chain, key, HTTP_1_1)

    def uncertify(self, name: str) -> None:
        self._contexts.pop(name, None)

    def challenge(self, name: str, token: str, answer: str, chain: str, key: str) -> None:
        """Raises as ``certify``."""
        self.unchallenge(name)
        if token:
            self._answers[name, token] = answer
        if chain:
            self._challenges[name] = make_context(chain, key, ACME_TLS_1)

    def unchallenge(self, name: str) -> None:
        self._challenges.pop(name, None)
        for key in [key for key in self._answers if key[0] == name]:
            del self._answers[key]

    def answer(self, name: str, token: str) -> str | None:
        """To HTTP-01."""
        return self._answers.get((name, token))

    def choose(self, data: bytes, is_routed: Callable[[str], bool]) -> tuple[str, SSL.Context] | Alert | None:
        """The name and its context for a hello; None if more bytes are needed."""
        try:
            hello = read_hello(data)
        except BadHello:
            return Alert.DECODE_ERROR
        if hello is None:
            return None
        name = parse_host(hello.name) if ":" not in hello.name else None
        if name is None:
            return Alert.UNRECOGNIZED_NAME
        if hello.protocols == (ACME_TLS_1,):
            context = self._challenges.get(name)
            return (name, context) if context is not None else Alert.UNRECOGNIZED_NAME
        if not is_routed(name):
            return Alert.UNRECOGNIZED_NAME
        context = self._contexts.get(name) or self._contexts.get("*." + name.partition(".")[2])
        if context is None:
            return Alert.INTERNAL_ERROR
        if hello.protocols and HTTP_1_1 not in hello.protocols:
            return Alert.NO_APPLICATION_PROTOCOL
        return name, context


def make_context(chain: str, key: str, protocol: bytes) -> SSL.Context:
    """TLS 1.2 and 1.3 with this certificate. Raises SSL.Error or ValueError."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    context.set_cipher_list(_CIPHERS)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)  # tickets are enough
    leaf, *others = x509.load_pem_x509_certificates(chain.encode())
    context.use_certificate(leaf)
    for each in others:
        context.add_extra_chain_cert(each)
    context.use_privatekey(load_pem_private_key(key.encode(), password=None))  # type: ignore[arg-type]
    context.check_privatekey()
    callback = _SELECT[protocol].callback
    # As set_alpn_select_callback does, apart from making a callback.
    context._alpn_select_helper, context._alpn_select_callback = _SELECT[protocol], callback
    lib, ffi = SSL._lib, SSL._ffi  # type: ignore[attr-defined]
    lib.SSL_CTX_set_alpn_select_cb(context._context, callback, ffi.NULL)
    return context


def alert_record(alert: Alert) -> bytes:
    """Fatal, before anything is encrypted."""
    return bytes((0x15, 3, 3, 0, 2, 2, alert))
