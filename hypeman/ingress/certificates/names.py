"""Which names a certificate is for, and who may certify a name. Pure.

Names are as ``parse_hostname`` returns them. ``*`` is one label, on the left.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from hypeman.ingress.hostnames import capture_of, parse_hostname

PRIVATE_SUFFIXES = ("internal", "local", "localhost", "test", "home.arpa")
"""Reserved: no public CA certifies names below them."""


class DomainList(Struct, frozen=True):
    """The contract's syntax: exact names, ``*.domain`` for one label, or ``*`` for every name, separated by commas."""

    entries: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> DomainList:
        """Raises ValueError with the reason."""
        entries = tuple(entry.strip().lower() for entry in text.split(",") if entry.strip())
        for entry in entries:
            if entry != "*":
                try:
                    labels = parse_hostname(entry.removeprefix("*."))
                except ValueError as error:
                    raise ValueError(f"{entry!r} {error}") from None
                if any(capture_of(label) for label in labels):
                    raise ValueError(f"{entry!r} has a capture; write * for one label")
        return cls(entries)

    def has(self, name: str) -> bool:
        return any(entry == "*" or is_for(entry, name) for entry in self.entries)


def is_for(certified: str, name: str) -> bool:
    """Whether a certificate for ``certified`` is for ``name``. Both may have the wildcard."""
    if certified.startswith("*."):
        return "." in name and certified[2:] == name.partition(".")[2]
    return certified == name


def best_match(names: Iterable[str], name: str) -> str | None:
    """Of the names that are for ``name`` the exact one, else one with a wildcard."""
    fitting = [each for each in names if is_for(each, name)]
    return name if name in fitting else next(iter(fitting), None)


def certificate_name(hostname: str) -> str | None:
    """The name that a certificate for a rule's host name must have; None if no certificate can be for all its hosts."""
    labels = parse_hostname(hostname)
    if any(capture_of(label) for label in labels[1:]):
        return None
    return f"*.{'.'.join(labels[1:])}" if capture_of(labels[0]) else hostname


def is_private(name: str, domain: str) -> bool:
    """Whether no public CA can certify it: one label, a reserved suffix, or below ``domain`` (may be empty)."""
    plain = name.removeprefix("*.")
    suffixes = (*PRIVATE_SUFFIXES, domain.lower()) if domain else PRIVATE_SUFFIXES
    return "." not in plain or any(plain == suffix or plain.endswith("." + suffix) for suffix in suffixes)


def public_problem(name: str) -> str:
    """Why no public CA would certify a name with HTTP-01 or TLS-ALPN-01; empty if one may."""
    if name.startswith("*."):
        return "is a pattern, and ACME certifies single names here; a certificate file can have a wildcard"
    if "_" in name:
        return "has an underscore, which public CAs refuse"
    if name.rpartition(".")[2].isdecimal():
        return "is not a domain name"
    return ""
