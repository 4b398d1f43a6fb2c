"""A guest and a server that speak Postgres' protocol as tests want them to, with a SCRAM of their own.

`Server` plays the host: what it does wrong is set by its fields. `Client` plays the guest, message by message.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import ssl
import struct
from typing import Any

import trio
import trio.lowlevel

from tests.egress.conftest import Wire
from tests.egress.login_peers import LoginServer

SSL_REQUEST = struct.pack(">II", 8, 80877103)
GSS_REQUEST = struct.pack(">II", 8, 80877104)
PLUS = "SCRAM-SHA-256-PLUS"
PLAIN = "SCRAM-SHA-256"
GS2 = {"n": b"n,,", "y": b"y,,", "p": b"p=tls-server-end-point,,"}
KEY = struct.pack(">II", 4711, 0xC0FFEE)


def startup(version: int = 3 << 16, **parameters: str) -> bytes:
    return first_message(version, *(text for pair in parameters.items() for text in pair))


def first_message(version: int, *texts: str) -> bytes:
    body = struct.pack(">I", version) + b"".join(text.encode() + b"\0" for text in texts) + b"\0"
    return struct.pack(">I", len(body) + 4) + body


def cancel_request(key: bytes = KEY) -> bytes:
    return struct.pack(">II", 16, 80877102) + key


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack(">I", len(body) + 4) + body


def authentication(kind: int, data: bytes = b"") -> bytes:
    return message(b"R", struct.pack(">I", kind) + data)


def error(**fields: str) -> bytes:
    return message(b"E", b"".join(name.encode() + text.encode() + b"\0" for name, text in fields.items()) + b"\0")


def fields_of(body: bytes) -> dict[str, str]:
    return {part[:1].decode(): part[1:].decode() for part in body.split(b"\0") if part}


async def read_message(wire: Wire) -> tuple[bytes, bytes]:
    kind = await wire.exactly(1)
    size = struct.unpack(">I", await wire.exactly(4))[0]
    return kind, await wire.exactly(size - 4)


async def read_startup(wire: Wire) -> bytes:
    size = await wire.exactly(4)
    return size + await wire.exactly(struct.unpack(">I", size)[0] - 4)


def mac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def both(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def attributes(text: bytes) -> dict[bytes, bytes]:
    return {part[:1]: part[2:] for part in text.split(b",")}


class Keys:
    def __init__(self, password: str, salt: bytes, iterations: int) -> None:
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
        self.client = mac(salted, b"Client Key")
        self.stored = hashlib.sha256(self.client).digest()
        self.server = mac(salted, b"Server Key")


class Server(LoginServer):
    """A host of Postgres. `sessions` is what it was told in each login that got so far."""

    def __init__(self, password: str, context: ssl.SSLContext, certificate: bytes) -> None:
        super().__init__(password, context)
        self.binding = hashlib.sha256(certificate).digest()
        self.mechanisms: tuple[str, ...] = (PLUS, PLAIN)
        self.iterations: object = 4096
        self.answer_to_tls = b"S"
        self.direct = False
        """TLS begins at once, without a question."""
        self.method = "scram"
        self.challenge: bytes | None = None
        """Instead of the right one."""
        self.proof: bytes | None = None
        self.after: bytes | None = None
        """Instead of AuthenticationOk and what follows."""
        self.startups: list[dict[str, str]] = []
        self.used: list[str] = []
        """Mechanisms."""
        self.passwords: list[bytes] = []
        self.cancelled: list[bytes] = []

    async def _serve(self, wire: Wire) -> None:
        if self.answer_to_tls and not self.direct:
            assert await read_startup(wire) == SSL_REQUEST
            await self._stop("tls")
            await wire.send(self.answer_to_tls)
            assert self.answer_to_tls.startswith(b"S")
        if self.answer_to_tls or self.direct:
            stream = trio.SSLStream(wire.stream, self.context, server_side=True, https_compatible=True)
            wire.stream = stream
            await stream.do_handshake()
        first = await read_startup(wire)
        if first[4:8] == cancel_request()[4:8]:
            self.cancelled.append(first[8:])
            return
        texts = first[8:-2].decode().split("\0")
        self.startups.append(dict(zip(texts[::2], texts[1::2], strict=True)))
        if not await (self._scram(wire) if self.method == "scram" else self._older(wire)):
            await self.send(wire, error(S="FATAL", V="FATAL", C="28P01", M="password authentication failed"))
            return
        await self._stop("shown")
        if self.after is not None:
            await self.send(wire, self.after)
            if not self.closes:
                await wire.rest()
            return
        await self.send(wire, authentication(0) + message(b"S", b"server_version\x0015.1\0") + message(b"K", KEY))
        await self._stop("ready")
        await self.send(wire, message(b"Z", b"I"))
        await self._echo(wire)

    async def _echo(self, wire: Wire) -> None:
        """A session: each query is answered with its text."""
        while True:
            kind, body = await read_message(wire)
            if kind == b"X":
                return
            await self.send(wire, message(b"C", body) + message(b"Z", b"I"))

    async def _scram(self, wire: Wire) -> bool:
        offered = b"".join(mechanism.encode() + b"\0" for mechanism in self.mechanisms) + b"\0"
        await self.send(wire, authentication(10, offered))
        kind, body = await read_message(wire)
        mechanism, _, rest = body.partition(b"\0")
        client_first = rest[4:]
        gs2 = GS2["p"] if mechanism.decode() == PLUS else client_first[:3]
        self.used.append(mechanism.decode() + " " + gs2[:1].decode())
        bare = client_first[len(gs2) :]
        salt = os.urandom(16)
        nonce = attributes(bare)[b"r"] + base64.b64encode(os.urandom(12))
        first = b"r=%b,s=%b,i=%b" % (nonce, base64.b64encode(salt), str(self.iterations).encode())
        if self.challenge is not None:
            first = self.challenge.replace(b"NONCE", attributes(bare)[b"r"])
        await self.send(wire, authentication(11, first))
        kind, final = await read_message(wire)
        assert kind == b"p"
        without, _, proof = final.rpartition(b",p=")
        bound = gs2 + (self.binding if mechanism.decode() == PLUS else b"")
        assert attributes(without)[b"c"] == base64.b64encode(bound), "channel binding"
        keys = Keys(self.password, salt, int(str(self.iterations)))
        signed = bare + b"," + first + b"," + without
        if hashlib.sha256(both(base64.b64decode(proof), mac(keys.stored, signed))).digest() != keys.stored:
            return False
        verifier = base64.b64encode(mac(keys.server, signed))
        await self.send(wire, authentication(12, self.proof or b"v=" + verifier))
        return True

    async def _older(self, wire: Wire) -> bool:
        salt = b"salt"
        if self.method == "trust":
            return True
        await self.send(wire, authentication(5, salt) if self.method == "md5" else authentication(3))
        _, body = await read_message(wire)
        self.passwords.append(body)
        expected = self.password.encode()
        if self.method == "md5":
            inner = hashlib.md5(expected + self.startups[-1]["user"].encode()).hexdigest().encode()
            expected = b"md5" + hashlib.md5(inner + salt).hexdigest().encode()
        return body == expected + b"\0"


class Client:
    """The guest's end of one connection."""

    def __init__(self, wire: Wire, binding: bytes = b"") -> None:
        self.wire = wire
        self.binding = binding
        self.messages: list[tuple[bytes, bytes]] = []

    async def read(self) -> tuple[bytes, bytes]:
        self.messages.append(await read_message(self.wire))
        return self.messages[-1]

    async def log_in(self, password: str, first: bytes, *, mechanism: str = PLAIN, flag: str = "n") -> dict[str, str]:
        """Until the session is ready, or refused: the fields of the error then, else nothing."""
        await self.wire.send(first)
        kind, body = await self.read()
        while kind == b"v":
            kind, body = await self.read()
        if kind == b"E":
            return fields_of(body)
        assert body == struct.pack(">I", 10) + f"{PLUS}\0{PLAIN}\0\0".encode()
        return await self.authenticate(password, mechanism, flag)

    async def authenticate(self, password: str, mechanism: str, flag: str) -> dict[str, str]:
        bare = b"n=,r=" + base64.b64encode(os.urandom(18))
        first = GS2[flag] + bare
        sent = mechanism.encode() + b"\0" + struct.pack(">I", len(first)) + first
        await self.wire.send(message(b"p", sent))
        kind, body = await self.read()
        if kind == b"E":
            return fields_of(body)
        challenge = body[4:]
        parts = attributes(challenge)
        keys = Keys(password, base64.b64decode(parts[b"s"]), int(parts[b"i"]))
        bound = base64.b64encode(GS2[flag] + (self.binding if flag == "p" else b""))
        without = b"c=%b,r=%b" % (bound, parts[b"r"])
        signed = bare + b"," + challenge + b"," + without
        proof = base64.b64encode(both(keys.client, mac(keys.stored, signed)))
        await self.wire.send(message(b"p", without + b",p=" + proof))
        kind, body = await self.read()
        if kind == b"E":
            return fields_of(body)
        assert body[4:] == b"v=" + base64.b64encode(mac(keys.server, signed)), "the engine knows the placeholder"
        while kind != b"Z":
            kind, body = await self.read()
            if kind == b"E":
                return fields_of(body)
        return {}

    async def query(self, text: str) -> bytes:
        await self.wire.send(message(b"Q", text.encode() + b"\0"))
        answer = (await self.read())[1]
        assert (await self.read())[0] == b"Z"
        return answer[:-1]


def certificate_of(stream: trio.abc.Stream) -> bytes:
    assert isinstance(stream, trio.SSLStream)
    found: Any = stream.getpeercert(binary_form=True)
    return bytes(found)
