"""Events of Kubernetes: why something happened to a pod or the node, for ``kubectl describe``.

An event that repeats is counted in one object, and written again at most every ``AGAIN_SECONDS``. Events are a help for
people, not state: they are written by one task from a bounded queue, and what cannot be written is dropped.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

import trio
from msgspec import Struct

from hypeman.kube.api import ApiClient, ApiError, Refused
from hypeman.kube.status import whole
from hypeman.kube.types import Thing
from hypeman.text import one_line
from hypeman.urls import segment

log = logging.getLogger(__name__)

AGAIN_SECONDS = 60.0
QUEUE = 256
REMEMBERED = 1024
"""Events that are counted when they repeat."""
MAX_MESSAGE = 1024
"""Bytes that the API accepts."""


class _Note(Struct, frozen=True):
    about: Thing
    kind: str
    type: str
    reason: str
    message: str

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.about.metadata.uid, self.reason, self.message)


class _Written:
    """An event that exists."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 1
        self.written_at = trio.current_time()


class Events:
    def __init__(self, api: ApiClient, node: str) -> None:
        self._api = api
        self._node = node
        self._send, self._receive = trio.open_memory_channel[_Note](QUEUE)
        self._known: OrderedDict[tuple[str, str, str], _Written] = OrderedDict()

    def normal(self, about: Thing, reason: str, message: str, *, kind: str = "Pod") -> None:
        self._note(_Note(about, kind, "Normal", reason, one_line(message)[:MAX_MESSAGE]))

    def warn(self, about: Thing, reason: str, message: str, *, kind: str = "Pod") -> None:
        self._note(_Note(about, kind, "Warning", reason, one_line(message)[:MAX_MESSAGE]))

    def _note(self, note: _Note) -> None:
        known = self._known.get(note.key)
        if known is not None:
            known.count += 1
            if trio.current_time() < known.written_at + AGAIN_SECONDS:
                return
        try:
            self._send.send_nowait(note)
        except trio.WouldBlock:
            log.warning("event dropped: %s %s", note.reason, note.message)

    async def run(self) -> None:
        async for note in self._receive:
            try:
                await self._write(note)
            except ApiError as error:
                log.warning("event %s of %s: %s", note.reason, note.about.key, error.message)

    async def _write(self, note: _Note) -> None:
        known = self._known.get(note.key)
        now = _text(datetime.now(UTC))
        path = f"/api/v1/namespaces/{segment(note.about.metadata.namespace or 'default')}/events"
        if known is not None:
            known.written_at = trio.current_time()
            try:
                await self._api.patch(
                    f"{path}/{segment(known.name)}", {"count": known.count, "lastTimestamp": now}, Thing
                )
                return
            except Refused as error:
                if not error.is_absent:
                    raise
        made = await self._api.create(path, self._body(note, now), Thing)
        self._known[note.key] = _Written(made.metadata.name)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _body(self, note: _Note, now: str) -> dict[str, Any]:
        about = note.about.metadata
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{about.name[:200]}.", "namespace": about.namespace or "default"},
            "involvedObject": {
                "kind": note.kind,
                "apiVersion": "v1",
                "namespace": about.namespace,
                "name": about.name,
                "uid": about.uid,
            },
            "type": note.type,
            "reason": note.reason,
            "message": note.message,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": "hypeman-node", "host": self._node},
            "reportingComponent": "hypeman-node",
            "reportingInstance": self._node,
        }


def _text(moment: datetime) -> str:
    return whole(moment).strftime("%Y-%m-%dT%H:%M:%SZ")
