"""What a pod needs before its instance can be made: objects of the cluster, the image, volumes, devices.

Everything here may be done again after a failure or a crash: what exists already is found by its id.
"""

from __future__ import annotations

import base64
import gzip
import io
import logging
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec
import trio

from hypeman.devices.types import Device
from hypeman.images.reference import parse_reference
from hypeman.images.types import CreateImageRequest, Image, ImageStatus, PushCredentials
from hypeman.kube import manifest, names
from hypeman.kube.api import ApiClient, Refused
from hypeman.kube.capacity import profile_names
from hypeman.kube.devices import device_class
from hypeman.kube.local import LocalRefused, LocalServer
from hypeman.kube.podspec import PodSpec, Refusal, Remark, TokenFile
from hypeman.kube.quantity import whole
from hypeman.kube.references import File, Missing, Needed, Sources, mounted
from hypeman.kube.translate import GIB, Archive, Disk, Placement, Wanted, credentials_secret
from hypeman.kube.types import (
    ConfigMap,
    PersistentVolume,
    PersistentVolumeClaim,
    Pod,
    RuntimeClass,
    Secret,
    TokenRequest,
)
from hypeman.logins import registry_of_key
from hypeman.resources.types import Resources
from hypeman.urls import segment
from hypeman.volumes.types import CreateVolumeRequest, Volume

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


class ImageProblem(Exception):
    """The image cannot be had: ``reason`` as the kubelet has it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# ── Objects of the cluster ──────────────────────────────────────────────────────────────────────


async def read_sources(api: ApiClient, pod: Pod, needed: Needed, account: str) -> Sources:
    """Objects that do not exist are absent from the result. Raises ApiError for any other failure."""
    base = f"/api/v1/namespaces/{segment(pod.metadata.namespace)}"
    config_maps = {
        name: await _or_none(api, f"{base}/configmaps/{segment(name)}", ConfigMap) for name in needed.config_maps
    }
    secrets = {name: await _or_none(api, f"{base}/secrets/{segment(name)}", Secret) for name in needed.secrets}
    return Sources(
        {name: found for name, found in config_maps.items() if found is not None},
        {name: found for name, found in secrets.items() if found is not None},
        {wanted: await _token(api, base, pod, account, wanted) for wanted in needed.tokens},
    )


async def read_secret(api: ApiClient, namespace: str, name: str) -> Secret:
    """Raises Missing, ApiError."""
    found = await _or_none(api, f"/api/v1/namespaces/{segment(namespace)}/secrets/{segment(name)}", Secret)
    if found is None:
        raise Missing(f'secret "{name}" not found')
    return found


async def _token(api: ApiClient, base: str, pod: Pod, account: str, wanted: TokenFile) -> str:
    about = pod.metadata
    body = {
        "spec": {
            "audiences": [wanted.audience] if wanted.audience else [],
            "expirationSeconds": wanted.expiration_seconds,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": about.name, "uid": about.uid},
        }
    }
    made = await api.create(f"{base}/serviceaccounts/{segment(account)}/token", body, TokenRequest)
    return made.status.token


async def check_runtime_class(api: ApiClient, name: str) -> None:
    """Whether pods of the RuntimeClass ``name`` are VMs. Raises Missing, Refusal, ApiError."""
    if name in ("", manifest.RUNTIME_CLASS):
        return
    found = await _or_none(api, f"/apis/node.k8s.io/v1/runtimeclasses/{segment(name)}", RuntimeClass)
    if found is None:
        raise Missing(f'runtimeclass "{name}" not found')
    if found.handler != manifest.HANDLER:
        why = f"{name!r} has the handler {found.handler!r}, and the only one here is {manifest.HANDLER!r}"
        raise Refusal((Remark("spec.runtimeClassName", why),))


async def read_claims(api: ApiClient, pod: Pod, spec: PodSpec) -> dict[str, str | None]:
    """Name of each mounted claim → id of its volume; None for one without a disk. Raises Missing, Refusal."""
    found: dict[str, str | None] = {}
    for volume in mounted(spec):
        if volume.persistent_volume_claim is None:
            continue
        name = volume.persistent_volume_claim.claim_name
        path = f"/api/v1/namespaces/{segment(pod.metadata.namespace)}/persistentvolumeclaims/{segment(name)}"
        claim = await _or_none(api, path, PersistentVolumeClaim)
        wanted = str((claim.spec if claim is not None else {}).get("volumeName", ""))
        if claim is None or not wanted or claim.status.phase != "Bound":
            raise Missing(f'persistentvolumeclaim "{name}" is not bound')
        bound = await api.get(f"/api/v1/persistentvolumes/{segment(wanted)}", PersistentVolume)
        if bound.spec.claim_ref.uid != claim.metadata.uid:
            raise Missing(f'persistentvolumeclaim "{name}" is not bound: its volume belongs to another claim')
        kind = bound.metadata.annotations.get(names.PROVISIONER)
        if kind is None:
            raise Refusal(
                (Remark(f"spec.volumes {volume.name!r}", f"claim {name!r} is not a volume of {names.PROVISIONER}"),)
            )
        found[name] = None if kind == names.STATE else bound.metadata.name
    return found


async def _or_none(api: ApiClient, path: str, kind: type[T]) -> T | None:
    try:
        return await api.get(path, kind)
    except Refused as error:
        if error.is_absent:
            return None
        raise


class Choice:
    """Devices chosen for one pod, until its instance has them."""

    def __init__(self, held: set[str]) -> None:
        """``held``: what all pods that are being made have chosen."""
        self._held = held
        self._mine: set[str] = set()

    def __enter__(self) -> Choice:
        return self

    def __exit__(self, *_: object) -> None:
        self._held -= self._mine

    def is_free(self, device: Device) -> bool:
        return device.attached_to is None and not device.missing and device.id not in self._held

    def take(self, identifiers: Iterable[str]) -> None:
        self._mine.update(identifiers)
        self._held |= self._mine


async def place(api: ApiClient, local: LocalServer, pod: Pod, spec: PodSpec, choice: Choice) -> Placement:
    """Raises Missing, Refusal, ApiError, LocalError."""
    await check_runtime_class(api, spec.runtime_class_name)
    secret = credentials_secret(pod, spec)
    limits = spec.container.resources.limits
    profiles = {}
    if any(name.startswith(names.VGPU) for name in limits):
        profiles = profile_names(await local.get("/resources", Resources))
    return Placement(
        claims=await read_claims(api, pod, spec),
        devices=await _choose_devices(local, limits, choice),
        profiles=profiles,
        credentials=await read_secret(api, pod.metadata.namespace, secret) if secret else None,
    )


async def _choose_devices(local: LocalServer, limits: dict[str, str | int], choice: Choice) -> tuple[str, ...]:
    """Ids of free devices of the wanted classes. Raises Missing while there are too few."""
    wanted = {
        name.removeprefix(names.GPU): whole(amount) for name, amount in limits.items() if name.startswith(names.GPU)
    }
    if not wanted:
        return ()
    free = [each for each in await local.get("/devices", tuple[Device, ...]) if choice.is_free(each)]
    chosen: list[str] = []
    for kind, number in wanted.items():
        suitable = [device.id for device in free if device_class(device) == kind]
        if len(suitable) < number:
            raise Missing(f"{names.GPU}{kind}: {len(suitable)} of {number} devices are free")
        chosen += suitable[:number]
    choice.take(chosen)
    return tuple(chosen)


# ── Images ──────────────────────────────────────────────────────────────────────────────────────


async def find_image(local: LocalServer, name: str) -> Image | None:
    """The image as this host knows it. Raises LocalError."""
    try:
        return await local.get(f"/images/{segment(name)}", Image)
    except LocalRefused as error:
        if error.http == 404:
            return None
        if error.http == 400:
            raise ImageProblem("InvalidImageName", error.message) from None
        raise


async def request_image(local: LocalServer, name: str, logins: Sequence[PushCredentials]) -> Image:
    """Ask the server to pull it, with each login in turn, or without. Raises ImageProblem, LocalUnreachable."""
    problem = "no login was tried"
    for login in logins or (PushCredentials(),):
        try:
            body = CreateImageRequest(name, credentials=login or None)
            return await local.post("/images", body, Image)
        except LocalRefused as error:
            problem = error.message
    raise ImageProblem("ErrImagePull", problem)


async def image_logins(api: ApiClient, pod: Pod, spec: PodSpec) -> tuple[PushCredentials, ...]:
    """Those of the pull secrets that are for the image's registry; a secret that does not exist is ignored, as by the
    kubelet. Raises ApiError."""
    found: list[PushCredentials] = []
    for ref in spec.image_pull_secrets:
        try:
            secret = await read_secret(api, pod.metadata.namespace, ref.name)
        except Missing:
            continue
        found += logins_of(secret, spec.container.image)
    return tuple(found)


def logins_of(secret: Secret, image: str) -> list[PushCredentials]:
    """The logins of a docker configuration for the registry of ``image``. Pure."""
    text = secret.data.get(".dockerconfigjson")
    auths: Any = {}
    try:
        if text is not None:
            auths = msgspec.json.decode(base64.b64decode(text))["auths"]
        elif (text := secret.data.get(".dockercfg")) is not None:
            auths = msgspec.json.decode(base64.b64decode(text))
        registry = parse_reference(image).registry
        return [_login(entry) for host, entry in auths.items() if registry_of_key(host) == registry]
    except (ValueError, KeyError, TypeError, AttributeError, msgspec.DecodeError):
        log.warning("pull secret %s is not a docker configuration", secret.key)
        return []


def _login(entry: Any) -> PushCredentials:
    user, password = str(entry.get("username", "")), str(entry.get("password", ""))
    if not user and entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
    return PushCredentials(user, password, str(entry.get("registrytoken", "")))


def image_id(image: Image | None) -> str:
    return f"{image.name.rpartition(':')[0]}@{image.digest}" if image is not None and image.digest else ""


def failed(image: Image) -> ImageProblem:
    return ImageProblem("ErrImagePull", image.error or "the pull failed")


def is_ready(image: Image | None) -> bool:
    return image is not None and image.status is ImageStatus.READY


# ── Volumes ─────────────────────────────────────────────────────────────────────────────────────


async def make_volumes(local: LocalServer, pod: Pod, wanted: Wanted, node: str) -> None:
    """Make those that do not exist. Raises LocalError."""
    for archive in wanted.archives:
        await make_archive(local, archive, _volume_tags(pod, node))
    for disk in wanted.disks:
        await make_disk(local, disk, _volume_tags(pod, node))


def _volume_tags(pod: Pod, node: str) -> dict[str, str]:
    return {names.NODE: node, names.POD_UID: pod.metadata.uid, names.NAMESPACE: pod.metadata.namespace}


async def make_archive(local: LocalServer, archive: Archive, tags: dict[str, str]) -> None:
    size = max(1, -(-sum(len(file.content) + 4096 for file in archive.files) // GIB))
    query = {"name": archive.id, "id": archive.id, "size_gb": str(size)}
    query |= {f"tags[{key}]": value for key, value in tags.items()}
    content = await trio.to_thread.run_sync(packed, archive.files)
    try:
        await local.send("POST", "/volumes/from-archive", content, "application/gzip", query=query)
    except LocalRefused as error:
        if error.http != 409:
            raise


async def make_disk(local: LocalServer, disk: Disk, tags: dict[str, str]) -> None:
    try:
        await local.post(
            "/volumes", CreateVolumeRequest(name=disk.id, size_gb=disk.size_gb, id=disk.id, tags=tags), Volume
        )
    except LocalRefused as error:
        if error.http != 409:
            raise


def packed(files: Sequence[File]) -> bytes:
    """A tar.gz of ``files``, owned by root. Pure."""
    output = io.BytesIO()
    with gzip.GzipFile(fileobj=output, mode="wb", mtime=0) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        folders = {part for file in files for part in _folders(file.path)}
        for folder in sorted(folders):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for file in files:
            entry = tarfile.TarInfo(file.path)
            entry.size, entry.mode = len(file.content), file.mode
            tar.addfile(entry, io.BytesIO(file.content))
    return output.getvalue()


def _folders(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: number + 1]) for number in range(len(parts))]


async def remove_volumes(local: LocalServer, node: str, pod_uid: str) -> None:
    """Delete what was made for the pod and is not in use. Raises LocalError."""
    query = {f"tags[{names.NODE}]": node, f"tags[{names.POD_UID}]": pod_uid}
    for volume in await local.get("/volumes", tuple[Volume, ...], query):
        if not volume.attachments:
            await remove_volume(local, volume.id)


async def remove_volume(local: LocalServer, identifier: str) -> None:
    """Raises LocalError, but not if it is gone."""
    try:
        await local.call("DELETE", f"/volumes/{segment(identifier)}")
    except LocalRefused as error:
        if error.http != 404:
            raise
