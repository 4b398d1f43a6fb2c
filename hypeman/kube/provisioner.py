"""Volumes of this host for PersistentVolumeClaims, of StorageClasses with the provisioner ``hypeman.dev/local``.

    claim waits for a pod ─→ the scheduler chooses this host ─→ volume ─→ PersistentVolume, bound to the host
    claim deleted         ─→ PersistentVolume is Released    ─→ its volume is deleted ─→ the object is deleted

A volume has the claim's uid in its id, so that making it again finds it. A class with the parameter ``type: state``
gets a PersistentVolume without a disk: it only keeps later pods of its claim, and the memory saved for them, here.
"""

from __future__ import annotations

import logging
from typing import Any

import trio

from hypeman.kube import materials, names
from hypeman.kube.api import ApiError, Refused
from hypeman.kube.claims import DISK, read_claim, size_gb, what_is_wrong
from hypeman.kube.events import Events
from hypeman.kube.local import LocalError, LocalRefused
from hypeman.kube.reflector import Reflector
from hypeman.kube.site import Site
from hypeman.kube.translate import Disk
from hypeman.kube.types import PersistentVolume, PersistentVolumeClaim, StorageClass, Thing
from hypeman.urls import segment
from hypeman.volumes.types import Volume

log = logging.getLogger(__name__)

LOOK_SECONDS = 30.0
SELECTED = "volume.kubernetes.io/selected-node"
PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
NODE = "hypeman.dev/node"
CLAIM_UID = "kubernetes.io/claim-uid"
"""Tag of a volume."""
VOLUMES = "/api/v1/persistentvolumes"


class Provisioner:
    def __init__(self, site: Site, events: Events) -> None:
        self._site = site
        self._events = events
        self._changed = trio.Event()
        self._claims = Reflector(site.api, "/api/v1/persistentvolumeclaims", PersistentVolumeClaim, self._look_again)
        self._volumes = Reflector(site.api, VOLUMES, PersistentVolume, self._look_again)

    def _look_again(self, uid: str) -> None:
        self._changed.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._claims.run)
            nursery.start_soon(self._volumes.run)
            await self._claims.synced.wait()
            await self._volumes.synced.wait()
            while True:
                changed = self._changed = trio.Event()
                await self._pass()
                with trio.move_on_after(LOOK_SECONDS):
                    await changed.wait()
                await trio.sleep(0.1)

    async def _pass(self) -> None:
        """Look at everything once. A failure about one object does not keep the others waiting."""
        for claim in tuple(self._claims.items.values()):
            if self._is_for_us(claim):
                await self._try(claim, "PersistentVolumeClaim", self._provide(claim))
        for volume in tuple(self._volumes.items.values()):
            if self._is_released(volume):
                await self._try(volume, "PersistentVolume", self._reclaim(volume))
        await self._try(None, "", self._sweep())

    async def _try(self, about: Thing | None, kind: str, work: Any) -> None:
        try:
            await work
        except (ApiError, LocalError) as error:
            log.warning("volumes: %s: %s", about.key if about is not None else "sweep", error.message)
            if about is not None:
                self._events.warn(about, "ProvisioningFailed", error.message, kind=kind)
        except Exception:  # a bug about one object must not end the node
            log.exception("volumes: %s", about.key if about is not None else "sweep")

    # ── Provide ─────────────────────────────────────────────────────────────────────────────────

    def _is_for_us(self, claim: PersistentVolumeClaim) -> bool:
        about = claim.metadata
        return (
            not claim.spec.get("volumeName")
            and about.deletion_timestamp is None
            and about.annotations.get(SELECTED) == self._site.name
            and about.annotations.get("volume.kubernetes.io/storage-provisioner") == names.PROVISIONER
        )

    async def _provide(self, claim: PersistentVolumeClaim) -> None:
        path = f"/apis/storage.k8s.io/v1/storageclasses/{segment(str(claim.spec.get('storageClassName', '')))}"
        kind = await self._site.api.get(path, StorageClass)
        if kind.provisioner != names.PROVISIONER:  # anyone who makes claims can write our annotations into them
            return
        wrong = what_is_wrong(claim, kind)
        if wrong:
            self._events.warn(claim, "ProvisioningFailed", wrong, kind="PersistentVolumeClaim")
            return
        if kind.parameters.get("type") != names.STATE:
            tags = {
                names.NODE: self._site.name,
                CLAIM_UID: claim.metadata.uid,
                names.NAMESPACE: claim.metadata.namespace,
            }
            disk = Disk(names.claim_volume_id(claim.metadata), size_gb(read_claim(claim)))
            await materials.make_disk(self._site.local, disk, tags)
        try:
            await self._site.api.create(VOLUMES, persistent_volume(claim, kind, self._site.name), Thing)
        except Refused as error:
            if not error.is_conflict:
                raise
            return
        self._events.normal(
            claim, "ProvisioningSucceeded", f"volume on {self._site.name}", kind="PersistentVolumeClaim"
        )

    # ── Reclaim ─────────────────────────────────────────────────────────────────────────────────

    def _is_released(self, volume: PersistentVolume) -> bool:
        about = volume.metadata
        return (
            about.annotations.get(NODE) == self._site.name
            and about.annotations.get(PROVISIONED_BY) == names.PROVISIONER
            and volume.status.phase in ("Released", "Failed")
            and volume.spec.persistent_volume_reclaim_policy == "Delete"
        )

    async def _reclaim(self, volume: PersistentVolume) -> None:
        try:
            await materials.remove_volume(self._site.local, volume.metadata.name)
        except LocalRefused as error:
            if error.http == 409:  # an instance that is being deleted still has it
                return
            raise
        try:
            await self._site.api.delete(f"{VOLUMES}/{segment(volume.metadata.name)}", uid=volume.metadata.uid)
        except Refused as error:
            if not error.is_absent:
                raise

    async def _sweep(self) -> None:
        """Volumes whose claim went away before it had a PersistentVolume."""
        claims = set(self._claims.items)
        bound = {volume.metadata.name for volume in self._volumes.items.values()}
        query = {f"tags[{names.NODE}]": self._site.name}
        for volume in await self._site.local.get("/volumes", tuple[Volume, ...], query):
            uid = (volume.tags or {}).get(CLAIM_UID)
            if uid is None or uid in claims or volume.id in bound or volume.attachments:
                continue
            if await self._is_gone(volume.id):
                await materials.remove_volume(self._site.local, volume.id)

    async def _is_gone(self, name: str) -> bool:
        """Whether the API server confirms that there is no such PersistentVolume."""
        try:
            await self._site.api.get(f"{VOLUMES}/{segment(name)}", Thing)
        except Refused as error:
            if error.is_absent:
                return True
            raise
        return False


def persistent_volume(claim: PersistentVolumeClaim, kind: StorageClass, node: str) -> dict[str, Any]:
    """The object for a claim. Pure."""
    about, spec = claim.metadata, read_claim(claim)
    name = names.claim_volume_id(about)
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": name,
            "annotations": {
                PROVISIONED_BY: names.PROVISIONER,
                names.PROVISIONER: kind.parameters.get("type", DISK),
                NODE: node,
            },
        },
        "spec": {
            "capacity": {"storage": spec.resources.requests["storage"]},
            "accessModes": list(spec.access_modes),
            "persistentVolumeReclaimPolicy": kind.reclaim_policy,
            "storageClassName": spec.storage_class_name,
            "volumeMode": "Filesystem",
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": about.namespace,
                "name": about.name,
                "uid": about.uid,
            },
            "local": {"path": f"/hypeman/{name}"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }
