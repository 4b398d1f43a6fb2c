"""What a PersistentVolumeClaim and its StorageClass ask for: read, or refused by the name of the field. Pure.

As for pods (``podspec.py``): a field that is not read is refused, also one that a later version of Kubernetes adds. An
empty volume in place of the copy that ``dataSource`` asks for would be worse than none.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec import field

from hypeman.kube import names
from hypeman.kube.podspec import Part, refused_fields
from hypeman.kube.quantity import BadQuantity, whole
from hypeman.kube.translate import GIB
from hypeman.kube.types import PersistentVolumeClaim, StorageClass

DISK = "disk"
"""Value of the parameter ``type`` of a StorageClass, unless it is ``names.STATE``."""


class ClaimResources(Part, frozen=True):
    requests: dict[str, str | int] = field(default_factory=dict)


class ClaimSpec(Part, frozen=True):
    storage_class_name: str = ""
    volume_name: str = ""
    access_modes: tuple[str, ...] = ()
    resources: ClaimResources = ClaimResources()
    volume_mode: str = "Filesystem"


def read_claim(claim: PersistentVolumeClaim) -> ClaimSpec:
    """``spec`` as far as it is read. Raises msgspec.ValidationError for another shape, which no API server accepts."""
    return msgspec.convert(claim.spec, ClaimSpec)


def size_gb(spec: ClaimSpec) -> int:
    """Raises KeyError, BadQuantity."""
    return max(1, math.ceil(whole(spec.resources.requests["storage"]) / GIB))


def what_is_wrong(claim: PersistentVolumeClaim, kind: StorageClass) -> str:
    """The first field that cannot be done; empty if there is none."""
    if refused := next(iter(refused_fields(claim.spec, ClaimSpec, "spec")), None):
        return str(refused)
    return _wrong_in_claim(read_claim(claim)) or _wrong_in_class(kind)


def _wrong_in_claim(spec: ClaimSpec) -> str:
    if spec.volume_mode != "Filesystem":
        return f"spec.volumeMode: {spec.volume_mode} is not supported by hypeman"
    others = [mode for mode in spec.access_modes if mode not in ("ReadWriteOnce", "ReadWriteOncePod")]
    if others:
        return f"spec.accessModes: {', '.join(others)} is not supported by hypeman: a volume belongs to one host"
    try:
        size_gb(spec)
    except (KeyError, BadQuantity):
        return "spec.resources.requests.storage is not a quantity"
    return ""


def _wrong_in_class(kind: StorageClass) -> str:
    where = f"StorageClass {kind.metadata.name!r}"
    legal: dict[str, Any] = {"type": (DISK, names.STATE)}
    for name, value in kind.parameters.items():
        if value not in legal.get(name, ()):
            return f"{where} parameters.{name}: {value!r} is not supported by hypeman"
    if kind.mount_options:
        return f"{where} mountOptions: {', '.join(kind.mount_options)} is not supported by hypeman"
    if kind.allow_volume_expansion:
        return f"{where} allowVolumeExpansion: volumes do not grow"
    return ""
