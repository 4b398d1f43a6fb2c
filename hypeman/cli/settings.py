"""The server's URL and credentials: flag > environment > file > local socket (§4.1)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

CONFIG_FILE = "~/.config/hypeman/cli.yaml"
LOCAL_SOCKET = "/run/hypeman/hypeman.sock"
DEFAULT_URL = "http://localhost:8080"


class SettingsError(Exception):
    """The settings cannot be used; the message names the file or the key."""


class Settings(Struct, frozen=True):
    base_url: str
    """``http://…``, ``https://…`` or ``unix:///path``."""
    api_key: str = ""

    def __repr__(self) -> str:
        return f"Settings(base_url={self.base_url!r})"


def load_settings(
    flag: str | None = None, environ: Mapping[str, str] = os.environ, local_socket: str = LOCAL_SOCKET
) -> Settings:
    """Raises SettingsError. Without any setting the server's socket on this host is used, if it can be opened."""
    file = Path(CONFIG_FILE).expanduser()
    kept = _read(file) if file.is_file() else {}
    key = environ.get("HYPEMAN_API_KEY") or kept.get("api_key") or ""
    url = flag or environ.get("HYPEMAN_BASE_URL") or kept.get("base_url")
    if not url:
        usable = os.access(local_socket, os.R_OK | os.W_OK)
        if not usable and Path(local_socket).exists() and not key:
            raise SettingsError(
                f"no permission to open {local_socket}: join the group hypeman (sudo usermod -aG hypeman $USER, then "
                "log in again), use sudo, or set HYPEMAN_API_KEY to use the API over TCP"
            )
        url = f"unix://{local_socket}" if usable else DEFAULT_URL
    if not url.startswith(("http://", "https://", "unix:///")):
        raise SettingsError(f"base URL {url!r} must begin with http://, https:// or unix:///")
    return Settings(url.rstrip("/"), key)


def _read(file: Path) -> dict[str, str]:
    import yaml  # takes 15 ms, which most calls can avoid

    try:
        tree: Any = yaml.safe_load(file.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from None
    if not isinstance(tree, dict | None):
        raise SettingsError(f"{file} must hold keys and values")
    return {str(key): str(value) for key, value in (tree or {}).items() if value is not None}
