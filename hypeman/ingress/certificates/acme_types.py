"""What a CA says in ACME (RFC 8555), and how it is configured. Pure."""

from __future__ import annotations

import hashlib

from msgspec import Struct

from hypeman.text import one_line

HTTP_01, TLS_ALPN_01 = "http-01", "tls-alpn-01"
LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
LETS_ENCRYPT_STAGING = "https://acme-staging-v02.api.letsencrypt.org/directory"
_MAX_TEXT = 300


class AcmeError(Exception):
    """The CA refused, or cannot be understood or reached. The message is one line."""

    def __init__(self, message: str, code: str = "", *, is_final: bool = False) -> None:
        """``code``: the CA's error type; ``is_final``: the order is of no more use."""
        super().__init__(one_line(message)[:_MAX_TEXT])
        self.code = code
        self.is_final = is_final


class Problem(Struct, frozen=True):
    type: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.type.rpartition(':')[2]}: {self.detail}"


class ChallengeView(Struct, frozen=True):
    type: str
    url: str = ""
    status: str = "pending"
    token: str = ""
    error: Problem | None = None


class AuthorizationView(Struct, frozen=True):
    status: str
    challenges: tuple[ChallengeView, ...] = ()

    @property
    def problem(self) -> str:
        found = [str(challenge.error) for challenge in self.challenges if challenge.error is not None]
        return found[0] if found else f"the authorization is {self.status}"


class OrderView(Struct, frozen=True):
    status: str
    authorizations: tuple[str, ...]
    finalize: str
    certificate: str = ""
    error: Problem | None = None


class CASettings(Struct, frozen=True):
    """Which CA, and how we are known there."""

    directory: str
    email: str = ""
    ca_file: str = ""
    """CA certificates that verify its TLS; empty: the system's."""
    eab_key_id: str = ""
    eab_hmac_key: str = ""
    """base64url."""
    profile: str = ""

    @property
    def account(self) -> str:
        """The same for the same account."""
        text = "\n".join((self.directory, self.email, self.eab_key_id))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"CASettings({self.directory})"
