"""Names that the node gives to things: tags of instances and volumes, annotations and resources of pods. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from hypeman.kube.types import ObjectMeta, OwnerReference, Pod
from hypeman.urls import segment

NODE = "kubernetes.io/node"
"""Tag: the node whose pod the instance is; all that the node ever touches have it."""
POD_UID = "kubernetes.io/pod-uid"
"""Tag: the idempotency key. An instance is adopted by it; no second one is created."""
POD = "kubernetes.io/pod"
NAMESPACE = "kubernetes.io/namespace"
OWNER = "kubernetes.io/owner"
"""Tag: ``apiVersion kind name`` of the pod's controller."""
OWNER_UID = "kubernetes.io/owner-uid"
SELF = "hypeman.dev/instance"
"""Tag: the instance's own name. A fork that a user makes has the tag of its source, and so is not the node's."""
SPEC = "hypeman.dev/spec"
"""Tag: hash of what the guest was made from; saved memory is only used for the same."""
FENCING = "hypeman.dev/fencing"
"""Annotation of a pod, and tag: keep, standby or stop."""
TOLERATES = "hypeman.dev/tolerates"
"""Tag: seconds that the pod tolerates an unreachable node; ``forever``."""
GOLDEN = "hypeman.dev/golden"
"""Annotation of a pod: "true" starts it as a fork of an instance that was booted once. Tag: that instance, by hash of
its spec."""
CREDENTIALS = "hypeman.dev/credentials"
"""Annotation of a pod: the Secret whose values stay on the host."""

PROVISIONER = "hypeman.dev/local"
"""Of StorageClasses whose claims are volumes of one host."""
STATE = "state"
"""Value of the parameter ``type`` of a StorageClass: a claim without a disk, which pins its pod to one host."""
HOST_LABEL = "hypeman.dev/host"
TAINT = "hypeman.dev/host"
VGPU = "hypeman.dev/vgpu-"
GPU = "hypeman.dev/gpu-"
"""Prefixes of extended resources."""

FOREVER = "forever"
RETAINED = frozenset({("agents.x-k8s.io", "Sandbox")})
"""Group and kind of owners that outlive their pod: while one lives, deleting its pod saves the memory."""
PLURALS: Mapping[tuple[str, str], str] = {
    ("agents.x-k8s.io", "Sandbox"): "sandboxes",
    ("extensions.agents.x-k8s.io", "SandboxWarmPool"): "sandboxwarmpools",
    ("apps", "ReplicaSet"): "replicasets",
    ("apps", "StatefulSet"): "statefulsets",
    ("apps", "DaemonSet"): "daemonsets",
    ("batch", "Job"): "jobs",
}
"""Owners that the node may look up."""


def is_golden(pod: Pod) -> bool:
    return pod.metadata.annotations.get(GOLDEN) == "true"


def is_retained(owner: OwnerReference | None) -> bool:
    return owner is not None and (owner.group, owner.kind) in RETAINED


def instance_name(pod: Pod) -> str:
    """``<pod>-<first 8 of its uid>``, at most 63 of a-z, 0-9 and '-'."""
    return _joined(pod.metadata.name, pod.metadata.uid.replace("-", "")[:8])


def golden_name(spec: str) -> str:
    return f"golden-{spec}"


def _joined(stem: str, suffix: str) -> str:
    stem = re.sub(r"[^a-z0-9-]", "-", stem.lower())[: 62 - len(suffix)].strip("-")
    return f"{stem}-{suffix}" if stem else suffix


def volume_id(pod: Pod, volume: str) -> str:
    """Of a volume that lives as long as the pod."""
    return f"pod-{pod.metadata.uid}-{hashlib.sha256(volume.encode()).hexdigest()[:8]}"


def claim_volume_id(claim: ObjectMeta) -> str:
    """Of a volume for a PersistentVolumeClaim; also the name of its PersistentVolume."""
    return f"pvc-{claim.uid}"


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for ``value``."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:16]


def owner_path(owner: OwnerReference, namespace: str) -> str | None:
    """Where the API server has the owner; None for a kind that the node does not know."""
    plural = PLURALS.get((owner.group, owner.kind))
    if plural is None:
        return None
    version = owner.api_version.rpartition("/")[2]
    return f"/apis/{owner.group}/{segment(version)}/namespaces/{segment(namespace)}/{plural}/{segment(owner.name)}"


def owner_of(tags: Mapping[str, str]) -> OwnerReference | None:
    """The owner that ``tags`` name."""
    words = tags.get(OWNER, "").split(" ")
    if len(words) != 3:
        return None
    return OwnerReference(api_version=words[0], kind=words[1], name=words[2], uid=tags.get(OWNER_UID, ""))
