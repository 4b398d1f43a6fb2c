"""A node between a fake cluster and a fake host, and objects for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from hypeman.config import NodeConfig
from hypeman.kube.api import ApiClient
from hypeman.kube.credentials import Access
from hypeman.kube.local import LocalServer
from hypeman.kube.node import serve
from hypeman.kube.site import Site
from tests.kube.fake_cluster import FakeCluster
from tests.kube.fake_host import FakeHost

Object = dict[str, Any]
NODE = "here"
SETTINGS = NodeConfig(name=NODE, lease_duration=40, fence_after=50.0)
NODE_PATH = "/api/v1/nodes/here"


class World:
    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.host = FakeHost()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[trio.CancelScope]:
        """The node program; leaving, or cancelling, kills it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.node)
            yield nursery.cancel_scope
            nursery.cancel_scope.cancel()

    async def node(self) -> None:
        """One run of the program."""
        access = Access(server="http://cluster")
        site = Site(
            name=NODE,
            address="192.0.2.7",
            port=10250,
            state_dir=Path("/nowhere"),
            api=ApiClient(access, self.cluster),
            local=LocalServer("http://host", transport=self.host),
        )
        await serve(site, SETTINGS, trio.current_time)

    async def until(self, true: Callable[[], object], *, seconds: float = 60.0, what: str = "") -> None:
        """Wait until ``true``; the clock of the tests jumps, so that waiting costs nothing."""
        with trio.move_on_after(seconds):
            while not true():
                await trio.sleep(0.05)
            return
        raise AssertionError(f"{what or 'the condition'} is not true after {seconds:g} s: {self.describe()}")

    def describe(self) -> str:
        pods = {path: each.get("status") for path, each in self.cluster.objects.items() if "/pods/" in path}
        instances = [
            (instance["name"], instance["state"], instance["tags"]) for instance in self.host.instances.values()
        ]
        return f"{pods} {instances} {self.cluster.events()}"

    def add_pod(self, name: str = "web", **fields: Any) -> str:
        """The path of a new pod that is bound to the node."""
        path = f"/api/v1/namespaces/default/pods/{name}"
        self.cluster.put(path, pod(**fields))
        return path

    def status(self, path: str) -> Object:
        found: Object = self.cluster.objects[path].get("status", {})
        return found

    def container(self, path: str) -> Object:
        """Its status."""
        found: list[Object] = self.status(path).get("containerStatuses", [])
        return found[0] if found else {"state": {}}

    def waits_for(self, path: str) -> str:
        """Why the container is not started."""
        return str(self.container(path)["state"].get("waiting", {}).get("reason", ""))

    def has_event(self, reason: str, text: str) -> bool:
        return any(reason == each and text in message for each, message in self.cluster.events())

    def phase(self, path: str) -> str:
        return str(self.status(path).get("phase", "")) if path in self.cluster.objects else "gone"

    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.cluster.events()]


def pod(*, owner: Object | None = None, annotations: Object | None = None, container: Object | None = None,
        **spec: Any) -> Object:  # fmt: skip
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"annotations": annotations or {}, "ownerReferences": [owner] if owner else []},
        "spec": {
            "nodeName": NODE,
            "restartPolicy": "Always",
            "dnsPolicy": "ClusterFirst",
            "schedulerName": "default-scheduler",
            "terminationGracePeriodSeconds": 30,
            "containers": [{"name": "main", "image": "nginx:alpine", "terminationMessagePath": "/dev/termination-log",
                            "terminationMessagePolicy": "File", "resources": {}, **(container or {})}],
            **spec,
        },
        "status": {"phase": "Pending"},
    }  # fmt: skip


SANDBOX = {
    "apiVersion": "agents.x-k8s.io/v1alpha1", "kind": "Sandbox", "name": "box", "uid": "sandbox-1", "controller": True,
}  # fmt: skip
SANDBOX_PATH = "/apis/agents.x-k8s.io/v1alpha1/namespaces/default/sandboxes/box"
REPLICA_SET = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "rs-1", "controller": True}
WARM_POOL_PATH = "/apis/extensions.agents.x-k8s.io/v1alpha1/namespaces/default/sandboxwarmpools/rs"
