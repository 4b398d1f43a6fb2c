"""Fencing: VMs whose pods the cluster gives to other nodes end here by themselves.

The cluster moves a pod once the node has been silent for ``grace`` and the pod's toleration has passed. A host that is
cut off cannot ask; it counts from its own last heartbeat, and by then has put the VM in standby (or has stopped or
kept it, as the pod's annotation says). When the link returns, pods that are still bound to this node are restored, and
the others are orphans.
"""

from __future__ import annotations

import logging

import trio

from hypeman.kube.decide import Fence, Verb, fence
from hypeman.kube.instances import Instances, save_or_stop, stop_instance
from hypeman.kube.lease import LeaseClock
from hypeman.kube.local import LocalError, LocalServer

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
FIRST_SECONDS = 5.0
"""For a program that has just started, to send its first heartbeat."""


class Fencing:
    def __init__(self, local: LocalServer, instances: Instances, lease: LeaseClock, node: str, grace: float) -> None:
        self._local = local
        self._instances = instances
        self._lease = lease
        self._node = node
        self._grace = grace

    async def run(self) -> None:
        await trio.sleep(FIRST_SECONDS)
        while True:
            await trio.sleep(LOOK_SECONDS)
            due = fence(self._instances.all, self._node, lost_for=self._lease.lost_for, grace=self._grace)
            if not due:
                continue
            log.warning("no heartbeat for %.0f s: fencing %d instances", self._lease.lost_for, len(due))
            async with trio.open_nursery() as nursery:
                for each in due:
                    nursery.start_soon(self._enforce, each)
            try:
                await self._instances.refresh()
            except LocalError as error:
                log.warning("instances: %s", error.message)

    async def _enforce(self, due: Fence) -> None:
        name = due.instance.name
        try:
            if due.verb is Verb.STOP:
                await stop_instance(self._local, due.instance)
            elif problem := await save_or_stop(self._local, due.instance, must_end=True):
                log.error("fenced %s: stop, because its memory cannot be saved: %s", name, problem)
                return
            log.warning("fencing %s: %s", name, due.verb.value)
        except LocalError as error:
            log.error("%s cannot be fenced: %s", name, error.message)
