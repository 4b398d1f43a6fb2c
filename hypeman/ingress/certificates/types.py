"""Certificates with their keys. Pure."""

from __future__ import annotations

import enum
from datetime import datetime

from msgspec import Struct


class Pair(Struct, frozen=True):
    """A certificate with its chain, and its key."""

    chain: str
    """PEM, the certificate of the site first."""
    key: str
    """PEM, not encrypted."""
    names: tuple[str, ...]
    """DNS names of the certificate, in lower case; ``*.example.com`` is for one label."""
    not_before: datetime
    not_after: datetime

    def __repr__(self) -> str:
        """Without the key."""
        return f"Pair({', '.join(self.names)}, until {self.not_after:%Y-%m-%d %H:%M})"


class Answer(Struct, frozen=True):
    """What shows a public CA that a name is ours: for HTTP-01 or for TLS-ALPN-01, the other part is empty."""

    token: str = ""
    authorization: str = ""
    chain: str = ""
    key: str = ""

    def __repr__(self) -> str:
        """Without the key."""
        return f"Answer({self.token or 'TLS-ALPN-01'})"


class Source(enum.StrEnum):
    """Where a certificate comes from."""

    FILE = "file"
    INTERNAL = "internal"
    ACME = "acme"
