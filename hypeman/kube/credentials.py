"""How to reach the cluster: the kubeconfig of the node. Reads files; no network.

Supported are certificate authority, client certificate and token, each as data or as a file. Files are read again
when they change: tokens are renewed by others, client certificates by the node itself.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import yaml

from hypeman.errors import InvalidRequest


class KubeconfigError(InvalidRequest):
    """The kubeconfig cannot be used; the message names the file and the field."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """An API server, and who we are to it."""

    server: str
    ca_file: str = ""
    ca_data: bytes = b""
    certificate_file: str = ""
    certificate_data: bytes = b""
    key_file: str = ""
    key_data: bytes = b""
    token: str = ""
    token_file: str = ""

    def __repr__(self) -> str:
        return f"Access(server={self.server!r})"

    def version(self) -> tuple[int, ...]:
        """Changes when one of the files does."""
        return tuple(_mtime(path) for path in (self.ca_file, self.certificate_file, self.key_file) if path)

    def bearer(self) -> str:
        """The token; empty if there is none. Raises OSError."""
        return Path(self.token_file).read_text().strip() if self.token_file else self.token

    def authorities(self) -> str:
        """The CA certificates of the cluster, PEM. Raises OSError."""
        return Path(self.ca_file).read_text() if self.ca_file else self.ca_data.decode()

    def context(self) -> ssl.SSLContext:
        """Verifies the API server, and presents the client certificate. Raises OSError (ssl.SSLError is one)."""
        context = ssl.create_default_context(cadata=self.authorities() or None)
        if self.certificate_file:
            context.load_cert_chain(self.certificate_file, self.key_file or None)
        elif self.certificate_data:
            with tempfile.NamedTemporaryFile() as file:  # OpenSSL loads chains from files only; mode 0600
                file.write(self.certificate_data + b"\n" + self.key_data)
                file.flush()
                context.load_cert_chain(file.name)
        return context


def load_kubeconfig(path: Path, *, server: str = "") -> Access:
    """The current context of the kubeconfig at ``path``; ``server`` replaces its URL. Raises KubeconfigError."""
    try:
        tree = yaml.safe_load(path.read_text())
        context = _named(tree, "contexts", "context", str(tree.get("current-context", "")))
        cluster = _named(tree, "clusters", "cluster", str(context["cluster"]))
        user = _named(tree, "users", "user", str(context["user"]))
        return _access(path, cluster, user, server)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise KubeconfigError(f"{path} cannot be read: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise KubeconfigError(f"{path} is not a kubeconfig: {error} is missing") from None
    except (binascii.Error, ValueError) as error:
        raise KubeconfigError(f"{path}: data that is not base64: {error}") from None


def _access(path: Path, cluster: dict[str, Any], user: dict[str, Any], server: str) -> Access:
    for field in ("exec", "auth-provider", "username"):
        if user.get(field):
            raise KubeconfigError(
                f"{path}: users of the kind {field!r} are not supported: use a token or a certificate"
            )
    for field in ("insecure-skip-tls-verify", "proxy-url", "tls-server-name"):
        if cluster.get(field):
            raise KubeconfigError(f"{path}: {field} is not supported")
    if not (cluster.get("certificate-authority") or cluster.get("certificate-authority-data")):
        raise KubeconfigError(f"{path}: certificate-authority is needed; it also verifies callers of the kubelet's API")

    def file(tree: dict[str, Any], field: str) -> str:
        name = tree.get(field)
        return str(path.parent / name) if name else ""

    def data(tree: dict[str, Any], field: str) -> bytes:
        return base64.b64decode(tree.get(field) or "", validate=True)

    return Access(
        server=(server or str(cluster["server"])).rstrip("/"),
        ca_file=file(cluster, "certificate-authority"),
        ca_data=data(cluster, "certificate-authority-data"),
        certificate_file=file(user, "client-certificate"),
        certificate_data=data(user, "client-certificate-data"),
        key_file=file(user, "client-key"),
        key_data=data(user, "client-key-data"),
        token=user.get("token") or "",
        token_file=file(user, "tokenFile"),
    )


def _named(tree: dict[str, Any], group: str, field: str, name: str) -> dict[str, Any]:
    for each in tree.get(group) or ():
        if each.get("name") == name:
            return dict(each[field])
    raise KeyError(f"{group}: {name!r}")


def _mtime(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
