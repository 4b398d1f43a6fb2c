"""Signatures in minisign's format (Ed25519 over BLAKE2b-512), so that anyone can verify a bundle with minisign.

    public key   "untrusted comment: …", base64("Ed", key id: 8, key: 32)
    signature    "untrusted comment: …", base64("ED", key id: 8, signature of the message's BLAKE2b-512: 64),
                 "trusted comment: …", base64(signature of the first signature and the trusted comment: 64)
    secret key   "untrusted comment: …", base64("Ed", no KDF: 2, "B2", salt and limits: 48, key id: 8, seed and key: 64,
                 BLAKE2b-256 checksum: 32)

Only secret keys without a password (``minisign -G -W``) are read: signing is unattended, and the file's mode guards it.
Format: https://jedisct1.github.io/minisign/. The Ed25519 is the library's (cryptography).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Sequence

import msgspec

from hypeman.errors import HypemanError, InvalidRequest

MAX_TEXT = 4096
"""Bytes of a key or a signature."""
_COMMENT, _TRUSTED = b"untrusted comment: ", b"trusted comment: "
_KDF_NONE = b"\0\0"
_KDF_SCRYPT = b"Sc"


class BadSignature(HypemanError):
    """It is not what a holder of a trusted key has signed."""


class PublicKey(msgspec.Struct, frozen=True):
    key_id: bytes
    key: bytes

    def __str__(self) -> str:
        return self.key_id[::-1].hex().upper()

    def render(self) -> bytes:
        return _COMMENT + f"minisign public key {self}\n".encode() + _base64(b"Ed", self.key_id, self.key) + b"\n"


class SecretKey(msgspec.Struct, frozen=True):
    key_id: bytes
    seed: bytes

    def __repr__(self) -> str:
        return f"SecretKey({self.public})"

    @property
    def public(self) -> PublicKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return PublicKey(self.key_id, Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw())

    def render(self) -> bytes:
        pair = self.key_id + self.seed + self.public.key
        check = hashlib.blake2b(b"Ed" + pair, digest_size=32).digest()
        text = _base64(b"Ed", _KDF_NONE, b"B2", bytes(48), pair, check)
        return _COMMENT + b"minisign unencrypted secret key\n" + text + b"\n"


def new_key() -> SecretKey:
    return SecretKey(secrets.token_bytes(8), secrets.token_bytes(32))


def parse_public_key(text: bytes) -> PublicKey:
    """A public key, with or without its comment line. Raises InvalidRequest."""
    lines = [line for line in text[:MAX_TEXT].splitlines() if line and not line.startswith(_COMMENT)]
    raw = _decoded(lines[0]) if len(lines) == 1 else b""
    if len(raw) != 42 or raw[:2] != b"Ed":
        raise InvalidRequest("this is not a minisign public key")
    return PublicKey(raw[2:10], raw[10:])


def parse_secret_key(text: bytes) -> SecretKey:
    """A secret key without a password. Raises InvalidRequest."""
    lines = text[:MAX_TEXT].splitlines()
    raw = _decoded(lines[1]) if len(lines) >= 2 and lines[0].startswith(_COMMENT) else b""
    if len(raw) != 158 or raw[:2] != b"Ed":
        raise InvalidRequest("this is not a minisign secret key")
    if raw[2:4] == _KDF_SCRYPT:
        raise InvalidRequest(
            "this secret key has a password; use one without: hypeman bundle keygen, or minisign -G -W"
        )
    if raw[2:4] != _KDF_NONE:
        raise InvalidRequest("this secret key uses an unknown protection")
    pair, check = raw[54:126], raw[126:]
    key = SecretKey(pair[:8], pair[8:40])
    if check not in (hashlib.blake2b(b"Ed" + pair, digest_size=32).digest(), bytes(32)) or key.public.key != pair[40:]:
        raise InvalidRequest("this secret key is damaged")
    return key


def sign(message: bytes, key: SecretKey, *, comment: str) -> bytes:
    """The signature's text. ``comment`` is signed, too; one line."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signer = Ed25519PrivateKey.from_private_bytes(key.seed)
    trusted = comment.encode()
    if b"\n" in trusted or b"\r" in trusted:
        raise InvalidRequest("a signature's comment must be one line")
    first = signer.sign(hashlib.blake2b(message).digest())
    whole = signer.sign(first + trusted)
    lines = (untrusted_comment(key.public), _base64(b"ED", key.key_id, first), _TRUSTED + trusted)
    return b"\n".join((*lines, _base64(whole), b""))


def untrusted_comment(key: PublicKey) -> bytes:
    """The first line of signatures that are made here; it is not signed itself."""
    return _COMMENT + f"signature of {key}".encode()


def verify(message: bytes, signature: bytes, trusted: Sequence[PublicKey]) -> tuple[PublicKey, str]:
    """Whose signature it is, and its trusted comment. Raises BadSignature."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    lines = signature.split(b"\n")
    raw = _decoded(lines[1]) if len(lines) == 5 and lines[4] == b"" and lines[0].startswith(_COMMENT) else b""
    whole = _decoded(lines[3]) if raw else b""
    if len(raw) != 74 or len(whole) != 64 or raw[:2] != b"ED" or not lines[2].startswith(_TRUSTED):
        raise BadSignature("the signature is malformed")
    key_id, first, comment = raw[2:10], raw[10:], lines[2].removeprefix(_TRUSTED)
    key = next((key for key in trusted if key.key_id == key_id), None)
    if key is None:
        known = ", ".join(map(str, trusted)) or "none"
        raise BadSignature(f"it is signed with key {PublicKey(key_id, b'')}, which is not trusted (trusted: {known})")
    try:
        public = Ed25519PublicKey.from_public_bytes(key.key)
        public.verify(first, hashlib.blake2b(message).digest())
        public.verify(whole, first + comment)
    except InvalidSignature:
        raise BadSignature(f"the signature with key {key} is invalid") from None
    return key, comment.decode(errors="replace")


def _base64(*parts: bytes) -> bytes:
    return base64.b64encode(b"".join(parts))


def _decoded(text: bytes) -> bytes:
    """Empty if it is not in base64 as an encoder writes it: one text for each value."""
    if not re.fullmatch(rb"[A-Za-z0-9+/]+=*", text):
        return b""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""
    return raw if base64.b64encode(raw) == text else b""
