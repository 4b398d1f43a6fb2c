"""Whether the owner of a pod is alive. Only an answer that names the owner confirms that it is gone."""

from __future__ import annotations

import logging
from collections import OrderedDict

import trio

from hypeman.kube import names
from hypeman.kube.api import ApiClient, ApiError, Refused
from hypeman.kube.decide import Owner
from hypeman.kube.types import OwnerReference, Thing

log = logging.getLogger(__name__)

FRESH_SECONDS = 1.0
"""How long an answer is used again."""
REMEMBERED = 1024


class Owners:
    def __init__(self, api: ApiClient) -> None:
        self._api = api
        self._known: OrderedDict[tuple[OwnerReference, str], tuple[Owner, float]] = OrderedDict()
        """By all that was asked: a pod may name the uid of an owner under a name that does not exist."""

    async def look(self, owner: OwnerReference, namespace: str) -> Owner:
        known = self._known.get((owner, namespace))
        if known is not None and trio.current_time() < known[1] + FRESH_SECONDS:
            return known[0]
        found = await self._ask(owner, namespace)
        self._known[owner, namespace] = (found, trio.current_time())
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found

    async def _ask(self, owner: OwnerReference, namespace: str) -> Owner:
        path = names.owner_path(owner, namespace)
        if path is None:
            return Owner.UNKNOWN
        try:
            found = await self._api.get(path, Thing)
        except Refused as error:
            if error.is_absent and error.about == owner.name:
                return Owner.GONE
            log.warning("owner %s %s/%s: %s", owner.kind, namespace, owner.name, error.message)
            return Owner.UNKNOWN
        except ApiError as error:
            log.warning("owner %s %s/%s: %s", owner.kind, namespace, owner.name, error.message)
            return Owner.UNKNOWN
        if found.metadata.uid != owner.uid or found.metadata.deletion_timestamp is not None:
            return Owner.GONE
        return Owner.ALIVE
