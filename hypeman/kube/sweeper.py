"""Instances and volumes whose pod is gone: kept for an owner that may want them, else removed.

The pod may have been deleted while this program or the whole host was away. That it is gone is confirmed by an answer
about this very pod; a list that failed, or an owner that could not be looked up, removes nothing.
"""

from __future__ import annotations

import logging

import trio

from hypeman.instances.model.types import Instance
from hypeman.kube import materials, names
from hypeman.kube.api import ApiError
from hypeman.kube.decide import Owner, Verb, decide_orphan, is_ours, tags_of
from hypeman.kube.instances import remove_instance, save_or_stop
from hypeman.kube.local import LocalError
from hypeman.kube.pods import Shared
from hypeman.kube.translate import golden_digest
from hypeman.kube.types import Thing
from hypeman.urls import segment
from hypeman.volumes.types import Volume

log = logging.getLogger(__name__)

SWEEP_SECONDS = 20.0


class Sweeper:
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._site = shared.site

    async def run(self) -> None:
        await self._shared.instances.synced.wait()
        await self._shared.pods.synced.wait()
        while True:
            changed = self._shared.changed
            try:
                await self.sweep()
            except (ApiError, LocalError) as error:
                log.warning("orphans: %s", error.message)
            except Exception:  # a bug here must not end the node
                log.exception("orphans")
            with trio.move_on_after(SWEEP_SECONDS):
                await changed.wait()
            await trio.sleep(0.2)

    async def sweep(self) -> None:
        """Look at each orphan once. Raises LocalError."""
        touched = False
        for instance in self._shared.instances.all:
            if is_ours(instance, self._site.name) and self._is_orphan(instance):
                touched = await self._try(instance) or touched
        if touched:
            await self._shared.instances.refresh()
        await self._sweep_volumes()

    async def _try(self, instance: Instance) -> bool:
        """A failure about one does not keep the others waiting."""
        try:
            return await self._settle(instance)
        except (ApiError, LocalError) as error:
            log.warning("orphan %s: %s", instance.name, error.message)
            return False

    def _is_orphan(self, instance: Instance) -> bool:
        return tags_of(instance).get(names.POD_UID) not in self._shared.pods.items

    async def _settle(self, instance: Instance) -> bool:
        tags = tags_of(instance)
        verb = decide_orphan(
            instance,
            await self._owner(instance),
            pod_is_gone=names.GOLDEN in tags or await self._is_gone(instance),
            golden_wanted=self._is_golden_wanted(instance),
        )
        if verb is Verb.WAIT:
            return False
        log.info("orphan %s: %s", instance.name, verb.value, extra={"pod": tags.get(names.POD, "")})
        if verb is Verb.STANDBY:
            await save_or_stop(self._site.local, instance)
        else:
            await remove_instance(self._site.local, instance)
        return True

    async def _owner(self, instance: Instance) -> Owner:
        tags = tags_of(instance)
        owner = names.owner_of(tags)
        if owner is None or not (names.is_retained(owner) or names.GOLDEN in tags):
            return Owner.NONE
        return await self._shared.owners.look(owner, tags.get(names.NAMESPACE, ""))

    def _is_golden_wanted(self, instance: Instance) -> bool:
        digest = tags_of(instance).get(names.GOLDEN)
        pods = self._shared.pods.items.values()
        return any(names.is_golden(pod) and golden_digest(pod) == digest for pod in pods)

    async def _is_gone(self, instance: Instance) -> bool:
        """Whether the API server confirms that there is no such pod here.

        By a list of this node's pods: a node that gets an absent pod by name is refused, as for one of another node.
        """
        tags = tags_of(instance)
        path = f"/api/v1/namespaces/{segment(tags.get(names.NAMESPACE, ''))}/pods"
        selector = f"spec.nodeName={self._site.name},metadata.name={tags.get(names.POD, '')}"
        found = await self._site.api.list(path, Thing, fieldSelector=selector)
        return all(item.metadata.uid != tags.get(names.POD_UID) for item in found.items)

    async def _sweep_volumes(self) -> None:
        """Volumes that were made for pods of which neither object nor instance is left."""
        living = set(self._shared.pods.items) | set(self._shared.instances.index.by_pod)
        query = {f"tags[{names.NODE}]": self._site.name}
        for volume in await self._site.local.get("/volumes", tuple[Volume, ...], query):
            pod_uid = (volume.tags or {}).get(names.POD_UID)
            if pod_uid is not None and pod_uid not in living and not volume.attachments:
                await materials.remove_volume(self._site.local, volume.id)
