"""What a cluster must contain before hosts join it, and what one host adds. Pure.

A node's rights come from the cluster's own rules for nodes (Node authorizer, NodeRestriction): it reads the Secrets and
ConfigMaps of pods that are bound to it and changes the status of these pods and of itself. ``hypeman-node`` adds what
volumes and owners need, for each host by name: the group of all nodes gets nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import yaml

HOST = "hypeman.dev/host"
"""Label and taint of these nodes."""
RUNTIME_CLASS = "hypeman"
HANDLER = "hypeman"
"""Of RuntimeClasses whose pods are VMs; clusters may have more of them, with another overhead."""
STORAGE_CLASS = "hypeman-local"
PROVISIONER = "hypeman.dev/local"
ROLE = "hypeman-node"
_BOOTSTRAPPERS = "system:bootstrappers:hypeman"
_RBAC = "rbac.authorization.k8s.io"
OVERHEAD = {"cpu": "50m", "memory": "64Mi"}
"""Of a VM beyond what its guest gets: the VMM."""

Object = dict[str, Any]

_READ = ["get", "list", "watch"]
RULES: list[Object] = [
    # volumes of StorageClass hypeman-local: made for claims that were scheduled to this host
    {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": _READ},
    {"apiGroups": [""], "resources": ["persistentvolumes"], "verbs": [*_READ, "create", "delete"]},
    {"apiGroups": ["storage.k8s.io"], "resources": ["storageclasses"], "verbs": ["get"]},
    # whether the owner of a deleted pod is gone: only then is its VM released
    {"apiGroups": ["apps"], "resources": ["replicasets", "statefulsets", "daemonsets"], "verbs": ["get"]},
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]},
    {"apiGroups": ["agents.x-k8s.io"], "resources": ["sandboxes"], "verbs": ["get"]},
    {"apiGroups": ["extensions.agents.x-k8s.io"], "resources": ["sandboxwarmpools"], "verbs": ["get"]},
]


def of_cluster() -> list[Object]:
    """Once for each cluster."""
    return [
        _object("ClusterRole", ROLE, api=f"{_RBAC}/v1", rules=RULES),
        _binding("hypeman-bootstrap", "system:node-bootstrapper", _group(_BOOTSTRAPPERS)),
        _binding(
            "hypeman-approve-new-nodes",
            "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
            _group(_BOOTSTRAPPERS),
        ),
        _binding(
            "hypeman-approve-renewals",
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
            _group("system:nodes"),
        ),
        _object(
            "RuntimeClass",
            RUNTIME_CLASS,
            api="node.k8s.io/v1",
            handler=HANDLER,
            overhead={"podFixed": OVERHEAD},
            scheduling={
                "nodeSelector": {HOST: "true"},
                "tolerations": [{"key": HOST, "operator": "Exists", "effect": "NoSchedule"}],
            },
        ),
        _object(
            "StorageClass",
            STORAGE_CLASS,
            api="storage.k8s.io/v1",
            provisioner=PROVISIONER,
            volumeBindingMode="WaitForFirstConsumer",
            reclaimPolicy="Delete",
        ),
    ]


def of_node(name: str) -> list[Object]:
    """Once for each host."""
    subject = {"kind": "User", "apiGroup": _RBAC, "name": f"system:node:{name}"}
    return [_binding(f"{ROLE}:{name}", ROLE, subject)]


def of_token(token_id: str, secret: str, expires: datetime) -> list[Object]:
    """A bootstrap token, with which hosts can request their first certificate until it ``expires``."""
    found = _object("Secret", f"bootstrap-token-{token_id}", api="v1", type="bootstrap.kubernetes.io/token")
    found["metadata"]["namespace"] = "kube-system"
    found["stringData"] = {
        "token-id": token_id,
        "token-secret": secret,
        "usage-bootstrap-authentication": "true",
        "auth-extra-groups": _BOOTSTRAPPERS,
        "expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return [found]


def bootstrap_kubeconfig(server: str, authorities: bytes, token: str) -> Object:
    """How a host reaches the cluster for the first time; ``authorities`` is PEM."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bootstrap",
        "contexts": [{"name": "bootstrap", "context": {"cluster": "cluster", "user": "bootstrap"}}],
        "clusters": [
            {
                "name": "cluster",
                "cluster": {"server": server, "certificate-authority-data": base64.b64encode(authorities).decode()},
            }
        ],
        "users": [{"name": "bootstrap", "user": {"token": token}}],
    }


def render(objects: Iterable[Object]) -> str:
    """For ``kubectl apply -f -``."""
    return str(yaml.safe_dump_all(objects, sort_keys=False))


def _object(kind: str, name: str, *, api: str, **fields: Any) -> Object:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, **fields}


def _binding(name: str, role: str, subject: Object) -> Object:
    reference = {"apiGroup": _RBAC, "kind": "ClusterRole", "name": role}
    return _object("ClusterRoleBinding", name, api=f"{_RBAC}/v1", roleRef=reference, subjects=[subject])


def _group(name: str) -> Object:
    return {"kind": "Group", "apiGroup": _RBAC, "name": name}
