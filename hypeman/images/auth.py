"""Registry logins of requests and of docker's configuration file. Pure except for reading that file.

Helpers (``credHelpers``, ``credsStore``) are third-party programs and are not run: a registry
configured only there has no login here.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import msgspec

from hypeman.images.types import PushCredentials
from hypeman.logins import registry_of_key

_MAX_CONFIG_BYTES = 1 << 20


class Login(msgspec.Struct, frozen=True):
    """Credentials for one registry. All empty: anonymous."""

    username: str = ""
    password: str = ""
    registry_token: str = ""
    """Sent unchanged as a bearer token."""
    identity_token: str = ""
    """OAuth2 refresh token, exchanged for an access token."""

    def __bool__(self) -> bool:
        return bool(self.username or self.password or self.registry_token or self.identity_token)

    def __repr__(self) -> str:
        return "Login(…)" if self else "Login()"

    @property
    def basic(self) -> str:
        """Value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


NOBODY = Login()


def login_of(credentials: PushCredentials | None) -> Login:
    """The login supplied with a request, or NOBODY."""
    if not credentials:
        return NOBODY
    return Login(credentials.username, credentials.password, credentials.registry_token)


class Keychain:
    """The logins in docker's ``config.json``, reread when the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._logins: dict[str, Login] = {}

    def login(self, registry: str) -> Login:
        """The login for a registry (``host[:port]``, ``docker.io`` for Docker Hub), or NOBODY.

        A missing or malformed file yields no logins; the registry then decides.
        """
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                text = self._path.read_bytes() if status.st_size <= _MAX_CONFIG_BYTES else b"{}"
                self._logins = parse_docker_config(text)
                self._stamp = stamp
        except (OSError, ValueError):
            self._stamp, self._logins = None, {}
        return self._logins.get(registry, NOBODY)


def parse_docker_config(text: bytes) -> dict[str, Login]:
    """Registry → login. Unreadable entries are skipped; raises ValueError if the file is unreadable."""
    document = msgspec.json.decode(text)
    entries = document.get("auths") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        return {}
    logins = {}
    for key, entry in entries.items():
        if isinstance(entry, dict) and (login := _parse_entry(entry)):
            logins[registry_of_key(key)] = login
    return logins


def _parse_entry(entry: dict[str, Any]) -> Login:
    def text(name: str) -> str:
        value = entry.get(name)
        return value if isinstance(value, str) else ""

    username, password = text("username"), text("password")
    if text("auth"):
        try:
            username, _, password = base64.b64decode(text("auth")).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return NOBODY
    return Login(username, password, text("registrytoken"), text("identitytoken"))
