"""A guest and a server that speak MySQL's protocol as tests want them to, with hashes of their own.

`Server` plays the host: what it does wrong is set by its fields. `Client` plays the guest, packet by packet.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import struct
from typing import Any

import msgspec
import trio
import trio.lowlevel

from tests.egress.conftest import Wire
from tests.egress.login_peers import LoginServer
from tests.egress.postgres_peers import both

NATIVE, SHA2, CLEAR = "mysql_native_password", "caching_sha2_password", "mysql_clear_password"
LONG_PASSWORD, WITH_DATABASE, COMPRESS, LOCAL_FILES = 1, 1 << 3, 1 << 5, 1 << 7
PROTOCOL_41, SSL, SECURE, MULTI = 1 << 9, 1 << 11, 1 << 15, 1 << 16
PLUGINS, ATTRIBUTES, LONG_ANSWER = 1 << 19, 1 << 20, 1 << 21
TRACK, DEPRECATE_EOF, ZSTD, MFA = 1 << 23, 1 << 24, 1 << 26, 1 << 28
USUAL = LONG_PASSWORD | PROTOCOL_41 | SECURE | PLUGINS | LONG_ANSWER
SERVERS = USUAL | WITH_DATABASE | COMPRESS | LOCAL_FILES | SSL | MULTI | ATTRIBUTES | TRACK | DEPRECATE_EOF | ZSTD | MFA
READY = b"\0\0\0\2\0\0\0"
THREAD = 4711


def packet(sequence: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "little") + bytes([sequence & 255]) + body


def text(value: str | bytes) -> bytes:
    return (value.encode() if isinstance(value, str) else value) + b"\0"


def counted(value: bytes) -> bytes:
    size = len(value)
    return (bytes([size]) if size < 251 else b"\xfc" + struct.pack("<H", size)) + value


def greeting(
    scramble: bytes = b"s" * 20, capabilities: int = SERVERS, plugin: str = SHA2, version: str = "8.0.36",
    further: int = 0,
) -> bytes:  # fmt: skip
    low, high = capabilities & 0xFFFF, capabilities >> 16
    head = (
        b"\n"
        + text(version)
        + struct.pack("<I", THREAD)
        + scramble[:8]
        + b"\0"
        + struct.pack("<HBHH", low, 255, 2, high)
    )
    body = head + bytes([21]) + bytes(6) + struct.pack("<I", further) + scramble[8:] + b"\0"
    return body + (text(plugin) if capabilities & PLUGINS else b"")


def native(password: str, scramble: bytes) -> bytes:
    once = hashlib.sha1(password.encode()).digest()
    return both(once, hashlib.sha1(scramble + hashlib.sha1(once).digest()).digest())


def sha2(password: str, scramble: bytes) -> bytes:
    once = hashlib.sha256(password.encode()).digest()
    return both(once, hashlib.sha256(hashlib.sha256(once).digest() + scramble).digest())


ANSWERS = {NATIVE: native, SHA2: sha2}


def error(code: int, state: str, message: str) -> bytes:
    return b"\xff" + struct.pack("<H", code) + b"#" + state.encode() + message.encode()


class Told(msgspec.Struct):
    """An error as the guest got it; code 0: none."""

    code: int = 0
    state: str = ""
    message: str = ""


def told(body: bytes) -> Told:
    state, message = (body[4:9], body[9:]) if body[3:4] == b"#" else (b"", body[3:])
    return Told(int.from_bytes(body[1:3], "little"), state.decode(), message.decode())


class Login(msgspec.Struct):
    """What a client's first packet says."""

    capabilities: int
    user: str
    answer: bytes
    database: str
    plugin: str
    attributes: bytes
    further: int

    @classmethod
    def read(cls, body: bytes) -> Login:
        capabilities, _, _ = struct.unpack_from("<IIB", body)
        user, _, rest = body[32:].partition(b"\0")
        answer, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        database = plugin = b""
        if capabilities & WITH_DATABASE:
            database, _, rest = rest.partition(b"\0")
        if capabilities & PLUGINS:
            plugin, _, rest = rest.partition(b"\0")
        further = 0 if capabilities & LONG_PASSWORD else struct.unpack_from("<I", body, 28)[0]
        return cls(capabilities, user.decode(), answer, database.decode(), plugin.decode(), rest, further)


def login(
    user: str, answer: bytes, *, capabilities: int = USUAL, database: str = "", plugin: str = SHA2,
    attributes: bytes = b"", further: int = 0,
) -> bytes:  # fmt: skip
    capabilities |= (WITH_DATABASE if database else 0) | (ATTRIBUTES if attributes else 0)
    body = struct.pack("<IIB", capabilities, 1 << 24, 45) + bytes(19) + struct.pack("<I", further) + text(user)
    body += counted(answer) if capabilities & LONG_ANSWER else bytes([len(answer)]) + answer
    body += text(database) if database else b""
    body += text(plugin) if capabilities & PLUGINS else b""
    return body + (counted(attributes) if attributes else b"")


def ssl_request(capabilities: int = USUAL) -> bytes:
    return struct.pack("<IIB", capabilities | SSL, 1 << 24, 45) + bytes(23)


async def read_packet(wire: Wire) -> tuple[int, bytes]:
    head = await wire.exactly(4)
    return head[3], await wire.exactly(int.from_bytes(head[:3], "little"))


async def read_no_more(wire: Wire) -> tuple[int, bytes]:
    """The same, and nothing of what follows: TLS may."""

    async def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            got = await wire.stream.receive_some(count - len(data))
            if not got:
                raise EOFError
            data += got
        return data

    head = await exactly(4)
    return head[3], await exactly(int.from_bytes(head[:3], "little"))


class Server(LoginServer):
    """A host of MySQL. `logins` is what it was told in each login that got so far."""

    def __init__(self, password: str, context: ssl.SSLContext) -> None:
        super().__init__(password, context)
        self.plugin = SHA2
        """Its default."""
        self.account = SHA2
        """Of the account."""
        self.cached = True
        """It knows the hash of the password; else it asks for the password itself."""
        self.capabilities = SERVERS
        self.version = "8.0.36"
        self.further = 0
        self.greets: bytes | None = None
        """Instead of its greeting, as it is on the wire."""
        self.after: bytes | None = None
        """Packets instead of its answer to the login; their sequence numbers are set."""
        self.raw_after: bytes | None = None
        """The same, as they are."""
        self.logins: list[Login] = []
        self.encrypted: list[bool] = []
        self.answers: list[bytes] = []
        """To its further questions."""

    async def _serve(self, wire: Wire) -> None:
        scramble = os.urandom(20).replace(b"\0", b"x")
        first = greeting(scramble, self.capabilities, self.plugin, self.version, self.further)
        await self.send(wire, packet(0, first) if self.greets is None else self.greets)
        if self.greets is not None and self.closes:
            return
        sequence, body = await read_no_more(wire)
        encrypted = len(body) == 32
        if encrypted:
            await self._stop("tls")
            stream = trio.SSLStream(wire.stream, self.context, server_side=True, https_compatible=True)
            wire.stream = stream
            await stream.do_handshake()
            sequence, body = await read_packet(wire)
        self.encrypted.append(encrypted)
        told = Login.read(body)
        self.logins.append(told)
        await self._stop("shown")
        if self.after is not None or self.raw_after is not None:
            await self.send(wire, self.raw_after if self.after is None else packet(sequence + 1, self.after))  # type: ignore[arg-type]
            if not self.closes:
                await wire.rest()
            return
        good, sequence = await self._check(wire, told, sequence, scramble)
        if not good:
            await self.send(wire, packet(sequence + 1, error(1045, "28000", f"Access denied for user '{told.user}'")))
            return
        await self.send(wire, packet(sequence + 1, READY))
        while True:  # a session: each query is answered with its text
            sequence, body = await read_packet(wire)
            assert sequence == 0
            if body == b"\x01":
                return
            await self.send(wire, packet(1, b"=" + body[1:]))

    async def _ask(self, wire: Wire, sequence: int, body: bytes) -> tuple[bytes, int]:
        await self.send(wire, packet(sequence + 1, body))
        got, answer = await read_packet(wire)
        assert got == sequence + 2
        self.answers.append(answer)
        return answer, got

    async def _check(self, wire: Wire, told: Login, sequence: int, scramble: bytes) -> tuple[bool, int]:
        answer = told.answer
        if told.plugin != self.account and self.capabilities & PLUGINS:
            scramble = os.urandom(20).replace(b"\0", b"x")
            answer, sequence = await self._ask(wire, sequence, b"\xfe" + text(self.account) + text(scramble))
        if self.account == CLEAR:
            return answer == text(self.password), sequence
        if self.account == SHA2 and not self.cached:
            answer, sequence = await self._ask(wire, sequence, b"\x01\x04")
            return answer == text(self.password), sequence
        if answer != ANSWERS[self.account](self.password, scramble):
            return False, sequence
        if self.account == SHA2:
            sequence += 1
            await self.send(wire, packet(sequence, b"\x01\x03"))
        return True, sequence


class Client:
    """The guest's end of one connection."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.sequence = 0
        self.greeting = b""
        self.scramble = b""
        self.plugin = ""
        self.version = ""
        self.thread = 0
        self.capabilities = 0
        self.further = 0
        self.packets: list[bytes] = []

    async def read(self) -> bytes:
        got, body = await read_packet(self.wire)
        assert got == self.sequence, "the packets are numbered"
        self.sequence = (got + 1) & 255
        self.packets.append(body)
        return body

    async def send(self, body: bytes) -> None:
        await self.wire.send(packet(self.sequence, body))
        self.sequence += 1

    async def greeted(self) -> Told:
        body = await self.read()
        if body[:1] == b"\xff":
            return told(body)
        self.greeting = body
        version, _, rest = body[1:].partition(b"\0")
        self.version = version.decode()
        self.thread, first = struct.unpack("<I", rest[:4])[0], rest[4:12]
        low, _, _, high = struct.unpack_from("<HBHH", rest, 13)
        self.capabilities = low | high << 16
        self.further = struct.unpack_from("<I", rest, 27)[0]
        second, _, plugin = rest[31:].partition(b"\0")
        self.scramble, self.plugin = first + second, plugin[:-1].decode()
        return Told()

    async def log_in(
        self, password: str, user: str = "app", *, plugin: str | None = None, answer: bytes | None = None, **more: Any
    ) -> Told:
        """Until the session is ready, or refused."""
        plugin = self.plugin if plugin is None else plugin
        if answer is None:
            answer = ANSWERS[plugin](password, self.scramble) if plugin == self.plugin else b""
        await self.send(login(user, answer, plugin=plugin, **more))
        return await self.finish(password)

    async def finish(self, password: str) -> Told:
        body = await self.read()
        if body[:1] == b"\xfe":
            self.plugin, data = body[1:].split(b"\0", 1)[0].decode(), body.split(b"\0", 1)[1]
            await self.send(ANSWERS[self.plugin](password, data[:-1]))
            body = await self.read()
        if body[:1] == b"\x01":
            assert body == b"\x01\x03"
            body = await self.read()
        if body[:1] == b"\xff":
            return told(body)
        assert body == READY
        return Told()

    async def query(self, query: str) -> str:
        self.sequence = 0
        await self.send(b"\x03" + query.encode())
        return (await self.read())[1:].decode()
