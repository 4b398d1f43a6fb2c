"""The node's object and its lease: who this host is, what it has, and that it is alive.

A heartbeat is sent only after this host's server has answered: a node without its server is useless. What the host has
is read again for each heartbeat; the object is written if it changed, and otherwise every ``REPORT_SECONDS``.

The lease's time is this host's, but never goes back: the cluster takes a renewal for one only if it is later than the
one before, and a clock that was set back would make the node count as gone until it has caught up.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import trio

from hypeman import __version__
from hypeman.architecture import HOST
from hypeman.devices.types import Device
from hypeman.kube import names
from hypeman.kube.api import ApiError, Patch, Refused, node_path
from hypeman.kube.capacity import MAX_SKEW, allocatable, capacity, conditions, difference
from hypeman.kube.decide import is_ours
from hypeman.kube.instances import Instances
from hypeman.kube.lease import LeaseClock
from hypeman.kube.local import LocalError
from hypeman.kube.reflector import pause_after
from hypeman.kube.site import Site
from hypeman.kube.status import whole
from hypeman.kube.types import (
    DaemonEndpoint,
    DaemonEndpoints,
    Lease,
    Node,
    NodeAddress,
    NodeInfo,
    NodeStatus,
)
from hypeman.resources.types import Resources
from hypeman.urls import segment

log = logging.getLogger(__name__)

KUBELET_VERSION = f"v1.36.0-hypeman.{__version__}"
"""The API of the kubelet that this program follows."""
FEATURES = ("ExtendWebSocketsToKubelet",)
"""exec, attach and port-forward arrive as WebSockets, not as SPDY."""
REPORT_SECONDS = 300.0
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


class Heartbeat:
    def __init__(
        self,
        site: Site,
        instances: Instances,
        lease: LeaseClock,
        *,
        duration: int,
        labels: Mapping[str, str],
        max_pods: int,
    ) -> None:
        self._site = site
        self._instances = instances
        self._lease = lease
        self._duration = duration
        self._labels = {**own_labels(site.name), **labels}
        self._max_pods = max_pods
        self._node: Node | None = None
        self._reported_at = float("-inf")
        self._renewed_at: datetime | None = None
        """What the lease says."""
        self._clock_is_off = False

    async def run(self) -> None:
        failures = 0
        while True:
            try:
                with trio.fail_after(self._duration):
                    await self.beat()
                failures = 0
                await trio.sleep(self._duration / 4)
                continue
            except trio.TooSlowError:
                log.warning("no heartbeat: not done in %d s", self._duration)
            except (ApiError, LocalError) as error:
                log.warning("no heartbeat: %s", error.message)
            await trio.sleep(min(pause_after(failures), self._duration / 4))
            failures += 1

    async def beat(self) -> None:
        """Raises ApiError, LocalError; then the cluster has not heard of this node."""
        resources = await self._site.local.get("/resources", Resources)
        sent = self._lease.now()
        node = self._node = await self._current()
        await self._renew(node)
        self._lease.renewed(sent)
        self._tell_clock()
        await self._report(node, resources)

    # ── The object ──────────────────────────────────────────────────────────────────────────────

    async def _current(self) -> Node:
        """As the API server has it: the cluster taints a node without heartbeats, which has to be undone."""
        if self._node is None:
            return await self._register()
        try:
            return await self._site.api.get(node_path(self._site.name), Node)
        except Refused as error:
            if error.is_absent:
                return await self._register()  # it was deleted
            raise

    async def _register(self) -> Node:
        body = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self._site.name, "labels": self._labels},
            "spec": {"taints": [{"key": names.TAINT, "value": "true", "effect": "NoSchedule"}]},
        }
        try:
            return await self._site.api.create("/api/v1/nodes", body, Node)
        except Refused as error:
            if not error.is_conflict:
                raise
        return await self._site.api.patch(node_path(self._site.name), {"metadata": {"labels": self._labels}}, Node)

    async def _report(self, node: Node, resources: Resources) -> None:
        devices = await self._site.local.get("/devices", tuple[Device, ...])
        status = self._status(node, resources, devices)
        now = trio.current_time()
        if _same(node.status, status) and now < self._reported_at + REPORT_SECONDS:
            return
        body: dict[str, Any] = {"status": msgspec.to_builtins(status)}
        for name in ("capacity", "allocatable"):  # what the host no longer has
            gone = getattr(node.status, name).keys() - getattr(status, name).keys()
            body["status"][name] |= dict.fromkeys((each for each in gone if each.startswith("hypeman.dev/")), "0")
        body["status"]["addresses"] = [{"$patch": "replace"}, *body["status"]["addresses"]]
        path = f"{node_path(self._site.name)}/status"
        self._node = await self._site.api.patch(path, body, Node, how=Patch.STRATEGIC)
        self._reported_at = now

    def _status(self, node: Node, resources: Resources, devices: tuple[Device, ...]) -> NodeStatus:
        total = capacity(resources, devices, self._instances.all, self._max_pods)
        pods = [each.id for each in self._instances.all if is_ours(each, self._site.name)]
        return NodeStatus(
            capacity=total,
            allocatable=allocatable(total, resources, pods),
            conditions=conditions(
                resources, node.status.conditions, whole(datetime.now(UTC)), clock_ahead=self._site.api.clock_ahead
            ),
            addresses=(NodeAddress("InternalIP", self._site.address), NodeAddress("Hostname", self._site.name)),
            daemon_endpoints=DaemonEndpoints(kubelet_endpoint=DaemonEndpoint(port=self._site.port)),
            node_info=node_info(),
            declared_features=FEATURES,
        )

    # ── The lease ───────────────────────────────────────────────────────────────────────────────

    async def _renew(self, node: Node) -> None:
        path = f"{LEASES}/{segment(self._site.name)}"
        owner = {"apiVersion": "v1", "kind": "Node", "name": self._site.name, "uid": node.metadata.uid}
        metadata = {"name": self._site.name, "namespace": "kube-node-lease", "ownerReferences": [owner]}
        try:
            if self._renewed_at is None:
                self._renewed_at = (await self._site.api.get(path, Lease)).spec.renew_time
            body = {"metadata": {"ownerReferences": [owner]}, "spec": self._lease_spec()}
            written = await self._site.api.patch(path, body, Lease)
        except Refused as error:
            if not error.is_absent:
                raise
            kind = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
            written = await self._site.api.create(
                LEASES, {**kind, "metadata": metadata, "spec": self._lease_spec()}, Lease
            )
        self._renewed_at = written.spec.renew_time

    def _lease_spec(self) -> dict[str, Any]:
        moment = datetime.now(UTC)
        if self._renewed_at is not None:
            moment = max(moment, self._renewed_at + timedelta(microseconds=1))
        return {
            "holderIdentity": self._site.name,
            "leaseDurationSeconds": self._duration,
            "renewTime": moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }

    def _tell_clock(self) -> None:
        """Log once that the clock is off, and once that it is not any more."""
        ahead = self._site.api.clock_ahead
        if (is_off := abs(ahead) > MAX_SKEW) == self._clock_is_off:
            return
        self._clock_is_off = is_off
        if is_off:
            log.warning("%s", difference(ahead))
        else:
            log.info("this host's clock agrees with the API server's")


def _same(before: NodeStatus, after: NodeStatus) -> bool:
    """Apart from times, and from what others report."""

    def plain(status: NodeStatus) -> tuple[object, ...]:
        own = {each.type for each in after.conditions}
        seen = sorted((each.type, each.status, each.reason) for each in status.conditions if each.type in own)
        return (status.capacity, status.allocatable, seen, status.addresses, status.node_info, status.declared_features)

    return plain(before) == plain(after)


def own_labels(name: str) -> dict[str, str]:
    return {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": HOST.name,
        names.HOST_LABEL: "true",
    }


def node_info(root: Path = Path("/")) -> NodeInfo:
    """Of the host, as far as it can be read."""
    return NodeInfo(
        machine_id=_line(root / "etc/machine-id"),
        system_uuid=_line(root / "sys/class/dmi/id/product_uuid") or _line(root / "etc/machine-id"),
        boot_id=_line(root / "proc/sys/kernel/random/boot_id"),
        kernel_version=platform.release(),
        os_image=_os_name(root / "etc/os-release"),
        container_runtime_version=f"hypeman://{__version__}",
        kubelet_version=KUBELET_VERSION,
        kube_proxy_version="",
        operating_system="linux",
        architecture=HOST.name,
    )


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeError):
        return ""


def _os_name(path: Path) -> str:
    for line in _line(path).splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return "Linux"
