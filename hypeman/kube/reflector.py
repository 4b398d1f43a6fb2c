"""A copy of the API server's objects of one kind, kept up to date: list, then watch.

synced      a list has succeeded since the start; until then an absent object means nothing
410         the watch's version is too old: list again
failures    the copy stays as it is, and the next attempt comes after a pause that grows to ``MAX_PAUSE``
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import trio

from hypeman.kube.api import ApiClient, ApiError, Change, Refused
from hypeman.kube.types import Thing

log = logging.getLogger(__name__)

MIN_PAUSE, MAX_PAUSE = 0.5, 15.0
"""Seconds between attempts, before the random part."""

T = TypeVar("T", bound=Thing)


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row, so that not all nodes come at the same moment."""
    return min(MAX_PAUSE, MIN_PAUSE * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.5)  # noqa: S311


def _version(item: Thing) -> int:
    """Versions of one kind are numbers that grow (Kubernetes 1.35)."""
    return int(item.metadata.resource_version or 0)


class Reflector(Generic[T]):
    """``changed`` is called with the uid of each object that is added, changed or removed."""

    def __init__(
        self, api: ApiClient, path: str, kind: type[T], changed: Callable[[str], object], **query: str
    ) -> None:
        self._api = api
        self._path = path
        self._kind = kind
        self._changed = changed
        self._query = query
        self._items: dict[str, T] = {}
        self.synced = trio.Event()

    @property
    def items(self) -> Mapping[str, T]:
        """By uid."""
        return self._items

    def put(self, item: T) -> None:
        """Replace the copy of an object with what a write returned, unless it has gone or changed meanwhile."""
        known = self._items.get(item.metadata.uid)
        if known is not None and _version(item) > _version(known):
            self._items[item.metadata.uid] = item

    async def run(self) -> None:
        failures = 0
        while True:
            try:
                listed = await self._api.list(self._path, self._kind, **self._query)
                self._replace({item.metadata.uid: item for item in listed.items})
                self.synced.set()
                failures = 0
                await self._follow(listed.version)
            except Refused as error:
                if error.is_expired:
                    continue
                log.warning("%s: %s", self._path, error.message)
            except ApiError as error:
                log.warning("%s: %s", self._path, error.message)
            await trio.sleep(pause_after(failures))
            failures += 1

    async def _follow(self, version: str) -> None:
        """Watch until a failure; a watch that the server ends regularly is continued."""
        while True:
            async with self._api.watch(self._path, self._kind, version, **self._query) as events:
                async for event in events:
                    version = event.object.metadata.resource_version or version
                    self._apply(event.type, event.object)
            await trio.sleep(0.05)  # a server that ends watches at once

    def _apply(self, change: Change, item: T) -> None:
        uid = item.metadata.uid
        if change is Change.BOOKMARK:
            return
        if change is Change.DELETED:
            self._items.pop(uid, None)
        else:
            self._items[uid] = item
        self._changed(uid)

    def _replace(self, items: dict[str, T]) -> None:
        before, self._items = self._items, items
        for uid in before.keys() | items.keys():
            if before.get(uid) != items.get(uid):
                self._changed(uid)
