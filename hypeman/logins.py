"""How logins at registries are written down, for the server and for the command line alone: the names in docker's
``config.json``, and what a registry answers to a request without a login. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

DEFAULT_REGISTRY = "docker.io"
_HUB_HOSTS = ("index.docker.io", "registry-1.docker.io")
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*,?\s*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))')
_SCHEME = re.compile(rf"\s*,?\s*({_WORD})(?=\s|,|$)")


class Challenge(msgspec.Struct, frozen=True):
    """One authentication method offered by a registry."""

    scheme: str
    """In lower case."""
    parameters: dict[str, str]
    """Names in lower case."""


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges of all WWW-Authenticate headers (RFC 9110, §11.6.1); malformed ones are skipped."""
    found = []
    for header in headers:
        at = 0
        while match := _SCHEME.match(header, at):
            scheme, at = match[1].lower(), match.end()
            parameters: dict[str, str] = {}
            while pair := _PARAMETER.match(header, at):
                value = pair[3] if pair[3] is not None else re.sub(r"\\(.)", r"\1", pair[2])
                parameters[pair[1].lower()] = value
                at = pair.end()
            found.append(Challenge(scheme, parameters))
    return found


def registry_of_key(key: str) -> str:
    """The registry (``host[:port]``) of a key of the file, such as ``https://index.docker.io/v1/``."""
    host = key.removeprefix("https://").removeprefix("http://").split("/", 1)[0]
    return DEFAULT_REGISTRY if host in _HUB_HOSTS else host
