"""Who the node is to the API server: its kubeconfig, or a client certificate requested with a bootstrap token.

kubeconfig                        used as it is, where it exists
bootstrap-kubeconfig              server, CA and a token that can do no more than request a certificate; that
                                  certificate and its key are in the state directory and are renewed there
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from hypeman.config import NodeConfig
from hypeman.kube.api import ApiClient
from hypeman.kube.credentials import Access, KubeconfigError, load_kubeconfig
from hypeman.kube.kubelet.certificates import CLIENT_SIGNER, Identity, Keeper, Pair

FILE = "client.pem"


def find_kubeconfig(settings: NodeConfig) -> tuple[Access, bool]:
    """How to reach the cluster at first, and whether that is by a bootstrap token. Raises KubeconfigError."""
    kubeconfig, bootstrap = settings.kubeconfig, settings.bootstrap_kubeconfig
    if os.path.exists(kubeconfig):
        return load_kubeconfig(Path(kubeconfig), server=settings.server), False
    if os.path.exists(bootstrap):
        return load_kubeconfig(Path(bootstrap), server=settings.server), True
    raise KubeconfigError(
        f"there is neither {kubeconfig} nor {bootstrap or 'a bootstrap_kubeconfig'}: "
        "`hypeman node join` writes the second one"
    )


def find_access(settings: NodeConfig) -> tuple[Access, Access | None]:
    """How to reach the cluster as the node, and how its certificate is requested while it has none; None: the
    certificate or token is renewed by others. Raises KubeconfigError."""
    first, bootstraps = find_kubeconfig(settings)
    if not bootstraps:
        return first, None
    file = str(Path(settings.state_dir) / FILE)
    access = msgspec.structs.replace(
        first, token="", token_file="", certificate_file=file, key_file=file, certificate_data=b"", key_data=b""
    )
    return access, first


def client_keeper(api: ApiClient, first: ApiClient, name: str, state_dir: Path) -> Keeper:
    """Renews the client certificate; ``ApiClient`` reads the file again when it changes."""
    return Keeper(api, Identity(name, CLIENT_SIGNER), state_dir / FILE, _nothing, first=first)


def _nothing(pair: Pair) -> None:
    pass
